"""
The connection of ``create``: a protocol between a transport and a handler's
:class:`Reader <tcpsvc.Reader>` and :class:`Writer <tcpsvc.Writer>`.

How it closes, in one place (spec H3, S8)::

    OPEN ──the handler ends, or its own writer.close()──▶ FLUSHING
    FLUSHING ──all is sent──▶ closed, if nothing is unread and nothing unsent
                          ├─▶ LINGERING: write side shut, input discarded
                          └─▶ LOSING: TLS says goodbye
    LINGERING ──the client's FIN──▶ closed
    any ──reset, X3, age limit, abort, no progress within the timeout──▶ closed

A plain close with input unread would make Linux send RST, and the client would
lose what is on its way to it; that is what LINGERING is for.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IHandshakeListener,
    IProtocol,
    IPullProducer,
    ISSLTransport,
)
from twisted.logger import LogLevel
from twisted.python.failure import Failure
from zope.interface import implementer

from tcpsvc import kernel
from tcpsvc.chunks import Chunks
from tcpsvc.connection import CLOSED, AddressT, Connection, Owner
from tcpsvc.log import log
from tcpsvc.log_fields import of_client
from tcpsvc.reader import Reader
from tcpsvc.reasons import Reason
from tcpsvc.snapshot import Bytes
from tcpsvc.transport import tells
from tcpsvc.writer import Writer

StreamHandler = Callable[[AddressT, Reader, Writer], object]


def _drop(data: bytes) -> None:
    """Nobody is there to read it."""


#: How long a client may take no byte after the handler's own close, in seconds.
OWN_CLOSE_TIMEOUT = 5.0

_OPEN, _FLUSHING, _LINGERING, _LOSING = "open", "flushing", "lingering", "losing"


@implementer(IProtocol, IHalfCloseableProtocol, IHandshakeListener, IPullProducer)
class StreamConnection(Connection[AddressT]):
    """A live connection whose handler reads and writes streams."""

    __slots__ = (
        "_aborted",
        "_base",
        "_chunks",
        "_discarded",
        "_flush_timeout",
        "_handler",
        "_has_flow_control",
        "_host",
        "_is_being_lost",
        "_is_held",
        "_is_write_side_shut",
        "_phase",
        "_progress",
        "_reading_paused",
        "_socket",
        "_waits_for_handshake",
        "dataReceived",
        "reader",
        "transport",
        "writer",
    )

    #: Nothing is delivered, and no end noticed, before the handler starts: see
    #: :mod:`tcpsvc.engine.transports`.
    starts_reading_itself = True

    def __init__(
        self,
        factory: Owner,
        id: int,
        peer: AddressT,
        handler: StreamHandler[AddressT],
    ) -> None:
        super().__init__(factory, id, peer)
        self._handler = handler
        self.reader = Reader(self, factory.settings.reader_buffer_size)
        self.writer = Writer(self, factory.settings.writer_buffer_size)
        #: Where the transport delivers: to the reader, or nowhere while closing.
        self.dataReceived: Callable[[bytes], None] = self.reader.data_received
        self.transport: Any = None
        self._host: Any = None
        #: Where the transport does not tell what it has sent.
        self._chunks: Chunks | None = None
        self._base: Any = None
        self._socket: socket.socket | None = None
        self._phase = _OPEN
        self._flush_timeout = 0.0
        self._progress: tuple[Any, float] = (None, 0.0)
        self._discarded = 0
        self._has_flow_control = False
        self._waits_for_handshake = False
        self._reading_paused = False
        self._is_held = False
        self._is_being_lost = False
        self._is_write_side_shut = False
        self._aborted = False

    def connectionMade(self) -> None:
        """What :meth:`makeConnection` does is all there is."""

    # The transport's side (IProtocol and its kin).

    def makeConnection(self, transport: Any) -> None:
        """The connection is there; the handler starts in a later turn."""
        self.transport = transport
        if tells(transport):
            self._base = transport
            self._socket = transport.socket
            transport.watcher = self
            self.writer.begin(transport)
        else:
            self._connect_in_chunks(transport)
        if self._socket is not None:
            self._factory.set_socket_options(self._socket)
        if self._is_held:
            self.pause_reading()
        # Whoever is told of it may close it, or the server.
        self._is_delivering = True
        if self._handler_state == "refused":
            self.close_now()  # A limit has ended it already.
        else:
            self._factory.connected(self)
        self._is_delivering = False

    def _connect_in_chunks(self, transport: Any) -> None:
        self.dataReceived = self._deliver
        self._chunks = Chunks(self)
        self.writer.begin(self._chunks)
        self._base = base = kernel.base_transport(transport)
        self._socket = kernel.socket_of(base)
        # The addresses of what is below TLS are gone with the connection.
        self._host = transport.getHost()
        # A TLS layer just above tells us when its handshake is done, and what is
        # written before would be buffered where it cannot be seen.
        self._waits_for_handshake = (
            self._is_tls and getattr(transport, "wrappedProtocol", None) is self
        )
        if self._socket is not None or hasattr(base, "registerProducer"):
            # The lowest transport is asked: only there "sent" means what it says.
            base.registerProducer(self, False)

    def _deliver(self, data: bytes) -> None:
        self._is_delivering = True
        self.reader.data_received(data)
        self._is_delivering = False

    def _discard(self, data: bytes) -> None:
        self._discarded += len(data)

    def readConnectionLost(self) -> None:
        """The client's FIN."""
        self._has_eof = True
        self.reader.feed_eof()
        if self._phase is _LINGERING:
            self._close_orderly()

    def writeConnectionLost(self) -> None:
        """Our FIN has gone out."""

    def handshakeCompleted(self) -> None:
        """TLS is up: what was written meanwhile goes out."""
        if self._waits_for_handshake:
            self._waits_for_handshake = False
            self._is_delivering = True
            self._chunks_sent()
            self._is_delivering = False

    def connectionLost(self, reason: Failure) -> None:
        """The socket is closed."""
        if self.is_socket_closed:
            return
        # First everything is as it will be, then whoever waits is told. The streams
        # are let go of meanwhile, when the handler has ended before.
        reader, writer = self.reader, self.writer
        was_reset = not self._closed_by_server and not isinstance(
            reason.value, (ConnectionDone, ConnectionAborted)
        )
        if was_reset:
            self.ends_because(Reason.RESET)
        elif self._phase is _OPEN and not self._closed_by_server:
            self._has_eof = True  # Where there are no halves to close: TLS.
        writer.gone()
        self.socket_closed()
        if was_reset:
            writer.consumer_has_left()
        writer.tell_gone()
        reader.feed_eof()

    def resumeProducing(self) -> None:
        """The transport has sent everything it had (IPullProducer)."""
        if not self._has_flow_control:
            # What registerProducer calls at once tells that it calls at all.
            self._has_flow_control = True
            return
        if not self._waits_for_handshake:
            self._chunks_sent()
        if getattr(self._base, "disconnecting", False):
            # TLS has ended the connection by itself.
            self._shut_off_producer()

    def _chunks_sent(self) -> None:
        if self._chunks is not None and not self.is_socket_closed:
            writer = self.writer
            self._chunks.all_sent()
            writer.sent()

    def stopProducing(self) -> None:
        """The transport is lost, its socket is about to be closed (IPullProducer)."""
        self.losing()

    # What a transport tells that says more (Watcher).

    def blocked(self) -> None:
        """Bytes wait to be sent."""
        self.writer.blocked()

    def sent(self) -> None:
        """More of them, or all, were sent."""
        if not self.is_socket_closed:
            self.writer.sent()

    def losing(self) -> None:
        """
        The socket is about to be closed: the last moment to take what the client
        sent before its reset (S8). The handler may act on it, but not close what
        is closing.
        """
        self._is_being_lost = True
        whereabouts = self._factory.whereabouts
        if (
            self._host is None
            and (self._handler_state == "running" or not whereabouts.has_one_address)
            and whereabouts.is_anywhere
        ):
            # The handler may still ask, or nobody else knows: 6 % of a short
            # connection.
            self._host = self.transport.getHost()
        if (
            self._phase is _OPEN
            and self._socket is not None
            and self._base is self.transport
            and not self._closed_by_server
            and not self._has_eof
            and not getattr(self._base, "read_failed", False)
        ):
            for data in kernel.rest_of_input(self._socket):
                self.reader.data_received(data)

    def lost(self, protocol: Any, reason: Failure) -> None:
        """The socket is closed."""
        self.connectionLost(reason)

    def failed(self, failure: Failure) -> bool:
        """Nothing of a handler's comes here: it is to be logged."""
        return False

    def logPrefix(self) -> str:
        """How lines of Twisted's legacy log are marked."""
        return "tcpsvc"

    # The life of the connection (Connection).

    def hold(self) -> None:
        """There is no slot yet: do not read, do not start."""
        self._is_held = True

    def start(self) -> None:
        """Run the handler with the address, the reader and the writer."""
        if self._closed_by_server:
            self.refuse()
            return
        if self._is_held:
            self._is_held = False
            self.resume_reading()
        elif self._chunks is None and not self._reading_paused:
            self._base.begin_reading()
        self._start(self._handler, self.peer, self.reader, self.writer)
        if self._chunks is None:
            self._base.end_first_step()

    def close_now(self) -> None:
        if self.is_socket_closed or self._aborted:
            return  # A reset that is on its way is not to become a FIN.
        self._closed_by_server = True
        if self._base is None:
            return  # Closed before its start, which is still to come.
        self._close_orderly()
        # Where the transport closes later, the streams end now all the same.
        self._end_streams()

    def abort(self) -> None:
        """Close with a reset."""
        if self._aborted or self._is_being_lost or self.is_socket_closed:
            return
        self.ends_because(Reason.ABORTED)
        self._closed_by_server = True
        if self._base is None:
            return  # Closed before its start, which is still to come.
        self._aborted = True
        self.transport.abortConnection()
        self._end_streams()

    def _end_streams(self) -> None:
        if not self._is_released:  # Else they have been.
            reader, writer = self.reader, self.writer
            writer.gone()
            writer.tell_gone()
            reader.feed_eof()

    def _finish(self) -> None:
        self.writer.handler_ended()
        self._begin_to_close(self._factory.settings.flush_timeout)

    def _let_go(self) -> None:
        del self.reader, self.writer
        self.dataReceived = _drop
        if self._chunks is None and self.transport is not None:
            self.transport.watcher = None

    def _connected_socket(self) -> socket.socket | None:
        return None if self.is_socket_closed else self._socket

    def _bytes(self) -> Bytes:
        return self.reader.bytes_arrived, self.writer.bytes_taken

    @property
    def bytes_waiting(self) -> int:
        return self.writer.bytes_to_write

    def tell_of_drain(self) -> None:
        """The server drains: the handler is told, then its reader."""
        super().tell_of_drain()
        if not self._is_released:
            self.reader.tell_of_drain()

    # For the reader and the writer.

    def gives_eof_for_drain(self, asked: bool | None) -> bool:
        """
        The server drains, and the reader waits at a boundary: whether that is EOF.
        Not while bytes of a next message wait in the kernel: that is answered.

        :param asked: whether the handler wants it; ``None`` when it does not say.
        """
        if asked is None:
            asked = self._factory.settings.eof_on_drain
        if not asked or (self._socket is not None and kernel.has_input(self._socket)):
            return False
        self.had_eof_of_drain = True
        return True

    def read_first(self) -> None:
        """The handler waits for the first time: deliver what has come before."""
        if self._chunks is None:
            self._base.read_first()

    def pause_reading(self) -> None:
        """Take nothing more from the kernel."""
        if self._phase is not _OPEN:
            return  # What still comes is discarded, see dataReceived.
        if not self._reading_paused and self._is_readable():
            self._reading_paused = True
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        """Go on taking from the kernel."""
        if self._reading_paused and not self._is_held and self._is_readable():
            self._reading_paused = False
            self.transport.resumeProducing()

    def go_on_reading(self) -> None:
        """Have the kernel tell of input in the handler's first step already."""
        if self._chunks is None and self._base is not None:
            self._base.go_on_reading()

    def close_by_reader(self) -> None:
        """The handler's own ``reader.close()``."""
        self.close_now()

    def close_by_writer(self) -> None:
        """The handler's own ``writer.close()``."""
        timeout = self._factory.settings.flush_timeout
        self._begin_to_close(min(OWN_CLOSE_TIMEOUT, timeout))

    def may_write(self) -> bool:
        """Whether the transport is ready for bytes at all."""
        return self.transport is not None and not self._waits_for_handshake

    def write_to_transport(self, data: bytes) -> bool:
        """Hand bytes on. A transport without flow control has taken them."""
        self.transport.write(data)
        return not self._has_flow_control

    def all_taken(self) -> None:
        """The kernel has all that was written: what waited for that goes on."""
        if self.is_socket_closed:
            return  # By whoever was told just before.
        if self._phase is _FLUSHING:
            self._flush_done()
        elif self.writer.has_written_eof:
            self._shut_write_side()

    def watch(self) -> float:
        """Have the sweep look at this connection. Returns the time."""
        return self._factory.sweeper.watch(self)

    @property
    def host(self) -> Any:
        """
        The own address. It is where the server listens, when it is asked for only
        after the handler has ended and the connection is gone.
        """
        if self._host is None:
            if self.is_socket_closed or self.transport is None:
                return self._factory.whereabouts.listening_on()
            self._host = self.transport.getHost()
        return self._host

    @property
    def can_half_close(self) -> bool:
        """Whether the write side can be closed alone."""
        return not self._is_tls and hasattr(self._base, "loseWriteConnection")

    # Closing.

    @property
    def _is_tls(self) -> bool:
        if self._chunks is None:
            # Twisted's own transport: then it is the handler that has started it.
            return bool(getattr(self._base, "TLS", False))
        return bool(ISSLTransport.providedBy(self.transport))

    def _is_readable(self) -> bool:
        return not self._has_eof and not self.is_socket_closed

    def _begin_to_close(self, timeout: float) -> None:
        if (
            self._phase is not _OPEN
            or self._aborted
            or self._is_being_lost
            or self.is_socket_closed
        ):
            return
        self._phase = _FLUSHING
        self._flush_timeout = timeout
        reader = self.reader
        self.dataReceived = self._discard
        # Input is read and discarded from now on: a client that sends all it has
        # before it reads anything would otherwise never come to read.
        if self._reading_paused:
            self.resume_reading()
        if self._chunks is None:
            is_sent = self._base.flush_now()
        else:
            is_sent = not self._chunks.unsent
        if is_sent and self._phase is _FLUSHING and not self.is_socket_closed:
            self._flush_done()
        if not self.is_socket_closed:
            self._progress = (self._taken_by_client(), self.watch())
        # Last, since whoever reads may do anything now.
        reader.feed_eof()

    def _flush_done(self) -> None:
        if self._has_flow_control:
            self._shut_off_producer()
        if self._socket is None or self._is_tls:
            self._phase = _LOSING
            self.transport.loseConnection()
        elif self._has_eof or kernel.nothing_pending(self._socket):
            self._close_orderly()
        else:
            self._phase = _LINGERING
            self._shut_write_side()

    def _shut_write_side(self) -> None:
        if not self._is_write_side_shut:
            self._is_write_side_shut = True
            self._shut_off_producer()
            self._base.loseWriteConnection()

    def _shut_off_producer(self) -> None:
        # A transport does not close under a registered producer.
        if self._has_flow_control:
            self._base.unregisterProducer()

    def _close_orderly(self) -> None:
        """Close the socket, unless that is what is going on."""
        if self._is_being_lost:
            return
        if self._chunks is None:
            self._base.connectionLost(CLOSED)
        elif not self._close_socket(self.transport):
            self._shut_off_producer()
            self.transport.loseConnection()

    def sweep(self, now: float) -> bool:
        """
        Look after old bytes and clients that do not take theirs, about once a
        second (spec S6, H3).

        :returns: whether there is anything left to look after.
        """
        if self.is_socket_closed:
            return False
        limit = self._factory.settings.buffer_age_limit
        age = self.writer.age(now)
        if (
            limit is not None
            and age > limit
            and not self._factory.lets_pass(self, Reason.TOO_OLD)
        ):
            self._client_does_not_read(age, limit)
            return False
        if self.is_socket_closed:
            return False  # Whoever was told of the dry run has closed it.
        if self._phase is _OPEN and getattr(self._base, "disconnecting", False):
            # TLS has ended the connection by itself, behind what is still to be
            # sent: the client's close ends both directions (spec S10).
            self._phase = _LOSING
            self._has_eof = True
            self._flush_timeout = self._factory.settings.flush_timeout
            self._progress = (self._taken_by_client(), now)
            self._end_streams()
        elif self._phase is _OPEN:
            return bool(self.writer.bytes_to_write)
        self._look_for_progress(now)
        return not self.is_socket_closed

    def _client_does_not_read(self, age: float, limit: float) -> None:
        error = self.writer.too_old(age, limit)
        self._factory.counters.too_old += 1
        self.reason = Reason.TOO_OLD  # Also of one that has ended but for this.
        if self.is_running:
            self.fail_at_once(Failure(error))
        else:
            self._say(
                LogLevel.warn,
                "closing {client} during its final flush: {error}; {count} so far",
                error=str(error),
                count=self._factory.counters.too_old,
            )
        self.close_now()

    def _taken_by_client(self) -> object:
        return self.writer.bytes_taken, kernel.output_state(self._socket)

    def _look_for_progress(self, now: float) -> None:
        if (
            self._phase is _LINGERING
            and not self._discarded
            and self._socket is not None
            and kernel.nothing_pending(self._socket)
        ):
            self._close_orderly()
            return
        before, since = self._progress
        taken = self._taken_by_client()
        if taken != before:
            self._progress = (taken, now)
        elif now - since >= self._flush_timeout and not self._aborted:
            self._factory.counters.aborted += 1
            self.reason = Reason.FLUSH_TIMEOUT
            self._say(
                LogLevel.info,
                "aborting {client}: it has taken no byte for {seconds:g} s while its "
                "connection was to close; {count} so far",
                seconds=now - since,
                count=self._factory.counters.aborted,
            )
            self.abort()

    def _say(self, level: Any, text: str, **fields: Any) -> None:
        """
        Say why it is closed: of each reason once in a minute, and at debug in between.
        """
        assert self.reason is not None
        if not self._factory.may_say(f"ended: {self.reason.value}"):
            level = LogLevel.debug
        log.emit(level, text, **of_client(self.peer), **fields)
