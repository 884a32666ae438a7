"""
The limits that are in force, in one line, for a log.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tcpsvc.networks import Networks
from tcpsvc.options import Options, StreamOptions
from tcpsvc.overflow import Reply
from tcpsvc.reasons import LIMITS
from tcpsvc.settings import Settings

#: How many networks are named; of more only the number is said.
MOST_NAMED = 5

#: What comes after a number.
_UNITS = {
    "first_byte_timeout": " s",
    "idle_timeout": " s",
    "handler_timeout": " s",
    "lifetime": " s",
    "min_throughput": " bytes/s",
    "throughput_window": " s",
    "buffer_age_limit": " s",
    "flush_timeout": " s",
    "reader_buffer_size": " bytes",
    "writer_buffer_size": " bytes",
}

#: The options in the order in which they are said.
_ORDER = (
    "drop_incoming_connections",
    "max_connections",
    "overflow",
    "max_connections_per_peer",
    "accept_rate_per_peer",
    "peer_prefixes",
    "accept_rate",
    "allow",
    "deny",
    "refusal",
    "on_exhaustion",
    "on_accept_error",
    "first_byte_timeout",
    "idle_timeout",
    "handler_timeout",
    "lifetime",
    "min_throughput",
    "throughput_window",
    "buffer_age_limit",
    "flush_timeout",
    "reader_buffer_size",
    "writer_buffer_size",
    "eof_on_drain",
    "max_accepts_per_batch",
    "backlog",
)

_OF_STREAMS = StreamOptions.__optional_keys__ - Options.__optional_keys__


#: What there is where nobody has said anything; of ``max_connections`` that depends on
#: the process, so it is always said.
_DEFAULTS = {field.name: field.default for field in fields(Settings)}


def limits_line(
    settings: Settings,
    *,
    of_streams: bool,
    is_dropping: bool,
    has_backlog: bool,
    with_defaults: bool = True,
) -> str:
    """
    :param settings: the options as they are now.
    :param of_streams: whether those of streams count.
    :param is_dropping: whether clients are dropped now.
    :param has_backlog: whether ``backlog`` is that of any socket.
    :param with_defaults: whether those count that are as by default.
    """
    told = []
    for name in _ORDER:
        value = getattr(settings, name)
        if name == "drop_incoming_connections":
            value = is_dropping
        elif (
            (name in _OF_STREAMS and not of_streams)
            or (name == "backlog" and not has_backlog)
            or not _matters(name, settings)
        ):
            continue
        elif not with_defaults:
            if value == _DEFAULTS[name]:
                continue
            if value is None:  # By default there is one.
                value = "none"
        if value is True:
            told.append(name)
        elif value is not None and value is not False:
            told.append(f"{name}={_text(name, value)}")
    if settings.dry_run:
        told.append(f"dry_run={_names(settings.dry_run)}")
    return ", ".join(told)


def _matters(name: str, settings: Settings) -> bool:
    """Whether an option has any effect, as the others are."""
    is_per_peer = (
        settings.max_connections_per_peer is not None
        or settings.accept_rate_per_peer is not None
    )
    if name == "peer_prefixes":
        return is_per_peer
    if name == "deny":
        return bool(settings.deny)
    if name == "throughput_window":
        return settings.min_throughput is not None
    if name == "refusal":
        return (
            is_per_peer
            or settings.allow is not None
            or bool(settings.deny)
            or settings.on_exhaustion == "shed"
        )
    return True


def _names(dry_run: frozenset[str]) -> str:
    return "all" if dry_run == LIMITS.keys() else " ".join(sorted(dry_run))


def _text(name: str, value: Any) -> str:
    if isinstance(value, Networks):
        found = [str(network) for network in value]
        if len(found) > MOST_NAMED:
            return f"{len(found)} networks"
        return " ".join(found) or "nobody"
    if isinstance(value, Reply):
        return f"a reply of {len(value.data)} bytes"
    if name == "peer_prefixes":
        return "/{} and /{}".format(*value)
    if name in _UNITS:
        number = f"{value:.12g}" if isinstance(value, float) else str(value)
        return number + _UNITS[name]
    if callable(value):
        return str(getattr(value, "__qualname__", repr(value)))
    return str(value)
