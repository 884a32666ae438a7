"""
Starting handlers: in the turn after their accept, in the order of their accepts
(spec H1), and none after a close (H5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol


class Startable(Protocol):
    """A connection that was accepted and has not started."""

    @property
    def may_start(self) -> bool:
        """Whether that is still to be done: it may have been evicted meanwhile."""

    def start(self) -> None:
        """Run its handler."""

    def refuse(self) -> None:
        """Close it without."""


class Starts:
    """
    The connections that are to be started in the next turn of the reactor.

    :param reactor: whose turns.
    :param on_started: called when those of one turn were started.
    """

    def __init__(self, reactor: Any, on_started: Callable[[], object]) -> None:
        self._reactor = reactor
        self._on_started = on_started
        self._waiting: deque[Startable] = deque()
        self._may_start = True
        self._is_due = False

    def __len__(self) -> int:
        return len(self._waiting)

    def hold(self) -> None:
        """Start nothing before :meth:`begin`."""
        self._may_start = False

    def begin(self) -> None:
        """What waits may start, in a turn after this one."""
        self._may_start = True
        if self._waiting:
            self._schedule()

    def add(self, connection: Startable) -> None:
        """Start it in the next turn."""
        self._waiting.append(connection)
        if self._may_start and not self._is_due:
            self._schedule()

    def start_now(self) -> None:
        """What waits starts in this turn, unless nothing may start yet."""
        if self._may_start:
            self._start()

    def refuse_all(self) -> None:
        """Close what was accepted and has not started."""
        while self._waiting:
            connection = self._waiting.popleft()
            if connection.may_start:
                connection.refuse()

    def _schedule(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._reactor.callLater(0, self._start)

    def _start(self) -> None:
        self._is_due = False
        # One by one: a handler that closes the server has the rest refused. What
        # is added meanwhile waits for another turn.
        for _ in range(len(self._waiting)):
            if not self._waiting:
                break
            connection = self._waiting.popleft()
            if connection.may_start:
                connection.start()
        if self._waiting:
            self._schedule()
        self._on_started()
