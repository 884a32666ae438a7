"""
One timer for all connections of a server, instead of one for each.

Connections with something to look after (bytes that wait to be sent, a close that
waits for the client) are swept about once a second, and all that are live while
there are timeouts. While there is nothing to look after there is no timer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime

#: How often, in seconds, unless something needs it oftener.
INTERVAL = 1.0

#: How often at most, in seconds.
SHORTEST_INTERVAL = 0.05


class Sweeper:
    """
    :param clock: what times it.
    :param connections: all that are live, by their ids; it may change.
    :param look: called with each of them, and the time, while all are swept.
    :ivar sweeps_all: whether all are.
    :ivar timer: what is to sweep next; ``None`` while there is nothing to look after.
    """

    def __init__(
        self,
        clock: IReactorTime,
        connections: Mapping[int, Any],
        look: Callable[[Any, float], object] | None = None,
    ) -> None:
        self._clock = clock
        self._connections = connections
        self._look = look
        self._watched: dict[Any, None] = {}
        self.sweeps_all = False
        self._interval = INTERVAL
        self.timer: IDelayedCall | None = None
        #: When it is to go off: late ones do not add up.
        self._due = 0.0

    def sweep_all(self, interval: float | None) -> None:
        """
        Sweep all that are live from now on, that often, in seconds; for ``None`` only
        those that are watched.
        """
        self.sweeps_all = interval is not None
        self._interval = INTERVAL if interval is None else interval
        if self.timer is not None:
            # Sooner, never later: else whoever changes something oftener than this
            # would put it off for ever.
            soonest = self._clock.seconds() + self._interval
            if soonest < self._due:
                self._due = soonest
                self.timer.reset(self._interval)
        self._update()

    def began(self) -> None:
        """A connection is live: to be told while all are swept."""
        if self.timer is None:
            self._update()

    def watch(self, connection: Any) -> float:
        """
        Sweep a connection from now on, until its ``sweep`` says that it needs it no
        more.

        :returns: the time.
        """
        self._watched[connection] = None
        if self.timer is None:
            self._update()
        return self._clock.seconds()

    def forget(self, connection: Any) -> None:
        """It is over, while there is a timer: with the last one that goes."""
        self._watched.pop(connection, None)
        self._update()

    def _update(self) -> None:
        is_needed = bool(self._watched or (self.sweeps_all and self._connections))
        if is_needed and self.timer is None:
            self._due = self._clock.seconds() + self._interval
            self.timer = self._clock.callLater(self._interval, self._sweep)
        elif not is_needed and self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        is_needed = bool(self._watched or (self.sweeps_all and self._connections))
        timer = self.timer
        checks = {
            "there is a sweep exactly while it is needed": (timer is not None)
            is is_needed,
            "a sweep is to come": timer is None or bool(timer.active()),
            "only live connections are watched": all(
                c.id in self._connections for c in self._watched
            ),
        }
        return [check for check, holds in checks.items() if not holds]

    def _sweep(self) -> None:
        now = self._clock.seconds()
        self._due += self._interval
        if self._due <= now:
            self._due = now + self._interval
        self.timer = self._clock.callLater(self._due - now, self._sweep)
        for connection in list(self._watched):
            # An earlier one's sweep may have ended this one.
            if connection in self._watched and not connection.sweep(now):
                self._watched.pop(connection, None)
        if self.sweeps_all and self._look is not None:
            for connection in list(self._connections.values()):
                if not connection.is_over:
                    self._look(connection, now)
        if self.timer is not None:
            self._update()
