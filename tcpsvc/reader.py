"""
The reading half of a connection: a bounded buffer between bytes that arrive and
a handler that asks for them (spec S1 to S3).

The methods are coroutines. Each may be awaited, yielded in ``inlineCallbacks``,
or turned into a Deferred with ``Deferred.fromCoroutine``. A read that finds its
bytes in the buffer returns them without a turn of the reactor. No byte leaves
the buffer before the read that takes it returns, so cancelling one loses none.
"""

from __future__ import annotations

from asyncio import IncompleteReadError, LimitOverrunError
from collections.abc import AsyncIterator
from typing import Any, Protocol, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import ITransport
from zope.interface import implementer

from tcpsvc.interfaces import IReader


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

    def pause_reading(self) -> None:
        """Take nothing more from the kernel."""

    def resume_reading(self) -> None:
        """Go on taking from the kernel."""

    def reading_wanted(self) -> None:
        """There is room in the buffer again."""

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

    :ivar bytes_read: how many bytes have arrived on this connection so far.
    """

    __slots__ = (
        "_buffer",
        "_connection",
        "_is_closed",
        "_is_reading",
        "_limit",
        "_wake_at",
        "_waiter",
        "bytes_read",
        "has_eof",
    )

    def __init__(self, connection: Input, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        self._buffer = bytearray()
        self._waiter: Deferred[None] | None = None
        self._wake_at = 0
        self._is_reading = False
        self._is_closed = False
        self.has_eof = False
        self.bytes_read = 0

    # For handlers.

    async def read(self, n: int = -1) -> bytes:
        """
        :param n: at most so many bytes; negative (the default) reads until EOF.
        :returns: what has arrived, at least one byte unless at EOF or ``n`` is 0;
            ``b""`` at EOF.
        :raises RuntimeError: another read is outstanding (S1), or the reader was
            closed.
        """
        self._check()
        if n == 0:
            return b""
        if n < 0:
            while not self.has_eof:
                await self._more(None)
            return self._take(len(self._buffer))
        if not self._buffer and not self.has_eof:
            await self._more(1)
        return self._take(min(n, len(self._buffer)))

    async def readline(self) -> bytes:
        """
        :returns: one line with its ``b"\\n"``; at EOF what is left, without one.
        :raises asyncio.LimitOverrunError: the line, its end not counted, is
            longer than ``reader_buffer_size``. It stays in the buffer.
        :raises RuntimeError: as :meth:`read`.
        """
        try:
            return await self.readuntil(b"\n")
        except IncompleteReadError as error:
            return error.partial

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
        self._check()
        size = len(separator)
        if not size:
            raise ValueError("separator=b'' would never be found")
        buffer = self._buffer
        searched = 0
        while True:
            found = buffer.find(separator, searched)
            if found >= 0:
                if found > self._limit:
                    self._overrun()
                return self._take(found + size)
            searched = max(0, len(buffer) + 1 - size)
            if searched > self._limit:
                self._overrun()
            if self.has_eof:
                raise IncompleteReadError(self._take(len(buffer)), None)
            await self._more(len(buffer) + 1)

    async def readexactly(self, n: int) -> bytes:
        """
        :param n: how many bytes; more than ``reader_buffer_size`` is allowed.
        :returns: exactly so many.
        :raises asyncio.IncompleteReadError: EOF came first; ``partial`` holds
            what there was.
        :raises ValueError: ``n`` is negative.
        :raises RuntimeError: as :meth:`read`.
        """
        self._check()
        if n < 0:
            raise ValueError(f"n={n} is negative")
        await self._until(n)
        if len(self._buffer) < n:
            raise IncompleteReadError(self._take(len(self._buffer)), n)
        return self._take(n)

    async def peek(self, n: int) -> bytes:
        """
        :param n: how many bytes to look at; at most ``reader_buffer_size``.
        :returns: the next ``n`` bytes, fewer only at EOF. They stay to be read.
        :raises ValueError: ``n`` is negative or larger than the buffer.
        :raises RuntimeError: as :meth:`read`.
        """
        self._check()
        if not 0 <= n <= self._limit:
            raise ValueError(f"n={n} is not in 0..{self._limit} (reader_buffer_size)")
        await self._until(n)
        return bytes(self._buffer[:n])

    async def drain_to_eof(self) -> None:
        """
        Read and discard until EOF, holding none of it.

        :raises RuntimeError: as :meth:`read`.
        """
        while await self.read(self._limit):
            pass

    def at_eof(self) -> bool:
        """Whether EOF has come and everything before it was read."""
        return self.has_eof and not self._buffer

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
            f"<Reader of {self._connection.peer} {state}, "
            f"{len(self._buffer)} bytes buffered, {self.bytes_read} read>"
        )

    # For the connection.

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived. After EOF nothing counts (TLS may hold some back)."""
        if self.has_eof:
            return
        self.bytes_read += len(data)
        self._buffer += data
        if self._waiter is not None and len(self._buffer) >= self._wake_at:
            self._wake()
        if self._waiter is None and len(self._buffer) >= self._limit:
            self._connection.pause_reading()

    def feed_eof(self) -> None:
        """Nothing more will come."""
        if not self.has_eof:
            self.has_eof = True
            self._wake()

    # The buffer.

    def _check(self) -> None:
        if self._is_reading:
            raise RuntimeError(
                "another read of this connection is outstanding: await it, or "
                "cancel it, before the next"
            )
        if self._is_closed:
            raise RuntimeError("read after close() of the reader")

    async def _until(self, n: int) -> None:
        if len(self._buffer) < n and not self.has_eof:
            await self._more(n)

    async def _more(self, size: int | None) -> None:
        """
        Wait until the buffer holds so many bytes (``None``: no number is
        enough), or EOF.
        """
        self._is_reading = True
        self._wake_at = (1 << 62) if size is None else size
        waiter = self._waiter = Deferred(self._read_cancelled)
        try:
            self._connection.resume_reading()
            await waiter
        finally:
            self._waiter = None
            self._is_reading = False
            if not self._is_closed and len(self._buffer) >= self._limit:
                self._connection.pause_reading()
        if self._is_closed:
            raise RuntimeError("close() of the reader during a read")

    def _read_cancelled(self, _: Deferred[None]) -> None:
        self._waiter = None

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(None)

    def _take(self, n: int) -> bytes:
        buffer = self._buffer
        taken = bytes(buffer) if n == len(buffer) else bytes(buffer[:n])
        del buffer[:n]
        if len(buffer) < self._limit:
            self._connection.reading_wanted()
        return taken

    def _overrun(self) -> None:
        raise LimitOverrunError(
            f"no separator within the limit of {self._limit} bytes "
            "(reader_buffer_size)",
            self._limit,
        )
