"""
The wait for ``accept_rate``: when no token is left, the next client waits for one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall


class RateWait:
    """
    :param clock: what times it.
    :param on_begin: called when it has begun: the last token was taken.
    :param on_end: called when it is over: there is a token again.
    :ivar timer: what ends it; ``None`` while nobody has to wait.
    """

    def __init__(
        self,
        clock: Any,
        on_begin: Callable[[], object],
        on_end: Callable[[], object],
    ) -> None:
        self._clock = clock
        self._on_begin = on_begin
        self._on_end = on_end
        self.timer: IDelayedCall | None = None

    def begin(self, seconds: float) -> None:
        """It lasts that long from now on, also if it had begun; for 0 it is over."""
        was_waiting = self.timer is not None
        self.stop()
        if seconds > 0:
            self.timer = self._clock.callLater(seconds, self._end)
            if not was_waiting:
                self._on_begin()

    def stop(self) -> None:
        """Nobody waits any more, nor is told so."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _end(self) -> None:
        self.timer = None
        self._on_end()
