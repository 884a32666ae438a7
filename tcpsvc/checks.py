"""
Checks of single values, each of which names the option.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from tcpsvc.networks import Networks
from tcpsvc.rate import Rate
from tcpsvc.reasons import LIMITS


def at_least_one(name: str, value: object) -> int:
    """
    :returns: the value.
    :raises ValueError: ``value`` is below 1.
    :raises TypeError: it is no int.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not an int")
    if value < 1:
        raise ValueError(f"{name}={value} is below 1")
    return value


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """
    :raises ValueError: ``value`` is none of those that are known.
    """
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, known))}"
        )


def positive(name: str, value: object, unit: str) -> float:
    """
    :returns: the value.
    :raises ValueError: ``value`` is not above 0, or is not finite.
    :raises TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is not a number of {unit}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={value} is not a finite number of {unit} above 0")
    return number


def seconds(name: str, value: object) -> float:
    """As :func:`positive`, of seconds."""
    return positive(name, value, "seconds")


def rate(name: str, value: object) -> Rate | None:
    """
    The rate that an option means.

    :raises ValueError: it is no rate.
    :raises TypeError: it is nothing like one.
    """
    if value is None or isinstance(value, Rate):
        return value
    if not isinstance(value, str):
        raise TypeError(
            f"{name}={value!r} is neither a Rate nor a text such as '10/s:20'"
        )
    try:
        return Rate.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def networks(name: str, value: Any) -> Networks:
    """
    The networks that an option means.

    :raises ValueError: one of them is none.
    :raises TypeError: it is nothing like a list of them.
    """
    if isinstance(value, str):
        raise TypeError(f"{name}={value!r} is a text, not a list of networks")
    try:
        return Networks(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def limits(name: str, value: Any) -> frozenset[str]:
    """
    The limits that an option names.

    :raises ValueError: one of the names is no limit's.
    :raises TypeError: they are no names.
    """
    if isinstance(value, bool):
        return frozenset(LIMITS) if value else frozenset()
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError(f"{name}={value!r} is neither a bool nor a list of limits")
    for limit in value:
        if not isinstance(limit, str):
            raise TypeError(f"{name}: {limit!r} is not the name of a limit")
        if limit not in LIMITS:
            raise ValueError(f"{name}: {limit!r} is not one of {', '.join(LIMITS)}")
    return frozenset(value)
