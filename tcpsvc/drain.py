"""
Stopping without losing a client: stop accepting, wait, and in the end insist.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from tcpsvc._waiters import Event
from tcpsvc.server import Server
from tcpsvc.where import addresses_text

#: How often it says what remains, in seconds.
REPORT_INTERVAL = 1.0

#: How long handlers have to end after their connections were closed, and again
#: after they were cancelled, in seconds.
GRACE = 1.0


class Drain:
    """
    Closes a server and sees it to its end:

    1. it accepts nobody any more; handlers go on, and once a second a line says
       how many connections remain;
    2. when the time is up, or at :meth:`force`, what is left is closed;
    3. handlers that still run after :data:`GRACE` are cancelled;
    4. those that still run after another one are given up, with a line.

    :param server: the server; it is closed at once.
    :param timeout: seconds until the second step; ``None`` for never.
    """

    _log = Logger(namespace="tcpsvc")

    def __init__(self, server: Server[Any, Any], timeout: float | None) -> None:
        self._server = server
        self._timeout = timeout
        self._addresses = addresses_text(x.address for x in server.listeners)
        self._clock = server.clock
        self._since = self._clock.seconds()
        self._timer: IDelayedCall | None = None
        self._is_forced = False
        self._is_cancelled = False
        self._when_done = Event()
        server.close()
        server.close_finished_and_handlers_determined().addCallback(self._done)
        if not self._when_done.has_happened:
            self._wait()

    def when_done(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fires when the drain is over.
        """
        return self._when_done.wait()

    def force(self) -> None:
        """The time is up: close what is left, and cancel at once."""
        if not self._when_done.has_happened and not self._is_cancelled:
            self._close_connections(grace=0.0)

    def _wait(self) -> None:
        self._timer = None
        waited = self._clock.seconds() - self._since
        if self._timeout is not None and waited >= self._timeout:
            self._close_connections(GRACE)
            return
        if self._remaining():
            self._log.info(
                "{address}: draining, {remaining} remain, "
                "waited {waited:.0f} s of {timeout}",
                address=self._addresses,
                remaining=self._remaining(),
                waited=waited,
                timeout="any" if self._timeout is None else f"{self._timeout:g} s",
            )
        pause = REPORT_INTERVAL
        if self._timeout is not None:
            pause = min(pause, self._timeout - waited)
        self._timer = self._clock.callLater(pause, self._wait)

    def _close_connections(self, grace: float) -> None:
        self._stop_timer()
        if not self._is_forced:
            self._is_forced = True
            self._log.warn(
                "{address}: closing {remaining} that remain",
                address=self._addresses,
                remaining=self._remaining() or "0 connections",
            )
            self._server.close(close_existing_connections=True)
        if not self._when_done.has_happened:
            self._timer = self._clock.callLater(grace, self._cancel_handlers)

    def _cancel_handlers(self) -> None:
        self._is_cancelled = True
        self._timer = self._clock.callLater(GRACE, self._give_up)
        self._server.cancel_handlers()

    def _give_up(self) -> None:
        self._timer = None
        self._log.error(
            "{address}: {remaining} do not end, not even when cancelled; "
            "not waiting for them",
            address=self._addresses,
            remaining=self._remaining("handlers"),
        )
        self._when_done.happen()

    def _remaining(self, what: str = "connections") -> str:
        """What is waited for, for a line of the log; nothing when nothing is."""
        remaining = []
        if self._server.num_connections:
            remaining.append(f"{self._server.num_connections} {what}")
        if self._server.is_reporting_errors:
            remaining.append("calls of on_handler_error")
        return " and ".join(remaining)

    def _done(self, _: object) -> None:
        self._stop_timer()
        self._when_done.happen()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
