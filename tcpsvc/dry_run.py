"""
Limits that end connections, and are only tried out (``dry_run``): whom they let pass,
told once each.

Those that keep clients out are :mod:`tcpsvc.admission`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from tcpsvc.reasons import LIMITS, Reason
from tcpsvc.refusal_log import RefusalLog
from tcpsvc.settings import Settings

#: The options that a reason is the limit of.
_LIMITS_OF = {
    reason: {name for name, limit in LIMITS.items() if limit is reason}
    for reason in LIMITS.values()
}


class Owner(Protocol):
    """Whose limits they are: the factory."""

    settings: Settings


class DryRun:
    """
    :param owner: the factory.
    :param refusal_log: is told whom a limit would have ended.
    :ivar told: for which reasons that was told, of live connections by their ids.
    """

    def __init__(self, owner: Owner, refusal_log: RefusalLog) -> None:
        self._owner = owner
        self._refusal_log = refusal_log
        self.told: dict[int, set[Reason]] = {}

    def lets_pass(self, connection: Any, reason: Reason) -> bool:
        """Whether what ends a connection is in a dry run. Then that is told, once."""
        if self._owner.settings.dry_run.isdisjoint(_LIMITS_OF[reason]):
            return False
        told = self.told.setdefault(connection.id, set())
        if reason not in told:
            told.add(reason)
            self._refusal_log.in_dry_run(connection.peer, reason)
        return True

    def forget(self, connection: Any) -> None:
        """It is over."""
        self.told.pop(connection.id, None)

    def broken(self, live: Collection[int]) -> list[str]:
        """
        What does not hold, and ought to.

        :param live: the ids of live connections.
        """
        remembers_others = any(number not in live for number in self.told)
        return ["a dry run remembers only who is live"] * remembers_others
