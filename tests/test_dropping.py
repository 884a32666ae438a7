"""Dropping incoming connections (spec D)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, serverFromString
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.protocols.policies import TimeoutFactory, WrappingFactory
from twisted.protocols.wire import Echo
from zope.interface import implementer

from tcpsvc import Server, ServerFactory, WhereToListen
from tests.support import LOOPBACK, in_thread, the_reactor, turn, until
from tests.tls import tls_endpoint


class Handler:
    """Answers each line, and counts how often it was started."""

    def __init__(self) -> None:
        self.started = 0

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        self.started += 1
        async for line in reader:
            writer.write(line)


@pytest.fixture
def handler() -> Handler:
    """The handlers of the test."""
    return Handler()


def dropped(server: Any) -> int:
    """How many clients were dropped."""
    count: int = server.describe()["counters"]["dropped"]
    return count


async def echoes(client: Any) -> bool:
    """Whether a client is served."""
    client.send(b"hello\n")
    return bool(await in_thread(client.read, 6) == b"hello\n")


async def is_dropped(client: Any) -> bool:
    """Whether a client reads EOF, and not one byte."""
    return bool(await in_thread(client.read_all) == b"")


def ended(client: Any) -> bytes:
    """What a client read until its connection ended, in whichever way."""
    try:
        data: bytes = client.read_all()
    except ConnectionResetError:
        return b""
    return data


# D1


@ensureDeferred
@pytest.mark.parametrize("unix", [False, True])
async def test_a_dropped_client_reads_eof_and_nobody_starts(
    unix: bool, serve: Any, connect: Any, handler: Handler, tmp_path: Path
) -> None:
    """D1: no handler, no byte, no slot; set at creation."""
    where: Any = WhereToListen.of_file(tmp_path / "s") if unix else LOOPBACK
    server = await serve(handler, where=where, drop_incoming_connections=True)
    assert server.is_dropping_incoming_connections is True
    for _ in range(3):
        assert await is_dropped(connect(server))
        assert server.num_connections == 0
    assert handler.started == 0
    counters = server.describe()["counters"]
    assert (counters["dropped"], counters["accepted"]) == (3, 0)
    server.invariant()


@ensureDeferred
async def test_a_dropped_client_that_spoke_early_reads_eof_too(
    serve: Any, connect: Any, handler: Handler
) -> None:
    """D1: shutdown first; a bare close would give it a reset."""
    server = await serve(handler, max_connections=1)
    first = connect(server)
    assert await echoes(first)
    clients = [connect(server) for _ in range(3)]
    for client in clients:
        client.send(b"x" * 10_000)
    server.set_drop_incoming_connections(True)
    for client in clients:
        assert await is_dropped(client)


@ensureDeferred
async def test_existing_connections_go_on_while_dropping(
    serve: Any, connect: Any, handler: Handler
) -> None:
    """D1: any number of times, at any time."""
    server = await serve(handler)
    served = []
    for number in range(3):
        served.append(connect(server))
        assert await echoes(served[-1])
        server.set_drop_incoming_connections(True)
        server.set_drop_incoming_connections(True)
        assert await is_dropped(connect(server))
        for client in served:
            assert await echoes(client)
        assert server.num_connections == len(served) == number + 1
        server.set_drop_incoming_connections(False)
        server.set_drop_incoming_connections(False)
        assert server.is_dropping_incoming_connections is False
    assert dropped(server) == 3
    server.invariant()


@ensureDeferred
async def test_dropping_is_for_every_kind_of_handler(serve: Any, connect: Any) -> None:
    """D1: create_sock and create_protocol; buildProtocol is not even asked."""
    asked: list[Any] = []

    class Asked(Factory):
        def buildProtocol(self, addr: Any) -> Protocol:
            asked.append(addr)
            return Echo()

    for create, handler in [
        (Server.create_sock, lambda address, client: asked.append(address)),
        (Server.create_protocol, Asked()),
    ]:
        server = await serve(handler, create=create, drop_incoming_connections=True)
        assert await is_dropped(connect(server))
        assert server.num_connections == 0
    await turn()
    assert asked == []


@ensureDeferred
async def test_the_flag_may_be_set_on_a_closed_server(
    serve: Any, connect: Any, handler: Handler
) -> None:
    """D1: it does no harm, and reopens nothing."""
    server = await serve(handler)
    client = connect(server)
    assert await echoes(client)
    closing = server.close()
    server.set_drop_incoming_connections(True)
    await closing
    for drop in (False, True):
        server.set_drop_incoming_connections(drop)
        assert server.is_dropping_incoming_connections is drop
    assert server.is_closed
    assert await echoes(client)
    with pytest.raises(ConnectionRefusedError):
        connect(server)
    client.close()
    await server.close_finished_and_handlers_determined()
    server.set_drop_incoming_connections(False)


def queued_before(connect: Any, number: int) -> tuple[Any, list[Any]]:
    """A place whose kernel has clients already, and these clients."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = IPv4Address("TCP", *listening.getsockname())
    clients = [connect(address) for _ in range(number)]
    return WhereToListen.of_fd(listening.detach(), own=True), clients


@ensureDeferred
async def test_the_flag_is_read_for_each_socket_of_a_batch(
    serve: Any, connect: Any
) -> None:
    """D1: toggled in the middle of a batch of accepts, by buildProtocol."""
    where, clients = queued_before(connect, 6)
    built: list[Any] = []

    class Toggle(Factory):
        def buildProtocol(self, addr: Any) -> Protocol:
            built.append(addr)
            if len(built) == 2:
                server.set_drop_incoming_connections(True)
            return Echo()

    server = await serve(
        Toggle(), create=Server.create_protocol, where=where, max_accepts_per_batch=100
    )
    for client in clients[2:]:
        assert await is_dropped(client)
    for client in clients[:2]:
        assert await echoes(client)
    assert (len(built), server.num_connections, dropped(server)) == (2, 2, 4)


@ensureDeferred
async def test_a_handler_of_the_batch_still_starts_when_dropping_began_after(
    serve: Any, connect: Any
) -> None:
    """D1: the flag is for what comes; who was accepted before it is served."""
    where, clients = queued_before(connect, 3)
    started: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)
        server.set_drop_incoming_connections(True)
        writer.write(await reader.readline())

    server = await serve(handler, where=where, max_accepts_per_batch=100)
    for client in clients:
        assert await echoes(client)
    assert len(started) == 3
    assert await is_dropped(connect(server))


@ensureDeferred
async def test_on_handler_error_may_begin_to_drop(serve: Any, connect: Any) -> None:
    """D1: the client that waited for the failed handler's slot is dropped."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        raise ValueError("no")

    def on_error(address: Any, failure: Any) -> None:
        server.set_drop_incoming_connections(True)

    server = await serve(handler, max_connections=1, on_handler_error=on_error)
    first = connect(server)
    await until(lambda: server.num_connections == 1)
    second = connect(server)
    first.send(b"\n")
    assert await is_dropped(second)
    assert server.describe()["counters"]["accepted"] == 1


# D2


@ensureDeferred
async def test_clients_that_wait_are_dropped_as_soon_as_the_flag_is_set(
    serve: Any, connect: Any, handler: Handler
) -> None:
    """D2: at max_connections, without a slot; the original lets them hang."""
    server = await serve(handler, max_connections=2, clock=Clock())
    served = [connect(server) for _ in range(2)]
    for client in served:
        assert await echoes(client)
    waiting = [connect(server) for _ in range(5)]
    server.set_drop_incoming_connections(True)
    for client in waiting:
        assert await is_dropped(client)
    assert await is_dropped(connect(server))
    assert (server.num_connections, dropped(server)) == (2, 6)
    for client in served:
        assert await echoes(client)
    server.invariant()
    # Unset, the server holds back again.
    server.set_drop_incoming_connections(False)
    waiting = [connect(server) for _ in range(2)]
    waiting[0].send(b"early\n")
    for _ in range(20):
        await turn()
    assert (handler.started, dropped(server)) == (2, 6)
    served[0].close()
    assert await in_thread(waiting[0].read, 6) == b"early\n"
    assert handler.started == 3


@ensureDeferred
async def test_a_drop_that_is_unset_at_once_drops_nobody(
    serve: Any, connect: Any, handler: Handler
) -> None:
    """D2: the flag is read at accept, not when it is set."""
    server = await serve(handler, max_connections=1)
    served = connect(server)
    assert await echoes(served)
    waiting = connect(server)
    server.set_drop_incoming_connections(True)
    server.set_drop_incoming_connections(False)
    for _ in range(20):
        await turn()
    assert dropped(server) == 0
    served.close()
    assert await echoes(waiting)


@ensureDeferred
async def test_dropping_takes_no_more_than_a_batch_in_a_turn(
    serve: Any, connect: Any, handler: Handler
) -> None:
    """D1, A1: max_accepts_per_batch holds for dropped clients too, so that a flood
    does not hold the reactor."""
    where, clients = queued_before(connect, 30)
    server = await serve(
        handler, where=where, drop_incoming_connections=True, max_accepts_per_batch=4
    )
    port = server._listeners.ports[0].port
    accept_batch, found = port.doRead, []

    def counting() -> None:
        before = dropped(server)
        accept_batch()
        found.append(dropped(server) - before)

    port.doRead = counting
    for client in clients:
        assert await is_dropped(client)
    assert max(found) == 4
    assert sum(found) == 30


@ensureDeferred
async def test_a_bare_factory_drops_its_held_clients(
    connect: Any, handler: Handler
) -> None:
    """D2: at once; they read EOF, also those that spoke early."""
    factory = ServerFactory.of_streams(
        handler, on_handler_error="ignore", max_connections=1
    )
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    clients = [connect(port.getHost()) for _ in range(4)]
    clients[1].send(b"early")
    await until(lambda: factory.describe()["held"] == 3)
    assert await echoes(clients[0])
    factory.set_drop_incoming_connections(True)
    for client in clients[1:]:
        assert await is_dropped(client)
    assert await is_dropped(connect(port.getHost()))
    assert factory.describe()["held"] == 0
    assert (factory.num_connections, dropped(factory), handler.started) == (1, 4, 1)
    assert await echoes(clients[0])
    factory.set_drop_incoming_connections(False)
    clients[0].close()
    last = connect(port.getHost())
    assert await echoes(last)
    last.close()
    await until(lambda: factory.num_connections == 0)
    factory.invariant()
    await port.stopListening()


@ensureDeferred
async def test_a_bare_protocol_factory_drops_its_held_clients(connect: Any) -> None:
    """D2: whose protocols were never built."""
    built: list[Any] = []

    class Building(Factory):
        def buildProtocol(self, addr: Any) -> Protocol:
            built.append(addr)
            return Echo()

    factory = ServerFactory.of_protocols(
        Building(), on_handler_error="ignore", max_connections=1
    )
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    clients = [connect(port.getHost()) for _ in range(3)]
    await until(lambda: factory.describe()["held"] == 2)
    factory.set_drop_incoming_connections(True)
    for client in clients[1:]:
        assert await is_dropped(client)
    assert len(built) == 1
    assert await echoes(clients[0])
    clients[0].close()
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()


# D3


@implementer(IStreamServerEndpoint)
class WrappingEndpoint:
    """An endpoint that puts a wrapping factory around the one it is given."""

    def __init__(self, wrap: Any) -> None:
        self._wrap = wrap

    def listen(self, factory: Any) -> Deferred[Any]:
        inner = TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1")
        result: Deferred[Any] = inner.listen(self._wrap(factory))
        return result


def wrappings(tmp_path: Path) -> dict[str, Any]:
    """Endpoints that do not give the plain transport to the factory."""
    return {
        "tls": tls_endpoint(tmp_path),
        "haproxy": "haproxy:tcp:0:interface=127.0.0.1",
        "timeout": WrappingEndpoint(lambda f: TimeoutFactory(f, None)),
        "twice": WrappingEndpoint(lambda f: TimeoutFactory(WrappingFactory(f), None)),
    }


@ensureDeferred
@pytest.mark.parametrize("wrapping", ["tls", "haproxy", "timeout", "twice"])
async def test_a_dropped_client_of_a_wrapped_server_is_closed(
    wrapping: str, serve: Any, connect: Any, tmp_path: Path, handler: Handler, logs: Any
) -> None:
    """D3: it does not hang as with Twisted's None, and no error is logged."""
    where = WhereToListen.of_endpoint(wrappings(tmp_path)[wrapping])
    server = await serve(handler, where=where, drop_incoming_connections=True)
    for _ in range(2):
        assert await in_thread(ended, connect(server)) == b""
    assert (handler.started, server.num_connections) == (0, 0)
    assert dropped(server) == 2
    assert logs.texts(LogLevel.error) == []
    assert logs.bad() == []


@ensureDeferred
@pytest.mark.parametrize("wrapping", ["tls", "haproxy", "timeout", "twice"])
@pytest.mark.parametrize("early", [b"", b"hello, I am early\r\n"])
async def test_a_bare_factory_drops_behind_wrappers_too(
    early: bytes,
    wrapping: str,
    connect: Any,
    tmp_path: Path,
    handler: Handler,
    logs: Any,
) -> None:
    """D3: where only a protocol can end the connection; there it may be RST."""
    factory = ServerFactory.of_streams(
        handler, on_handler_error="ignore", drop_incoming_connections=True
    )
    endpoint = wrappings(tmp_path)[wrapping]
    if isinstance(endpoint, str):
        endpoint = serverFromString(the_reactor(), endpoint)
    port = await endpoint.listen(factory)
    for _ in range(2):
        client = connect(port.getHost())
        client.send(early)
        assert await in_thread(ended, client) == b""
    assert (handler.started, factory.num_connections) == (0, 0)
    assert dropped(factory) == 2
    assert logs.texts(LogLevel.error) == []
    assert logs.bad() == []
    await port.stopListening()


@ensureDeferred
@pytest.mark.parametrize("wrapping", ["tls", "timeout"])
async def test_held_clients_behind_wrappers_are_dropped(
    wrapping: str, connect: Any, tmp_path: Path, handler: Handler, logs: Any
) -> None:
    """D2, D3: they end when the flag is set."""
    factory = ServerFactory.of_streams(
        handler, on_handler_error="ignore", max_connections=1
    )
    endpoint = wrappings(tmp_path)[wrapping]
    if isinstance(endpoint, str):
        endpoint = serverFromString(the_reactor(), endpoint)
    port = await endpoint.listen(factory)
    clients = [connect(port.getHost()) for _ in range(3)]
    await until(lambda: factory.describe()["held"] == 2)
    await until(lambda: handler.started == 1)
    factory.set_drop_incoming_connections(True)
    for client in clients[1:]:
        assert await in_thread(ended, client) == b""
    assert (handler.started, factory.num_connections) == (1, 1)
    clients[0].close()
    await until(lambda: factory.num_connections == 0)
    assert logs.bad() == []
    await port.stopListening()
