"""
One timer for all connections of a server, instead of one for each.

Connections with something to look after (bytes that wait to be sent, a close
that waits for the client) are swept about once a second. While there are none
there is no timer.
"""

from __future__ import annotations

from typing import Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

#: How often, in seconds.
INTERVAL = 1.0


class Swept(Protocol):
    """What can be watched."""

    def sweep(self, now: float) -> bool:
        """Look after it. Returns whether it is to be watched further."""


class Sweeper:
    """Sweeps what asks to be watched, until it needs no more watching."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._watched: dict[Swept, None] = {}
        self._timer: IDelayedCall | None = None

    def watch(self, swept: Swept) -> float:
        """
        Sweep it from now on.

        :returns: the time.
        """
        self._watched[swept] = None
        if self._timer is None:
            self._timer = self._clock.callLater(INTERVAL, self._sweep)
        return self._clock.seconds()

    def forget(self, swept: Swept) -> None:
        """It is over. With the last one the timer goes."""
        self._watched.pop(swept, None)
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = self._clock.callLater(INTERVAL, self._sweep)
        now = self._clock.seconds()
        for swept in list(self._watched):
            # An earlier one's sweep may have ended this one.
            if swept in self._watched and not swept.sweep(now):
                self.forget(swept)
