"""
How many connections a peer has, and how often it makes one. A peer is whoever has
an address of one prefix: an IPv4 address, or what one household gets of IPv6.

What is known of a peer is an int while it has connections, and a float while its
bucket is not full (see :mod:`tcpsvc.rate`). So whoever comes from many addresses
costs little, and is forgotten soon: each entrance forgets up to two of the peers
that entered the longest ago.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections import OrderedDict
from enum import Enum
from typing import Any, Final, Literal, TypeAlias

from tcpsvc.networks import network_of, number_of
from tcpsvc.rate import Rate

#: Of how many peers the rate is remembered. The oldest are forgotten before their
#: buckets are full when there are more.
MOST_PEERS = 100_000

#: How many peers are forgotten by one entrance. It adds one at most, so with two
#: what a flood has left goes.
_FORGOTTEN_AT_ONCE = 2

#: How many peers a description names.
_DESCRIBED = 5

#: What identifies a peer; ``None`` is for clients without an IP address.
Key: TypeAlias = "int | bytes | None"

#: Which limit refuses.
Refusal: TypeAlias = Literal["connections", "rate"]

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
        "_full_at",
        "_interval",
        "_latest",
        "_live",
        "_max_connections",
        "_most",
        "_prefixes",
        "_rate",
        "_reach",
        "_shift_4",
        "_shift_6",
    )

    def __init__(
        self,
        max_connections: int | None = None,
        rate: Rate | None = None,
        prefixes: tuple[int, int] = PREFIXES,
    ) -> None:
        #: How many connections each peer has that has any.
        self._live: dict[int | bytes, int] = {}
        #: When the buckets will be full, those who entered last at the end.
        self._full_at: OrderedDict[int | bytes, float] = OrderedDict()
        self._latest = -math.inf
        self._back = 0.0
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
            _check_prefixes(prefixes)
            self._prefixes = prefixes
            self._shift_4, self._shift_6 = 32 - prefixes[0], 128 - prefixes[1]
        if max_connections is not _KEPT:
            self._max_connections = max_connections
            self._most = sys.maxsize if max_connections is None else max_connections
        if rate is not _KEPT and rate != self._rate:
            self._rate = rate
            self._interval = 0.0 if rate is None else rate.interval
            self._reach = 0.0 if rate is None else rate.reach
            self._full_at = OrderedDict()

    def key_of(self, host: str | None) -> Key:
        """
        Who an address is. IPv4 addresses written as IPv6 ones are IPv4; a scope id
        is ignored.

        :param host: the address; ``None`` or what is no IP address is nobody's.
        :returns: the key. Those of different versions or prefixes are never equal.
        """
        if host is None:
            return None
        number = number_of(host)
        if number is None:
            return None
        if number >= 0:
            return number >> self._shift_4
        # Bytes, since their hashes are secret. Who owns a /48 can find addresses
        # whose numbers have one hash, which would make a list of the dict.
        return (number >> self._shift_6).to_bytes(17, "big", signed=True)

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
        full_at = self._full_at.get(key)
        if (
            full_at is not None
            and full_at - now - self._back > self._reach
            # The clock may have been set back, which is looked at only here.
            and full_at - self._time(now) > self._reach
        ):
            return "rate"
        return None

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
        now += self._back
        if now < self._latest:
            now = self._time(now - self._back)
        else:
            self._latest = now
        full_at = self._full_at
        until = full_at.get(key)
        if until is None:
            full_at[key] = now + self._interval
        else:
            full_at.move_to_end(key)
            if until <= now:
                full_at[key] = now + self._interval
            elif until - now <= self._reach:
                full_at[key] = until + self._interval
        oldest = next(iter(full_at))
        if full_at[oldest] <= now or len(full_at) > MOST_PEERS:
            self._forget(now)

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

    def _forget(self, now: float) -> None:
        """The oldest whose buckets are full, and those who are too many."""
        full_at = self._full_at
        for _ in range(_FORGOTTEN_AT_ONCE):
            oldest = next(iter(full_at))
            if full_at[oldest] > now and len(full_at) <= MOST_PEERS:
                return
            del full_at[oldest]

    def _time(self, now: float) -> float:
        """The time on a clock that is never set back."""
        now += self._back
        if now < self._latest:
            self._back += self._latest - now
            return self._latest
        self._latest = now
        return now

    def describe(self) -> dict[str, Any]:
        """
        :returns: a JSON-able description: the limits, how many peers there are, and
            who has the most connections.
        """
        most = heapq.nlargest(_DESCRIBED, self._live.items(), key=lambda item: item[1])
        return {
            "max_connections": self._max_connections,
            "rate": None if self._rate is None else str(self._rate),
            "prefixes": list(self._prefixes),
            "live": len(self._live),
            "remembered": len(self._full_at),
            "most_connections": {name_of(key): count for key, count in most},
        }

    def invariant(self) -> None:
        """
        :raises AssertionError: the state is broken; it says how.
        """
        ahead = self._latest + self._reach + 2 * self._interval
        checks = {
            "who has connections has at least one": all(
                count >= 1 for count in self._live.values()
            ),
            "not too many are remembered": len(self._full_at) <= MOST_PEERS,
            "without a rate nobody is": self._rate is not None or not self._full_at,
            "no bucket lacks more than it holds": all(
                full_at <= ahead for full_at in self._full_at.values()
            ),
        }
        broken = [name for name, holds in checks.items() if not holds]
        if broken:
            raise AssertionError(f"{'; '.join(broken)} is not so: {self.describe()}")


def name_of(key: Key) -> str | None:
    """
    The prefix of a peer, as ``192.0.2.1/32``.

    :param key: what :meth:`Peers.key_of` has returned.
    :returns: ``None`` for no peer.
    """
    if key is None:
        return None
    if isinstance(key, bytes):
        key = int.from_bytes(key, "big", signed=True)
    return str(network_of(key))


def _check_max_connections(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_connections={value!r} is neither an int nor None")
    if value < 1:
        raise ValueError(f"max_connections={value} is below 1; None is for no limit")


def _check_prefixes(value: object) -> None:
    if (
        not isinstance(value, tuple)
        or len(value) != 2
        or any(isinstance(bits, bool) or not isinstance(bits, int) for bits in value)
    ):
        raise TypeError(f"prefixes={value!r} is not a tuple of two ints, as (32, 64)")
    for bits, most, version in zip(value, (32, 128), (4, 6), strict=True):
        if not 0 <= bits <= most:
            raise ValueError(
                f"prefixes={value}: {bits} bits of an IPv{version} address are not"
                f" from 0 to {most}"
            )
