"""
The end of a factory: nobody is let in any more, connections are closed, handlers
cancelled; and when all that is over (spec X).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred

from tcpsvc._waiters import Event, all_of
from tcpsvc.conditions import Conditions
from tcpsvc.entrance import Entrance
from tcpsvc.failures import Failures
from tcpsvc.refusing import Replies
from tcpsvc.slots import Slots
from tcpsvc.starts import Starts


class Ending:
    """
    :param slots: of which connections.
    :param entrance: is closed first.
    :param starts: handlers that have not started, and will not.
    :param replies: clients that are being given a last word.
    :param conditions: what is waited for until it is over.
    :param failures: the errors of its handlers. One of them may begin the end.
    :ivar is_cancelling: whether handlers are being cancelled just now, any of which may
        ask for that.
    :ivar has_server: whether a server tells when nothing can fail any more.
    """

    def __init__(
        self,
        slots: Slots,
        entrance: Entrance,
        starts: Starts,
        replies: Replies,
        conditions: Conditions,
        failures: Failures,
    ) -> None:
        self._slots = slots
        self._live: Mapping[int, Any] = slots.live
        self._entrance = entrance
        self._starts = starts
        self._replies = replies
        self._conditions = conditions
        self._failures = failures
        failures.on_reported = self.maybe_over
        failures.on_fatal = self.close
        self._when_over = Event()
        #: Happens when those are closed that are being closed just now.
        self._closing: Event | None = None
        self.is_cancelling = False
        self.has_server = False

    def close(self) -> None:
        """Let nobody in from now on, and start no handler any more."""
        if self._entrance.is_closed:
            return
        self._entrance.close()
        self._replies.close()
        self._starts.refuse_all()
        self.maybe_over()

    def close_connections(self) -> Deferred[None]:
        """
        Close the sockets of all live connections at once (spec X3).

        :returns: a Deferred that fires when they are closed.
        """
        if self._closing is not None:
            # By whoever is told of it, maybe by all, one within the other.
            return self._closing.wait()
        closing = self._closing = Event()
        closed = []
        try:
            for connection in list(self._live.values()):
                closed.append(connection.when_socket_closed.wait())
                connection.close()
        finally:
            self._closing = None
        all_of(closed).addCallback(lambda _: closing.happen())
        return closing.wait()

    def cancel_handlers(self) -> None:
        """Cancel every handler that still runs."""
        if self.is_cancelling:
            return
        self.is_cancelling = True
        try:
            for connection in list(self._live.values()):
                connection.cancel_handler()
        finally:
            self.is_cancelling = False

    def maybe_over(self) -> None:
        """A connection is over, or its error was reported, or nobody is let in now."""
        if self._entrance.is_closed and not self._is_anything_left:
            self._when_over.happen()
            self._conditions.look(self._slots)
            self._conditions.over()
            if not self.has_server:
                self._failures.over()

    @property
    def _is_anything_left(self) -> bool:
        return bool(self._live) or self._failures.is_reporting

    def when_over(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when it is closed, no connection is live, and
            ``on_handler_error`` of the last has returned.
        """
        return self._when_over.wait()

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        if self._when_over.has_happened and self._is_anything_left:
            return ["nothing live after the end"]
        return []
