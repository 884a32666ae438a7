"""
The reading half of a connection: a bounded buffer between bytes that arrive and
a handler that asks for them (spec S1 to S3).

The methods are coroutines. Each may be awaited, yielded in ``inlineCallbacks``,
or turned into a Deferred with ``Deferred.fromCoroutine``. A read that finds its
bytes in the buffer returns them without a turn of the reactor; one that does not
is resumed from within the delivery of the bytes. No byte leaves the buffer before
the read that takes it returns, so cancelling one loses none.

The buffer is the received ``bytes`` as they came, and how far they are read: one
chunk that answers one read is never copied. Only where a rest would be copied
again and again is it a ``bytearray``, see :meth:`Reader.data_received`.
"""

from __future__ import annotations

from asyncio import IncompleteReadError, LimitOverrunError
from collections.abc import AsyncIterator, Generator
from types import coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast

from twisted.internet.interfaces import ITransport
from zope.interface import implementer

from tcpsvc.address_text import address_text
from tcpsvc.driver import Suspension
from tcpsvc.interfaces import IReader

if TYPE_CHECKING:
    from tcpsvc.connection import Connection

#: More than ever arrives.
_ENDLESS = 1 << 62


class Input(Protocol):
    """What a reader reads from: a connection that can be paused."""

    @property
    def peer(self) -> Any:
        """Who sends."""

    @property
    def host(self) -> Any:
        """Who receives."""

    @property
    def transport(self) -> Any:
        """What it comes through."""

    @property
    def draining(self) -> bool:
        """Whether the server drains."""

    def gives_eof_for_drain(self, asked: bool | None) -> bool:
        """Whether a reader that waits at a boundary while it drains is at EOF."""

    def read_first(self) -> None:
        """A read is to wait, the first: deliver what has come before it."""

    def go_on_reading(self) -> None:
        """Have the kernel tell of input, if it does not yet."""

    def pause_reading(self) -> None:
        """Take nothing more from the kernel."""

    def resume_reading(self) -> None:
        """Go on taking from the kernel."""

    def close_by_reader(self) -> None:
        """The reader was closed by its own ``close``."""


@implementer(IReader)
class Reader:
    """
    Reads from one connection. Names and results are those of
    :class:`asyncio.StreamReader`, with one difference: a line that is too long
    is a :exc:`LimitOverrunError <asyncio.LimitOverrunError>` from
    :meth:`readline` too, and stays in the buffer.

    The server makes it; handlers receive it.
    """

    __slots__ = (
        "_connection",
        "_data",
        "_eof_when_draining",
        "_has_waited",
        "_is_asked",
        "_is_closed",
        "_is_draining",
        "_limit",
        "_position",
        "_suspension",
        "_waiter",
        "_wake_at",
        "bytes_arrived",
        "has_eof",
    )

    def __init__(self, connection: Input, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        #: What has arrived, and up to where it is read. A bytearray is read from
        #: its start.
        self._data: bytes | bytearray = b""
        self._position = 0
        self._waiter: Suspension | None = None
        #: How many bytes a read waits for, until it has returned; else 0.
        self._wake_at = 0
        #: The last waiter, to be used again.
        self._suspension: Suspension | None = None
        self._is_closed = False
        #: Whether the handler wants EOF at a boundary; else as the option says.
        self._eof_when_draining: bool | None = None
        self._is_draining = False
        #: Whether any read has had to wait: the first takes what has come before.
        self._has_waited = False
        #: Whether it has been asked what has come.
        self._is_asked = False
        self.has_eof = False
        self.bytes_arrived = 0

    # For handlers.

    async def read(self, n: int = -1) -> bytes:
        """
        :param n: at most so many bytes; negative (the default) reads until EOF.
        :returns: what has arrived, at least one byte unless at EOF or ``n`` is 0;
            ``b""`` at EOF.
        :raises RuntimeError: another read is outstanding (S1), or the reader was
            closed.
        """
        if self._wake_at or self._is_closed:
            self._refuse()
        if n <= 0:
            if n == 0:
                return b""
            while not self.has_eof:
                await self._more(None)
            return self._take(self._buffered)
        if self._position == len(self._data) and not self.has_eof:
            await self._more(1)
        size = len(self._data) - self._position
        return self._take(min(size, n))

    async def readline(self) -> bytes:
        """
        :returns: one line with its ``b"\\n"``; at EOF what is left, without one.
        :raises asyncio.LimitOverrunError: the line, its end not counted, is
            longer than ``reader_buffer_size``. It stays in the buffer.
        :raises RuntimeError: as :meth:`read`.
        """
        if self._wake_at or self._is_closed:
            self._refuse()
        searched = 0
        while True:
            position = self._position
            found = self._data.find(b"\n", position + searched) + 1
            if found:
                size = found - position
                if size == len(self._data) and size < self._limit:
                    line, self._data = self._data, b""
                    return line if type(line) is bytes else bytes(line)
                if size > self._limit + 1:
                    self._overrun()
                return self._take(size)
            searched = len(self._data) - position
            if searched > self._limit:
                self._overrun()
            if self.has_eof:
                return self._take(searched)
            await self._more(searched + 1)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """
        :param separator: what to read up to, one byte or more.
        :returns: everything up to and with the separator.
        :raises asyncio.IncompleteReadError: EOF came first; ``partial`` holds
            what there was.
        :raises asyncio.LimitOverrunError: more than ``reader_buffer_size`` bytes
            come before the separator. They stay in the buffer, and the first
            ``consumed`` of them can be read past.
        :raises ValueError: the separator is empty.
        :raises RuntimeError: as :meth:`read`.
        """
        if self._wake_at or self._is_closed:
            self._refuse()
        size = len(separator)
        if not size:
            raise ValueError("separator=b'' would never be found")
        searched = 0
        while True:
            position = self._position
            found = self._data.find(separator, position + searched) - position
            if found >= 0:
                if found > self._limit:
                    self._overrun()
                return self._take(found + size)
            buffered = len(self._data) - position
            searched = max(0, buffered + 1 - size)
            if searched > self._limit:
                self._overrun()
            if self.has_eof:
                raise IncompleteReadError(self._take(buffered), None)
            await self._more(buffered + 1)

    async def readexactly(self, n: int) -> bytes:
        """
        :param n: how many bytes; more than ``reader_buffer_size`` is allowed.
        :returns: exactly so many.
        :raises asyncio.IncompleteReadError: EOF came first; ``partial`` holds
            what there was.
        :raises ValueError: ``n`` is negative.
        :raises RuntimeError: as :meth:`read`.
        """
        if self._wake_at or self._is_closed:
            self._refuse()
        if n < 0:
            raise ValueError(f"n={n} is negative")
        if self._buffered < n and not self.has_eof:
            await self._more(n)
        buffered = self._buffered
        if buffered < n:
            raise IncompleteReadError(self._take(buffered), n)
        return self._take(n)

    async def peek(self, n: int) -> bytes:
        """
        :param n: how many bytes to look at; at most ``reader_buffer_size``.
        :returns: the next ``n`` bytes, fewer only at EOF. They stay to be read.
        :raises ValueError: ``n`` is negative or larger than the buffer.
        :raises RuntimeError: as :meth:`read`.
        """
        if self._wake_at or self._is_closed:
            self._refuse()
        if not 0 <= n <= self._limit:
            raise ValueError(f"n={n} is not in 0..{self._limit} (reader_buffer_size)")
        if self._buffered < n and not self.has_eof:
            await self._more(n)
        return bytes(self._data[self._position : self._position + n])

    async def drain_to_eof(self) -> None:
        """
        Read and discard until EOF, holding none of it.

        :raises RuntimeError: as :meth:`read`.
        """
        while await self.read(self._limit):
            pass

    def at_eof(self) -> bool:
        """Whether EOF has come and everything before it was read."""
        if not self._is_asked:
            self._asked()
        return self.has_eof and not self._buffered

    def close(self) -> None:
        """
        Close the whole connection at once, as Async's ``Reader.close`` does
        (spec S8): what was written and not yet taken by the kernel is discarded.
        A pending read, and every later one, raises ``RuntimeError``.
        """
        if not self._is_closed:
            self._is_closed = True
            self._connection.close_by_reader()
            self._wake()

    @property
    def draining(self) -> bool:
        """
        Whether the server drains: it accepts nobody any more, and handlers should
        come to an end.
        """
        return self._connection.draining

    def eof_when_draining(self, wanted: bool = True) -> None:
        """
        Ask for EOF as soon as the server drains and a read waits at a boundary, that
        is, with nothing buffered: the next message will not be answered here any
        more. By default it is as the option ``eof_on_drain`` says.

        A handler that takes more than one read for a message takes this back until
        it has the rest of it::

            header = await reader.readexactly(4)
            reader.eof_when_draining(False)
            body = await reader.readexactly(int.from_bytes(header))
            reader.eof_when_draining()

        :param wanted: whether to, from now on.
        """
        self._eof_when_draining = wanted
        if self._is_draining:
            self.tell_of_drain()

    @property
    def bytes_buffered(self) -> int:
        """How many bytes have arrived and are not read yet."""
        if not self._is_asked:
            self._asked()
        return len(self._data) - self._position

    @property
    def bytes_read(self) -> int:
        """How many bytes have arrived on this connection so far."""
        if not self._is_asked:
            self._asked()
        return self.bytes_arrived

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

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "eof" if self.has_eof else "open"
        return (
            f"<Reader of {address_text(self._connection.peer)} {state}, "
            f"{self._buffered} bytes buffered, {self.bytes_arrived} read>"
        )

    # For the connection.

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived. After EOF nothing counts (TLS may hold some back)."""
        if self.has_eof:
            return
        size = len(data)
        self.bytes_arrived += size
        old = self._data
        rest = len(old) - self._position
        if not rest:
            self._data = data
            self._position = 0
        elif type(old) is bytearray:
            old += data
        elif rest <= size:
            self._data = old[self._position :] + data
            self._position = 0
        else:
            # To copy a large rest for each small arrival would never end.
            self._data = bytearray(memoryview(old)[self._position :])
            self._data += data
            self._position = 0
        size += rest
        waiter = self._waiter
        if waiter is not None and size >= self._wake_at:
            self._waiter = None
            # What waiter.wake() does, without a call more for each message.
            driver = waiter.driver
            if driver is None:
                waiter.callback(None)
            else:
                waiter.driver = None
                driver.resume(None)
            size = len(self._data) - self._position
        if size >= self._limit and self._waiter is None:
            self._pause()

    def feed_eof(self) -> None:
        """Nothing more will come."""
        if not self.has_eof:
            self.has_eof = True
            if self._waiter is not None:
                self._wake()

    def tell_of_drain(self) -> None:
        """The server drains. It may be told again."""
        self._is_draining = True
        if self._waiter is not None and self._is_at_the_end():
            self.feed_eof()

    def _is_at_the_end(self) -> bool:
        """Whether a read that waits has nothing to wait for, since it drains."""
        return not self._buffered and self._connection.gives_eof_for_drain(
            self._eof_when_draining
        )

    def _asked(self) -> None:
        """
        Have the kernel tell of input also in the handler's first step: who asks what
        has come may turn the reactor (``reactor.iterate()``) until something has.
        """
        self._is_asked = True
        self._connection.go_on_reading()

    # The buffer.

    @property
    def _buffered(self) -> int:
        return len(self._data) - self._position

    def _refuse(self) -> None:
        if self._wake_at:
            raise RuntimeError(
                "another read of this connection is outstanding: await it, or "
                "cancel it, before the next"
            )
        raise RuntimeError("read after close() of the reader")

    def _pause(self) -> None:
        """
        The buffer is full. What it is resumed by follows from that: whether it is
        paused is the connection's to know.
        """
        if not self._is_closed:
            self._connection.pause_reading()

    @coroutine
    def _more(self, size: int | None) -> Generator[Suspension, None, None]:
        """
        Wait until the buffer holds so many bytes (``None``: no number is
        enough), or EOF.
        """
        if self._is_draining and self._is_at_the_end():
            self.has_eof = True
            return
        wake_at = self._wake_at = _ENDLESS if size is None else size
        if not self._has_waited:
            self._has_waited = True
            self._connection.read_first()
            if self.has_eof or self._buffered >= wake_at:
                self._wake_at = 0
                return
        waiter = self._suspension
        if waiter is None or waiter.called:  # By whom it was used as a Deferred.
            waiter = self._suspension = Suspension()
        self._waiter = waiter
        try:
            if wake_at > self._limit:  # Else the buffer is not full of too little.
                self._connection.resume_reading()
            yield waiter
        except BaseException:
            self._suspension = None  # Whoever waited for it may still hold it.
            self._waiter = None
            if self._buffered >= self._limit:
                self._pause()
            raise
        finally:
            self._wake_at = 0
        if self._is_closed:
            raise RuntimeError("close() of the reader during a read")

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.wake()

    def _take(self, n: int) -> bytes:
        data = self._data
        position = self._position
        buffered = len(data) - position
        if n == buffered:
            # All there is.
            self._data = b""
            self._position = 0
            taken: Any = data if not position else data[position:]
            if type(taken) is bytearray:
                taken = bytes(taken)
        elif type(data) is bytearray:
            taken = bytes(memoryview(data)[:n])
            del data[:n]
        else:
            self._position = position = position + n
            taken = data[position - n : position]
        if buffered >= self._limit and buffered - n < self._limit:
            self._connection.resume_reading()
        return taken  # type: ignore[no-any-return]

    def _overrun(self) -> None:
        raise LimitOverrunError(
            f"no separator within the limit of {self._limit} bytes "
            "(reader_buffer_size)",
            self._limit,
        )
