"""
How many connections a peer has, and how often it makes one. A peer is whoever has
an address of one prefix: an IPv4 address, or what one household gets of IPv6.

What is known of a peer is an int while it has connections, and a float while its
bucket is not full (see :mod:`tcpsvc.rate`): so little that whoever comes from many
addresses cannot fill the memory. Peers whose buckets are full again are forgotten
without looking at each: the floats are in two dicts, those of peers that entered
since some moment, and of those that entered in the time before it that an empty
bucket takes to fill. When that time is over again, the latter are full.
"""

from __future__ import annotations

import heapq
import math
import sys
from enum import Enum
from typing import Any, Final, Literal, TypeAlias

from tcpsvc.addresses import check_prefixes, key_of, name_of, packed_of, whole_bytes
from tcpsvc.rate import Rate

#: Of how many peers the rate is remembered. When more come, those of them that
#: entered the longest ago, up to half, are forgotten before their buckets are full.
MOST_PEERS = 100_000

#: How many peers a description names.
_DESCRIBED = 5

#: What identifies a peer; ``None`` is for clients without an IP address.
Key: TypeAlias = bytes | None

#: Which limit refuses.
Refusal: TypeAlias = Literal["connections", "rate"]

#: The default of ``prefixes``.
PREFIXES = (32, 64)


class _Kept(Enum):
    """For a limit that stays as it is: ``None`` is a limit too."""

    KEPT = 0


_KEPT: Final = _Kept.KEPT


class Peers:
    """
    Counts connections by peers, and says who is to be refused.

    For each connection :meth:`key_of` comes first, then :meth:`refusal`, then
    :meth:`enter` if it is not refused (or if refusing is only tried out), and
    :meth:`leave` at its end. Clients without an IP address (``None`` for a key) are
    neither counted nor refused.

    Times are those of one clock (``IReactorTime.seconds``). When that is set back,
    the time stands still here at that moment, and then goes on.

    :param max_connections: how many connections a peer may have at a time; ``None``
        for any number.
    :param rate: how often a peer may make one; ``None`` for as often as it likes.
    :param prefixes: how many bits of an IPv4 and of an IPv6 address make a peer.
    :raises ValueError: one of them is out of range.
    :raises TypeError: one of them is of the wrong kind.
    """

    __slots__ = (
        "_back",
        "_before",
        "_host",
        "_interval",
        "_key",
        "_latest",
        "_live",
        "_max_connections",
        "_most",
        "_prefixes",
        "_rate",
        "_reach",
        "_recent",
        "_turn_at",
        "_whole_4",
        "_whole_6",
    )

    def __init__(
        self,
        max_connections: int | None = None,
        rate: Rate | None = None,
        prefixes: tuple[int, int] = PREFIXES,
    ) -> None:
        #: How many connections each peer has that has any.
        self._live: dict[bytes, int] = {}
        #: When the buckets will be full, of those who entered lately, and before.
        self._recent: dict[bytes, float] = {}
        self._before: dict[bytes, float] = {}
        #: When those of before are forgotten.
        self._turn_at = self._latest = -math.inf
        self._back = 0.0
        #: The address that was asked about last.
        self._host: str | None = None
        self._key: Key = None
        self._rate: Rate | None = None
        self._interval = self._reach = 0.0
        self.change(max_connections=max_connections, rate=rate, prefixes=prefixes)

    def change(
        self,
        *,
        max_connections: int | _Kept | None = _KEPT,
        rate: Rate | _Kept | None = _KEPT,
        prefixes: tuple[int, int] | _Kept = _KEPT,
    ) -> None:
        """
        Other limits from now on; those not given stay. Nothing changes if one of
        them is wrong.

        Who is connected stays so. With another rate everybody starts with a full
        bucket. With other prefixes everybody starts anew: connections that are
        live leave under the keys they entered with, and do not count for the
        peers of the new prefixes.
        """
        if max_connections is not _KEPT:
            _check_max_connections(max_connections)
        if rate is not _KEPT and rate is not None and not isinstance(rate, Rate):
            raise TypeError(f"rate={rate!r} is not a Rate; Rate.parse makes one of it")
        if prefixes is not _KEPT:
            check_prefixes("prefixes", prefixes)
            self._prefixes = prefixes
            self._whole_4 = whole_bytes(4, prefixes[0])
            self._whole_6 = whole_bytes(6, prefixes[1])
            self._host = self._key = None
        if max_connections is not _KEPT:
            self._max_connections = max_connections
            self._most = sys.maxsize if max_connections is None else max_connections
        if rate is not _KEPT and rate != self._rate:
            self._rate = rate
            self._interval = 0.0 if rate is None else rate.interval
            self._reach = 0.0 if rate is None else rate.reach
            self._recent, self._before = {}, {}
            self._turn_at = -math.inf

    def key_of(self, host: str | None) -> Key:
        """
        Who an address is. IPv4 addresses written as IPv6 ones are IPv4; a scope id
        is ignored.

        :param host: the address; ``None`` or what is no IP address is nobody's.
        :returns: the key. Those of different versions or prefixes are never equal.
        """
        if host is self._host:
            return self._key  # It is asked about, and then let in: 0.3 µs.
        packed = packed_of(host) if host else None
        key: Key
        # What key_of does, without the call for the prefixes that most have.
        if packed is None:
            key = None
        elif len(packed) == 4:
            whole = self._whole_4
            key = packed[:whole] if whole else key_of(packed, self._prefixes[0])
        else:
            whole = self._whole_6
            key = packed[:whole] if whole else key_of(packed, self._prefixes[1])
        self._host, self._key = host, key
        return key

    def refusal(self, key: Key, now: float) -> Refusal | None:
        """
        Whether a newcomer is to be refused. Asking uses nothing up.

        :param now: the time.
        :returns: the limit that refuses it, or ``None``.
        """
        if key is None:
            return None
        if self._live.get(key, 0) >= self._most:
            return "connections"
        if key not in self._recent and key not in self._before:
            return None
        return "rate" if self.comes_too_often(key, now) else None

    def comes_too_often(self, key: Key, now: float) -> bool:
        """
        Whether the rate alone refuses a newcomer, however many of its there are.
        """
        if key is None:
            return False
        full_at = self._recent.get(key)
        if full_at is None:
            full_at = self._before.get(key)
            if full_at is None:
                return False
        return (
            full_at - now - self._back > self._reach
            # The clock may have been set back, which is looked at only here.
            and full_at - self._time(now) > self._reach
        )

    def enter(self, key: Key, now: float) -> None:
        """
        A connection begins. It uses up one of the peer's tokens, if there is one:
        who enters though it is refused for its rate delays nobody.
        """
        if key is None:
            return
        live = self._live
        live[key] = live.get(key, 0) + 1
        if not self._interval:
            return
        # As _time does, without the call unless the clock was set back.
        at = now + self._back
        if at < self._latest:
            at = self._time(now)
        else:
            self._latest = at
        if at >= self._turn_at:
            self._turn(at)
        recent = self._recent
        full_at = recent.get(key)
        if full_at is None:
            if len(recent) >= MOST_PEERS // 2:
                self._turn(at)
                recent = self._recent
            full_at = self._before.pop(key, at)
        if full_at <= at:
            recent[key] = at + self._interval
        elif full_at - at <= self._reach:
            recent[key] = full_at + self._interval
        else:
            recent[key] = full_at

    def leave(self, key: Key) -> None:
        """
        A connection ends.

        :param key: the one it entered with.
        :raises KeyError: none has entered with it: the caller has a bug.
        """
        if key is None:
            return
        live = self._live
        left = live[key] - 1
        if left:
            live[key] = left
        else:
            del live[key]

    def _turn(self, now: float) -> None:
        """Forget those who entered before, and begin with new ones."""
        to_fill = self._reach + self._interval
        # After a pause, the buckets of all are full.
        self._before = self._recent if now < self._turn_at + to_fill else {}
        self._recent = {}
        self._turn_at = now + to_fill

    def _time(self, now: float) -> float:
        """The time on a clock that is never set back."""
        now += self._back
        if now < self._latest:
            self._back += self._latest - now
            return self._latest
        self._latest = now
        return now

    def connections(self, key: Key) -> int:
        """
        :returns: how many connections the peer has.
        """
        return 0 if key is None else self._live.get(key, 0)

    def describe(self) -> dict[str, Any]:
        """
        :returns: a JSON-able description: the limits, under the names of the options
            that set them, how many peers there are, and who has the most connections.
        """
        most = heapq.nlargest(_DESCRIBED, self._live.items(), key=lambda item: item[1])
        return {
            "max_connections_per_peer": self._max_connections,
            "accept_rate_per_peer": None if self._rate is None else str(self._rate),
            "peer_prefixes": list(self._prefixes),
            "live_peers": len(self._live),
            "remembered_peers": len(self._recent) + len(self._before),
            "most_connections": {name_of(key): count for key, count in most},
        }

    def invariant(self) -> None:
        """
        :raises AssertionError: the state is broken; it says how.
        """
        full_at = {**self._before, **self._recent}
        rounding = 1e-6
        latest = self._latest + self._reach + self._interval + rounding
        checks = {
            "who is counted is there": all(n >= 1 for n in self._live.values()),
            "not too many are remembered": len(full_at) <= MOST_PEERS,
            "each is remembered once": not self._before.keys() & self._recent,
            "without a rate nobody is": self._rate is not None or not full_at,
            "no bucket lacks more than it holds": all(
                time <= latest for time in full_at.values()
            ),
            "who is to be forgotten next will be full": all(
                time <= self._turn_at + rounding for time in self._before.values()
            ),
        }
        broken = [name for name, holds in checks.items() if not holds]
        if broken:
            raise AssertionError(f"{'; '.join(broken)} is not so: {self.describe()}")


def _check_max_connections(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_connections={value!r} is neither an int nor None")
    if value < 1:
        raise ValueError(f"max_connections={value} is below 1; None is for no limit")
