"""
For tests of your own handlers.

Without sockets and without a reactor, give bytes, see bytes, advance a clock::

    from tcpsvc.testing import MemoryServer

    class GreetTests(SynchronousTestCase):
        def test_greets_by_name(self):
            client = MemoryServer(greet).connect()
            client.send(b"Bob\\n")
            self.assertEqual(client.received, b"What is your name?\\nHello, Bob!\\n")
            self.assertTrue(client.is_closed)

With a server on a real port, and a clean reactor afterwards::

    class GreetOnAPortTests(TestCase):
        async def test_greets_by_name(self):
            server = await serve(self, greet)
            client = await connect(self, server)
            client.write(b"Bob\\n")
            self.assertEqual(await client.reader.readline(), b"What is your name?\\n")

Both work in pytest too; there, :func:`serving` and :func:`connected` close what
they opened at the end of an ``async with``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    UNIXClientEndpoint,
    connectProtocol,
)
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IProtocolFactory,
    ITCPTransport,
)
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from tcpsvc._waiters import Event
from tcpsvc.factory import ServerFactory
from tcpsvc.handler import OnHandlerError, log_error
from tcpsvc.options import READER_BUFFER_SIZE
from tcpsvc.reader import Reader
from tcpsvc.server import Server
from tcpsvc.where import LOCALHOST, WhereToListen

__all__ = [
    "Client",
    "MemoryClient",
    "MemoryServer",
    "MemoryTransport",
    "connect",
    "connected",
    "serve",
    "serving",
]


@implementer(ITCPTransport)
class MemoryTransport:
    """
    The server's end of a connection that is all in memory. What is written
    reaches the client at once, unless the client has stopped reading.

    :param client: the other end.
    :param host: the server's address.
    :param peer: the client's address.
    :ivar bytes_in: bytes that the protocol has received.
    :ivar bytes_out: bytes that the client has taken.
    """

    def __init__(self, client: MemoryClient, host: Any, peer: Any) -> None:
        self._client = client
        self._host = host
        self._peer = peer
        self._producer: Any = None
        self._unsent = bytearray()
        self._unread = bytearray()
        self._peer_eof = False
        self._is_reading = True
        self._write_side = "open"
        self.disconnecting = False
        self.connected = True
        self.bytes_in = 0
        self.bytes_out = 0
        self.protocol: Any = None

    @property
    def unsent(self) -> int:
        """How many bytes the client has not taken yet."""
        return len(self._unsent)

    # ITransport

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""
        if not isinstance(data, bytes):
            raise TypeError(f"data={data!r:.40} is not bytes")
        if self.connected and self._write_side == "open":
            self._unsent += data
            self.deliver()

    def writeSequence(self, data: Any) -> None:
        """Send pieces of bytes to the client."""
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        """Close when all is sent."""
        self.disconnecting = True
        self._is_reading = False
        self.deliver()

    def abortConnection(self) -> None:
        """Close with a reset."""
        if self.connected:
            self._unsent.clear()
            self._client._saw("reset")
            self.connectionLost(Failure(ConnectionAborted()))

    def loseWriteConnection(self) -> None:
        """Close the write side when all is sent."""
        if self._write_side == "open":
            self._write_side = "closing"
            self.deliver()

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over, at both ends."""
        if self.connected:
            self.connected = False
            self._client._saw("eof")
            self.protocol.connectionLost(reason)

    def getPeer(self) -> Any:
        """The client's address."""
        return self._peer

    def getHost(self) -> Any:
        """The server's address."""
        return self._host

    # IConsumer

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Ask a producer for more whenever everything is sent."""
        if self._producer is not None:
            raise RuntimeError(f"{self._producer!r} is registered already")
        if streaming:
            raise ValueError("only a pull producer (streaming=False) is supported")
        self._producer = producer
        producer.resumeProducing()

    def unregisterProducer(self) -> None:
        """Ask it no more."""
        self._producer = None

    # IPushProducer

    def pauseProducing(self) -> None:
        """Deliver nothing more to the protocol for now."""
        self._is_reading = False

    def resumeProducing(self) -> None:
        """Deliver what has come, and what comes."""
        if not self.disconnecting:
            self._is_reading = True
            self._read()

    def stopProducing(self) -> None:
        """Close."""
        self.loseConnection()

    # ITCPTransport

    def setTcpNoDelay(self, enabled: bool) -> None:
        """There is no delay."""

    def getTcpNoDelay(self) -> bool:
        """There is no delay."""
        return True

    def setTcpKeepAlive(self, enabled: bool) -> None:
        """There is nothing to keep alive."""

    def getTcpKeepAlive(self) -> bool:
        """There is nothing to keep alive."""
        return False

    # The client's side.

    def deliver(self) -> None:
        """Give the client what is unsent, if it reads."""
        if not self.connected:
            return
        if self._unsent and self._client.is_reading:
            data = bytes(self._unsent)
            self._unsent.clear()
            self.bytes_out += len(data)
            self._client._received += data
            if self._producer is not None:
                self._producer.resumeProducing()
        if self._unsent or not self.connected:
            return
        if self._write_side == "closing":
            self._write_side = "closed"
            self._client._saw("eof")
            if IHalfCloseableProtocol.providedBy(self.protocol):
                self.protocol.writeConnectionLost()
        if self.disconnecting:
            self.connectionLost(Failure(ConnectionDone()))

    def receive(self, data: bytes) -> None:
        """The client has sent bytes."""
        self._unread += data
        self._read()

    def receive_eof(self) -> None:
        """The client has sent FIN."""
        self._peer_eof = True
        self._read()

    def receive_reset(self) -> None:
        """The client has sent RST: what came before it is read first."""
        while self._unread and self.connected:
            data = bytes(self._unread[:65536])
            del self._unread[:65536]
            self.bytes_in += len(data)
            self.protocol.dataReceived(data)
        self.connectionLost(Failure(ConnectionLost()))

    def _read(self) -> None:
        while self._unread and self._is_reading and self.connected:
            data = bytes(self._unread[:65536])
            del self._unread[:65536]
            self.bytes_in += len(data)
            self.protocol.dataReceived(data)
        if self._peer_eof and self._is_reading and self.connected:
            self._is_reading = False
            if IHalfCloseableProtocol.providedBy(self.protocol):
                self.protocol.readConnectionLost()
            else:
                self.connectionLost(Failure(ConnectionDone()))


class MemoryClient:
    """
    A client of a :class:`MemoryServer`: give bytes, see bytes.

    :ivar is_reading: whether it takes what the server sends.
    :ivar has_eof: whether the server has closed its write side, or all of it.
    :ivar was_reset: whether the server has aborted the connection.
    """

    def __init__(self, server: MemoryServer, address: Any) -> None:
        self._server = server
        self.address = address
        self.is_reading = True
        self.has_eof = False
        self.was_reset = False
        self._received = bytearray()
        self._transport = MemoryTransport(self, server.address, address)

    def send(self, data: bytes) -> None:
        """Send bytes to the handler, and let it act on them."""
        self._transport.receive(data)
        self._server.clock.advance(0)

    def send_eof(self) -> None:
        """Send FIN: no more from us."""
        self._transport.receive_eof()
        self._server.clock.advance(0)

    def reset(self) -> None:
        """Send RST: we are gone."""
        self._transport.receive_reset()
        self._server.clock.advance(0)

    def stop_reading(self) -> None:
        """Take nothing more: the server's buffers fill."""
        self.is_reading = False

    def resume_reading(self) -> None:
        """Take what has been sent meanwhile, and go on."""
        self.is_reading = True
        self._transport.deliver()
        self._server.clock.advance(0)

    @property
    def received(self) -> bytes:
        """Everything the handler has sent, since the start or the last take."""
        return bytes(self._received)

    def take(self) -> bytes:
        """What :attr:`received` says, which is empty after."""
        taken = self.received
        self._received.clear()
        return taken

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed at both ends."""
        return not self._transport.connected

    def _saw(self, what: str) -> None:
        self.has_eof = True
        if what == "reset":
            self.was_reset = True

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "eof" if self.has_eof else "open"
        return f"<MemoryClient {self.address} {state}, {len(self._received)} received>"


class MemoryServer:
    """
    Runs a handler without sockets and without a reactor.

    Everything happens in the calls of its clients, and when its clock is
    advanced. Beyond ``max_connections`` clients are held, as by
    :class:`tcpsvc.ServerFactory`.

    :param handler: a stream handler, as for :meth:`tcpsvc.Server.create`; or see
        :meth:`of_protocols`.
    :param on_handler_error: as for :meth:`tcpsvc.Server.create`; by default
        errors are collected in :attr:`errors`.
    :param clock: default: a new :class:`twisted.internet.task.Clock`.
    :param address: the server's address.
    :param options: of :class:`tcpsvc.StreamOptions`.

    :ivar clock: advance it to let time pass.
    :ivar factory: the :class:`tcpsvc.ServerFactory`, with its counters.
    :ivar errors: what handlers have raised.
    """

    def __init__(
        self,
        handler: Any,
        *,
        on_handler_error: OnHandlerError | None = None,
        clock: Clock | None = None,
        address: Any = None,
        make_factory: Callable[..., ServerFactory] = ServerFactory.of_streams,
        **options: Any,
    ) -> None:
        self.clock = Clock() if clock is None else clock
        self.address = address or IPv4Address("TCP", LOCALHOST, 8000)
        self.errors: list[BaseException | None] = []
        self._clients = 0
        self.factory = make_factory(
            handler,
            on_handler_error=on_handler_error or self._collect,
            reactor=self.clock,
            clock=self.clock,
            **options,
        )

    @classmethod
    def of_protocols(cls, factory: IProtocolFactory, **options: Any) -> MemoryServer:
        """The same for a protocol factory (:meth:`tcpsvc.Server.create_protocol`)."""
        return cls(factory, make_factory=ServerFactory.of_protocols, **options)

    def connect(self, address: Any = None, *, is_reading: bool = True) -> MemoryClient:
        """
        A new client. Its handler has started when this returns, if there is a
        slot.

        :param address: the client's address; by default each has another port.
        :param is_reading: whether it takes what the server sends (default), or
            does not until its ``resume_reading``.
        """
        self._clients += 1
        if address is None:
            address = IPv4Address("TCP", LOCALHOST, 50_000 + self._clients)
        client = MemoryClient(self, address)
        client.is_reading = is_reading
        protocol: Any = self.factory.buildProtocol(address)
        client._transport.protocol = protocol
        protocol.makeConnection(client._transport)
        self.clock.advance(0)
        return client

    def _collect(self, _: object, failure: Failure) -> None:
        self.errors.append(failure.value)


class _HasCleanup(Protocol):
    """A trial or unittest TestCase."""

    def addCleanup(self, function: Any, /, *args: Any, **kwargs: Any) -> Any: ...


def serve(
    test_case: _HasCleanup,
    handler: Any,
    *,
    where: WhereToListen[Any, Any] | None = None,
    create: Callable[..., Deferred[Server[Any, Any]]] = Server.create,
    on_handler_error: OnHandlerError = log_error,
    **options: Any,
) -> Deferred[Server[Any, Any]]:
    """
    Serve on a real port for one test. When the test is over the server and its
    connections are closed and handlers that still run are cancelled.

    :param test_case: the trial ``TestCase``.
    :param handler: what ``create`` takes.
    :param where: default: a free port of the loopback address.
    :param create: default: :meth:`tcpsvc.Server.create`.
    :param on_handler_error: default: errors are logged, so that trial reports
        them (``flushLoggedErrors``).
    :param options: of :class:`tcpsvc.StreamOptions`.
    :returns: a Deferred that fires with the server.
    """
    where = where or WhereToListen.bind_to(LOCALHOST, 0)
    made = create(where, handler, on_handler_error=on_handler_error, **options)

    def clean_up_later(server: Server[Any, Any]) -> Server[Any, Any]:
        test_case.addCleanup(shut_down, server)
        return server

    return made.addCallback(clean_up_later)


def shut_down(server: Server[Any, Any]) -> Deferred[None]:
    """
    Close a server and its connections, and cancel its handlers.

    :returns: a Deferred that fires when the last handler has ended.
    """
    server.close(close_existing_connections=True)
    server.cancel_handlers()
    return server.close_finished_and_handlers_determined()


def connect(
    test_case: _HasCleanup, server: Server[Any, Any], *, reactor: Any = None
) -> Deferred[Client]:
    """
    A client of a server on a real port, for one test; closed when it is over.

    :param test_case: the trial ``TestCase``.
    :param server: the server.
    :returns: a Deferred that fires with the client.
    """

    def clean_up_later(client: Client) -> Client:
        test_case.addCleanup(client.close)
        return client

    return _connect(server, reactor).addCallback(clean_up_later)


@asynccontextmanager
async def serving(handler: Any, **options: Any) -> AsyncIterator[Server[Any, Any]]:
    """
    ``async with serving(handler) as server:`` as :func:`serve`, without a
    ``TestCase``.
    """
    where = options.pop("where", None) or WhereToListen.bind_to(LOCALHOST, 0)
    create = options.pop("create", Server.create)
    options.setdefault("on_handler_error", log_error)
    server = await create(where, handler, **options)
    try:
        yield server
    finally:
        await shut_down(server)


@asynccontextmanager
async def connected(
    server: Server[Any, Any], *, reactor: Any = None
) -> AsyncIterator[Client]:
    """
    ``async with connected(server) as client:`` as :func:`connect`, without a
    ``TestCase``.
    """
    client = await _connect(server, reactor)
    try:
        yield client
    finally:
        await client.close()


def _connect(server: Server[Any, Any], reactor: Any) -> Deferred[Client]:
    if reactor is None:
        from twisted.internet import reactor
    address: Any = server.listening_on_address
    endpoint: Any
    if isinstance(address, UNIXAddress):
        endpoint = UNIXClientEndpoint(reactor, address.name)
    elif ":" in address.host:
        host = "::1" if address.host == "::" else address.host
        endpoint = TCP6ClientEndpoint(reactor, host, address.port)
    else:
        host = LOCALHOST if address.host == "0.0.0.0" else address.host
        endpoint = TCP4ClientEndpoint(reactor, host, address.port)
    made: Deferred[Client] = connectProtocol(endpoint, Client())
    return made


@implementer(IHalfCloseableProtocol)
class Client(TwistedProtocol):
    """
    A client on a real socket.

    :ivar reader: what the server sends, as a :class:`tcpsvc.Reader`.
    :ivar was_reset: whether the connection ended with a reset.
    """

    transport: Any

    def __init__(self) -> None:
        self.reader = Reader(self, READER_BUFFER_SIZE)
        self.was_reset = False
        self._is_paused = False
        self._is_lost = Event()

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self.transport.write(data)

    def write_eof(self) -> None:
        """Send FIN when all is sent; go on reading."""
        self.transport.loseWriteConnection()

    def reset(self) -> Deferred[None]:
        """
        Send RST.

        :returns: a Deferred that fires when the socket is closed.
        """
        self.transport.abortConnection()
        return self.closed()

    def close(self) -> Deferred[None]:
        """
        Close, at once.

        :returns: a Deferred that fires when the socket is closed.
        """
        self.transport.abortConnection()
        return self.closed()

    def closed(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when the socket is closed, by whichever
            side.
        """
        return self._is_lost.wait()

    @property
    def peer(self) -> Any:
        """The server's address."""
        return self.transport.getPeer()

    @property
    def host(self) -> Any:
        """The own address."""
        return self.transport.getHost()

    # IProtocol and its kin.

    def dataReceived(self, data: bytes) -> None:
        self.reader.data_received(data)

    def readConnectionLost(self) -> None:
        self.reader.feed_eof()

    def writeConnectionLost(self) -> None:
        """Our FIN has gone out."""

    def connectionLost(self, reason: Any = None) -> None:
        if reason.check(ConnectionLost):
            self.was_reset = True
        self._is_lost.happen()
        self.reader.feed_eof()

    # What the reader needs.

    #: It is no server.
    draining = False

    def gives_eof_for_drain(self, asked: bool | None) -> bool:
        """Never."""
        return False

    def pause_reading(self) -> None:
        if not self._is_paused and not self._is_lost.has_happened:
            self._is_paused = True
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        if self._is_paused and not self._is_lost.has_happened:
            self._is_paused = False
            if not self.reader.has_eof:
                self.transport.resumeProducing()

    def close_by_reader(self) -> None:
        self.close()
