"""
The output of a connection whose transport does not say how much it has sent: TLS,
transports in memory, other wrapping protocols.

The lowest transport holds at most :data:`CHUNK` bytes of ours at a time and says
when it has sent them all, as it says to any pull producer; the rest waits here,
where it can be counted and aged. So what is known of it is exact to a chunk.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

#: How many bytes the transport is given at a time.
CHUNK = 128 * 1024


class Chunked(Protocol):
    """What is asked of the connection, and what it is told."""

    def may_write(self) -> bool:
        """Whether the transport is ready for bytes at all."""

    def write_to_transport(self, data: bytes) -> bool:
        """Hand bytes on. Returns whether they count as taken at once."""

    def blocked(self) -> None:
        """Bytes wait."""


class Chunks:
    """
    Hands bytes to the transport, a chunk at a time.

    :ivar unsent: how many bytes the transport has not sent yet.
    """

    __slots__ = ("_connection", "_offset", "_passed", "_queue", "unsent")

    def __init__(self, connection: Chunked) -> None:
        self._connection = connection
        self._queue: deque[bytes] = deque()
        #: How much of the first in the queue was handed on already.
        self._offset = 0
        #: How many bytes the transport has and has not sent.
        self._passed = 0
        self.unsent = 0

    def report_flush(self) -> None:
        """The transport tells of each."""

    def write(self, data: bytes) -> None:
        """Hand them on, or let them wait."""
        if data:
            self.unsent += len(data)
            self._queue.append(data)
            self.feed()
            if self.unsent:
                self._connection.blocked()

    def all_sent(self) -> None:
        """The transport has sent what it had."""
        self.unsent -= self._passed
        self._passed = 0
        self.feed()

    def feed(self) -> None:
        """Give the transport the next chunk, if it has room."""
        queue = self._queue
        while queue and self._connection.may_write():
            room = CHUNK - self._passed
            if not room:
                break
            first = queue[0]
            if not self._offset and len(first) <= room:
                piece = queue.popleft()
            else:
                piece = first[self._offset : self._offset + room]
                self._offset += len(piece)
                if self._offset == len(first):
                    queue.popleft()
                    self._offset = 0
            self._passed += len(piece)
            if self._connection.write_to_transport(piece):
                self.unsent -= len(piece)
                self._passed -= len(piece)
