"""Serving the protocols of an existing factory (spec P)."""

from __future__ import annotations

import array
import http.client
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import ssl as twisted_ssl
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IHandshakeListener,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import LogLevel, formatEvent
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import TimeoutFactory
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.protocols.wire import Echo
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer

from tcpsvc import Server, ServerFactory, WhereToListen
from tests.support import LOOPBACK, PATIENCE, in_thread, the_reactor, turn, until
from tests.tls import client_context, make_certificate, tls_endpoint


class Errors:
    """An on_handler_error that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, type[BaseException]]] = []
        self.server: Any = None
        self.live: list[int] = []

    def report(self, address: Any, failure: Failure) -> None:
        assert failure.type is not None
        self.seen.append((address, failure.type))
        if self.server is not None:
            self.live.append(self.server.num_connections)

    @property
    def types(self) -> list[type[BaseException]]:
        return [kind for _, kind in self.seen]


@pytest.fixture
def errors() -> Errors:
    """What on_handler_error has heard."""
    return Errors()


@pytest.fixture
def serve_protocol(serve: Any, errors: Errors) -> Any:
    """``await serve_protocol(protocol or factory, **options)``."""

    async def serve_protocol(protocol: Any, **options: Any) -> Any:
        factory = protocol
        if isinstance(protocol, type) and issubclass(protocol, Protocol):
            factory = Factory.forProtocol(protocol)

        def on_handler_error(address: Any, failure: Failure) -> None:
            errors.report(address, failure)

        options.setdefault("on_handler_error", on_handler_error)
        server = await serve(factory, create=Server.create_protocol, **options)
        errors.server = server
        return server

    return serve_protocol


def ended(client: Any) -> bytes:
    """What a client read until its connection ended, in whichever way."""
    got = b""
    try:
        while data := client.socket.recv(65536):
            got += data
    except ConnectionResetError:
        pass
    return got


# P1: the protocol is the handler


@ensureDeferred
async def test_the_handler_is_finished_at_connection_lost(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P1: until then the slot is taken and the handler runs."""
    lost: list[Failure] = []

    class Once(Protocol):
        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)
            self.transport.loseConnection()

        def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
            lost.append(reason)
            assert server.num_connections == 1

    server = await serve_protocol(Once)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    (described,) = server.describe()["connections"]
    assert described["handler"] == "running"
    client.send(b"hello")
    assert await in_thread(client.read_all) == b"hello"
    await until(lambda: server.num_connections == 0)
    assert [reason.type for reason in lost] == [ConnectionDone]
    assert server.describe()["counters"]["finished"] == 1
    assert errors.seen == []


class Boom(Exception):
    """What the protocols here raise."""


class Raising(Protocol):
    """Raises in the method of the name."""

    where = ""

    def _maybe(self, method: str) -> None:
        if method in self.where:
            raise Boom(method)

    def makeConnection(self, transport: Any) -> None:
        self._maybe("makeConnection")
        super().makeConnection(transport)

    def connectionMade(self) -> None:
        self._maybe("connectionMade")

    def dataReceived(self, data: bytes) -> None:
        self._maybe("dataReceived")

    def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
        self._maybe("connectionLost")


@ensureDeferred
@pytest.mark.parametrize(
    "method", ["makeConnection", "connectionMade", "dataReceived", "connectionLost"]
)
async def test_what_a_protocol_raises_is_a_handler_error(
    method: str, serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P1, E1: reported once, with the address, after the slot is free; the
    connection ends and the server goes on."""

    class Here(Raising):
        where = method

    server = await serve_protocol(Here)
    for number in (1, 2):
        client = connect(server)
        address = IPv4Address("TCP", *client.socket.getsockname())
        client.send(b"x")
        if method == "connectionLost":
            client.close()
        else:
            assert await in_thread(ended, client) == b""
        await until(lambda n=number: len(errors.seen) == n)
        assert errors.seen[-1] == (address, Boom)
    assert errors.live == [0, 0]
    assert server.describe()["counters"]["failed"] == 2
    assert not server.is_closed


@ensureDeferred
@pytest.mark.parametrize("method", ["makeConnection", "connectionMade"])
async def test_a_connection_whose_make_connection_raised_is_aborted(
    method: str, serve_protocol: Any, connect: Any
) -> None:
    """P2: Twisted leaves it open and reading."""

    class Here(Raising):
        where = method

    server = await serve_protocol(Here)
    client = connect(server)
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read_all)
    await until(lambda: server.num_connections == 0)


class BrokenProducer:
    """What an application registers; each method of ``where`` raises."""

    def __init__(self, where: str) -> None:
        self._where = where

    def _raise(self, here: str) -> None:
        if here in self._where.split():
            raise Boom(here)

    def resumeProducing(self) -> None:
        self._raise("resume")

    def pauseProducing(self) -> None:
        """It has nothing."""

    def stopProducing(self) -> None:
        self._raise("stop")


@ensureDeferred
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("where", ["stop", "resume", "resume stop"])
async def test_what_a_producer_raises_is_a_handler_error_and_keeps_no_slot(
    where: str,
    end: str,
    streaming: bool,
    serve_protocol: Any,
    connect: Any,
    errors: Errors,
    logs: Any,
) -> None:
    """P1, A5: Twisted leaves the socket open when stopProducing raises."""

    class Produces(Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            producer: Any = BrokenProducer(where)
            self.transport.registerProducer(producer, streaming)
            if streaming and "resume" in where:
                producer.pauseProducing()
                self.transport.producerPaused = True
            self.transport.write(b"x")

    server = await serve_protocol(Produces)
    for number in (1, 2):
        client = connect(server)
        if "resume" not in where:
            assert await in_thread(client.read, 1) == b"x"
            getattr(client, end)()
        else:
            await in_thread(ended, client)
        await until(lambda n=number: len(errors.seen) == n)
    assert errors.types == [Boom, Boom]
    assert errors.live == [0, 0]
    server.invariant()
    texts = logs.texts(LogLevel.critical)
    assert not [text for text in texts if "Unhandled" in text]
    logs.take(LogLevel.critical)


@ensureDeferred
async def test_a_producer_that_raises_keeps_no_server_from_closing(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """X3: the other connections are closed too."""

    class Produces(Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            self.transport.registerProducer(BrokenProducer("stop"), True)

    server = await serve_protocol(Produces)
    clients = [connect(server) for _ in range(3)]
    await until(lambda: server.num_connections == len(clients))
    await server.close(close_existing_connections=True)
    assert [await in_thread(ended, client) for client in clients] == [b""] * 3
    await server.close_finished_and_handlers_determined()
    assert errors.types == [Boom] * 3


@ensureDeferred
async def test_another_protocol_in_the_place_of_the_first_keeps_no_slot(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P1: it is told of the end, and the handler is over with it."""
    told: list[Failure] = []

    class Second(Protocol):
        def connectionLost(self, reason: Failure = connectionDone) -> None:
            told.append(reason)

    class First(Protocol):
        def dataReceived(self, data: bytes) -> None:
            assert self.transport is not None
            second = Second()
            self.transport.protocol = second
            second.makeConnection(self.transport)
            self.transport.write(data)

    server = await serve_protocol(First)
    client = connect(server)
    client.send(b"x")
    assert await in_thread(client.read, 1) == b"x"
    client.close()
    await until(lambda: server.num_connections == 0)
    assert [reason.type for reason in told] == [ConnectionDone]
    assert errors.seen == []


@ensureDeferred
async def test_only_the_first_error_counts_and_the_later_is_logged(
    serve_protocol: Any, connect: Any, errors: Errors, logs: Any
) -> None:
    """P1, E4: dataReceived and then connectionLost."""

    class Both(Raising):
        where = "dataReceived connectionLost"

    server = await serve_protocol(Both)
    client = connect(server)
    client.send(b"x")
    await in_thread(ended, client)
    await until(lambda: server.num_connections == 0)
    assert errors.types == [Boom]
    counters = server.describe()["counters"]
    assert (counters["failed"], counters["later_errors"]) == (1, 1)
    (later,) = logs.take(LogLevel.critical)
    assert later["log_failure"].type is Boom


@ensureDeferred
async def test_a_raising_protocol_closes_a_server_that_was_told_raise(
    serve_protocol: Any, connect: Any
) -> None:
    """P1, E2: the listener, not the other connections."""

    class Here(Raising):
        where = "dataReceived"

    server = await serve_protocol(Here, on_handler_error="raise")
    failed = server.failed()
    other, client = connect(server), connect(server)
    await until(lambda: server.num_connections == 2)
    client.send(b"x")
    with pytest.raises(Boom):
        await failed
    assert server.is_closed
    assert server.num_connections == 1
    other.close()
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_an_extraordinary_reason_is_a_handler_error(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P1: whatever ended the connection, if it is no ordinary loss."""
    reasons: list[Failure] = []

    class Odd(Protocol):
        def dataReceived(self, data: bytes) -> None:
            self.transport.connectionLost(Failure(Boom("odd")))

        def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
            reasons.append(reason)

    server = await serve_protocol(Odd)
    client = connect(server)
    client.send(b"x")
    await in_thread(ended, client)
    await until(lambda: server.num_connections == 0)
    assert [reason.type for reason in reasons] == [Boom]
    assert errors.types == [Boom]


@ensureDeferred
@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("client closes", ConnectionDone),
        ("client resets", ConnectionLost),
        ("server loses", ConnectionDone),
        ("server aborts", ConnectionAborted),
    ],
)
async def test_an_ordinary_reason_is_none(
    end: str, kind: type, serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P1: ConnectionDone, ConnectionLost, ConnectionAborted."""
    reasons: list[Failure] = []

    class Ending(Protocol):
        def dataReceived(self, data: bytes) -> None:
            if end == "server loses":
                self.transport.loseConnection()
            elif end == "server aborts":
                self.transport.abortConnection()

        def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
            reasons.append(reason)

    server = await serve_protocol(Ending)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    client.send(b"x")
    if end == "client closes":
        client.close()
    elif end == "client resets":
        client.reset()
    await until(lambda: server.num_connections == 0)
    assert [reason.type for reason in reasons] == [kind]
    assert errors.seen == []
    assert server.describe()["counters"]["failed"] == 0


def tls_place(tmp_path: Path) -> Any:
    """A TLS endpoint on a free port."""
    return WhereToListen.of_endpoint(tls_endpoint(tmp_path))


@ensureDeferred
async def test_a_producer_that_raises_behind_tls_keeps_no_slot(
    serve_protocol: Any, connect: Any, tmp_path: Path, logs: Any
) -> None:
    """A5: it is TLS's error there, and logged as errors of handlers are."""

    class Produces(Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            self.transport.registerProducer(BrokenProducer("stop"), True)
            self.transport.write(b"x")

    server = await serve_protocol(Produces, where=tls_place(tmp_path))

    def come_and_go(client: Any) -> None:
        client.socket = client_context().wrap_socket(client.socket)
        assert client.read(1) == b"x"
        client.reset()

    for _ in range(3):
        await in_thread(come_and_go, connect(server))
        await until(lambda: server.num_connections == 0)
    events = logs.take(LogLevel.critical)
    assert [bool(event.get("log_failure")) for event in events] == [True, False, False]
    assert "in the connection of" in formatEvent(events[0])
    server.invariant()


@ensureDeferred
async def test_tls_errors_are_ordinary(
    serve_protocol: Any, connect: Any, errors: Errors, tmp_path: Path
) -> None:
    """P1: garbage, a plain HTTP request, a client that believes nobody, one that
    leaves without a word."""
    server = await serve_protocol(Echo, where=tls_place(tmp_path))
    for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"x" * 512):
        client = connect(server)
        client.send(garbage)
        await in_thread(ended, client)
    for leave in ("close", "reset"):
        client = connect(server)
        client.send(b"\x16\x03")
        getattr(client, leave)()

    def believe_nobody(client: Any) -> None:
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(client.socket, server_hostname="127.0.0.1")

    await in_thread(believe_nobody, connect(server))

    def talk_and_cut(client: Any) -> bytes:
        tls = client_context().wrap_socket(client.socket)
        tls.sendall(b"hello")
        got = bytes(tls.recv(5))
        # No close_notify.
        raw = socket.socket(fileno=tls.detach())
        raw.close()
        return got

    assert await in_thread(talk_and_cut, connect(server)) == b"hello"
    await until(lambda: server.num_connections == 0)
    assert server.describe()["counters"]["accepted"] == 6
    assert errors.seen == []


# P2


@ensureDeferred
async def test_make_connection_runs_at_accept(
    serve_protocol: Any, connect: Any
) -> None:
    """P2: in the turn of buildProtocol, as in Twisted; H1 does not apply. The slot
    is taken by then."""
    happened: list[str] = []

    class Watch(Protocol):
        def connectionMade(self) -> None:
            happened.append(f"made {server.num_connections}")

    class Watching(Factory):
        def buildProtocol(self, addr: Any) -> Protocol:
            happened.append(f"built for {type(addr).__name__}")
            the_reactor().callLater(0, happened.append, "next turn")
            return Watch()

    server = await serve_protocol(Watching())
    connect(server)
    await until(lambda: "next turn" in happened)
    assert happened == ["built for IPv4Address", "made 1", "next turn"]


class Refusing(Factory):
    """Builds nothing, or fails to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked = 0
        self._error = error

    def buildProtocol(self, addr: Any) -> None:  # type: ignore[override]
        self.asked += 1
        if self._error is not None:
            raise self._error


@ensureDeferred
@pytest.mark.parametrize("early", [b"", b"early" * 1000])
async def test_a_client_without_a_protocol_is_refused_with_fin(
    early: bytes, serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P2: buildProtocol returned None; no slot is kept, nothing is reported."""
    factory = Refusing()
    server = await serve_protocol(factory, max_connections=1)
    for _ in range(3):
        client = connect(server)
        client.send(early)
        assert await in_thread(client.read_all) == b""
    assert factory.asked == 3
    assert server.num_connections == 0
    counters = server.describe()["counters"]
    assert (counters["refused"], counters["accepted"]) == (3, 0)
    assert errors.seen == []


@implementer(IStreamServerEndpoint)
class TimeoutEndpoint:
    """An endpoint that wraps the factory in a TimeoutFactory."""

    def listen(self, factory: Any) -> Deferred[Any]:
        inner = TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1")
        result: Deferred[Any] = inner.listen(TimeoutFactory(factory, None))
        return result


@ensureDeferred
@pytest.mark.parametrize("wrapping", ["tls", "haproxy", "timeout"])
async def test_a_client_without_a_protocol_is_refused_behind_wrappers(
    wrapping: str,
    serve_protocol: Any,
    connect: Any,
    errors: Errors,
    tmp_path: Path,
    logs: Any,
) -> None:
    """P2: Twisted leaves such a client hanging."""
    where: Any = {
        "tls": lambda: tls_place(tmp_path),
        "haproxy": lambda: WhereToListen.of_endpoint(
            "haproxy:tcp:0:interface=127.0.0.1"
        ),
        "timeout": lambda: WhereToListen.of_endpoint(TimeoutEndpoint()),
    }[wrapping]()
    server = await serve_protocol(Refusing(), where=where)
    assert await in_thread(ended, connect(server)) == b""
    assert server.num_connections == 0
    assert errors.seen == []
    assert logs.texts(LogLevel.error) == []


@ensureDeferred
async def test_a_build_protocol_that_raises_is_a_handler_error(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P1, E4: no error is lost; the client is ended and no slot is kept."""
    server = await serve_protocol(Refusing(Boom()), max_connections=1)
    for _ in range(2):
        assert await in_thread(ended, connect(server)) == b""
    await until(lambda: server.num_connections == 0)
    assert errors.types == [Boom, Boom]
    server.invariant()


@ensureDeferred
async def test_a_held_client_without_a_protocol_keeps_no_slot(connect: Any) -> None:
    """P2, A1: in the bare factory, where it is asked for when a slot is free."""
    held: list[Protocol] = []

    class Second(Factory):
        def buildProtocol(self, addr: Any) -> Protocol | None:
            if not held:
                held.append(Echo())
                return held[0]
            return None

    factory = ServerFactory.of_protocols(
        Second(), on_handler_error="raise", max_connections=1
    )
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    clients = [connect(port.getHost()) for _ in range(3)]
    await until(lambda: factory.describe()["held"] == 2)
    clients[0].close()
    for client in clients[1:]:
        assert await in_thread(client.read_all) == b""
    await until(lambda: factory.num_connections == 0)
    factory.invariant()
    assert not factory.is_closed, "None is no error"
    await port.stopListening()


@ensureDeferred
async def test_do_start_and_do_stop_reach_the_factory(serve_protocol: Any) -> None:
    """P2: once each, around the life of the port."""
    happened: list[str] = []

    class Watching(Factory):
        protocol = Echo
        noisy = False

        def startFactory(self) -> None:
            happened.append("start")

        def stopFactory(self) -> None:
            happened.append("stop")

    server = await serve_protocol(Watching())
    assert happened == ["start"]
    closing = server.close()
    await closing
    assert happened == ["start", "stop"]
    # By way of an endpoint, whose port is Twisted's.
    where = WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    server = await serve_protocol(Watching(), where=where)
    assert happened == ["start", "stop", "start"]
    await server.close()
    assert happened == ["start", "stop", "start", "stop"]


@ensureDeferred
async def test_a_factory_whose_do_stop_raises_is_closed_all_the_same(
    serve_protocol: Any, logs: Any
) -> None:
    """P2, X1: close() fires; the error is logged."""

    class Unwilling(Factory):
        protocol = Echo

        def stopFactory(self) -> None:
            raise Boom

    server = await serve_protocol(Unwilling())
    listening = server.listening_socket
    await server.close()
    assert listening.fileno() == -1
    (line,) = logs.take(LogLevel.critical)
    assert line["log_failure"].type is Boom
    await server.close_finished_and_handlers_determined()


@ensureDeferred
@pytest.mark.parametrize("tls", [False, True])
async def test_closing_existing_connections_is_connection_done(
    tls: bool, serve_protocol: Any, connect: Any, errors: Errors, tmp_path: Path
) -> None:
    """P2, X3: and the client reads what the kernel took, then EOF."""
    reasons: list[Failure] = []

    class Hello(Protocol):
        def connectionMade(self) -> None:
            self.transport.write(b"hello")

        def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
            reasons.append(reason)

    where = tls_place(tmp_path) if tls else LOOPBACK
    server = await serve_protocol(Hello, where=where)
    client = connect(server)
    if tls:

        def talk() -> Any:
            wrapped = client_context().wrap_socket(
                client.socket, suppress_ragged_eofs=True
            )
            return wrapped, wrapped.recv(5)

        client.socket, got = await in_thread(talk)
        assert got == b"hello"
    await until(lambda: server.num_connections == 1)
    for _ in range(5):
        await turn()
    await server.close(close_existing_connections=True)
    assert server.num_connections == 0
    assert [reason.type for reason in reasons] == [ConnectionDone]
    assert await in_thread(client.read_all) == (b"" if tls else b"hello")
    assert errors.seen == []


# What protocols may be


@ensureDeferred
async def test_a_half_closeable_protocol_is_told_of_the_half_close(
    serve_protocol: Any, connect: Any
) -> None:
    """P1: IHalfCloseableProtocol; others lose their connection at FIN."""

    @implementer(IHalfCloseableProtocol)
    class Half(Protocol):
        def readConnectionLost(self) -> None:
            self.transport.write(b"after your FIN")
            self.transport.loseConnection()

        def writeConnectionLost(self) -> None:
            """It is not asked for here."""

    server = await serve_protocol(Half)
    client = connect(server)
    assert await in_thread(client.finish) == b"after your FIN"
    plain = await serve_protocol(Echo)
    client = connect(plain)
    assert await in_thread(client.finish) == b""


@ensureDeferred
async def test_an_error_in_a_half_close_is_a_handler_error(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P1, E4: no error of the protocol is lost."""

    @implementer(IHalfCloseableProtocol)
    class Half(Protocol):
        def readConnectionLost(self) -> None:
            raise Boom

        def writeConnectionLost(self) -> None:
            """It is not asked for here."""

    server = await serve_protocol(Half)
    client = connect(server)
    client.shut()
    await in_thread(ended, client)
    await until(lambda: server.num_connections == 0)
    assert errors.types == [Boom]


@ensureDeferred
async def test_a_handshake_listener_hears_of_the_handshake(
    serve_protocol: Any, connect: Any, tmp_path: Path
) -> None:
    """P1: IHandshakeListener, behind a TLS endpoint."""

    @implementer(IHandshakeListener)
    class Shaken(Protocol):
        def handshakeCompleted(self) -> None:
            self.transport.write(b"shaken")
            self.transport.loseConnection()

    server = await serve_protocol(Shaken, where=tls_place(tmp_path))

    def talk(client: Any) -> bytes:
        with client_context().wrap_socket(client.socket) as tls:
            return bytes(tls.recv(100))

    assert await in_thread(talk, connect(server)) == b"shaken"


@ensureDeferred
async def test_descriptors_reach_a_descriptor_receiver(
    serve_protocol: Any, connect: Any, tmp_path: Path
) -> None:
    """P1: IFileDescriptorReceiver, on a UNIX socket."""
    received: list[int] = []

    @implementer(IFileDescriptorReceiver)
    class Receiver(Protocol):
        def fileDescriptorReceived(self, descriptor: int) -> None:
            received.append(descriptor)

    where = WhereToListen.of_file(tmp_path / "s")
    server = await serve_protocol(Receiver, where=where)
    client = connect(server)
    reading, writing = os.pipe()
    try:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writing]))
        client.socket.sendmsg([b"x"], [rights])
        await until(lambda: received)
        os.write(received[0], b"through the pipe")
        assert os.read(reading, 100) == b"through the pipe"
    finally:
        for descriptor in (reading, writing, *received):
            os.close(descriptor)


@ensureDeferred
async def test_a_descriptor_may_end_the_connection_that_it_came_by(
    serve_protocol: Any, connect: Any, errors: Errors, tmp_path: Path
) -> None:
    """X5: what came with it is closed, and nothing is delivered any more."""
    received: list[Any] = []

    @implementer(IFileDescriptorReceiver)
    class Receiver(Protocol):
        def fileDescriptorReceived(self, descriptor: int) -> None:
            os.close(descriptor)
            received.append(descriptor)
            server.close(close_existing_connections=True)

        def dataReceived(self, data: bytes) -> None:
            received.append(data)

    server = await serve_protocol(Receiver, where=WhereToListen.of_file(tmp_path / "s"))
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    reading, writing = os.pipe()
    pair = array.array("i", [reading, writing])
    client.socket.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pair)])
    os.close(writing)
    await until(lambda: server.num_connections == 0)
    os.set_blocking(reading, False)
    assert os.read(reading, 1) == b""  # Nobody has the other end.
    os.close(reading)
    assert len(received) == 1
    assert errors.seen == []


@ensureDeferred
async def test_a_protocol_may_start_tls_in_the_middle(
    serve_protocol: Any, connect: Any, errors: Errors, tmp_path: Path
) -> None:
    """P1: startTLS on the transport; the protocol's errors are seen after it too."""
    pem = make_certificate(tmp_path).read_text()
    certificate = twisted_ssl.PrivateCertificate.loadPEM(pem)

    class StartTLS(LineReceiver):
        def lineReceived(self, line: bytes) -> None:
            if line == b"STARTTLS":
                self.sendLine(b"go")
                self.transport.startTLS(certificate.options())  # type: ignore[union-attr]
            elif line == b"fail":
                raise Boom
            else:
                self.sendLine(b"secret " + line)

        def connectionLost(self, reason: Failure = connectionDone) -> None:
            told.append(reason)

    told: list[Failure] = []
    server = await serve_protocol(StartTLS)

    def talk(client: Any) -> bytes:
        client.send(b"STARTTLS\r\n")
        assert client.read(4) == b"go\r\n"
        client.socket = client_context().wrap_socket(client.socket)
        client.send(b"hello\r\n")
        got: bytes = client.read(14)
        client.send(b"fail\r\n")
        with pytest.raises((ConnectionResetError, ssl.SSLError, AssertionError)):
            assert client.socket.recv(1)
        return got

    client = connect(server)
    assert await in_thread(talk, client) == b"secret hello\r\n"
    await until(lambda: server.num_connections == 0)
    assert errors.types == [Boom]
    assert len(told) == 1


@ensureDeferred
async def test_a_tls_factory_may_be_the_factory(
    serve_protocol: Any, connect: Any, errors: Errors, tmp_path: Path
) -> None:
    """P1: a wrapping factory inside ours, and X3 through it."""
    pem = make_certificate(tmp_path).read_text()
    options = twisted_ssl.PrivateCertificate.loadPEM(pem).options()
    factory = TLSMemoryBIOFactory(options, False, Factory.forProtocol(Echo))
    server = await serve_protocol(factory)

    def talk(client: Any) -> bytes:
        client.socket = client_context().wrap_socket(client.socket)
        client.send(b"hello")
        got: bytes = client.read(5)
        return got

    client = connect(server)
    assert await in_thread(talk, client) == b"hello"
    await server.close(close_existing_connections=True)
    assert await in_thread(client.read_all) == b""
    assert server.num_connections == 0
    assert errors.seen == []


# twisted.web


class Hello(Resource):
    isLeaf = True

    def render_GET(self, request: Any) -> bytes:
        return b"hello " + request.path

    def render_POST(self, request: Any) -> bytes:
        return b"%d" % len(request.content.read())


class Wait(Resource):
    """Answers when told to."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Any] = []
        self.lost: list[Failure] = []

    def render_GET(self, request: Any) -> Any:
        self.waiting.append(request)
        request.notifyFinish().addErrback(self.lost.append)
        return NOT_DONE_YET


@ensureDeferred
async def test_a_web_site_is_served(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P: twisted.web's Site, asked by a real HTTP client, on one connection that it
    keeps alive."""
    server = await serve_protocol(Site(Hello()))

    def ask() -> list[tuple[int, bytes]]:
        web = http.client.HTTPConnection("127.0.0.1", server.listening_on, PATIENCE)
        answers = []
        try:
            for method, path, body in [
                ("GET", "/a", None),
                ("POST", "/", b"x" * 300_000),
                ("GET", "/b", None),
            ]:
                web.request(method, path, body)
                answer = web.getresponse()
                answers.append((answer.status, answer.read()))
        finally:
            web.close()
        return answers

    assert await in_thread(ask) == [
        (200, b"hello /a"),
        (200, b"300000"),
        (200, b"hello /b"),
    ]
    await until(lambda: server.num_connections == 0)
    assert server.describe()["counters"]["accepted"] == 1
    assert errors.seen == []


@ensureDeferred
async def test_a_web_site_keeps_to_the_limit(serve_protocol: Any, connect: Any) -> None:
    """P, A1: requests beyond it wait, and are answered."""
    server = await serve_protocol(Site(Hello()), max_connections=2)
    peak = []

    def ask(number: int) -> bytes:
        web = http.client.HTTPConnection("127.0.0.1", server.listening_on, PATIENCE)
        try:
            web.request("GET", f"/{number}", headers={"Connection": "close"})
            peak.append(server.num_connections)
            return web.getresponse().read()
        finally:
            web.close()

    asking = [in_thread(ask, number) for number in range(8)]
    assert [await a for a in asking] == [b"hello /%d" % n for n in range(8)]
    assert max(peak) <= 2


@ensureDeferred
async def test_a_web_request_in_progress_sees_the_server_close(
    serve_protocol: Any, connect: Any, errors: Errors
) -> None:
    """P2, X3: its notifyFinish fails with ConnectionDone, and the client is told."""
    wait = Wait()
    server = await serve_protocol(Site(wait))
    client = connect(server)
    client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: wait.waiting)
    await server.close(close_existing_connections=True)
    assert await in_thread(client.read_all) == b""
    assert [failure.type for failure in wait.lost] == [ConnectionDone]
    assert errors.seen == []
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_a_web_request_in_progress_outlives_a_plain_close(
    serve_protocol: Any, connect: Any
) -> None:
    """P, X1: existing connections go on."""
    wait = Wait()
    server = await serve_protocol(Site(wait))
    client = connect(server)
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    await until(lambda: wait.waiting)
    await server.close()
    over = server.close_finished_and_handlers_determined()
    assert not over.called
    wait.waiting[0].write(b"at last")
    wait.waiting[0].finish()
    answer = await in_thread(client.read_all)
    assert answer.startswith(b"HTTP/1.0 200 OK") and answer.endswith(b"at last")
    client.close()
    await over


@ensureDeferred
async def test_a_web_site_behind_tls(serve_protocol: Any, tmp_path: Path) -> None:
    """P: the same factory on a TLS endpoint."""
    server = await serve_protocol(Site(Hello()), where=tls_place(tmp_path))
    port = server.listening_on.port

    def ask() -> bytes:
        web = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=PATIENCE, context=client_context()
        )
        try:
            web.request("GET", "/tls")
            return web.getresponse().read()
        finally:
            web.close()

    assert await in_thread(ask) == b"hello /tls"
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_what_is_no_factory_is_refused() -> None:
    """Names: a TypeError that names it, before anything is bound."""
    for wrong in (Protocol, object(), None):
        with pytest.raises(TypeError, match="factory="):
            await Server.create_protocol(LOOPBACK, wrong, on_handler_error="raise")  # type: ignore[arg-type]
