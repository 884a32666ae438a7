"""
What a server counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from twisted.python.failure import Failure

from tcpsvc.events import Observer
from tcpsvc.reasons import Reason


@dataclass(slots=True)
class Counters(Observer):
    """
    What has happened since the start. The first observer of a server.

    :ivar accepted: connections that took a slot.
    :ivar dropped: clients closed at once because the server was dropping.
    :ivar refused: connections closed without a handler, as nothing else was the
        reason: after ``close``, or because the application's factory built no protocol.
    :ivar finished: handlers that ended by themselves.
    :ivar left: handlers that ended because their connection was gone, or because
        the server cancelled them.
    :ivar failed: handlers that raised.
    :ivar later_errors: errors after a handler's first.
    :ivar too_old: connections closed by ``buffer_age_limit``.
    :ivar aborted: connections aborted because the client did not take its bytes.
    :ivar accept_errors: failed attempts to accept.
    :ivar observer_errors: what observers have raised.
    :ivar ends: ended connections, by :class:`Reason`.
    :ivar refusals: clients that were not let in, by :class:`Reason`. Who had a slot
        is none of them, and is in ``ends``.
    :ivar would_refuse: what ``dry_run`` let pass, by :class:`Reason`.
    """

    accepted: int = 0
    dropped: int = 0
    refused: int = 0
    finished: int = 0
    left: int = 0
    failed: int = 0
    later_errors: int = 0
    too_old: int = 0
    aborted: int = 0
    accept_errors: int = 0
    observer_errors: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    would_refuse: dict[str, int] = field(default_factory=dict)

    def connection_accepted(self, connection: Any) -> None:
        self.accepted += 1

    def connection_refused(self, address: Any, reason: Reason) -> None:
        _count(self.refusals, reason)
        if reason is Reason.DROPPED:
            self.dropped += 1
        elif reason is Reason.UNSERVED:
            self.refused += 1

    def refused_in_dry_run(self, address: Any, reason: Reason) -> None:
        _count(self.would_refuse, reason)

    def handler_ended(
        self, connection: Any, outcome: str, failure: Failure | None
    ) -> None:
        if outcome == "finished":
            self.finished += 1
        elif outcome == "left":
            self.left += 1
        else:
            self.failed += 1

    def connection_finished(self, connection: Any) -> None:
        _count(self.ends, connection.reason)
        if connection.reason is Reason.UNSERVED:
            self.refused += 1

    def accept_failed(self, error: OSError) -> None:
        self.accept_errors += 1


def _count(counts: dict[str, int], reason: Reason) -> None:
    # As its value is: to look that up costs more than to count.
    key = reason._value_
    counts[key] = counts.get(key, 0) + 1
