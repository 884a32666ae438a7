"""
Who is let in, by address and by how often: the limits of which one refuses a client.

How many may be there at a time is :mod:`tcpsvc.slots`'s; what becomes of those that
are refused, :mod:`tcpsvc.refusing`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tcpsvc.peers import Key, Peers
from tcpsvc.rate import TokenBucket
from tcpsvc.reasons import Reason
from tcpsvc.settings import Settings


class Admission:
    """
    The limits by address and rate.

    :param settings: what they are.
    :ivar asks: whether there is any: if not, nobody need be asked about.
    :ivar has_rate: whether those who are let in take tokens.
    :ivar counts_peers: whether any is per peer.
    :ivar tried_out: limits in a dry run that would have kept somebody out, since they
        were last told of.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peers = Peers()
        #: Whom connections count for.
        self._keys: dict[int, Key] = {}
        self._bucket: TokenBucket | None = None
        self.counts_peers = False
        self.tried_out: list[Reason] = []
        self.change(settings, (), 0.0)

    def change(self, settings: Settings, present: Iterable[Any], now: float) -> None:
        """
        Other limits, for the next client. Who is there stays, and counts for its
        peer as if it had always been so; but its coming took no token.

        :param present: the connections that are there.
        """
        before, self._settings = self._settings, settings
        counted = self.counts_peers
        self.counts_peers = (
            settings.max_connections_per_peer is not None
            or settings.accept_rate_per_peer is not None
        )
        if (
            self.counts_peers is not counted
            or settings.peer_prefixes != before.peer_prefixes
        ):
            self._recount(settings, present)
        self._peers.change(
            max_connections=settings.max_connections_per_peer,
            rate=settings.accept_rate_per_peer,
            prefixes=settings.peer_prefixes,
        )
        self.asks = (
            self.counts_peers or settings.allow is not None or bool(settings.deny)
        )
        if settings.accept_rate is None:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(settings.accept_rate)
        elif self._bucket.rate != settings.accept_rate:
            self._bucket.change(settings.accept_rate, now)
        self.has_rate = self._bucket is not None

    def _recount(self, settings: Settings, present: Iterable[Any]) -> None:
        for key in self._keys.values():
            self._peers.leave(key)
        self._keys.clear()
        self._peers.change(rate=None, prefixes=settings.peer_prefixes)
        for connection in present:
            self.enter(connection, host_of(connection.peer), 0.0)

    def refusal(self, host: str | None, now: float) -> Reason | None:
        """
        The limit that refuses a client. What would is in :attr:`tried_out`.

        :param host: its IP address; ``None`` for a UNIX client, which none refuses.
        """
        if host is None:
            return None
        settings = self._settings
        would_deny = False
        if settings.allow is not None and host not in settings.allow:
            if "allow" not in settings.dry_run:
                return Reason.DENIED
            would_deny = True
        if settings.deny and host in settings.deny:
            if "deny" not in settings.dry_run:
                return Reason.DENIED
            would_deny = True
        if would_deny:
            self.tried_out.append(Reason.DENIED)
        if not self.counts_peers:
            return None
        peers = self._peers
        key = peers.key_of(host)
        refused_by = peers.refusal(key, now)
        if refused_by == "connections":
            if "max_connections_per_peer" not in settings.dry_run:
                return Reason.PEER_CONNECTIONS
            self.tried_out.append(Reason.PEER_CONNECTIONS)
            # The other limit is still to be asked.
            if peers.comes_too_often(key, now):
                refused_by = "rate"
        if refused_by == "rate":
            if "accept_rate_per_peer" not in settings.dry_run:
                return Reason.PEER_RATE
            self.tried_out.append(Reason.PEER_RATE)
        return None

    def enter(self, connection: Any, host: str | None, now: float) -> None:
        """A connection is let in, and counts for its peer if there are such limits."""
        if self.counts_peers and host is not None:
            key = self._keys[connection.id] = self._peers.key_of(host)
            self._peers.enter(key, now)

    def leave(self, connection: Any) -> None:
        """It is over."""
        if self._keys:
            key = self._keys.pop(connection.id, None)
            if key is not None:
                self._peers.leave(key)

    def take_token(self, now: float) -> float:
        """
        A client was accepted. That it would have had to wait is in :attr:`tried_out`.

        :returns: how many seconds the next client is to wait for.
        """
        if self._bucket is None:
            return 0.0
        was_there = self._bucket.take(now)
        if "accept_rate" in self._settings.dry_run:
            if not was_there:
                self.tried_out.append(Reason.ACCEPT_RATE)
            return 0.0
        return self._bucket.wait(now)

    def wait(self, now: float) -> float:
        """
        :returns: how many seconds the next client is to wait for.
        """
        if self._bucket is None or "accept_rate" in self._settings.dry_run:
            return 0.0
        return self._bucket.wait(now)

    def describe(self) -> dict[str, Any]:
        """What is known of peers, as JSON has it."""
        return self._peers.describe() if self.counts_peers else {}

    def invariant(self, present: frozenset[int] | set[int]) -> None:
        """
        :param present: the ids of the connections that are there.
        :raises AssertionError: what is counted for peers is wrong.
        """
        self._peers.invariant()
        keys = self._keys
        if not keys.keys() <= present:
            raise AssertionError(f"who has left counts: {keys.keys() - present}")
        counted = Counter(key for key in keys.values() if key is not None)
        for key, count in counted.items():
            if self._peers.connections(key) != count:
                raise AssertionError(f"{key!r} has {count}: {self.describe()}")
        if self._peers.describe()["live_peers"] != len(counted):
            raise AssertionError(f"not {len(counted)} peers: {self.describe()}")


def host_of(address: Any) -> str | None:
    """The IP address of a client, ``None`` of a UNIX client."""
    return getattr(address, "host", None)
