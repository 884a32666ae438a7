"""
How often something may happen: so many a second, and so many at once.

A rate is kept by one float (GCRA, the "generic cell rate algorithm" of ATM), the
time at which the bucket of tokens will be full: each token that is taken puts it
off by one interval. There is a token as long as it lies less than a bucket ahead.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

#: More limits nothing, and less is never. What is between, floats can tell apart.
MOST_PER_SECOND = 1_000_000.0
LEAST_PER_SECOND = 0.000_001
MOST_BURST = 1_000_000

#: By how much a sum of two times may be off, in seconds: a clock that counts from
#: 1970 is a float whose steps are of that size.
_STEP = 2.5e-7

_UNITS = {"s": 1, "m": 60, "h": 3600}
_FORM = re.compile(
    r"""(?P<count> (?: [0-9]+ (?: \.[0-9]* )? | \.[0-9]+ ) (?: e[-+]?[0-9]+ )? )
        (?: / (?P<unit> [smh] ) )?
        (?: : (?P<burst> [0-9]{1,9} ) )?""",
    re.ASCII | re.VERBOSE,
)


@dataclass(frozen=True, slots=True, init=False)
class Rate:
    """
    A rate, and how many may come at once after a pause.

    :param per_second: how many a second on average, from 0.000001 to 1000000.
    :param burst: how many at once, from 1 to 1000000. Default: what comes in a
        second, rounded up.
    :raises ValueError: one of them is out of range.
    :raises TypeError: one of them is no number.
    """

    per_second: float
    burst: int

    def __init__(self, per_second: float, burst: int | None = None) -> None:
        if isinstance(per_second, bool) or not isinstance(per_second, (int, float)):
            raise TypeError(f"per_second={per_second!r} is not a number")
        if not LEAST_PER_SECOND <= per_second <= MOST_PER_SECOND:
            raise ValueError(
                f"per_second={per_second} is not from {LEAST_PER_SECOND:f} to"
                f" {MOST_PER_SECOND:.0f}; for no limit give no rate"
            )
        if burst is None:
            burst = math.ceil(per_second)
        if isinstance(burst, bool) or not isinstance(burst, int):
            raise TypeError(f"burst={burst!r} is not an int")
        if not 1 <= burst <= MOST_BURST:
            raise ValueError(f"burst={burst} is not from 1 to {MOST_BURST}")
        object.__setattr__(self, "per_second", float(per_second))
        object.__setattr__(self, "burst", burst)

    @classmethod
    def parse(cls, text: str) -> Rate:
        """
        The rate that a text gives: ``10`` or ``10/s`` for ten a second, ``90/m`` a
        minute, ``0.5/h`` an hour, each with ``:20`` for twenty at once.

        :raises ValueError: it is not of this form, or out of range.
        :raises TypeError: it is no text.
        """
        if not isinstance(text, str):
            raise TypeError(f"rate {text!r} is not a str, as '10/s:20'")
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(
                f"rate {text!r} is not of the form N, N/s, N/m or N/h with an"
                " optional :BURST, as in 10/s:20"
            )
        burst = found["burst"]
        try:
            return cls(
                float(found["count"]) / _UNITS[found["unit"] or "s"],
                None if burst is None else int(burst),
            )
        except ValueError as error:
            raise ValueError(f"rate {text!r}: {error}") from None

    def __str__(self) -> str:
        """As :meth:`parse` reads it, with the unit that makes it shortest."""
        texts = []
        for unit, size in _UNITS.items():
            count = f"{self.per_second * size:.15g}"
            if float(count) / size == self.per_second:
                texts.append(f"{count}/{unit}")
        text = min(texts, key=len, default=f"{self.per_second!r}/s")
        return f"{text}:{self.burst}"

    @property
    def interval(self) -> float:
        """Seconds for one token."""
        return 1 / self.per_second

    @property
    def reach(self) -> float:
        """
        How many seconds ahead the time of the full bucket may lie while there is
        still a token. Rounding must not cost one, and never makes half of one.
        """
        rounding = min(self.interval / 2, self.burst * _STEP)
        return (self.burst - 1) * self.interval + rounding


class TokenBucket:
    """
    One bucket of tokens: full at first, filled at the rate, never fuller than its
    burst.

    Times are those of one clock (``IReactorTime.seconds``). When that is set back,
    the time stands still for the bucket at that moment, and then goes on.

    :param rate: how fast it fills, and how many tokens it holds.
    """

    __slots__ = ("_back", "_full_at", "_interval", "_latest", "_rate", "_reach")

    def __init__(self, rate: Rate) -> None:
        self._back = 0.0
        self._latest = self._full_at = -math.inf
        self._set(rate)

    def __repr__(self) -> str:
        return f"<TokenBucket {self._rate}>"

    @property
    def rate(self) -> Rate:
        """The rate."""
        return self._rate

    def take(self, now: float) -> bool:
        """
        Take a token.

        :returns: whether there was one.
        """
        now = self._time(now)
        if self._full_at <= now:
            self._full_at = now + self._interval
            return True
        if self._full_at - now <= self._reach:
            self._full_at += self._interval
            return True
        return False

    def wait(self, now: float) -> float:
        """
        :returns: in how many seconds there is a token, 0.0 if there is one.
        """
        early = self._full_at - self._time(now)
        if early <= self._reach:
            return 0.0
        return early - (self._rate.burst - 1) * self._interval

    def change(self, rate: Rate, now: float) -> None:
        """
        Another rate from now on. The tokens that are there stay, as many as fit.
        """
        now = self._time(now)
        missing = max(0.0, self._full_at - now) / self._interval
        there = self._rate.burst - missing
        self._set(rate)
        # With more than fit it has been full for a while.
        self._full_at = now + (rate.burst - there) * self._interval

    def _set(self, rate: Rate) -> None:
        self._rate = rate
        self._interval = rate.interval
        self._reach = rate.reach

    def _time(self, now: float) -> float:
        """The time on a clock that is never set back."""
        now += self._back
        if now < self._latest:
            self._back += self._latest - now
            return self._latest
        self._latest = now
        return now
