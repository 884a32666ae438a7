"""
How long a connection may take: which of the timeouts is over.

They are looked at once a second or oftener, see :mod:`tcpsvc.sweeper`: a timeout is
over not before its time, and up to a quarter of it, or a second, later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from tcpsvc.eviction import RANKING_LASTS
from tcpsvc.reasons import Reason
from tcpsvc.settings import Settings
from tcpsvc.sweeper import INTERVAL, SHORTEST_INTERVAL

#: The names of the options.
TIMEOUTS = ("first_byte_timeout", "idle_timeout", "handler_timeout", "lifetime")

#: Those of them, and what else, that are about the bytes that are moved.
OF_TRAFFIC = ("first_byte_timeout", "idle_timeout", "min_throughput")


#: How late a sweep may be, in seconds, without another one being waited for.
LATENESS = 0.02


class Timeouts:
    """
    The timeouts of a server's connections.

    :param settings: what they are.
    :param lets_pass: whether a connection is let pass nevertheless, in a dry run.
    """

    def __init__(
        self, settings: Settings, lets_pass: Callable[[Any, Reason], bool]
    ) -> None:
        self._settings = settings
        self._lets_pass = lets_pass
        #: Of connections that are watched for their throughput: since when, and how
        #: many bytes they had moved by then, and delivered, where that is known.
        self.windows: dict[int, tuple[float, int, int | None]] = {}
        self.change(settings)

    def change(self, settings: Settings) -> None:
        """Other ones, for all that are live, from the next look on."""
        before, self._settings = self._settings, settings
        self._has_any = self.shortest is not None
        #: Whether what connections move is looked at.
        self.looks = (
            settings.idle_timeout is not None
            or settings.min_throughput is not None
            or settings.overflow == "evict"
        )
        if (before.min_throughput, before.throughput_window) != (
            settings.min_throughput,
            settings.throughput_window,
        ):
            self.windows.clear()

    @property
    def shortest(self) -> float | None:
        """The shortest that there is, in seconds."""
        settings = self._settings
        found = [getattr(settings, name) for name in TIMEOUTS]
        if settings.min_throughput is not None:
            found.append(settings.throughput_window)
        return min((t for t in found if t is not None), default=None)

    @property
    def interval(self) -> float | None:
        """
        How often to look, in seconds; ``None`` when there is nothing to look for.

        A byte is seen up to an interval after it has moved. So that the end is not
        seen as much later again, idle_timeout is a whole number of intervals.
        """
        shortest = self.shortest
        if shortest is None:
            return RANKING_LASTS if self._settings.overflow == "evict" else None
        interval = max(SHORTEST_INTERVAL, min(INTERVAL, shortest / 4))
        if self._settings.idle_timeout is not None:
            idle = self._settings.idle_timeout + LATENESS
            interval = max(SHORTEST_INTERVAL, idle / math.ceil(idle / interval))
        return interval

    def look(self, connection: Any, now: float) -> None:
        """Look at a live connection, and end it if one of them is over."""
        if not connection.is_running or connection.is_ended:
            return
        for reason in self.overdue(connection, now):
            if not self._lets_pass(connection, reason):
                connection.end(reason)
                return
            if connection.is_ended or connection.is_over:
                return  # Whoever was told of the dry run has ended it.

    def overdue(self, connection: Any, now: float) -> tuple[Reason, ...]:
        """
        Which of them are over for a connection whose handler runs: all, since some
        may be in a dry run.
        """
        last = connection.look(now) if self.looks else now
        if not self._has_any:
            return ()
        settings = self._settings
        age = connection.age
        over: tuple[Reason, ...] = ()
        if settings.handler_timeout is not None and age >= settings.handler_timeout:
            over += (Reason.HANDLER_TIMEOUT,)
        if connection.is_socket_closed:
            return over  # The handler is all there is of it.
        if settings.lifetime is not None and age >= settings.lifetime:
            over = (Reason.LIFETIME, *over)
        if (
            settings.first_byte_timeout is not None
            and age >= settings.first_byte_timeout
            and not connection.has_received
        ):
            over += (Reason.FIRST_BYTE,)
        if not self.looks or connection.moved < 0:
            return over
        if settings.idle_timeout is not None and now - last >= settings.idle_timeout:
            over += (Reason.IDLE,)
        if settings.min_throughput is not None and self._is_slow(
            connection, settings.min_throughput, now
        ):
            over += (Reason.SLOW,)
        return over

    def _is_slow(self, connection: Any, least: float, now: float) -> bool:
        """
        Whether it has moved too little in a whole window: some bytes, but too few, or
        none although some wait to be sent. One that moves none, and for which none
        wait, is idle, not slow.

        A kernel that is full takes more only when a third of what it holds is gone,
        so what the client's has acknowledged counts, too.
        """
        window = self.windows.get(connection.id)
        if window is None:
            self.windows[connection.id] = (now, connection.moved, connection.delivered)
            return False
        since, moved_before, delivered_before = window
        if now - since < self._settings.throughput_window:
            return False
        moved, delivered = connection.moved, connection.delivered
        self.windows[connection.id] = (now, moved, delivered)
        delta = moved - moved_before
        if delivered is not None and delivered_before is not None:
            delta = max(delta, delivered - delivered_before)
        if not (delta or connection.bytes_waiting):
            return False
        return bool(delta < least * (now - since))

    def forget(self, connection: Any) -> None:
        """It is over."""
        self.windows.pop(connection.id, None)

    def broken(self, live: Collection[int]) -> list[str]:
        """
        What does not hold, and ought to.

        :param live: the ids of live connections.
        """
        watches_others = any(number not in live for number in self.windows)
        return ["only who is live is watched for its throughput"] * watches_others
