"""
How long each phase of a drain lasts: a value, its checks, and how it is shortened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

#: How long handlers may go on by themselves, in seconds, unless told otherwise.
DRAIN_TIMEOUT = 30.0

#: How long handlers have to end after their connections were closed, and again
#: after they were cancelled, in seconds, unless told otherwise.
GRACE = 1.0


class DrainOptions(TypedDict, total=False):
    """
    The keyword options of :meth:`tcpsvc.Server.drain`: how long each of its phases
    lasts, in seconds. What is not given is as its default, or as before when the
    server drains already.

    ``announce``
        How long it goes on as before while :attr:`tcpsvc.Server.is_draining` is true,
        so that health checks fail before clients are refused. Default 0. A
        ``pause("refuse")``, before or meanwhile, leaves nothing to announce: it is over
        then.
    ``timeout``
        How long handlers may go on by themselves once it accepts nobody; ``None`` for
        any time. Default 30.
    ``spread``
        Over what time the closes of what is left are spread, so that the clients do
        not come back all at once. Default 0: it is closed at once.
    ``grace``
        How long handlers have to end after their connections were closed, before they
        are cancelled; and again after that, before they are given up. Default 1.
    """

    announce: float
    timeout: float | None
    spread: float
    grace: float


@dataclass(frozen=True, slots=True)
class Durations:
    """The checked options, with their defaults; infinity is for any time."""

    announce: float = 0.0
    timeout: float = DRAIN_TIMEOUT
    spread: float = 0.0
    grace: float = GRACE

    def shortened(self, by: Mapping[str, float]) -> Durations:
        """The shorter of each."""
        return replace(
            self, **{name: min(getattr(self, name), by[name]) for name in by}
        )


_NAMES = frozenset(f.name for f in fields(Durations))


def check_drain_options(
    options: Mapping[str, Any], prefix: str = ""
) -> dict[str, float]:
    """
    The seconds that options ask for; infinity for a timeout of ``None``.

    :param prefix: what stands before the names where they are given.
    :raises ValueError: one is below 0, or is not finite; it is named.
    :raises TypeError: one is unknown, or no number.
    """
    checked: dict[str, float] = {}
    for name, value in options.items():
        said = f"{prefix}{name}={value!r}"
        if name not in _NAMES:
            raise TypeError(f"unknown option {said}")
        if name == "timeout" and value is None:
            checked[name] = math.inf
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{said} is not a number of seconds")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not number >= 0:
            raise ValueError(f"{said} is not 0 seconds or more")
        if number == math.inf and name != "timeout":
            raise ValueError(f"{said} would never end")
        checked[name] = number
    return checked
