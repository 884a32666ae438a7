"""Accepting: the limit, the order, and what happens when descriptors run out
(spec A)."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import resource
import socket
import sys
import termios
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.protocols.policies import TimeoutFactory

import tcpsvc.settings
import tcpsvc.sockets
from tcpsvc import Server, ServerFactory, WhereToListen
from tests.kinds import OtherEndpoint
from tests.scripts import Script
from tests.support import (
    LOOPBACK,
    PATIENCE,
    in_thread,
    settle,
    the_reactor,
    until,
)
from tests.tls import client_context, tls_endpoint


class Handlers:
    """Handlers that read one line, and answer it and end when they are told to."""

    def __init__(self) -> None:
        self.addresses: list[Any] = []
        self.lines: list[bytes] = []
        self.counts: list[int] = []
        self.peak = 0
        self.count: Callable[[], int] = lambda: 0
        self._waiting: list[Deferred[None]] = []

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        self.addresses.append(address)
        self.counts.append(self.count())
        self.peak = max(self.peak, self.count())
        told: Deferred[None] = Deferred()
        self._waiting.append(told)
        line = await reader.readline()
        self.lines.append(line)
        await told
        writer.write(b"done " + line)

    def watch(self, server: Any) -> Any:
        self.count = lambda: server.num_connections
        return server

    @property
    def running(self) -> int:
        return len(self._waiting)

    def end_oldest(self) -> None:
        self._waiting.pop(0).callback(None)

    def end_all(self) -> None:
        while self._waiting:
            self.end_oldest()


@pytest.fixture
def handlers() -> Handlers:
    """The handlers of the test."""
    return Handlers()


def queued(server: Any) -> int:
    """How many clients wait in the kernel: TCP_INFO of a listening socket."""
    info = server.listening_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(info[24:28], sys.byteorder)


class Watched(socket.socket):
    """A listening socket that notes each accept, and fails when told to."""

    calls: list[Any]
    errors: list[int]
    note: Callable[[], Any]

    def accept(self) -> Any:
        number = self.errors.pop(0) if self.errors else 0
        kind = type(self)
        if number:
            kind.calls.append(kind.note())
            raise OSError(number, os.strerror(number))
        accepted = super().accept()
        kind.calls.append(kind.note())
        return accepted


@pytest.fixture
def watched(monkeypatch: Any) -> type[Watched]:
    """The listening sockets of the test are of this kind. ``calls`` holds what
    ``note()`` said at each accept that was not in vain."""

    class Kind(Watched):
        calls = []
        errors = []
        note = staticmethod(lambda: None)

    def make(family: int) -> socket.socket:
        made = Kind(family, socket.SOCK_STREAM)
        made.setblocking(False)
        return made

    monkeypatch.setattr(tcpsvc.sockets, "make_socket", make)
    return Kind


# A1


@ensureDeferred
@pytest.mark.parametrize("batch", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", ["tcp", "endpoint", "fd"])
async def test_clients_beyond_the_limit_wait_in_the_backlog_in_order(
    kind: str, batch: int, serve: Any, connect: Any, handlers: Handlers
) -> None:
    """A1: exact, also within a batch, however the port was made; early bytes are
    intact."""
    listening = None
    where: Any = LOOPBACK
    if kind == "endpoint":
        where = WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    elif kind == "fd":
        listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        where = WhereToListen.of_fd(listening.detach(), own=True)
    server = handlers.watch(
        await serve(
            handlers, where=where, max_connections=3, max_accepts_per_batch=batch
        )
    )
    clients = [connect(server) for _ in range(12)]
    for number, client in enumerate(clients):
        client.send(b"%d\n" % number)
    for first in range(12):
        await until(lambda first=first: len(handlers.lines) == min(12, first + 3))
        await settle()
        assert server.num_connections == min(3, 12 - first)
        assert handlers.running == min(3, 12 - first)
        assert queued(server) == max(0, 12 - 3 - first)
        server.invariant()
        handlers.end_oldest()
        expected = b"done %d\n" % first
        assert await in_thread(clients[first].read_all) == expected
        clients[first].close()
    assert handlers.peak == 3
    assert handlers.lines == [b"%d\n" % n for n in range(12)]
    assert [a.port for a in handlers.addresses[3:]] and len(handlers.addresses) == 12
    await until(lambda: server.num_connections == 0)


@ensureDeferred
@pytest.mark.parametrize("batch", [1, 100])
async def test_the_limit_is_exact_on_a_unix_socket(
    batch: int, serve: Any, connect: Any, handlers: Handlers, tmp_path: Path
) -> None:
    """A1: unix.Port; and one that Twisted's own endpoint made."""
    for where in (
        WhereToListen.of_file(tmp_path / "1"),
        WhereToListen.of_endpoint(f"unix:{tmp_path / '2'}"),
    ):
        server = handlers.watch(
            await serve(
                handlers, where=where, max_connections=2, max_accepts_per_batch=batch
            )
        )
        clients = [connect(server) for _ in range(6)]
        for number, client in enumerate(clients):
            client.send(b"%d\n" % number)
        await until(lambda: len(handlers.lines) == 2)
        await settle()
        assert (server.num_connections, handlers.running) == (2, 2)
        for number, client in enumerate(clients):
            await until(lambda: handlers.running)
            handlers.end_oldest()
            assert await in_thread(client.read_all) == b"done %d\n" % number
        assert handlers.lines == [b"%d\n" % n for n in range(6)]
        assert handlers.peak == 2
        handlers.lines.clear()
        await until(lambda s=server: s.num_connections == 0)


@ensureDeferred
@pytest.mark.parametrize("batch", [1, 2, 50])
async def test_accept_is_not_called_without_a_free_slot(
    batch: int, serve: Any, connect: Any, handlers: Handlers, watched: Any
) -> None:
    """A1: never, whatever the batch; so what accept() finds is at most limit - 1
    taken slots."""
    server = handlers.watch(
        await serve(handlers, max_connections=4, max_accepts_per_batch=batch)
    )
    watched.note = staticmethod(lambda: server.num_connections)
    clients = [connect(server) for _ in range(20)]
    await until(lambda: handlers.running == 4)
    await settle()
    assert len(watched.calls) == 4
    for client in clients:
        client.close()
        await until(lambda: handlers.running)
        handlers.end_oldest()
    await until(lambda: server.num_connections == 0)
    assert len(watched.calls) == 20
    assert max(watched.calls) == 3


@ensureDeferred
@pytest.mark.parametrize(
    ("batch", "limit", "batches"),
    [(1, 9, [1] * 9), (4, 9, [4, 4, 1]), (100, 9, [9]), (2, 3, [2, 1])],
)
async def test_a_batch_is_the_smaller_of_its_size_and_the_free_slots(
    batch: int,
    limit: int,
    batches: list[int],
    serve: Any,
    connect: Any,
    watched: Any,
    handlers: Handlers,
) -> None:
    """A1: min(max_accepts_per_batch, free slots) in one turn; 12 clients wait."""
    # They are queued before the server is there.
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = IPv4Address("TCP", *listening.getsockname())
    clients = [connect(address) for _ in range(12)]
    started: list[int] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(accepted())
        await handlers(address, reader, writer)

    server = await serve(
        handler,
        where=WhereToListen.of_fd(listening.detach(), own=True),
        max_connections=limit,
        max_accepts_per_batch=batch,
    )

    def accepted() -> int:
        count: int = server.describe()["counters"]["accepted"]
        return count

    port = server._listeners.ports[0].port
    accept_batch, found = port.doRead, []

    def counting() -> None:
        before = accepted()
        accept_batch()
        found.append(accepted() - before)

    port.doRead = counting
    await until(lambda: len(started) == limit)
    await settle()
    assert found == batches
    for client in clients:
        client.close()
    await server.close()
    handlers.end_all()


@ensureDeferred
async def test_the_whole_batch_is_counted_when_its_first_handler_starts(
    serve: Any, connect: Any, handlers: Handlers
) -> None:
    """A5, H1: slots are taken at accept, before any handler starts."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = IPv4Address("TCP", *listening.getsockname())
    clients = [connect(address) for _ in range(5)]
    server = handlers.watch(
        await serve(
            handlers,
            where=WhereToListen.of_fd(listening.detach(), own=True),
            max_accepts_per_batch=5,
        )
    )
    await until(lambda: handlers.running == 5)
    assert handlers.counts == [5] * 5
    assert handlers.addresses == [
        IPv4Address("TCP", *c.socket.getsockname()) for c in clients
    ]
    handlers.end_all()
    for client in clients:
        client.shut()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_raised_limit_lets_waiting_clients_in_at_once(
    serve: Any, connect: Any, handlers: Handlers
) -> None:
    """A1: and a lowered one closes nobody, and lets nobody in before it holds."""
    server = handlers.watch(await serve(handlers, max_connections=1))
    clients = [connect(server) for _ in range(6)]
    await until(lambda: handlers.running == 1)
    server.max_connections = 4
    await until(lambda: handlers.running == 4)
    await settle()
    assert (server.num_connections, queued(server)) == (4, 2)
    server.max_connections = 2
    for left in (3, 2):
        clients.pop(0).close()
        handlers.end_oldest()
        await until(lambda left=left: server.num_connections == left)
        await settle()
        server.invariant()
        assert (server.num_connections, queued(server)) == (left, 2)
    clients.pop(0).close()
    handlers.end_oldest()
    await until(lambda: handlers.running == 2)
    assert queued(server) == 1
    for bad in (0, -1):
        with pytest.raises(ValueError, match="max_connections"):
            server.max_connections = bad
    assert server.max_connections == 2
    for client in clients:
        client.close()
    await until(lambda: handlers.end_all() or server.num_connections == 0)


@ensureDeferred
async def test_the_limit_is_exact_for_socks_and_protocols(
    serve: Any, connect: Any
) -> None:
    """A1: for every kind of handler."""
    ends: list[Deferred[None]] = []

    async def handler(address: Any, client: socket.socket) -> None:
        ends.append(Deferred())
        await ends[-1]

    class Hold(Protocol):
        def connectionMade(self) -> None:
            held.append(self)

    held: list[Hold] = []
    socks = await serve(
        handler, create=Server.create_sock, max_connections=2, max_accepts_per_batch=9
    )
    protocols = await serve(
        Factory.forProtocol(Hold),
        create=Server.create_protocol,
        max_connections=2,
        max_accepts_per_batch=9,
    )
    for server in (socks, protocols):
        for _ in range(7):
            connect(server)
    await until(lambda: len(ends) == 2 and len(held) == 2)
    await settle()
    for server in (socks, protocols):
        assert (server.num_connections, queued(server)) == (2, 5)
    ends[0].callback(None)
    held[0].transport.loseConnection()
    await until(lambda: len(ends) == 3 and len(held) == 3)
    await settle()
    for server in (socks, protocols):
        assert (server.num_connections, queued(server)) == (2, 4)
    assert len(held) == 3
    await socks.close()
    for end in ends[1:]:
        end.callback(None)


@ensureDeferred
async def test_the_limit_is_exact_behind_tls(
    serve: Any, connect: Any, tmp_path: Path, handlers: Handlers
) -> None:
    """A1: a TLS endpoint's port is a tcp.Port too."""
    where = WhereToListen.of_endpoint(tls_endpoint(tmp_path))
    server = handlers.watch(
        await serve(handlers, where=where, max_connections=2, max_accepts_per_batch=9)
    )
    clients = [connect(server) for _ in range(6)]
    await until(lambda: handlers.running == 2)
    await settle()
    assert (server.num_connections, queued(server)) == (2, 4)
    for number, client in enumerate(clients):

        def talk(client: Any = client, number: int = number) -> bytes:
            with client_context().wrap_socket(client.socket) as tls:
                tls.sendall(b"%d\n" % number)
                return bytes(tls.recv(100))

        talking = in_thread(talk)
        await until(lambda n=number: len(handlers.lines) == n + 1)
        handlers.end_oldest()
        assert await talking == b"done %d\n" % number
    assert handlers.peak == 2


@ensureDeferred
async def test_create_says_when_it_cannot_gate_a_port(
    serve: Any, connect: Any, handlers: Handlers, logs: Any
) -> None:
    """A1: one warning; the surplus is held, unstarted, and has its turn."""
    where = WhereToListen.of_endpoint(OtherEndpoint())
    server = handlers.watch(await serve(handlers, where=where, max_connections=2))
    warnings = logs.texts(LogLevel.warn)
    assert len(warnings) == 1 and "cannot" in warnings[0]
    clients = [connect(server) for _ in range(5)]
    for number, client in enumerate(clients):
        client.send(b"%d\n" % number)
    await until(lambda: server.describe()["held"] == 3)
    await settle()
    assert (server.num_connections, handlers.running) == (2, 2)
    for number, client in enumerate(clients):
        await until(lambda n=number: len(handlers.lines) > n)
        handlers.end_oldest()
        assert await in_thread(client.read_all) == b"done %d\n" % number
    assert handlers.peak == 2
    await until(lambda: server.num_connections == 0)
    await server.close()
    with pytest.raises(ConnectionRefusedError):
        connect(server)


# A1: the bare factory


def bare(handlers: Any, **options: Any) -> ServerFactory:
    """A factory that listens on a port of somebody else's."""
    return ServerFactory.of_streams(handlers, on_handler_error="ignore", **options)


def unread_in_kernel(held: Any) -> int:
    """How many bytes of a held connection nobody has received."""
    answer = array.array("i", [0])
    fcntl.ioctl(held.transport.socket.fileno(), termios.FIONREAD, answer)
    return answer[0]


@ensureDeferred
@pytest.mark.parametrize("way", ["listenTCP", "endpoint"])
async def test_a_bare_factory_holds_the_surplus_unread_and_in_order(
    way: str, connect: Any, handlers: Handlers
) -> None:
    """A1: no handler beyond the limit, where the port is somebody else's."""
    factory = bare(handlers, max_connections=2)
    handlers.count = lambda: factory.num_connections
    if way == "listenTCP":
        port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    else:
        port = await serverFromString(
            the_reactor(), "tcp:0:interface=127.0.0.1"
        ).listen(factory)
    clients = [connect(port.getHost()) for _ in range(7)]
    for number, client in enumerate(clients):
        client.send(b"%d\n" % number)
    await until(lambda: factory.describe()["held"] == 5)
    await until(lambda: len(handlers.lines) == 2)
    await settle()
    assert (factory.num_connections, handlers.running) == (2, 2)
    assert [unread_in_kernel(c) for c in factory.entrance.held.waiting] == [2] * 5
    factory.invariant()
    for number, client in enumerate(clients):
        await until(lambda n=number: len(handlers.lines) > n)
        handlers.end_oldest()
        assert await in_thread(client.read_all) == b"done %d\n" % number
        client.close()
    assert handlers.peak == 2
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()
    factory.close()
    await factory.when_over()


@ensureDeferred
async def test_a_newcomer_does_not_overtake_the_held_ones(
    connect: Any, handlers: Handlers
) -> None:
    """A1: in order, also when a slot is free in the very turn it comes."""
    factory = bare(handlers, max_connections=1)
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    clients = [connect(port.getHost()) for _ in range(2)]
    await until(lambda: factory.describe()["held"] == 1)
    for number, client in enumerate(clients):
        client.send(b"%d\n" % number)
    factory.max_connections = 2
    clients.append(connect(port.getHost()))
    clients[2].send(b"2\n")
    await until(lambda: len(handlers.lines) == 2)
    assert handlers.lines == [b"0\n", b"1\n"]
    factory.max_connections = 3
    await until(lambda: len(handlers.lines) == 3)
    handlers.end_all()
    for client in clients:
        await in_thread(client.read_all)
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()


@ensureDeferred
async def test_a_held_client_that_left_still_gets_its_handler(
    connect: Any, handlers: Handlers
) -> None:
    """A4 for the bare factory: its data, then EOF."""
    factory = bare(handlers, max_connections=1)
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    first, second = connect(port.getHost()), connect(port.getHost())
    await until(lambda: factory.describe()["held"] == 1)
    # The first handler starts in a turn of its own.
    await until(lambda: factory.connections[0].is_running)
    second.send(b"early")
    second.close()
    first.close()
    handlers.end_all()
    await until(lambda: handlers.lines == [b"", b"early"])
    handlers.end_all()
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()


@ensureDeferred
@pytest.mark.parametrize("wrapping", ["timeout", "tls"])
async def test_a_wrapped_bare_factory_holds_its_surplus(
    wrapping: str, connect: Any, handlers: Handlers, tmp_path: Path
) -> None:
    """A1: behind TimeoutFactory and TLS."""
    factory = bare(handlers, max_connections=1)
    handlers.count = lambda: factory.num_connections
    if wrapping == "timeout":
        wrapped = TimeoutFactory(factory, None)
        port = the_reactor().listenTCP(0, wrapped, interface="127.0.0.1")
    else:
        port = await serverFromString(the_reactor(), tls_endpoint(tmp_path)).listen(
            factory
        )
    clients = [connect(port.getHost()) for _ in range(3)]

    def talk(client: Any, number: int) -> bytes:
        if wrapping == "timeout":
            client.send(b"%d\n" % number)
            return bytes(client.read(100))
        with client_context().wrap_socket(client.socket) as tls:
            tls.sendall(b"%d\n" % number)
            return bytes(tls.recv(100))

    talking = [in_thread(talk, c, n) for n, c in enumerate(clients)]
    await until(lambda: len(handlers.lines) == 1)
    await until(lambda: factory.describe()["held"] == 2)
    await settle()
    assert handlers.lines == [b"0\n"]
    for number, answer in enumerate(talking):
        await until(lambda n=number: len(handlers.lines) > n)
        handlers.end_oldest()
        assert await answer == b"done %d\n" % number
    assert handlers.peak == 1
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()


@ensureDeferred
async def test_a_bare_factory_builds_no_protocol_beyond_the_limit(
    connect: Any,
) -> None:
    """A1 with P2: buildProtocol itself waits for the slot."""
    built: list[Protocol] = []

    class Echo(Protocol):
        def connectionMade(self) -> None:
            built.append(self)

        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)

    factory = ServerFactory.of_protocols(
        Factory.forProtocol(Echo), on_handler_error="ignore", max_connections=1
    )
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    first, second = connect(port.getHost()), connect(port.getHost())
    second.send(b"early")
    await until(lambda: factory.describe()["held"] == 1)
    await settle()
    assert len(built) == 1
    first.close()
    assert await in_thread(second.read, 5) == b"early"
    assert len(built) == 2
    second.close()
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()


@ensureDeferred
async def test_a_closed_bare_factory_ends_held_and_new_clients(
    connect: Any, handlers: Handlers
) -> None:
    """A1, H5: the held ones read EOF, as do those that still come; the one that is
    served goes on."""
    factory = bare(handlers, max_connections=1)
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    clients = [connect(port.getHost()) for _ in range(3)]
    # The handler starts in a turn of its own: a close before it would prevent it.
    await until(lambda: factory.describe()["held"] == 2 and handlers.addresses)
    factory.close()
    clients.append(connect(port.getHost()))
    for client in clients[1:]:
        assert await in_thread(client.read_all) == b""
    assert factory.num_connections == 1
    clients[0].send(b"0\n")
    handlers.end_all()
    assert await in_thread(clients[0].read_all) == b"done 0\n"
    await factory.when_over()
    assert len(handlers.addresses) == 1
    factory.invariant()
    await port.stopListening()


def test_the_bare_factory_says_that_it_holds_the_surplus() -> None:
    """A1: its docstring."""
    text = " ".join((ServerFactory.__doc__ or "").split())
    assert "surplus is held accepted, unread and unstarted, in order" in text


# A2


@pytest.mark.parametrize(
    ("soft", "expected"),
    [
        (10, 1),
        (64, 1),
        (65, 1),
        (66, 2),
        (256, 192),
        (640, 576),
        (1024, 922),
        (4096, 3687),
        (11_112, 10_000),
        (1_000_000, 10_000),
        (resource.RLIM_INFINITY, 10_000),
    ],
)
def test_the_default_limit_fits_the_open_files(
    soft: int, expected: int, monkeypatch: Any
) -> None:
    """A2: max(1, min(10_000, soft - max(64, soft // 10))), at creation."""
    monkeypatch.setattr(
        tcpsvc.settings.resource, "getrlimit", lambda which: (soft, soft)
    )
    factory = bare(lambda a, r, w: None)
    assert factory.max_connections == expected
    assert bare(lambda a, r, w: None, max_connections=None).max_connections == expected


@ensureDeferred
async def test_the_default_limit_is_of_the_soft_limit_at_creation(serve: Any) -> None:
    """A2: the real one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        server = await serve(lambda a, r, w: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.max_connections == 900


@ensureDeferred
@pytest.mark.parametrize("option", ["max_connections", "max_accepts_per_batch"])
@pytest.mark.parametrize("value", [0, -1])
async def test_a_limit_below_one_is_refused_before_anything_is_bound(
    option: str, value: int, monkeypatch: Any
) -> None:
    """A2: by every create. The original leaks the socket."""

    def never(family: int) -> socket.socket:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(tcpsvc.sockets, "make_socket", never)
    options = {option: value, "on_handler_error": "ignore"}
    factory = Factory.forProtocol(Protocol)
    match = f"{option}={value}"
    for create, handler in [
        (Server.create, print),
        (Server.create_sock, print),
        (Server.create_protocol, factory),
    ]:
        with pytest.raises(ValueError, match=match):
            await create(LOOPBACK, handler, **options)  # type: ignore[operator]
    for create_inet, handler in [
        (Server.create_inet, print),
        (Server.create_sock_inet, print),
        (Server.create_protocol_inet, factory),
    ]:
        with pytest.raises(ValueError, match=match):
            create_inet(LOOPBACK, handler, **options)  # type: ignore[operator]
    with pytest.raises(ValueError, match=match):
        ServerFactory.of_streams(print, **options)


@ensureDeferred
@pytest.mark.parametrize("value", [1.5, "3", True])
async def test_a_limit_that_is_no_int_is_refused(value: Any) -> None:
    """A2: a TypeError that names it."""
    for option in ("max_connections", "max_accepts_per_batch"):
        with pytest.raises(TypeError, match=option):
            await Server.create(
                LOOPBACK, print, on_handler_error="ignore", **{option: value}
            )


# A3


@ensureDeferred
async def test_the_last_slot_is_warned_of_at_most_once_a_minute(
    serve: Any, connect: Any, logs: Any, handlers: Handlers
) -> None:
    """A3: with the limit and the real address, by the clock, without a timer."""
    clock = Clock()
    server = await serve(handlers, max_connections=2, clock=clock)

    def warnings() -> list[str]:
        return [t for t in logs.texts(LogLevel.warn) if "all 2 connections" in t]

    async def fill_and_empty() -> None:
        clients = [connect(server) for _ in range(2)]
        await until(lambda: server.num_connections == 2)
        for client in clients:
            client.close()
        await until(lambda: handlers.end_all() or server.num_connections == 0)

    client = connect(server)
    await until(lambda: server.num_connections == 1)
    assert warnings() == []
    client.close()
    await until(lambda: handlers.end_all() or server.num_connections == 0)

    await fill_and_empty()
    assert len(warnings()) == 1
    assert f"127.0.0.1:{server.listening_on}" in warnings()[0]
    assert clock.getDelayedCalls() == []
    clock.advance(59.9)
    await fill_and_empty()
    assert len(warnings()) == 1
    clock.advance(0.2)
    await fill_and_empty()
    assert len(warnings()) == 2
    # From the second one on, not from the first.
    clock.advance(59)
    await fill_and_empty()
    assert len(warnings()) == 2


@ensureDeferred
async def test_the_warning_comes_also_for_a_limit_of_one(
    serve: Any, connect: Any, logs: Any, tmp_path: Path
) -> None:
    """A3: when the last slot is taken, not when somebody has to wait."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.read()

    where = WhereToListen.of_file(tmp_path / "s")
    server = await serve(handler, where=where, max_connections=1)
    connect(server)
    await until(lambda: server.num_connections == 1)
    (warning,) = logs.texts(LogLevel.warn)
    assert "1" in warning and str(tmp_path / "s") in warning


# A4


@ensureDeferred
@pytest.mark.parametrize("unix", [False, True])
async def test_a_client_that_left_before_its_accept_gets_its_handler(
    unix: bool, serve: Any, connect: Any, handlers: Handlers, tmp_path: Path
) -> None:
    """A4: the data it sent, then EOF."""
    where: Any = WhereToListen.of_file(tmp_path / "s") if unix else LOOPBACK
    ends: list[bytes] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        ends.append(await reader.read())

    server = await serve(handler, where=where, max_connections=1)
    first = connect(server)
    await until(lambda: server.num_connections == 1)
    for data in (b"early", b"", b"x" * 50_000):
        left = connect(server)
        left.send(data)
        left.close()
    await settle()
    assert ends == []
    first.close()
    await until(lambda: len(ends) == 4)
    assert ends == [b"", b"early", b"", b"x" * 50_000]
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_client_that_reset_before_its_accept_gets_its_handler(
    serve: Any, connect: Any
) -> None:
    """A4: and the server goes on; every kind of handler."""
    started: list[str] = []
    first_done: Deferred[None] = Deferred()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append("stream")
        if len(started) == 1:
            await first_done
        assert await reader.read() in (b"", b"early")

    server = await serve(handler, max_connections=1, on_handler_error="raise")
    first = connect(server)
    await until(lambda: started)
    for data in (b"", b"early"):
        gone = connect(server)
        gone.send(data)
        gone.reset()
    last = connect(server)
    last.shut()
    first.close()
    first_done.callback(None)
    await until(lambda: len(started) == 4)
    assert await in_thread(last.read_all) == b""
    assert not server.is_closed


# A5


@ensureDeferred
async def test_a_handler_whose_client_is_gone_keeps_its_slot(
    serve: Any, connect: Any, handlers: Handlers
) -> None:
    """A5 [+]: the original forgets it."""
    server = await serve(handlers, max_connections=1)
    first = connect(server)
    await until(lambda: handlers.running == 1)
    first.reset()
    second = connect(server)
    await settle()
    assert server.num_connections == 1
    assert server.describe()["connections"][0]["handler"] == "running"
    assert queued(server) == 1
    handlers.end_all()
    await until(lambda: handlers.running == 1)
    second.send(b"2\n")
    handlers.end_all()
    assert await in_thread(second.read_all) == b"done 2\n"


@ensureDeferred
async def test_a_socket_that_is_not_yet_closed_keeps_its_slot(
    serve: Any, connect: Any
) -> None:
    """A5: the handler has finished, its client has still to read."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 20_000_000)

    server = await serve(handler, max_connections=1, clock=Clock())
    first = connect(server)
    await until(
        lambda: [c["handler"] for c in server.describe()["connections"]] == ["finished"]
    )
    connect(server)
    await settle()
    assert (server.num_connections, queued(server)) == (1, 1)
    assert len(await in_thread(first.read_all)) == 20_000_000
    first.close()
    await until(lambda: queued(server) == 0)
    assert server.num_connections == 1


@ensureDeferred
@pytest.mark.parametrize("keepalive", [True, False])
async def test_keepalive_is_set_by_request(
    keepalive: bool, serve: Any, connect: Any, tmp_path: Path
) -> None:
    """A5, A7: SO_KEEPALIVE by request, TCP_NODELAY always, every kind of handler."""
    seen: list[tuple[bool, bool]] = []

    def look(client: socket.socket) -> None:
        seen.append(
            (
                bool(client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)),
                bool(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)),
            )
        )

    class Look(Protocol):
        def connectionMade(self) -> None:
            look(self.transport.getHandle())

    def stream(address: Any, reader: Any, writer: Any) -> None:
        transport = writer.transport
        look(getattr(transport, "transport", transport).socket)

    tls = WhereToListen.of_endpoint(tls_endpoint(tmp_path))
    for create, handler, where in [
        (Server.create, stream, LOOPBACK),
        (Server.create, stream, WhereToListen.bind_to("::", 0, dual_stack=True)),
        (Server.create, stream, tls),
        (Server.create_sock, lambda address, client: look(client), LOOPBACK),
        (Server.create_protocol, Factory.forProtocol(Look), LOOPBACK),
    ]:
        before = len(seen)
        connect(await serve(handler, create=create, where=where, keepalive=keepalive))
        await until(lambda n=before: len(seen) == n + 1)
    assert seen == [(keepalive, True)] * 5


@ensureDeferred
async def test_a_unix_socket_needs_no_nodelay(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """A7: on every inet connection; a UNIX one is served all the same."""
    for create, handler in [
        (Server.create, lambda a, r, w: w.write(b"x")),
        (Server.create_sock, lambda a, c: c.sendall(b"x")),
    ]:
        where = WhereToListen.of_file(tmp_path / "s")
        server = await serve(handler, create=create, where=where, keepalive=True)
        assert await in_thread(connect(server).read_all) == b"x"
        await server.close()


# A6


@ensureDeferred
@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
)
async def test_exhaustion_pauses_accepting_for_50_ms_of_the_clock(
    number: int,
    serve: Any,
    connect: Any,
    watched: Any,
    handlers: Handlers,
    logs: Any,
) -> None:
    """A6: no CPU meanwhile, one line an episode, and the client is not lost."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    first = connect(server)
    await until(lambda: handlers.running == 1)
    watched.calls.clear()

    watched.errors[:] = [number] * 3
    second = connect(server)
    second.send(b"2\n")
    await until(lambda: len(watched.calls) == 1)
    await settle()
    assert len(watched.calls) == 1, "it spins"
    assert queued(server) == 1
    assert len(clock.getDelayedCalls()) == 1
    assert clock.getDelayedCalls()[0].getTime() <= clock.seconds() + 0.05
    for tries in (2, 3):
        clock.advance(0.05)
        await until(lambda n=tries: len(watched.calls) == n)
        await settle()
        assert len(watched.calls) == tries
    # Existing connections go on meanwhile.
    first.send(b"1\n")
    await until(lambda: handlers.lines == [b"1\n"])
    clock.advance(0.05)
    await until(lambda: handlers.running == 2)
    assert clock.getDelayedCalls() == []

    def lines() -> list[str]:
        return [t for t in logs.texts(LogLevel.error) if os.strerror(number) in t]

    assert len(lines()) == 1
    assert server.describe()["counters"]["accept_errors"] == 3
    # A further episode has a line of its own.
    watched.errors[:] = [number]
    third = connect(server)
    await until(lambda: len(lines()) == 2)
    clock.advance(0.05)
    await until(lambda: handlers.running == 3)
    for client in (first, second, third):
        client.shut()
    handlers.end_all()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_descriptor_that_closes_ends_the_pause(
    serve: Any, connect: Any, watched: Any, handlers: Handlers
) -> None:
    """A6: at once, without the clock; by a handler that ends, and by a client that
    resets while its handler runs on."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    first, second = connect(server), connect(server)
    await until(lambda: handlers.running == 2)
    watched.errors[:] = [errno.EMFILE]
    third = connect(server)
    await until(lambda: not watched.errors)
    await settle()
    assert handlers.running == 2
    first.send(b"1\n")
    first.shut()
    handlers.end_oldest()
    await until(lambda: handlers.running == 2)
    assert clock.getDelayedCalls() == []
    watched.errors[:] = [errno.EMFILE]
    fourth = connect(server)
    await until(lambda: not watched.errors)
    await settle()
    assert handlers.running == 2
    second.reset()
    await until(lambda: handlers.running == 3)
    assert clock.getDelayedCalls() == []
    third.shut()
    fourth.shut()
    handlers.end_all()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_closing_during_the_pause_leaves_no_timer(
    serve: Any, connect: Any, watched: Any, handlers: Handlers, logs: Any
) -> None:
    """A6: and no accept follows."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    watched.errors[:] = [errno.EMFILE]
    client = connect(server)
    await until(lambda: len(clock.getDelayedCalls()) == 1)
    closing = server.close()
    assert clock.getDelayedCalls() == []
    await closing
    clock.advance(1)
    await settle()
    assert len(watched.calls) == 1
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read_all)


@ensureDeferred
async def test_changes_during_the_pause_do_not_end_it(
    serve: Any, connect: Any, watched: Any, handlers: Handlers
) -> None:
    """A6: dropping and a new limit do not make it spin, and count afterwards."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    watched.errors[:] = [errno.EMFILE] * 2
    client = connect(server)
    await until(lambda: len(watched.calls) == 1)
    server.max_connections = 7
    server.set_drop_incoming_connections(True)
    await settle()
    assert len(watched.calls) == 1
    assert len(clock.getDelayedCalls()) == 1
    clock.advance(0.05)
    await until(lambda: len(watched.calls) == 2)
    clock.advance(0.05)
    assert await in_thread(client.read_all) == b""
    assert handlers.addresses == []


@ensureDeferred
@pytest.mark.parametrize(
    "number", [errno.ECONNABORTED, errno.EINTR, errno.EPROTO, errno.EPERM]
)
async def test_a_lost_client_costs_the_next_one_nothing(
    number: int, serve: Any, connect: Any, watched: Any, handlers: Handlers, logs: Any
) -> None:
    """A6: the next one is tried, at once and without a word."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    watched.errors[:] = [number] * 5
    client = connect(server)
    await until(lambda: handlers.running == 1)
    assert clock.getDelayedCalls() == []
    assert logs.texts(LogLevel.error) == []
    client.shut()
    handlers.end_all()


@ensureDeferred
async def test_an_accept_that_always_fails_does_not_hold_the_reactor(
    serve: Any, connect: Any, watched: Any, handlers: Handlers, logs: Any
) -> None:
    """A6: neither with an errno of the next client, nor with an unknown one."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    watched.errors[:] = [errno.EPERM] * 10_000
    client = connect(server)
    await until(clock.getDelayedCalls)
    assert len(watched.calls) < 10_000
    watched.errors[:] = [errno.EIO]
    clock.advance(0.05)
    await until(lambda: not watched.errors)
    clock.advance(0.05)
    await until(lambda: handlers.running == 1)
    assert len(logs.take(LogLevel.critical)) == 1
    client.shut()
    handlers.end_all()


EXHAUSTED = """
import json, os, resource, sys
if sys.argv[1] == "AsyncioSelectorReactor":
    from twisted.internet import asyncioreactor
    asyncioreactor.install()
from twisted.internet import reactor, stdio
from twisted.logger import globalLogPublisher, formatEvent
from twisted.protocols.basic import LineReceiver
from tcpsvc import LOCALHOST, Server, WhereToListen

errors = []
def observe(event):
    if event["log_level"].name in ("error", "critical"):
        errors.append(formatEvent(event))
globalLogPublisher.addObserver(observe)

async def echo(address, reader, writer):
    async for line in reader:
        writer.write(line)

class Commands(LineReceiver):
    delimiter = b"\\n"
    def lineReceived(self, line):
        if line == b"close":
            server.close(close_existing_connections=True).addCallback(self.closed)
            return
        used = os.times()
        self.tell(
            live=server.num_connections,
            accept_errors=server.describe()["counters"]["accept_errors"],
            cpu=used.user + used.system,
            errors=errors,
        )
    def tell(self, **what):
        print(json.dumps(what), flush=True)
    def closed(self, _):
        self.tell(delayed=len(reactor.getDelayedCalls()))
        reactor.stop()

def started(made):
    global server
    server = made
    commands.tell(port=server.listening_on, limit=limit)

stdio.StandardIO(commands := Commands())
# Room for the listening socket and twenty clients.
spare = os.dup(0)
os.close(spare)
limit = spare + 1 + 20
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
Server.create(
    WhereToListen.bind_to(LOCALHOST, 0), echo, on_handler_error="ignore",
    max_connections=1000, max_accepts_per_batch=int(sys.argv[2]), backlog=128,
).addCallback(started)
reactor.run()
"""


def starved(batch: int) -> Script:
    """The process that is short of descriptors."""
    return Script(EXHAUSTED, type(the_reactor()).__name__, batch)


def exhaust(batch: int) -> None:
    """Bring a child out of descriptors, and see what its clients see."""
    with ExitStack() as stack:
        child = stack.enter_context(starved(batch))
        port = child.told()["port"]
        clients: list[socket.socket] = []
        for number in range(60):
            client = socket.create_connection(("127.0.0.1", port), PATIENCE)
            clients.append(stack.enter_context(client))
            client.sendall(b"%d\n" % number)

        def answered(number: int) -> None:
            expected = b"%d\n" % number
            assert clients[number].recv(100) == expected

        while not (report := child.ask())["accept_errors"]:
            pass
        served = report["live"]
        assert 15 <= served <= 20, report
        for number in range(served):
            answered(number)
        # Ten further tries, and what they cost.
        began = report
        while report["accept_errors"] < began["accept_errors"] + 10:
            report = child.ask()
        assert report["live"] == served
        assert len(report["errors"]) == 1, report
        clients[served].setblocking(False)
        with pytest.raises(BlockingIOError):
            clients[served].recv(1)  # Neither served nor closed.
        clients[served].settimeout(PATIENCE)
        # Existing connections go on.
        for number in range(served):
            clients[number].sendall(b"%d\n" % number)
            answered(number)
        # Those who wait are served as descriptors are free again, in order.
        for number in range(60):
            clients[number].close()
            if number + served < 60:
                answered(number + served)
        last = child.ask("close")
        assert last["delayed"] == 0
        assert child.end() == 0


@pytest.mark.whatever("engine")
@ensureDeferred
@pytest.mark.parametrize("batch", [1, 100])
async def test_a_process_out_of_descriptors_loses_nobody(batch: int) -> None:
    """A6: a real EMFILE, in a process with room for twenty clients of sixty."""
    await in_thread(exhaust, batch)


@pytest.mark.whatever("engine")
@ensureDeferred
async def test_a_process_out_of_descriptors_does_not_spin() -> None:
    """A6: while clients wait in vain, tries come every 50 ms, not every turn."""

    def measure() -> None:
        with ExitStack() as stack:
            child = stack.enter_context(starved(1))
            port = child.told()["port"]
            for _ in range(40):
                client = socket.create_connection(("127.0.0.1", port), PATIENCE)
                stack.enter_context(client)
            while not (first := child.ask())["accept_errors"]:
                pass
            asked = 0
            while (last := child.ask())["accept_errors"] < first["accept_errors"] + 8:
                asked += 1
            # A server that spins tries in every turn, and each question is one.
            assert asked > 8 * 5, (asked, first, last)

    await in_thread(measure)
