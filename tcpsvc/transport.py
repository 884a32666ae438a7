"""
What a connection is told by its transport beyond what Twisted tells protocols.

Twisted's transports tell nobody how far they are with sending. But a slow
client's bytes have an age, and a flush has an end, before everything later is
sent too (spec S5, S6). And what a client sent before its reset is to be read
before the socket is closed (S8). The transports of :mod:`tcpsvc.engine` tell a
:class:`Watcher`; so do Twisted's own with what is mixed in here.

This file knows the queue of Twisted's transports (``dataBuffer``, ``offset``,
``_tempDataLen``) and how descriptors come to them
(``_ancillaryLevelSOLSOCKETTypeSCMRIGHTS``), which have no public names (Twisted 24.7 to
26.10).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from twisted.internet import tcp, unix
from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
)
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure

from tcpsvc.log import log

#: Errors of a send that may succeed later.
NO_ROOM = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS})

#: One descriptor of those that come with a message.
_DESCRIPTOR = struct.Struct("i")


class Watcher(Protocol):
    """Who is told: a connection."""

    def blocked(self) -> None:
        """Bytes wait in this process: the kernel has not taken them at once."""

    def sent(self) -> None:
        """The kernel has taken more of them, or all."""

    def losing(self) -> None:
        """The socket is about to be closed, and can still be read."""

    def lost(self, protocol: Any, reason: Failure) -> None:
        """It is closed. To be told to the protocol, which is not told else."""

    def failed(self, failure: Failure) -> bool:
        """The protocol has raised. Returns whether that is dealt with."""

    def unhandled(self, failure: Failure) -> None:
        """Something has raised that nobody deals with: log it."""


def is_dealt_with(watcher: Watcher | None, failure: Failure) -> bool:
    """Whether the watcher deals with what was raised. Else it is logged."""
    if watcher is not None and watcher.failed(failure):
        return True
    log_unhandled(watcher, failure)
    return False


def log_unhandled(watcher: Watcher | None, failure: Failure) -> None:
    """
    Log what nobody deals with: as Twisted does where nobody watches, else as the
    watcher does, since clients can bring it about.
    """
    if watcher is None:
        log.failure("Unhandled Error", failure=failure)
    else:
        watcher.unhandled(failure)


def tells(transport: Any) -> bool:
    """
    Whether a transport has a ``watcher`` of its own. Its class is asked: wrapping
    protocols pass on what the transport below them has.
    """
    return hasattr(type(transport), "watcher")


class Watched:
    """
    Mixed into a server transport of Twisted's: it may have a watcher.

    :ivar watcher: who is told.
    :ivar read_failed: whether it was a failed read that ended the connection: then
        nothing is left to be read.
    :ivar has_eof: whether the client has ended its side before anything of ours.
    :ivar tells_errors: whether the watcher is told what the protocol raises in
        ``dataReceived``.
    """

    watcher: Watcher | None = None
    read_failed = False
    has_eof = False
    tells_errors = False

    if TYPE_CHECKING:
        # What the transport classes have that this is mixed into.
        producer: Any

    @property
    def unsent(self) -> int:
        """How many bytes of what was written the kernel has not taken yet."""
        return len(self.dataBuffer) - self.offset + self._tempDataLen  # type: ignore[attr-defined,no-any-return]

    def doWrite(self) -> Any:
        """Send, and tell."""
        if not self.connected:
            return None  # Closed when it was read, in the same turn.
        try:
            why = super().doWrite()  # type: ignore[misc]
        except BaseException:  # Of a producer.
            if self.watcher is None or not self.watcher.failed(Failure()):
                raise
            return None
        if self.watcher is not None and why is None:
            self.watcher.sent()
        return why

    def readConnectionLost(self, reason: Failure) -> None:
        """The client's FIN."""
        self.has_eof = not self.disconnecting  # type: ignore[attr-defined]
        protocol = IHalfCloseableProtocol(self.protocol, None)  # type: ignore[attr-defined]
        if protocol is None:
            self.connectionLost(reason)
        else:
            self._tell_protocol(protocol.readConnectionLost)

    def _end_producing(self) -> None:
        """
        No longer connected: tell a producer. What it raises keeps neither the socket
        open nor the protocol from hearing of the end, as it does in Twisted.
        """
        self.disconnected = 1
        self.connected = 0
        if self.producer is not None:
            try:
                self.producer.stopProducing()
            except BaseException:
                is_dealt_with(self.watcher, Failure())
            self.producer = None

    def _closeWriteConnection(self) -> None:
        """All is sent: close the write side."""
        try:
            self.socket.shutdown(socket.SHUT_WR)  # type: ignore[attr-defined]
        except OSError:
            pass
        protocol = IHalfCloseableProtocol(self.protocol, None)  # type: ignore[attr-defined]
        if protocol is not None:
            self._tell_protocol(protocol.writeConnectionLost)

    def _tell_protocol(self, method: Callable[[], None]) -> None:
        try:
            method()
        except BaseException:
            failure = Failure()
            if not is_dealt_with(self.watcher, failure):
                self.connectionLost(failure)  # type: ignore[attr-defined]


class Counted:
    """
    Mixed into a server transport that is asked how many bytes it has moved, since
    the kernel does not tell, or its bytes go through here anyway, and its connection
    does not count them.

    :ivar bytes_in: bytes received.
    :ivar bytes_out: bytes that the kernel has taken.
    """

    bytes_in = 0
    bytes_out = 0

    def _dataReceived(self, data: bytes) -> Any:
        self.bytes_in += len(data)
        return super()._dataReceived(data)  # type: ignore[misc]

    def writeSomeData(self, data: Any) -> Any:
        """Send, and count what was sent."""
        sent = super().writeSomeData(data)  # type: ignore[misc]
        if isinstance(sent, int):
            self.bytes_out += sent
        return sent


class TakesDescriptors:
    """
    Mixed into a UNIX transport: with one of the descriptors that come in a message its
    connection may end at once, as Twisted's do not.
    """

    def _ancillaryLevelSOLSOCKETTypeSCMRIGHTS(self, packed: bytes) -> None:
        """Pass each on as long as the protocol is there, then close the rest."""
        if not IFileDescriptorReceiver.providedBy(self.protocol):  # type: ignore[attr-defined]
            super()._ancillaryLevelSOLSOCKETTypeSCMRIGHTS(packed)  # type: ignore[misc]
            return
        for (descriptor,) in _DESCRIPTOR.iter_unpack(packed):
            if self.connected:  # type: ignore[attr-defined]
                self.protocol.fileDescriptorReceived(descriptor)  # type: ignore[attr-defined]
            else:
                os.close(descriptor)
        if not self.connected:  # type: ignore[attr-defined]
            self._dataReceived = lambda data: None


class _Telling(Watched):
    """Mixed into a transport that is served by the reactor, as Twisted's are."""

    if TYPE_CHECKING:
        # What the transport classes have that this is mixed into.
        dataBuffer: bytes
        _tempDataLen: int

    def begin_reading(self) -> None:
        """It has since the accept, unless the buffer is full."""
        self.resumeProducing()  # type: ignore[attr-defined]

    def read_first(self) -> None:
        """The reactor does."""

    def go_on_reading(self) -> None:
        """It does."""

    def end_first_step(self) -> None:
        """There is nothing to make good."""

    def write(self, data: Any) -> None:
        """Write, and tell when nothing waited before."""
        waited = self._tempDataLen or self.dataBuffer
        super().write(data)  # type: ignore[misc]
        if not waited and self._tempDataLen and self.watcher is not None:
            self.watcher.blocked()

    def flush_now(self) -> bool:
        """
        The reactor will: nothing is sent before it says that there is room.

        :returns: whether nothing waits to be sent.
        """
        return not self.unsent

    def report_flush(self) -> None:
        """It is told of each."""

    def connectionLost(self, reason: Failure) -> None:
        """Tell before, and have the watcher tell the protocol."""
        if hasattr(self, "socket"):
            watcher = self.watcher
            if watcher is not None:
                watcher.losing()
                protocol = self.protocol  # type: ignore[has-type]
                self.protocol = _Lost(watcher, protocol)
            self._end_producing()
        super().connectionLost(reason)  # type: ignore[misc]


class _Lost:
    """Passes a transport's last word through its watcher."""

    def __init__(self, watcher: Watcher, protocol: Any) -> None:
        self._watcher = watcher
        self._protocol = protocol

    def connectionLost(self, reason: Failure) -> None:
        self._watcher.lost(self._protocol, reason)


class _SendsPlainly:
    """
    Mixed into a TCP transport. Twisted's ``writeSomeData`` tries again after signals,
    which Python does by itself, and takes a memoryview of what fits: 2 % of an echo.
    """

    def writeSomeData(self, data: Any) -> Any:
        """Send as much as the kernel takes."""
        if len(data) > tcp.Connection.SEND_LIMIT:
            return super().writeSomeData(data)  # type: ignore[misc]
        try:
            return self.socket.send(data)  # type: ignore[attr-defined]
        except OSError as error:
            return 0 if error.errno in NO_ROOM else CONNECTION_LOST


@cache
def telling(transport_class: type, is_counted: bool) -> type:
    """
    The class of a port's transports, made to tell.

    :param is_counted: whether it is :class:`Counted`, which costs 2 % of an echo.
    """
    if not hasattr(transport_class, "writeSomeData"):
        return transport_class
    mixins: tuple[type, ...] = (_Telling, transport_class)
    if transport_class is tcp.Server:
        mixins = (_SendsPlainly, *mixins)
    elif issubclass(transport_class, unix.Server):
        mixins = (TakesDescriptors, *mixins)
    if is_counted:
        mixins = (Counted, *mixins)
    return type(f"Telling{transport_class.__name__}", mixins, {})
