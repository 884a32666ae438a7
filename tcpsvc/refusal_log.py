"""
What is said, and counted, of clients that are refused, or wait, of whom they drive out,
and of limits that are only tried out; and how often anything is said that a client can
bring about.
"""

from __future__ import annotations

from typing import Any, Protocol

from tcpsvc.counters import Counters
from tcpsvc.log import log
from tcpsvc.log_fields import of_client
from tcpsvc.reasons import LIMITS, Reason
from tcpsvc.settings import Settings
from tcpsvc.whereabouts import Whereabouts

#: Of each reason there is one warning in so many seconds (spec A3).
WARNING_INTERVAL = 60.0

#: What is asked for is no news, and that descriptors have run out has a line.
_SAID_ELSEWHERE = (Reason.DROPPED, Reason.UNSERVED, Reason.SHED)


class Owner(Protocol):
    """Whose clients they are: the factory."""

    settings: Settings
    counters: Counters
    events: Any
    clock: Any


class RefusalLog:
    """
    :param owner: the factory.
    :param whereabouts: where it listens.
    """

    def __init__(self, owner: Owner, whereabouts: Whereabouts) -> None:
        self._owner = owner
        self._whereabouts = whereabouts
        self._evicted = 0
        #: When it was last said that clients are refused, by the reason.
        self._warned_at: dict[Reason | str, float] = {}

    def refused(self, address: Any, reason: Reason) -> None:
        """A client was sent away."""
        owner = self._owner
        owner.events.connection_refused(address, reason)
        if reason not in _SAID_ELSEWHERE and self.may_say(reason):
            log.warn(
                "{address}: refusing clients: {reason}, {count} so far{limit}",
                address=str(self._whereabouts),
                reason=reason.value,
                count=owner.counters.refusals[reason.value],
                limit=self._limit(reason),
            )

    def in_dry_run(self, address: Any, reason: Reason) -> None:
        """A limit would have refused, or ended, what it lets pass."""
        owner = self._owner
        owner.events.refused_in_dry_run(address, reason)
        if self.may_say(f"dry run {reason.value}"):
            log.warn(
                "{address}: dry run: {client} would have been refused or ended: "
                "{reason}, {count} so far{limit}",
                address=str(self._whereabouts),
                **of_client(address),
                reason=reason.value,
                count=owner.counters.would_refuse[reason.value],
                limit=self._limit(reason),
            )

    def _limit(self, reason: Reason) -> str:
        """The option that one would change, which has another name than the reason."""
        names = [name for name, whom in LIMITS.items() if whom is reason]
        if len(names) == 1:
            return f" ({names[0]}={getattr(self._owner.settings, names[0])})"
        return f" ({' or '.join(names)})" if names else ""

    def all_slots_taken(self) -> None:
        """A client has taken the last."""
        owner = self._owner
        owner.events.limit_reached("max_connections")
        settings = owner.settings
        if settings.overflow == "hold" and self.may_say("max_connections"):
            log.warn(
                "{address}: all {limit} connections are in use; further clients wait",
                address=str(self._whereabouts),
                limit=settings.max_connections,
            )

    def all_tokens_taken(self) -> None:
        """A client has taken the last that ``accept_rate`` allows for now."""
        self._owner.events.limit_reached("accept_rate")

    def evicted(self) -> None:
        """A connection had to go for another client."""
        self._evicted += 1
        if self.may_say(Reason.EVICTED):
            log.warn(
                "{address}: all {limit} connections are in use; for each further "
                "client the one that was idle for longest goes: {reason}, {count} so "
                "far",
                address=str(self._whereabouts),
                limit=self._owner.settings.max_connections,
                reason=Reason.EVICTED.value,
                count=self._evicted,
            )

    def waits_for_rate(self) -> None:
        """A client had to wait for accept_rate."""
        if self.may_say(Reason.ACCEPT_RATE):
            log.warn(
                "{address}: clients come more often than accept_rate={rate}; they wait",
                address=str(self._whereabouts),
                rate=self._owner.settings.accept_rate,
            )

    def may_say(self, of: Reason | str) -> bool:
        """
        Whether that was not said for a while. Clients can bring much about, but not a
        line of the log each.
        """
        now = self._owner.clock.seconds()
        warned_at = self._warned_at.get(of)
        if warned_at is not None and now - warned_at < WARNING_INTERVAL:
            return False
        self._warned_at[of] = now
        return True
