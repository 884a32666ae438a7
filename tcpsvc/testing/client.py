"""
A client on a real socket.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol
from zope.interface import implementer

from tcpsvc._waiters import Event
from tcpsvc.reader import Reader
from tcpsvc.settings import READER_BUFFER_SIZE


@implementer(IHalfCloseableProtocol)
class Client(Protocol):
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
        """As :meth:`reset`: at once."""
        return self.reset()

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

    def read_first(self) -> None:
        """The reactor reads."""

    def go_on_reading(self) -> None:
        """It does."""

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
