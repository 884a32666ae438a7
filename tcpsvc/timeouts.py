"""
How long a connection may take: which of the timeouts is over.

They are looked at once a second or oftener, see :mod:`tcpsvc.sweeper`: a timeout is
over not before its time, and up to a quarter of it, or a second, later.
"""

from __future__ import annotations

from typing import Any

from tcpsvc.options import Settings
from tcpsvc.reasons import Reason

#: The names of the options.
TIMEOUTS = (
    "first_byte_timeout",
    "idle_timeout",
    "handler_timeout",
    "lifetime",
)


class Timeouts:
    """
    The timeouts of a server's connections.

    :param settings: what they are.
    """

    def __init__(self, settings: Settings) -> None:
        self.change(settings)

    def change(self, settings: Settings) -> None:
        """Other ones, for all that are live, from the next look on."""
        self._settings = settings
        self._has_any = self.shortest is not None or settings.min_throughput is not None
        #: Of connections that are watched for their throughput: since when, and how
        #: many bytes they had moved by then.
        self._windows: dict[int, tuple[float, int]] = {}

    @property
    def shortest(self) -> float | None:
        """The shortest that there is, in seconds."""
        settings = self._settings
        found = [getattr(settings, name) for name in TIMEOUTS]
        if settings.min_throughput is not None:
            found.append(settings.throughput_window)
        return min((t for t in found if t is not None), default=None)

    def overdue(self, connection: Any, now: float) -> Reason | None:
        """Which of them is over for a connection whose handler runs."""
        last = connection.look(now)
        if not self._has_any:
            return None
        settings = self._settings
        age = connection.age
        if settings.lifetime is not None and age >= settings.lifetime:
            return Reason.LIFETIME
        if settings.handler_timeout is not None and age >= settings.handler_timeout:
            return Reason.HANDLER_TIMEOUT
        bytes_in, bytes_out = connection.bytes_moved
        if (
            settings.first_byte_timeout is not None
            and bytes_in == 0
            and age >= settings.first_byte_timeout
        ):
            return Reason.FIRST_BYTE
        if bytes_in is None and bytes_out is None:
            return None  # Nobody knows what it moves.
        if settings.idle_timeout is not None and now - last >= settings.idle_timeout:
            return Reason.IDLE
        if settings.min_throughput is not None:
            return self._slow(connection, settings.min_throughput, now)
        return None

    def _slow(self, connection: Any, least: float, now: float) -> Reason | None:
        """
        Whether it has moved too little in a whole window: some bytes, but too few, or
        none although some wait to be sent. One that moves none, and for which none
        wait, is idle, not slow.
        """
        window = self._settings.throughput_window
        moved = connection.moved
        since, before = self._windows.setdefault(connection.id, (now, moved))
        if now - since < window:
            return None
        self._windows[connection.id] = (now, moved)
        delta = moved - before
        if (delta or connection.bytes_waiting) and delta < least * (now - since):
            return Reason.SLOW
        return None

    def forget(self, connection: Any) -> None:
        """It is over."""
        self._windows.pop(connection.id, None)
