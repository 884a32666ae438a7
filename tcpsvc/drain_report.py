"""
What a drain has come to: counted while it goes on, and told at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from tcpsvc.connection import Connection
from tcpsvc.events import Observer
from tcpsvc.reasons import Reason


@dataclass(frozen=True, slots=True)
class DrainReport:
    """
    How the connections ended that were there when a drain stopped accepting. Each is
    counted once, by the last thing that had to be done to it. Clients that had no
    handler then, and get none, are counted beside them.

    :ivar finished: they ended by themselves, or by a limit, as on any day.
    :ivar closed_idle: their handlers had asked for EOF, got it while nothing was under
        way, and ended.
    :ivar closed: their sockets were closed, and their handlers ended then.
    :ivar cancelled: their handlers had to be cancelled.
    :ivar aborted: their sockets had to be reset.
    :ivar given_up: their handlers still run.
    :ivar errors: how many of all these handlers raised.
    :ivar unserved: further clients that were accepted, and closed before a handler had
        started: those who waited for a slot (``overflow="evict"``, or a port that
        cannot be gated), for ``accept_rate`` or for a resume there.
    :ivar longest_wait: seconds from the end of accepting to the end of the last.
    """

    finished: int = 0
    closed_idle: int = 0
    closed: int = 0
    cancelled: int = 0
    aborted: int = 0
    given_up: int = 0
    errors: int = 0
    longest_wait: float = 0.0
    unserved: int = 0

    @property
    def connections(self) -> int:
        """How many there were, without the unserved."""
        return sum(getattr(self, step) for step in _STEPS)

    def __str__(self) -> str:
        """Without what is 0."""
        said = [
            f"{getattr(self, step)} {step.replace('_', ' ')}"
            for step in _STEPS
            if getattr(self, step)
        ]
        if self.errors:
            said.append(f"{self.errors} failed")
        if self.unserved:
            said.append(f"{self.unserved} unserved")
        if not said:
            return "no connections"
        waited = f"; longest wait {self.longest_wait:.1f} s" if self.connections else ""
        return ", ".join(said) + waited


_STEPS = tuple(f.name for f in fields(DrainReport))[:6]


class Tally(Observer):
    """
    Counts, while a server drains.

    :param clock: what times it; the waiting begins now.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._since = clock.seconds()
        #: What was last done to those that are live, by their ids.
        self._done: dict[int, str] = {}
        self._counts = dict.fromkeys(_STEPS, 0)
        self._errors = 0
        self._unserved = 0
        self._longest_wait = 0.0

    def note(self, connection: Connection[Any], step: str) -> None:
        """The drain does that to it now."""
        self._done[connection.id] = step

    def handler_ended(
        self, connection: Any, outcome: str, failure: Failure | None
    ) -> None:
        if outcome == "failed":
            self._errors += 1

    def connection_refused(self, address: Any, reason: Reason) -> None:
        if reason is Reason.UNSERVED:
            self._unserved += 1

    def connection_finished(self, connection: Any) -> None:
        if connection.reason is Reason.UNSERVED:
            self._unserved += 1  # It had a slot, and its handler has never started.
            return
        self._count(self._done.pop(connection.id, "") or _step_of(connection))

    def _count(self, step: str) -> None:
        self._counts[step] += 1
        self._longest_wait = float(self._clock.seconds() - self._since)

    def report(self, left: Iterable[Connection[Any]]) -> DrainReport:
        """
        The end.

        :param left: what is still live.
        """
        for connection in left:
            self._count(
                "given_up"
                if connection.is_running
                else self._done.get(connection.id, "closed")
            )
        return DrainReport(
            **self._counts,
            errors=self._errors,
            longest_wait=self._longest_wait,
            unserved=self._unserved,
        )


def _step_of(connection: Connection[Any]) -> str:
    """How one ended that the drain itself has let alone."""
    if connection.had_eof_of_drain:
        return "closed_idle"
    # By somebody else's close, in the midst of the drain.
    if connection.reason is Reason.CLOSED:
        return "closed"
    return "cancelled" if connection.reason is Reason.CANCELLED else "finished"
