"""
The writing half of a connection: a buffer in front of the transport, and what is
known of it (spec S4 to S6).

Bytes are *taken* when the kernel has them. Until then they wait in the writer's
output, which says how many they are: the transport itself where it can say that
(:mod:`tcpsvc.transport`), else :class:`tcpsvc.chunks.Chunks` in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import ITransport
from zope.interface import implementer

from tcpsvc._waiters import Event
from tcpsvc.address_text import address_text
from tcpsvc.errors import BufferAgeLimitExceeded, ConnectionGone
from tcpsvc.interfaces import IWriter
from tcpsvc.reasons import Reason

if TYPE_CHECKING:
    from tcpsvc.connection import Connection


class Output(Protocol):
    """
    Where bytes wait until the kernel takes them.

    :ivar unsent: how many do.
    """

    @property
    def unsent(self) -> int: ...

    def write(self, data: bytes) -> None:
        """Send, or let wait."""

    def report_flush(self) -> None:
        """Tell the connection (``sent``) of the next flush, whatever it leaves."""


class Written(Protocol):
    """What a writer asks of its connection."""

    @property
    def peer(self) -> Any:
        """The client's address."""

    @property
    def host(self) -> Any:
        """The own address."""

    @property
    def transport(self) -> Any:
        """What it goes through."""

    @property
    def when_socket_closed(self) -> Event:
        """The end of the connection's socket."""

    @property
    def can_half_close(self) -> bool:
        """Whether the write side can be closed alone."""

    @property
    def draining(self) -> bool:
        """Whether the server drains."""

    def when_draining(self) -> Deferred[None]:
        """A Deferred: it does."""

    @property
    def reason(self) -> Reason | None:
        """Why it ends."""

    def all_taken(self) -> None:
        """The kernel has all that was written."""

    def watch(self) -> float:
        """Look at the writer's age about once a second. Returns the time."""

    def go_on_reading(self) -> None:
        """Have the kernel tell of input, if it does not yet."""

    def close_by_writer(self) -> None:
        """The writer was closed by its own ``close``."""

    def abort(self) -> None:
        """Close with a reset."""


_OPEN, _EOF, _CLOSED = "open", "eof written", "closed"


class _Nowhere:
    """The output of a connection that is not there, or no longer."""

    unsent = 0

    def write(self, data: bytes) -> None:
        """Drop them."""

    def report_flush(self) -> None:
        """There will be none."""


_NOWHERE: Output = _Nowhere()


@implementer(IWriter)
class Writer:
    """
    Writes to one connection. The server makes it; handlers receive it.

    :ivar bytes_written: how many bytes were given to :meth:`write` so far.
    """

    __slots__ = (
        "_age_error",
        "_connection",
        "_consumer_left",
        "_draining",
        "_flushing",
        "_has_consumer_left",
        "_has_ended",
        "_is_gone",
        "_is_open",
        "_limit",
        "_marks",
        "_output",
        "_state",
        "_unsent_at_end",
        "bytes_written",
    )

    def __init__(self, connection: Written, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        #: Where the bytes go, once the connection is there.
        self._output: Output = _NOWHERE
        self._state = _OPEN
        self._is_gone = False
        self._has_ended = False
        #: Whether what is written goes anywhere: it is neither closed, nor gone,
        #: nor has its handler ended.
        self._is_open = True
        self.bytes_written = 0
        self._unsent_at_end = 0
        self._flushing: list[tuple[int, Deferred[None]]] | None = None
        self._draining: list[Deferred[None]] | None = None
        self._has_consumer_left = False
        self._consumer_left: Event | None = None
        #: How many bytes had been written at which times, while some of them wait.
        self._marks: list[tuple[int, float]] | None = None
        self._age_error: BufferAgeLimitExceeded | None = None

    # For handlers.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """
        Write bytes; it never waits. When the client has left, or the server has
        closed the connection, or the handler has ended, they are dropped (spec S4).

        :raises RuntimeError: after this writer's own :meth:`close` or
            :meth:`write_eof`.
        :raises TypeError: ``data`` is not bytes-like.
        """
        if type(data) is not bytes:
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise TypeError(f"data={data!r:.40} is not bytes-like")
            data = bytes(data)
        if self._is_open:
            self.bytes_written += len(data)
            self._output.write(data)
        elif self._state is not _OPEN:
            end = "write_eof" if self._state is _EOF else "close"
            raise RuntimeError(f"write after {end}() of the writer")

    def writelines(self, lines: Iterable[bytes]) -> None:
        """Write several pieces of bytes as one (spec S5)."""
        self.write(b"".join(lines))

    async def drain(self) -> None:
        """
        Wait until at most ``writer_buffer_size`` bytes wait to be sent. A
        handler that awaits it after each write is never far ahead of its client.

        :raises ConnectionGone: the client has left or the server has closed the
            connection, also while this waits.
        :raises BufferAgeLimitExceeded: the client stopped reading (S6).
        :raises RuntimeError: after this writer's own :meth:`close`.
        """
        if not self._is_open:
            self._check()
        if self._output.unsent > self._limit:
            if self._draining is None:
                self._draining = []
            waiter: Deferred[None] = Deferred(self._drain_cancelled)
            self._draining.append(waiter)
            self._output.report_flush()
            await waiter

    def flushed(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when the kernel has all that was written
            before this call. It fails as :meth:`drain` raises. Cancelling it
            cancels the waiting only.
        """
        try:
            self._check()
        except (ConnectionGone, RuntimeError) as error:
            return fail(error)
        if not self.bytes_to_write:
            return succeed(None)
        if self._flushing is None:
            self._flushing = []
        waiter: Deferred[None] = Deferred(self._flush_cancelled)
        self._flushing.append((self.bytes_written, waiter))
        self._output.report_flush()
        return waiter

    def close(self) -> None:
        """
        Close the connection when all is sent: the client reads everything, then
        EOF (spec S8). The reader is at EOF after what it has buffered, and the
        slot is kept until the handler ends. A client that takes no byte for 5 s
        is aborted. Closing twice is closing once.
        """
        if self._state is not _CLOSED:
            self._state = _CLOSED
            self._is_open = False
            self._connection.close_by_writer()

    def close_finished(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when the connection's socket is closed,
            by whomever. It closes nothing itself.
        """
        self._connection.go_on_reading()
        return self._connection.when_socket_closed.wait()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, by its own :meth:`close` or any other way."""
        return self._is_gone or self._has_ended or self._state is _CLOSED

    @property
    def can_write_eof(self) -> bool:
        """Whether :meth:`write_eof` works: not under TLS (spec S10)."""
        return self._connection.can_half_close

    def write_eof(self) -> None:
        """
        Close the write side when all is sent: the client reads EOF, and may go
        on sending. Twice is once.

        :raises RuntimeError: the transport has no half-close, such as TLS, or
            the writer is closed.
        """
        if self._state is _OPEN:
            if not self.can_write_eof:
                raise RuntimeError("write_eof: this transport has no half-close")
            self._state = _EOF
            self._is_open = False
            if self.bytes_to_write:
                self._output.report_flush()
            elif not self._is_gone:
                self._connection.all_taken()
        elif self._state is _CLOSED:
            raise RuntimeError("write_eof after close() of the writer")

    @property
    def bytes_to_write(self) -> int:
        """How many bytes the kernel has not taken yet, and still may."""
        return 0 if self._is_gone else self._output.unsent

    @property
    def bytes_taken(self) -> int:
        """How many bytes the kernel has taken so far."""
        unsent = self._unsent_at_end if self._is_gone else self._output.unsent
        return self.bytes_written - unsent

    def consumer_left(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when the client has left: when its reset,
            or a failed send, is seen. Not at its FIN, which says only that it
            sends no more.
        """
        self._connection.go_on_reading()
        if self._consumer_left is None:
            self._consumer_left = Event()
            if self._has_consumer_left:
                self._consumer_left.happen()
        return self._consumer_left.wait()

    @property
    def draining(self) -> bool:
        """
        Whether the server drains: it accepts nobody any more, and handlers should
        come to an end.
        """
        return self._connection.draining

    def when_draining(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fires when :attr:`draining` becomes
            true, or has fired already. It never does if the connection is over
            before. Cancelling it affects nobody else.
        """
        return self._connection.when_draining()

    def abort(self) -> None:
        """Close at once with a reset; what was not sent is lost."""
        self._connection.abort()

    @property
    def connection(self) -> Connection[Any]:
        """The connection: its label, its number, see :class:`tcpsvc.IConnection`."""
        return cast("Connection[Any]", self._connection)

    @property
    def transport(self) -> ITransport:
        """Twisted's transport, for its addresses and TLS details (spec S7)."""
        return cast(ITransport, self._connection.transport)

    @property
    def peer(self) -> Any:
        """The client's address."""
        return self._connection.peer

    @property
    def host(self) -> Any:
        """The own address of this connection."""
        return self._connection.host

    def __repr__(self) -> str:
        state = "gone" if self._is_gone else self._state
        return (
            f"<Writer to {address_text(self.peer)} {state}, "
            f"{self.bytes_to_write} of {self.bytes_written} bytes to write>"
        )

    # For the connection.

    def begin(self, output: Output) -> None:
        """The connection is there, and this is where its bytes go."""
        self._output = output

    @property
    def has_written_eof(self) -> bool:
        """Whether :meth:`write_eof` was called and nothing has ended it since."""
        return self._state is _EOF

    def blocked(self) -> None:
        """Bytes have begun to wait: remember since when, and have them watched."""
        if self._marks is None and not self._is_gone:
            self._marks = [(self.bytes_written, self._connection.watch())]

    def sent(self) -> None:
        """The kernel has taken more, or all, of what waited."""
        if self._is_gone:
            return
        if not self._output.unsent:
            self._marks = None
        if self._flushing or self._draining:
            self._tell_waiters()
        # Whoever was told may have written more, and ended the handler.
        if not self._is_open and not self._is_gone and not self._output.unsent:
            self._connection.all_taken()

    def handler_ended(self) -> None:
        """What was written so far is all: who kept the writer cannot add to it."""
        self._has_ended = True
        self._is_open = False

    def consumer_has_left(self) -> None:
        """A reset or a failed send was seen."""
        self._has_consumer_left = True
        if self._consumer_left is not None:
            self._consumer_left.happen()

    def gone(self) -> None:
        """The connection is closed: nothing can be sent any more."""
        if not self._is_gone:
            self._unsent_at_end = self._output.unsent
            self._is_gone = True
            self._is_open = False
            self._output = _NOWHERE
            self._marks = None

    def tell_gone(self) -> None:
        """Who waits is told that the connection is gone."""
        # One by one: the first to be told may cancel the next.
        while self._draining:
            self._draining.pop(0).errback(self._gone_error())
        while self._flushing:
            self._flushing.pop(0)[1].errback(self._gone_error())

    def age(self, now: float) -> float:
        """
        How long, in seconds, the oldest byte has waited at least; it is exact to
        the interval of the calls. 0 when nothing waits.
        """
        marks = self._marks
        if not marks:
            return 0.0
        taken = self.bytes_taken
        while marks and marks[0][0] <= taken:
            marks.pop(0)
        if taken < self.bytes_written and (
            not marks or marks[-1][0] < self.bytes_written
        ):
            marks.append((self.bytes_written, now))
        return now - marks[0][1] if marks else 0.0

    def too_old(self, age: float, limit: float) -> BufferAgeLimitExceeded:
        """The client does not read: from now on waiters are told so (S6)."""
        self._age_error = BufferAgeLimitExceeded(age, limit)
        self._age_error.connection = self._connection
        return self._age_error

    # Who waits.

    def _tell_waiters(self) -> None:
        # All at once: the first to be told may end the connection, which makes
        # nothing undone that the others wait for.
        told: list[Deferred[None]] = []
        if self._flushing:
            taken = self.bytes_taken
            told = [waiter for end, waiter in self._flushing if end <= taken]
            del self._flushing[: len(told)]
        if self._draining and self.bytes_to_write <= self._limit:
            told += self._draining
            self._draining = None
        for waiter in told:
            if not waiter.called:
                waiter.callback(None)

    def _flush_cancelled(self, waiter: Deferred[None]) -> None:
        self._flushing = [e for e in self._flushing or () if e[1] is not waiter]

    def _drain_cancelled(self, waiter: Deferred[None]) -> None:
        self._draining = [d for d in self._draining or () if d is not waiter]

    def _check(self) -> None:
        if self._state is _CLOSED:
            raise RuntimeError("the writer was closed by its own close()")
        if self._is_gone or self._has_ended:
            raise self._gone_error()

    def _gone_error(self) -> ConnectionGone:
        if self._age_error is not None:
            return self._age_error
        reason = self._connection.reason
        because = "" if reason is None else f": {reason.value}"
        error = ConnectionGone(
            f"the connection of {address_text(self.peer)} is gone{because}"
        )
        error.reason = reason
        error.connection = self._connection
        return error
