"""
Stopping without losing a client: announce it, stop accepting, wait, and in the end
insist.

The phases, each with a deadline of its own (see :class:`tcpsvc.DrainOptions`)::

    announcing ──announce──▶ finishing ──timeout──▶ spreading ──spread──▶ closing
    still accepts            accepts nobody,        closes what           all is
                             handlers are told      is left, bit by bit   closed
                                                                            │ grace
                              over ◀──grace── cancelling ◀──────────────────┘
               resets what is open,           handlers that
               gives up what still runs       still run

It is over at once, in whichever phase, when nothing is live any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall

from tcpsvc._waiters import Event
from tcpsvc.connection import Connection
from tcpsvc.drain_lines import NEAR, Lines
from tcpsvc.drain_options import Durations
from tcpsvc.drain_report import DrainReport, Tally
from tcpsvc.events import Observer
from tcpsvc.factory import ServerFactory
from tcpsvc.reasons import Reason

#: How often at most it closes some of what is left while it spreads that, in seconds.
SPREAD_INTERVAL = 0.02


class Drained(Protocol):
    """What is asked of a server."""

    @property
    def is_closed(self) -> bool: ...

    @property
    def is_paused(self) -> str | None: ...

    def close(self) -> Deferred[None]: ...

    def close_finished(self) -> Deferred[None]: ...

    def close_finished_and_handlers_determined(self) -> Deferred[None]: ...


class Phase(Enum):
    """Where a drain is, and which option its deadline comes from."""

    NEW = "new"
    ANNOUNCING = "announcing"
    FINISHING = "finishing"
    SPREADING = "spreading"
    CLOSING = "closing"
    CANCELLING = "cancelling"
    OVER = "over"


_OPTIONS = {
    Phase.ANNOUNCING: "announce",
    Phase.FINISHING: "timeout",
    Phase.SPREADING: "spread",
    Phase.CLOSING: "grace",
    Phase.CANCELLING: "grace",
}


class _Refusing(Observer):
    """Sees that the server refuses clients from now on."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then

    def server_paused(self, how: str) -> None:
        if how == "refuse":
            self._then()


class Drain:
    """
    Closes a server and sees it to its end. It does nothing before :meth:`begin`.

    Handlers, observers and whoever waits are called in the midst of it, and may call
    it: so after each such call it looks at its phase again.

    :param server: the server.
    :param addresses: where it listens, for the log.
    :param factory: the server's: what is live, who is told.
    :param durations: how long each phase lasts.
    """

    def __init__(
        self,
        server: Drained,
        addresses: str,
        factory: ServerFactory,
        durations: Durations,
    ) -> None:
        self._server = server
        self._factory = factory
        self._clock = factory.clock
        self._durations = durations
        self._phase = Phase.NEW
        self._is_forced = False
        self._began_at = self._now()
        #: When the phase is over.
        self._ends_at = math.inf
        #: When some were closed last, while it spreads that.
        self._spread_at = 0.0
        self._timer: IDelayedCall | None = None
        # What was on its way to a reader then may have been no whole message after
        # all, and a handler may have asked for EOF since.
        self._lines = Lines(addresses, factory, each_second=factory.tell_of_drain)
        self._refusing = _Refusing(self._go_on)
        self._tally = Tally(self._clock)
        self._report = DrainReport()
        self._when_over = Event()

    def when_over(self) -> Deferred[DrainReport]:
        """
        :returns: a Deferred of one's own that fires with the report at the end.
            Cancelling it ends the waiting only.
        """
        return self._when_over.wait().addCallback(lambda _: self._report)

    def begin(self) -> None:
        """The first phase."""
        self._factory.events.server_draining()
        # Who refuses clients already has nothing to announce. Who holds them has: its
        # port is open, and a resume serves who has come meanwhile.
        refuses = self._server.is_closed or self._server.is_paused == "refuse"
        if refuses or not self._durations.announce:
            self._stop_accepting()
            return
        self._phase = Phase.ANNOUNCING
        self._factory.add_observer(self._refusing)
        self._lines.announcing(self._durations.announce)
        # Somebody else's close, or a handler's error, ends the announcement, as a
        # pause does that refuses.
        self._server.close_finished().addCallback(self._port_closed)
        self._wait(self._durations.announce)

    def shorten(self, by: dict[str, float]) -> None:
        """
        Give phases that are to come, and the one it is in, less time from now on;
        never more.

        :param by: seconds, by the names of the options.
        """
        self._durations = self._durations.shortened(by)
        seconds = by.get(_OPTIONS.get(self._phase, ""), math.inf)
        if self._now() + seconds < self._ends_at:
            self._wait(seconds)

    def force(self) -> None:
        """
        The time is up: close, cancel and reset what is left, at once. Handlers have
        one grace to end, then they are given up.
        """
        if self._is_forced or self._phase is Phase.OVER:
            return
        self._is_forced = True
        self._durations = replace(
            self._durations, announce=0.0, timeout=0.0, spread=0.0
        )
        if self._phase is Phase.CANCELLING:
            self._abort()
        elif self._phase is not Phase.NEW:
            self._go_on()

    # Deadlines.

    def _now(self) -> float:
        return float(self._clock.seconds())

    def _wait(self, seconds: float) -> None:
        """The phase that it is in is over then."""
        if self._phase is not Phase.OVER:
            self._spread_at = self._now()
            self._ends_at = self._spread_at + seconds
            self._lines.until = self._ends_at
            self._wait_on()

    def _wait_on(self) -> None:
        self._stop_timer()
        left = self._ends_at - self._now()
        if left <= NEAR:
            self._go_on()
        elif left < math.inf:
            if self._phase is Phase.SPREADING:
                each = left / max(1, len(self._open()))
                left = min(left, max(SPREAD_INTERVAL, each))
            self._timer = self._clock.callLater(left, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        if self._phase is Phase.SPREADING:
            self._close_some()
        if self._timer is None and self._phase is not Phase.OVER:
            self._wait_on()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on(self) -> None:
        """From one phase to the next."""
        self._stop_timer()
        if self._phase is Phase.ANNOUNCING:
            self._factory.remove_observer(self._refusing)
            self._stop_accepting()
        elif self._phase is Phase.FINISHING:
            self._begin_to_close()
        elif self._phase is Phase.SPREADING:
            self._close()
        elif self._phase is Phase.CLOSING:
            self._cancel()
        elif self._phase is Phase.CANCELLING:
            self._give_up()

    # The phases.

    def _port_closed(self, _: None) -> None:
        if self._phase is Phase.ANNOUNCING:
            self._go_on()

    def _stop_accepting(self) -> None:
        self._phase = Phase.FINISHING
        self._ends_at = math.inf
        self._tally = Tally(self._clock)
        self._factory.add_observer(self._tally)
        self._factory.starts.start_now()
        self._server.close()
        ended = self._server.close_finished_and_handlers_determined()
        ended.addCallback(lambda _: self._finish())
        if self._phase is Phase.FINISHING:
            self._factory.tell_of_drain()
        if self._phase is Phase.FINISHING:
            self._lines.begin(self._durations.timeout)
            self._wait(self._durations.timeout)

    def _begin_to_close(self) -> None:
        self._phase = Phase.SPREADING
        spread = self._durations.spread if self._open() else 0.0
        self._lines.closing(spread)
        self._wait(spread)

    def _close_some(self) -> None:
        """As many as are due, so that the last is closed when the phase is over."""
        left = self._open()
        now = self._now()
        share = (now - self._spread_at) / (self._ends_at - self._spread_at)
        self._spread_at = now
        for connection in left[: max(1, round(len(left) * share))]:
            self._close_one(connection)
        if self._phase is Phase.SPREADING and not self._open():
            self._go_on()

    def _close(self) -> None:
        self._phase = Phase.CLOSING
        self._lines.end()
        for connection in self._open():
            self._close_one(connection)
        if self._phase is Phase.CLOSING:
            self._wait(0.0 if self._is_forced else self._durations.grace)

    def _close_one(self, connection: Connection[Any]) -> None:
        if not connection.is_socket_closed:
            self._tally.note(connection, "closed")
            connection.close_because(Reason.DRAINED)

    def _cancel(self) -> None:
        self._phase = Phase.CANCELLING
        self._ends_at = math.inf
        for connection in self._factory.connections:
            if connection.is_cancellable:
                self._tally.note(connection, "cancelled")
                connection.cancel_handler()
        if self._is_forced:
            self._abort()
        if self._phase is Phase.CANCELLING:
            self._wait(self._durations.grace)

    def _abort(self) -> None:
        for connection in self._open():
            self._tally.note(connection, "aborted")
            connection.abort()

    def _give_up(self) -> None:
        self._ends_at = math.inf
        self._abort()
        # Else it waits for nothing but the listening socket.
        if self._phase is not Phase.OVER and self._lines.remaining():
            self._lines.given_up()
            self._finish()

    def _finish(self) -> None:
        if self._phase is Phase.OVER:
            return
        self._phase = Phase.OVER
        self._stop_timer()
        self._lines.end()
        self._factory.remove_observer(self._tally)
        self._report = self._tally.report(self._factory.connections)
        self._lines.drained(self._now() - self._began_at, self._report)
        self._factory.events.server_drained(self._report)
        self._when_over.happen()

    def _open(self) -> list[Connection[Any]]:
        """Those whose sockets are open."""
        return [c for c in self._factory.connections if not c.is_socket_closed]
