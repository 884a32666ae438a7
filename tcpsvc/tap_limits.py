"""
The limits of ``twistd tcpsvc``: who is let in, and for how long.

Their values are those of the options of the same names, see :mod:`tcpsvc.options`.
Unlike the library, the command line has timeouts unless told otherwise: whoever
starts a daemon from there may not have thought of clients that say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.python import usage

from tcpsvc.addresses import check_prefixes
from tcpsvc.checks import at_least_one, limits, rate, seconds
from tcpsvc.overflow import OVERFLOWS, REFUSALS, Reply
from tcpsvc.reasons import LIMITS

#: Seconds; the library has no limits for these.
FIRST_BYTE_TIMEOUT = 60.0
IDLE_TIMEOUT = 3600.0

#: What may be in a dry run, as it is typed.
_DRY_RUN = ("all", *(name.replace("_", "-") for name in LIMITS))

#: As on a command line.
NONE = "none"


def _or_none(convert: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    def converted(name: str, text: str) -> Any:
        return None if text == NONE else convert(name, text)

    return converted


def _count(name: str, text: str) -> int:
    try:
        return at_least_one(name, int(text))
    except ValueError:
        raise ValueError("not a number from 1 on") from None


def _seconds(name: str, text: str) -> float:
    try:
        return seconds(name, float(text))
    except ValueError:
        raise ValueError("not a number of seconds above 0") from None


def _bytes_a_second(name: str, text: str) -> float:
    try:
        return seconds(name, float(text))
    except ValueError:
        raise ValueError("not a number of bytes a second above 0") from None


def _prefixes(name: str, text: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(","))
        check_prefixes("peer_prefixes", (first, second))
    except ValueError:
        raise ValueError(
            "not two prefix lengths, of IPv4 and IPv6, such as 32,64"
        ) from None
    return first, second


def _limits(name: str, text: str) -> Any:
    words = text.split(",")
    if "all" in words:
        if len(words) > 1:
            raise ValueError("'all' stands alone")
        return True
    for word in words:
        if word.replace("-", "_") not in LIMITS:
            raise ValueError(f"{word!r} is not one of {', '.join(_DRY_RUN)}")
    return limits(name, [word.replace("-", "_") for word in words])


def _way(words: tuple[str, ...]) -> Callable[[str, str], Any]:
    def convert(name: str, text: str) -> Any:
        kind, colon, rest = text.partition(":")
        if kind == "reply" and colon:
            return Reply(rest.encode().decode("unicode_escape").encode("latin-1"))
        if text not in words:
            raise ValueError(f"not one of {', '.join(words)} or reply:TEXT")
        return text

    return convert


def _parameter(
    name: str, default: object, convert: Callable[[str, str], Any], text: str
) -> list[Any]:
    def coerce(value: str) -> Any:
        python_name = name.replace("-", "_")
        try:
            return convert(python_name, value)
        except (TypeError, ValueError) as error:
            what = str(error).removeprefix(f"{python_name}: ")
            raise ValueError(f"--{name} {value}: {what}") from error

    return [name, None, default, text, coerce]


#: For :class:`twisted.python.usage.Options`.
PARAMETERS = [
    _parameter(
        "overflow",
        "hold",
        _way(OVERFLOWS),
        "What becomes of a client beyond --max-connections: hold (it waits), drop "
        "(FIN), reset (RST), evict (the one that was idle for longest goes), or "
        "reply:TEXT.",
    ),
    _parameter(
        "refusal",
        "reset",
        _way(REFUSALS),
        "What becomes of a client that another limit keeps out: reset, drop or "
        "reply:TEXT.",
    ),
    _parameter(
        "max-connections-per-peer",
        None,
        _or_none(_count),
        "Connections at a time of one peer. [default: none]",
    ),
    _parameter(
        "accept-rate-per-peer",
        None,
        _or_none(rate),
        "How often one peer may come, such as 10/s or 90/m:20 (20 at once). "
        "[default: none]",
    ),
    _parameter(
        "peer-prefixes",
        None,
        _prefixes,
        "What a peer is: bits of an IPv4 and of an IPv6 address. [default: 32,64]",
    ),
    _parameter(
        "accept-rate",
        None,
        _or_none(rate),
        "How often clients are accepted at all; others wait. [default: none]",
    ),
    _parameter(
        "dry-run",
        None,
        _limits,
        "Limits that only count and log whom they would refuse or end: all, or names "
        "with commas, such as deny,idle-timeout.",
    ),
    _parameter(
        "first-byte-timeout",
        FIRST_BYTE_TIMEOUT,
        _or_none(_seconds),
        "Seconds in which a client must have sent something, or 'none'.",
    ),
    _parameter(
        "idle-timeout",
        IDLE_TIMEOUT,
        _or_none(_seconds),
        "Seconds without a byte either way after which a connection is closed, or "
        "'none'.",
    ),
    _parameter(
        "handler-timeout",
        None,
        _or_none(_seconds),
        "Seconds that a handler may run. [default: none]",
    ),
    _parameter(
        "lifetime",
        None,
        _or_none(_seconds),
        "Seconds that a connection may last. [default: none]",
    ),
    _parameter(
        "min-throughput",
        None,
        _or_none(_bytes_a_second),
        "Bytes a second, either way, below which a connection that is not idle is "
        "closed. [default: none]",
    ),
    _parameter(
        "throughput-window",
        30.0,
        _seconds,
        "Seconds over which --min-throughput is measured.",
    ),
]

#: What may be completed.
COMPLETIONS = {
    "overflow": usage.CompleteList([*OVERFLOWS, "reply:"]),
    "refusal": usage.CompleteList([*REFUSALS, "reply:"]),
    "dry-run": usage.CompleteMultiList(list(_DRY_RUN)),
}

#: The defaults that there are.
_DEFAULTS = {
    "first_byte_timeout": FIRST_BYTE_TIMEOUT,
    "idle_timeout": IDLE_TIMEOUT,
}

_NAMES = [str(parameter[0]) for parameter in PARAMETERS]


def limits_of(options: Any) -> dict[str, Any]:
    """
    The library's options that a command line asks for.

    :param options: the parsed :class:`twisted.python.usage.Options`.
    """
    found = {name.replace("-", "_"): options[name] for name in _NAMES}
    for name in ("dry_run", "peer_prefixes"):
        if found[name] is None:
            del found[name]
    found["allow"] = options["allow"] or None
    found["deny"] = options["deny"]
    return found


def without_defaults(found: dict[str, Any]) -> None:
    """
    Have none of the defaults, where nobody knows what connections move. What was typed
    stays, to be refused.
    """
    for name, default in _DEFAULTS.items():
        if found[name] is default:  # What is typed is a number of its own.
            found[name] = None
