"""
A server without sockets and without a reactor, and its clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IProtocolFactory,
    ITCPTransport,
)
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from tcpsvc.factory import ServerFactory
from tcpsvc.handler import OnHandlerError
from tcpsvc.where import LOCALHOST


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
            self._client.was_reset = True
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
            self._client.has_eof = True
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
            self._client.has_eof = True
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
            self._read_once()
        self.connectionLost(Failure(ConnectionLost()))

    def _read(self) -> None:
        while self._unread and self._is_reading and self.connected:
            self._read_once()
        if self._peer_eof and self._is_reading and self.connected:
            self._is_reading = False
            if IHalfCloseableProtocol.providedBy(self.protocol):
                self.protocol.readConnectionLost()
            else:
                self.connectionLost(Failure(ConnectionDone()))

    def _read_once(self) -> None:
        data = bytes(self._unread[:65536])
        del self._unread[:65536]
        self.bytes_in += len(data)
        self.protocol.dataReceived(data)


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
