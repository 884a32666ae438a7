"""
Twisted's server transports, made to send at once.

Twisted's ``write`` never sends: it arms the reactor for writing, and the next turn
sends and disarms, which is two system calls and some 6 µs for each answer. These
send what was written while a connection was served as soon as it has been, in
one ``send``, and fall back to Twisted's own queue for what the kernel did not
take. Everything else of a transport is Twisted's: half-close, producers, TLS,
the order of things at the end.

This file knows the inside of :class:`twisted.internet.tcp.Server` and
:class:`twisted.internet.unix.Server` (Twisted 24.7 to 26.10):

- ``_tempDataBuffer``, ``_tempDataLen``, ``dataBuffer`` and ``offset``, the queue;
  ``_writeDisconnected`` and ``_writeDisconnecting``; ``_closeWriteConnection``,
  ``_postLoseConnection``, ``_closeSocket``, ``_maybePauseProducer``: none has a
  public name;
- ``twisted.internet._newtls.startTLS``, to which it says what is below TLS;
- what ``__init__`` sets, since it is replaced: Twisted's formats two strings for
  each connection, which nobody may ever look at.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from twisted.internet import tcp, unix
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectionAborted
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python.failure import Failure

from tcpsvc.addresses import ipv4_address
from tcpsvc.engine.subreactor import LEAST_RECEIVED, SubReactor, reason_of
from tcpsvc.transport import NO_ROOM, Counted, TakesDescriptors, Watched


class _BelowTLS:
    """What TLS that was started on a transport writes its own bytes with."""

    @staticmethod
    def write(transport: Any, data: bytes) -> None:
        transport.write_below_tls(data)

    @staticmethod
    def writeSequence(transport: Any, pieces: Any) -> None:
        transport.write_below_tls(b"".join(pieces))

    loseConnection = FileDescriptor.loseConnection
    registerProducer = FileDescriptor.registerProducer
    unregisterProducer = FileDescriptor.unregisterProducer


class _SendsAtOnce(Watched):
    """
    Mixed into a server transport of Twisted's.

    :ivar is_flush_due: whether there will be a flush, or the kernel is asked to
        say when there is room.
    """

    if TYPE_CHECKING:
        # What the transport classes have that this is mixed into.
        producer: Any
        producerPaused: bool
        streamingProducer: bool
        disconnecting: Any
        _aborting: bool
        _writeDisconnecting: bool
        _writeDisconnected: bool
        _getLogPrefix: Any
        _maybePauseProducer: Any
        _postLoseConnection: Any
        _closeSocket: Any
        resumeProducing: Any

    is_flush_due = False
    _reports_flush = False
    #: Whether TLS was started on it. Said, since Twisted's class does not without
    #: pyOpenSSL.
    TLS = False
    tells_errors = True
    #: What the sub-reactor reads from; ``None`` where it is to call ``doRead``.
    plain_socket: Any = None
    #: Whether the first write outside a turn may go before what follows it.
    _flushes_at_once = True
    #: Its protocol while that hears of the loss, for the log.
    _last_protocol: Any = None
    #: The number of the turn after which it was flushed outside any.
    _flushed_in = -1
    #: Whether it is to be read from, and the kernel is not asked to tell of input yet.
    _is_to_watch = False
    #: Whether what its handler writes goes after its first step, and who was served
    #: before that.
    _is_in_first_step = False
    _outer: Any = None

    def __init__(
        self,
        sock: Any,
        protocol: Any,
        client: Any,
        server: Any,
        sessionno: int,
        reactor: Any,
    ) -> None:
        """As of the transport's Twisted class; ``reactor`` may be a sub-reactor."""
        sock.setblocking(False)
        self.socket = sock
        self.plain_socket = sock
        self.protocol = protocol
        self.client = client
        self.server = server
        self.sessionno = sessionno
        if type(reactor) is not SubReactor:
            reactor = SubReactor.of(reactor)
        self._group = reactor
        self._tempDataBuffer: list[bytes] = []
        self._tempDataLen = 0
        self.dataBuffer = b""
        self.offset = 0
        self.is_flush_due = False
        self.connected = 1
        #: Whether bytes may go as they are, and nothing is to be done after that:
        #: see :meth:`_judge`. One attribute instead of six: 3 % of an echo.
        self._is_plain = True
        if not getattr(protocol, "starts_reading_itself", False):
            reactor.addReader(self)

    # What Twisted works out for each connection, worked out when asked for.

    @property
    def reactor(self) -> Any:
        """The main reactor."""
        return self._group.reactor

    @property
    def hostname(self) -> Any:
        return self.client[0]

    @property
    def _addressType(self) -> Any:
        return IPv4Address if len(self.client) == 2 else IPv6Address

    @cached_property
    def logstr(self) -> str:
        protocol = getattr(self, "protocol", self._last_protocol)
        prefix = self._getLogPrefix(protocol)
        return f"{prefix},{self.sessionno},{self.hostname}"

    @cached_property
    def repstr(self) -> str:
        port = getattr(self.server, "_realPortNumber", None)
        protocol = type(getattr(self, "protocol", None)).__name__
        return f"<{protocol} #{self.sessionno} on {port}>"

    def fileno(self) -> int:
        """The descriptor; -1 once it is lost."""
        if self.plain_socket is None and not hasattr(self, "socket"):
            return -1
        return self.socket.fileno()  # type: ignore[no-any-return]

    # Reading.

    def begin_reading(self) -> None:
        """
        The handler starts: what has come already is read when it first waits for
        something (:meth:`read_first`), and the kernel is asked to tell of more only
        after its first step (:meth:`end_first_step`). Most short connections are over
        by then. That they are never added and removed, nor their handlers suspended,
        is 17 % of their life, and 3 % of one that goes on.

        What it writes goes after that step, in one piece, as in a turn: a quarter of a
        short connection that writes three times.
        """
        if self._is_plain and not self.is_flush_due:
            self.is_flush_due = True
            self._outer = self._group.serves(self)
            self._is_in_first_step = True
        if self.plain_socket is None or self._group.first_bytes <= 0:
            self.resumeProducing()  # Unless it is lost, or to be.
        else:
            self._is_to_watch = bool(self.connected and not self.disconnecting)

    def read_first(self) -> None:
        """Read what has come already, unless somebody has decided about reading."""
        if not self._is_to_watch or self.plain_socket is None:
            return
        try:
            data = self.plain_socket.recv(LEAST_RECEIVED)
        except BlockingIOError:
            self._group.first_read_failed()
            self.startReading()
            return
        except OSError:
            # It is lost, of which it is told in the next turn.
            self.read_failed = True
            self.plain_socket = None
            self.startReading()
            return
        self._group.first_read_succeeded(len(data))
        if data:
            self.protocol.dataReceived(data)
        else:
            self.startReading()  # To be told of the end again.

    def go_on_reading(self) -> None:
        """
        In the first step already: have the kernel tell of more. Whoever asks may turn
        the reactor until it does, and the client wait for what was written.
        """
        if self._is_in_first_step:
            self._leave_first_step()
            if self._tempDataLen:
                self.wait_for_room()
        if self._is_to_watch:
            self.startReading()

    def end_first_step(self) -> None:
        """
        Send what was written, and have the kernel tell of more, unless somebody has
        decided that.
        """
        if self._is_in_first_step:
            self._leave_first_step()
            if self.is_flush_due and not self.dataBuffer:
                self._group.flush_one(self)
        if self._is_to_watch:
            self.startReading()

    def _leave_first_step(self) -> None:
        self._is_in_first_step = False
        self._group.served = self._outer
        self._outer = None

    def startReading(self) -> None:
        self._is_to_watch = False
        self._group.addReader(self)

    def stopReading(self) -> None:
        self._is_to_watch = False
        self._group.removeReader(self)

    def doRead(self) -> Any:
        """Read once, as much as the sub-reactor says, and deliver it."""
        if self.read_failed:
            return CONNECTION_LOST
        try:
            data = self.socket.recv(self._group.receive_size)
        except BlockingIOError:
            return None
        except OSError:
            self.read_failed = True
            return CONNECTION_LOST
        if not data:
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    # Writing.

    def write(self, data: bytes) -> None:
        if self._is_plain and type(data) is bytes and data:
            self._tempDataBuffer.append(data)
            self._tempDataLen += len(data)
            if not self.is_flush_due:
                group = self._group
                if group.is_serving:
                    self.is_flush_due = True
                    group.due.append(self)
                else:
                    self._flush_soon()
        elif self.TLS:
            if self.connected:
                self.protocol.write(data)
        else:
            self.write_below_tls(data)

    def write_below_tls(self, data: bytes) -> None:
        """Send bytes, not through TLS."""
        if not isinstance(data, bytes):
            raise TypeError("Data must be bytes")
        if not self.connected or self._writeDisconnected or not data:
            return
        self._tempDataBuffer.append(data)
        self._tempDataLen += len(data)
        if self.producer is not None:
            self._maybePauseProducer()
        if not self.is_flush_due:
            self._flush_soon()

    def writeSequence(self, pieces: Any) -> None:
        if self.TLS:
            if self.connected:
                self.protocol.writeSequence(pieces)
            return
        for piece in pieces:
            if not isinstance(piece, bytes):
                raise TypeError("Data must be bytes")
        self.write_below_tls(b"".join(pieces))

    def _flush_soon(self) -> None:
        """Something was written, or is to end, and nothing is on its way."""
        if self._aborting or not self.connected:
            return
        self.is_flush_due = True
        group = self._group
        if group.is_serving:
            group.due.append(self)
        elif self._is_in_first_step:
            pass  # At the end of it.
        elif (
            self._flushed_in == group.turn
            or not self._is_plain
            or not self._tempDataBuffer
            or not self._flushes_at_once
        ):
            self.wait_for_room()
        else:
            # The first write since the last turn; what follows it goes together.
            self._flushed_in = group.turn
            if self.flush() is not None:
                # Nobody hears of a lost connection from within a write: the
                # kernel says it again, in a turn.
                self.wait_for_room()

    def wait_for_room(self) -> None:
        """The kernel is to say when there is room; then this is flushed."""
        self.is_flush_due = True
        self._group.addWriter(self)
        if self.watcher is not None and self.unsent:
            self.watcher.blocked()

    def _judge(self) -> None:
        """Whether it is plain: it can change here, and be set false elsewhere."""
        self._is_plain = bool(
            self.connected
            and not self.TLS
            and self.producer is None
            and not self._reports_flush
            and not (self.disconnecting or self._aborting)
            and not (self._writeDisconnecting or self._writeDisconnected)
        )

    def report_flush(self) -> None:
        """The watcher is to be told of each flush up to one that leaves nothing."""
        self._reports_flush = True
        self._is_plain = False

    def flush_now(self) -> bool:
        """
        Send what was written in this turn before the end of it.

        :returns: whether nothing waits to be sent.
        """
        if self._tempDataLen and not self.dataBuffer:
            why = self.flush()
            if why is not None:
                self.connectionLost(reason_of(why))
        if self.dataBuffer or self._tempDataLen:
            self.report_flush()
            return False
        return True

    def doWrite(self) -> Any:
        """There is room."""
        if not self.is_flush_due:
            self.stopWriting()  # It was flushed before the kernel has said so.
            return None
        return super().doWrite()

    def startWriting(self) -> None:
        """Twisted's methods call it for whatever is to happen at the next flush."""
        if not self.is_flush_due:
            self._flush_soon()

    def stopWriting(self) -> None:
        self.is_flush_due = False
        self._group.removeWriter(self)

    def flush(self) -> Any:
        """
        Send what was written since the last flush. Called by the sub-reactor;
        nothing older waits, since then the kernel is to say when there is room.

        :returns: why the connection is lost, or ``None``.
        """
        self.is_flush_due = False
        pieces = self._tempDataBuffer
        if pieces:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._tempDataLen = 0
            try:
                sent = self.socket.send(data)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    self.dataBuffer = data  # It was not sent.
                    return CONNECTION_LOST
                sent = 0
            if sent != len(data):
                self.dataBuffer = data
                self.offset = sent
                self.wait_for_room()
                return None
        return None if self._is_plain else self._flushed()

    def _flushed(self) -> Any:
        """All is sent: do what Twisted's ``doWrite`` does then, and tell."""
        if self.producer is not None and (
            not self.streamingProducer or self.producerPaused
        ):
            self.producerPaused = False
            self.producer.resumeProducing()
            self._report()
            return None
        self._report()
        if self.unsent or not self.connected:
            return None  # Whoever was told has written more, or closed it.
        if self.disconnecting:
            return self._postLoseConnection()
        if self._writeDisconnecting and not self._writeDisconnected:
            self._writeDisconnected = True
            # Whoever was told of this flush may have asked for another one, and to
            # send after this, were it nothing, is an error that loses it.
            self.stopWriting()
            return self._closeWriteConnection()
        return None

    def _report(self) -> None:
        if self._reports_flush:
            if not self.unsent:  # Else there is a flush to come.
                self._reports_flush = False
                self._judge()
            if self.watcher is not None:
                self.watcher.sent()

    # The end.

    def connectionLost(self, reason: Failure) -> None:
        if not hasattr(self, "socket"):
            return  # Twisted's own sign that this has been.
        watcher = self.watcher
        if watcher is not None:
            watcher.losing()
        self._end_producing()
        self.is_flush_due = False
        self._is_plain = False
        self._is_to_watch = False
        self._group.remove(self)
        if self.read_failed:
            self.socket.close()  # The client has reset it: nothing is left to shut.
        else:
            self._closeSocket(not isinstance(reason.value, ConnectionAborted))
        protocol = self.protocol
        del self.protocol
        del self.socket
        self.plain_socket = None
        self._last_protocol = protocol
        try:
            if watcher is None or watcher is protocol:
                protocol.connectionLost(reason)
            else:
                watcher.lost(protocol, reason)
        finally:
            self._last_protocol = None

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self._is_plain = False
        super().registerProducer(producer, streaming)  # type: ignore[misc]

    def unregisterProducer(self) -> None:
        super().unregisterProducer()  # type: ignore[misc]
        self._judge()

    def loseConnection(self, *args: Any) -> None:
        self._is_plain = False
        super().loseConnection(*args)  # type: ignore[misc]

    def loseWriteConnection(self) -> None:
        self._is_plain = False
        super().loseWriteConnection()  # type: ignore[misc]

    def abortConnection(self) -> None:
        self._is_plain = False
        super().abortConnection()  # type: ignore[misc]

    def startTLS(self, ctx: Any, normal: bool = True) -> None:
        from twisted.internet import _newtls  # It needs pyOpenSSL.

        self._is_plain = False
        _newtls.startTLS(self, ctx, normal, _BelowTLS)


class TCPServerTransport(_SendsAtOnce, tcp.Server):  # type: ignore[override]
    """In the place of :class:`twisted.internet.tcp.Server`."""

    def getHost(self) -> Any:
        """The own address."""
        if len(self.client) == 2:
            return ipv4_address(self.socket.getsockname())
        return super().getHost()  # type: ignore[no-untyped-call]


class UNIXServerTransport(TakesDescriptors, Counted, _SendsAtOnce, unix.Server):  # type: ignore[override]
    """
    In the place of :class:`twisted.internet.unix.Server`. It reads as Twisted
    does, since descriptors may come with the bytes.
    """

    def __init__(self, sock: Any, protocol: Any, client: Any, *args: Any) -> None:
        super().__init__(sock, protocol, (client, None), *args)
        self.plain_socket = None
        self._sendmsgQueue: list[int] = []

    doRead = unix.Server.doRead
    # A descriptor that is sent after them needs a byte to go with.
    _flushes_at_once = False

    def flush(self) -> Any:
        """As of any transport; descriptors leave with the bytes beside them."""
        if not self._sendmsgQueue:
            unsent = self.unsent
            why = super().flush()
            if why is None:
                self.bytes_out += unsent - self.unsent
            return why
        why = self.doWrite()
        if why is None and self.is_flush_due:
            self.wait_for_room()
        return why
