"""
What the log says of a drain: a line at each turn of it, and once a second one that
says what remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall

from tcpsvc.cancelling import peers_text
from tcpsvc.drain_report import DrainReport
from tcpsvc.factory import ServerFactory
from tcpsvc.log import log

#: How often it says what remains, in seconds.
REPORT_INTERVAL = 1.0

#: Seconds that are no time: sums of floats are not exact.
NEAR = 1e-6


class Lines:
    """
    The lines of one drain.

    :param addresses: where the server listens.
    :param factory: the server's: what is live.
    :param each_second: called after each line of a second.
    """

    def __init__(
        self, addresses: str, factory: ServerFactory, each_second: Callable[[], object]
    ) -> None:
        self._addresses = addresses
        self._factory = factory
        self._clock = factory.clock
        self._each_second = each_second
        self._timer: IDelayedCall | None = None
        self._since = 0.0
        #: When the waiting is over.
        self.until = math.inf

    def remaining(self, what: str = "connection") -> str:
        """What is waited for; nothing when nothing is."""
        remaining = []
        count = len(self._factory.connections)
        if count:
            remaining.append(f"{count} {what}{'' if count == 1 else 's'}")
        if self._factory.failures.is_reporting:
            remaining.append("calls of on_handler_error")
        return " and ".join(remaining)

    def announcing(self, seconds: float) -> None:
        """It accepts for another while."""
        log.info(
            "{address}: about to drain, {doing} for another {seconds:g} s",
            address=self._addresses,
            doing="paused" if self._factory.entrance.is_paused else "accepting",
            seconds=seconds,
        )

    def begin(self, seconds: float) -> None:
        """
        Now, and from now on once a second: what remains.

        :param seconds: how long the waiting lasts.
        """
        self._since = self._clock.seconds()
        self.until = self._since + seconds
        self._say_what_remains()

    def _say_what_remains(self) -> None:
        self._timer = self._clock.callLater(REPORT_INTERVAL, self._next)
        now = self._clock.seconds()
        if self.remaining() and self.until - now > NEAR:
            # The deadline is one of the reactor's, some microseconds off.
            limit = round(self.until - self._since, 1)
            log.info(
                "{address}: draining, {remaining} {remain}, "
                "waited {waited:.0f} s of {limit}",
                address=self._addresses,
                remaining=self.remaining(),
                remain="remains" if self._remains_one() else "remain",
                waited=now - self._since,
                limit="any time" if limit == math.inf else f"{limit:g} s",
            )

    def _remains_one(self) -> bool:
        factory = self._factory
        return len(factory.connections) == 1 and not factory.failures.is_reporting

    def _next(self) -> None:
        self._say_what_remains()
        # Last, since it may end all this.
        self._each_second()

    def end(self) -> None:
        """No more of them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def closing(self, spread: float) -> None:
        """What remains is closed, over so many seconds."""
        if self.remaining():
            log.warn(
                "{address}: closing {remaining} that {remain}{over}",
                address=self._addresses,
                remaining=self.remaining(),
                remain="remains" if self._remains_one() else "remain",
                over=f", over {spread:g} s" if spread else "",
            )

    def given_up(self) -> None:
        """What remains is not waited for."""
        peers = peers_text(self._factory.connections)
        log.error(
            "{address}: {remaining} {do} not end, not even when cancelled; "
            "not waiting for them{peers}",
            address=self._addresses,
            remaining=self.remaining("handler"),
            do="does" if self._remains_one() else "do",
            peers=f": {peers}" if peers else "",
        )

    def drained(self, seconds: float, report: DrainReport) -> None:
        """It is over."""
        log.info(
            "{address}: drained in {seconds:.1f} s: {report}",
            address=self._addresses,
            seconds=seconds,
            report=report,
        )
