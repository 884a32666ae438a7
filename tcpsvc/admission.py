"""
Who is let in, by address and by how often: the limits of which one refuses a client.

How many may be there at a time is :mod:`tcpsvc.slots`'s; what becomes of those that
are refused, :mod:`tcpsvc.refusing`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tcpsvc.options import Settings
from tcpsvc.peers import Key, Peers
from tcpsvc.rate import TokenBucket
from tcpsvc.reasons import LIMITS, Reason


class Admission:
    """
    The limits by address and rate.

    :param settings: what they are.
    :ivar asks: whether there is any: if not, nobody need be asked about.
    :ivar counts: whether those who are let in need be counted.
    :ivar counts_peers: whether any is per peer.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peers = Peers()
        #: Whom live connections count for.
        self._keys: dict[int, Key] = {}
        self._bucket: TokenBucket | None = None
        self.change(settings)

    def change(self, settings: Settings) -> None:
        """Other limits, for the next client. Who is there stays."""
        self._settings = settings
        self._peers.change(
            max_connections=settings.max_connections_per_peer,
            rate=settings.accept_rate_per_peer,
            prefixes=settings.peer_prefixes,
        )
        self.counts_peers = (
            settings.max_connections_per_peer is not None
            or settings.accept_rate_per_peer is not None
        )
        self.asks = (
            self.counts_peers or settings.allow is not None or bool(settings.deny)
        )
        if settings.accept_rate is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.rate != settings.accept_rate:
            self._bucket = TokenBucket(settings.accept_rate)
        self.counts = self.counts_peers or self._bucket is not None

    def refusal(
        self, host: str | None, now: float, in_dry_run: Callable[[Reason], object]
    ) -> Reason | None:
        """
        The limit that refuses a client.

        :param host: its IP address; ``None`` for a UNIX client, which none refuses.
        :param in_dry_run: told what would refuse it, too.
        """
        if host is None:
            return None
        settings = self._settings
        if settings.allow is not None and host not in settings.allow:
            if "allow" not in settings.dry_run:
                return Reason.DENIED
            in_dry_run(Reason.DENIED)
        if settings.deny and host in settings.deny:
            if "deny" not in settings.dry_run:
                return Reason.DENIED
            in_dry_run(Reason.DENIED)
        if not self.counts_peers:
            return None
        refused_by = self._peers.refusal(self._peers.key_of(host), now)
        if refused_by is None:
            return None
        limit = (
            "max_connections_per_peer"
            if refused_by == "connections"
            else "accept_rate_per_peer"
        )
        if limit not in settings.dry_run:
            return LIMITS[limit]
        in_dry_run(LIMITS[limit])
        return None

    def enter(self, connection: Any, host: str | None, now: float) -> None:
        """A connection is let in."""
        if self.counts_peers and host is not None:
            key = self._keys[connection.id] = self._peers.key_of(host)
            self._peers.enter(key, now)

    def leave(self, connection: Any) -> None:
        """It is over."""
        if self._keys:
            key = self._keys.pop(connection.id, None)
            if key is not None:
                self._peers.leave(key)

    def wait(self, now: float, in_dry_run: Callable[[Reason], object]) -> float:
        """
        A client was accepted.

        :returns: how many seconds the next one is to wait for.
        """
        bucket = self._bucket
        if bucket is None:
            return 0.0
        had_token = bucket.take(now)
        if "accept_rate" not in self._settings.dry_run:
            return bucket.wait(now)
        if not had_token:
            in_dry_run(Reason.ACCEPT_RATE)
        return 0.0

    def describe(self) -> dict[str, Any]:
        """What is known of peers, as JSON has it."""
        return self._peers.describe() if self.counts_peers else {}

    def invariant(self) -> None:
        """
        :raises AssertionError: what is counted for peers is wrong.
        """
        self._peers.invariant()


def host_of(address: Any) -> str | None:
    """The IP address of a client, ``None`` of a UNIX client."""
    return getattr(address, "host", None)
