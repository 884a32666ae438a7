"""
Handlers, factories and owners that do odd things: the server stands it, and says
what it can.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import (
    IProtocolNegotiationFactory,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.web.resource import Resource
from twisted.web.server import Site
from zope.interface import implementer

from tcpsvc import DrainReport, ServerFactory, TcpService, WhereToListen
from tcpsvc.drain_options import GRACE
from tcpsvc.server import Server
from tcpsvc.testing import MemoryServer
from tests.support import in_thread, the_reactor, until


@ensureDeferred
async def test_a_canceller_that_raises_does_not_stop_the_drain(
    serve: Any, connect: Any, logs: Any
) -> None:
    """H6, drain: the other handlers are cancelled, and it ends."""
    cancelled: list[Any] = []

    def boom(_: Any) -> None:
        cancelled.append(True)
        raise ValueError("boom")

    clock = Clock()
    handlers: list[Deferred[None]] = []

    def handler(address: Any, reader: Any, writer: Any) -> Deferred[None]:
        handlers.append(Deferred(boom))
        return handlers[-1]

    server = await serve(handler, clock=clock)
    connect(server)
    connect(server)
    await until(lambda: len(handlers) == 2)
    done: list[Any] = []
    server.drain(timeout=0.0).addCallback(done.append)
    clock.advance(GRACE)
    assert cancelled == [True, True]
    clock.advance(GRACE)
    assert done == [DrainReport(given_up=2, longest_wait=2 * GRACE)]
    assert len(logs.take(LogLevel.critical)) == 2
    for ended in handlers:
        ended.callback(None)


def test_a_system_exit_out_of_build_protocol_is_a_stop(logs: Any) -> None:
    """H7, P: the reactor is stopped, the slot is free, the factory goes on."""

    class Exits(Factory):
        def buildProtocol(self, addr: Any) -> Any:
            raise SystemExit(3)

    server = MemoryServer.of_protocols(Exits())
    client = server.connect()
    assert client.is_closed
    assert isinstance(server.factory.failures.stopped_by, SystemExit)
    assert server.factory.num_connections == 0
    assert server.errors == []
    assert len(logs.take(LogLevel.critical)) == 1


def test_an_error_that_cannot_be_printed_is_ignored_all_the_same() -> None:
    """E1: the end comes, and the slot is free."""

    class Unprintable(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        raise Unprintable

    server = MemoryServer(handler, on_handler_error="ignore", max_connections=1)
    assert server.connect().is_closed
    assert server.connect().is_closed
    over: list[Any] = []
    server.factory.close()
    server.factory.when_over().addCallback(over.append)
    assert over == [None]


def test_who_keeps_the_writer_cannot_add_to_it() -> None:
    """H3: what the handler has written is sent; what comes later is dropped."""
    kept: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        kept.append(writer)
        writer.write(b"mine")

    server = MemoryServer(handler)
    client = server.connect(is_reading=False)
    [writer] = kept
    assert writer.is_closed
    writer.write(b"late")
    client.resume_reading()
    assert client.received == b"mine"
    assert client.is_closed
    assert server.factory.num_connections == 0


def test_sys_exit_in_memory_ends_the_connection(logs: Any) -> None:
    """H7: without a reactor that could be stopped."""

    def handler(address: Any, reader: Any, writer: Any) -> None:
        raise SystemExit(1)

    server = MemoryServer(handler)
    assert server.connect().is_closed
    assert server.factory.num_connections == 0
    assert len(logs.take(LogLevel.critical)) == 1


def test_an_error_before_a_system_exit_is_not_lost(logs: Any) -> None:
    """E4: logged, and counted."""

    class Odd(Protocol):
        def dataReceived(self, data: bytes) -> None:
            raise ValueError("first")

        def connectionLost(self, reason: Any = None) -> None:
            raise SystemExit(1)

    server = MemoryServer.of_protocols(Factory.forProtocol(Odd))
    server.connect().send(b"x")
    assert server.factory.counters.later_errors == 1
    texts = [e["log_failure"].value for e in logs.take(LogLevel.critical)]
    assert [type(error) for error in texts] == [ValueError, SystemExit]


def test_a_held_client_that_left_gets_no_protocol() -> None:
    """P1: nobody builds what nobody connects."""
    built: list[Any] = []

    class Counting(Factory):
        def buildProtocol(self, addr: Any) -> Any:
            built.append(addr)
            return Protocol()

    server = MemoryServer.of_protocols(Counting(), max_connections=1)
    first, second = server.connect(), server.connect()
    second.reset()
    first.send_eof()
    assert len(built) == 1
    assert server.factory.num_connections == 0


def test_alpn_of_the_applications_factory_is_passed_on() -> None:
    """P: behind TLS a Site offers the protocols that it speaks."""
    site = Site(Resource())
    factory = ServerFactory.of_protocols(site, on_handler_error="ignore")
    assert IProtocolNegotiationFactory.providedBy(site) == (
        IProtocolNegotiationFactory.providedBy(factory)
    )
    if IProtocolNegotiationFactory.providedBy(site):
        assert factory.acceptableProtocols() == site.acceptableProtocols()  # type: ignore[attr-defined]


def test_a_socket_handler_without_its_server_refuses(logs: Any) -> None:
    """A1: one clear line, and no client hangs."""

    def handler(address: Any, client: Any) -> None:
        raise AssertionError("never called")

    server = MemoryServer(handler, make_factory=ServerFactory.of_socks)
    assert server.connect().is_closed
    assert "only a tcpsvc.Server" in "".join(logs.texts(LogLevel.error))


def test_a_service_does_not_own_a_descriptor() -> None:
    """W7: started again, it would listen on, and close, somebody else's."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        where = WhereToListen.of_fd(listening.fileno(), own=True)
        with pytest.raises(ValueError, match="own=True"):
            TcpService(where, print, on_handler_error="ignore")
        os.fstat(listening.fileno())


@ensureDeferred
async def test_what_is_no_socket_is_named() -> None:
    """W7: a TypeError."""
    with pytest.raises(TypeError, match="socket='abc'"):
        await Server.create(
            WhereToListen.of_port(0),
            print,
            on_handler_error="ignore",
            socket="abc",  # type: ignore[typeddict-item]
        )


@ensureDeferred
async def test_a_drain_says_that_it_waits_for_on_handler_error(
    serve: Any, connect: Any, logs: Any
) -> None:
    """Drain, X4: what is waited for is named."""
    clock = Clock()
    release: Deferred[None] = Deferred()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        raise ValueError("no")

    server = await serve(handler, clock=clock, on_handler_error=lambda *_: release)
    client = connect(server)
    await in_thread(client.read_all)
    client.close()
    await until(lambda: server._factory.failures.is_reporting)
    done: list[Any] = []
    server.drain(timeout=5.0).addCallback(done.append)
    clock.pump([1.0] * 8)
    assert done == [DrainReport()]
    assert "calls of on_handler_error do not end" in "".join(logs.texts(LogLevel.error))
    release.callback(None)


@ensureDeferred
async def test_a_cancelled_create_keeps_no_client_of_a_slow_endpoint(
    connect: Any,
) -> None:
    """W8: an endpoint that listens at once, and says so late."""
    said: Deferred[Any] = Deferred()
    ports: list[Any] = []

    @implementer(IStreamServerEndpoint)
    class Slow:
        def listen(self, factory: Any) -> Any:
            real = TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1")
            real.listen(factory).addCallback(ports.append)
            return said

    def handler(address: Any, reader: Any, writer: Any) -> None:
        raise AssertionError("never called")

    creating = Server.create(
        WhereToListen.of_endpoint(Slow()), handler, on_handler_error="ignore"
    )
    client = connect(ports[0].getHost())
    await until(lambda: ports[0].sessionno == 1)
    creating.cancel()
    with pytest.raises(CancelledError):
        await creating
    said.callback(ports[0])
    assert await in_thread(client.read_all) == b""
