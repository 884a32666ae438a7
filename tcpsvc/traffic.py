"""
How old a connection is, and what it has moved.
"""

from __future__ import annotations

from typing import Any

from tcpsvc import kernel
from tcpsvc.clock import SteadyClock
from tcpsvc.snapshot import Bytes


class Traffic:
    """
    What limits, snapshots and observers are told of a connection's age and bytes. The
    half of :class:`tcpsvc.connection.Connection` that changes nothing but what was
    seen when it was looked at.
    """

    __slots__ = (
        "_accepted_at",
        "_active_at",
        "_at_end",
        "_has_received",
        "_moved",
    )

    _factory: Any
    _is_released: bool
    #: When it was accepted, and when it was last seen to have moved a byte.
    _accepted_at: float
    _active_at: float
    #: Bytes moved, either way, up to the last look; -1 when nobody knows.
    _moved: int
    _has_received: bool
    #: How old it was at its end, and what it had moved.
    _at_end: tuple[float, Bytes] | None

    # What a kind of connection knows.

    def _bytes(self) -> Bytes:
        """Bytes in and out, ``None`` where nobody knows."""
        raise NotImplementedError  # pragma: no cover

    def _connected_socket(self) -> Any:
        """Its socket, if it has one and it is open."""
        return None

    def _bytes_seen(self) -> Bytes:
        """As :meth:`_bytes`, for whom only changes matter."""
        return self._bytes()

    def _bytes_at_end(self) -> Bytes:
        """As :meth:`_bytes`, of a socket that is to be closed, or is."""
        return self._bytes()

    @property
    def bytes_waiting(self) -> int:
        """Bytes that wait to be sent, as far as is known."""
        return 0

    # What is known of each.

    @property
    def age(self) -> float:
        """Seconds since the accept; up to the end, once it is over."""
        if self._is_released and self._at_end is not None:
            return self._at_end[0]
        return float(self._factory.clock.seconds() - self._accepted_at)

    @property
    def bytes_in(self) -> int | None:
        """Bytes received."""
        return self._known_bytes()[0]

    @property
    def bytes_out(self) -> int | None:
        """Bytes that the kernel has taken."""
        return self._known_bytes()[1]

    def _known_bytes(self) -> Bytes:
        if self._at_end is not None:
            return self._at_end[1]
        return (None, None) if self._is_released else self._bytes()

    def look(self, now: float) -> float:
        """
        See whether it has moved a byte since the last look.

        :returns: the time of the last look that found so.
        """
        bytes_in, bytes_out = self._bytes_seen()
        moved = -1 if bytes_in is None else bytes_in + (bytes_out or 0)
        if moved == -1:
            self._moved = -1
        elif moved != self._moved:
            self._moved = moved
            self._active_at = now
        return self._active_at

    @property
    def moved(self) -> int:
        """Bytes moved, either way, up to the last look; -1 when nobody knows."""
        return self._moved

    def _idle(self, now: float) -> float:
        """Seconds without a byte."""
        if self._is_released:
            return now - self._active_at
        by_kernel = None
        # Its clock is the kernel's only where it is steady.
        if not self._factory.looks and type(self._factory.clock) is SteadyClock:
            by_kernel = kernel.idle(self._connected_socket())
        # The kernel counts from before the accept, in its own ticks.
        if by_kernel is None:
            return now - self.look(now)
        return min(by_kernel, now - self._accepted_at)

    @property
    def has_received(self) -> bool:
        """Whether the client has sent anything; true where nobody knows."""
        if not self._has_received:
            connected = self._connected_socket()
            self._has_received = self._bytes_seen()[0] != 0 or (
                # Its protocol may have paused it.
                connected is not None and kernel.has_input(connected)
            )
        return self._has_received

    @property
    def delivered(self) -> int | None:
        """
        Bytes that have come, and that the client's kernel has acknowledged;
        ``None`` where nobody knows.
        """
        received, acknowledged = kernel.traffic(self._connected_socket())
        if received is None or acknowledged is None:
            return None
        return received + acknowledged

    def _note_bytes(self) -> None:
        """
        Note how old it is and what it has moved, for observers: at its release, and
        before, when the socket is about to be closed that is to be asked.
        """
        before = self._at_end
        self._at_end = (
            float(self._factory.clock.seconds() - self._accepted_at),
            self._bytes_at_end() if before is None else before[1],
        )
