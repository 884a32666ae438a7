"""
The settings of a server: the options that were given, checked, with the defaults of
the others (spec A2, W5). Everything is looked at before anything is opened.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from tcpsvc.addresses import check_prefixes
from tcpsvc.checks import (
    at_least_one,
    limits,
    networks,
    one_of,
    positive,
    rate,
    seconds,
)
from tcpsvc.events import check_observer
from tcpsvc.handler import OnHandlerError, check_on_handler_error
from tcpsvc.networks import Networks
from tcpsvc.options import AcceptErrorCallable, StreamOptions
from tcpsvc.overflow import (
    OVERFLOWS,
    REFUSALS,
    Overflow,
    Refusal,
    Reply,
    check_word_or_reply,
)
from tcpsvc.peers import PREFIXES
from tcpsvc.rate import Rate

#: The default of ``backlog``, as in Async.
BACKLOG = 64

#: What fits the kernel's int. It takes what exceeds its own limit as that limit.
MOST_BACKLOG = 2**31 - 1

#: The default of ``max_connections`` where there is no limit of open files.
MOST_CONNECTIONS = 10_000

#: What ``engine`` may be.
ENGINES = ("auto", "reactor")

#: What ``on_exhaustion`` may be.
EXHAUSTION_POLICIES = ("back-off", "shed")

#: Seconds (spec S6, H3).
BUFFER_AGE_LIMIT = 120.0
FLUSH_TIMEOUT = 30.0

THROUGHPUT_WINDOW = 30.0

NO_NETWORKS = Networks(())

#: Bytes (spec S3, S5).
READER_BUFFER_SIZE = 131_072
WRITER_BUFFER_SIZE = 131_072


def default_max_connections() -> int:
    """
    How many connections fit into the soft limit of open files, with room for
    everything else the process opens.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, soft - max(64, soft // 10)))


#: Options that are given in more than one form, and what makes one of them.
_FORMS: dict[str, Callable[[str, Any], Any]] = {
    "accept_rate": rate,
    "accept_rate_per_peer": rate,
    "allow": lambda name, value: None if value is None else networks(name, value),
    "deny": lambda name, value: networks(name, () if value is None else value),
    "dry_run": limits,
    "max_connections": lambda _, value: (
        default_max_connections() if value is None else value
    ),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked options, with their defaults."""

    on_handler_error: OnHandlerError
    max_connections: int
    max_accepts_per_batch: int = 1
    backlog: int = BACKLOG
    drop_incoming_connections: bool = False
    overflow: Overflow = "hold"
    refusal: Refusal = "reset"
    max_connections_per_peer: int | None = None
    accept_rate_per_peer: Rate | None = None
    peer_prefixes: tuple[int, int] = PREFIXES
    accept_rate: Rate | None = None
    allow: Networks | None = None
    deny: Networks = NO_NETWORKS
    dry_run: frozenset[str] = frozenset()
    first_byte_timeout: float | None = None
    idle_timeout: float | None = None
    handler_timeout: float | None = None
    lifetime: float | None = None
    min_throughput: float | None = None
    throughput_window: float = THROUGHPUT_WINDOW
    on_exhaustion: str = "back-off"
    on_accept_error: AcceptErrorCallable | None = None
    keepalive: bool = False
    engine: str = "auto"
    buffer_age_limit: float | None = BUFFER_AGE_LIMIT
    flush_timeout: float = FLUSH_TIMEOUT
    reader_buffer_size: int = READER_BUFFER_SIZE
    writer_buffer_size: int = WRITER_BUFFER_SIZE
    eof_on_drain: bool = False

    def __post_init__(self) -> None:
        check_on_handler_error(self.on_handler_error)
        for name in (
            "max_connections",
            "max_accepts_per_batch",
            "backlog",
            "reader_buffer_size",
            "writer_buffer_size",
        ):
            at_least_one(name, getattr(self, name))
        for name in (
            "buffer_age_limit",
            "first_byte_timeout",
            "idle_timeout",
            "handler_timeout",
            "lifetime",
        ):
            if getattr(self, name) is not None:
                seconds(name, getattr(self, name))
        for name in ("flush_timeout", "throughput_window"):
            seconds(name, getattr(self, name))
        if self.min_throughput is not None:
            positive("min_throughput", self.min_throughput, "bytes a second")
        if self.max_connections_per_peer is not None:
            at_least_one("max_connections_per_peer", self.max_connections_per_peer)
        check_word_or_reply("overflow", self.overflow, OVERFLOWS)
        check_word_or_reply("refusal", self.refusal, REFUSALS)
        check_prefixes("peer_prefixes", self.peer_prefixes)
        one_of("on_exhaustion", self.on_exhaustion, EXHAUSTION_POLICIES)
        if self.on_accept_error is not None and not callable(self.on_accept_error):
            raise TypeError(
                f"on_accept_error={self.on_accept_error!r} is no callable "
                "f(error, server)"
            )
        one_of("engine", self.engine, ENGINES)
        if self.backlog > MOST_BACKLOG:
            raise ValueError(f"backlog={self.backlog} is above {MOST_BACKLOG}")


def check_options(
    known: Any, on_handler_error: OnHandlerError, options: dict[str, Any]
) -> Settings:
    """
    The settings that options ask for. ``socket``, ``reactor`` and ``clock`` are
    not among them.

    :param known: :class:`Options` or :class:`StreamOptions`.
    :raises ValueError: an option has a bad value; it is named.
    :raises TypeError: an option is unknown, or its value is of the wrong kind.
    """
    unknown = sorted(set(options) - known.__optional_keys__)
    if unknown:
        said = f"{unknown[0]}={options[unknown[0]]!r}"
        if unknown[0] in StreamOptions.__optional_keys__:
            raise TypeError(f"{said} is an option of stream handlers only")
        raise TypeError(f"unknown option {said}")
    if options.get("observer") is not None:
        check_observer(options["observer"])
    values = _formed({"max_connections": None, **options})
    return Settings(on_handler_error, **values)


def change_options(known: Any, settings: Settings, changes: dict[str, Any]) -> Settings:
    """
    Other settings, for a server that runs.

    :param known: as of :func:`check_options`.
    :raises ValueError: an option has a bad value; it is named.
    :raises TypeError: an option is unknown, cannot be changed, or its value is of the
        wrong kind.
    """
    for name, value in changes.items():
        if name in _INSTEAD:
            raise TypeError(f"{name}={value!r} cannot be changed: {_INSTEAD[name]}")
        if name not in known.__optional_keys__:
            raise TypeError(f"{name}={value!r} is no option of this server")
    return replace(settings, **_formed(changes))


#: What :func:`change_options` cannot change, and what to do instead.
_INSTEAD = {
    "drop_incoming_connections": "use set_drop_incoming_connections",
    "handler": "use set_handler",
    "observer": "use add_observer and remove_observer",
    **dict.fromkeys(
        ("engine", "socket", "reactor", "clock", "on_handler_error"),
        "create a new server",
    ),
}


def _formed(options: dict[str, Any]) -> dict[str, Any]:
    values = {k: v for k, v in options.items() if k in Settings.__slots__}
    for name, form in _FORMS.items():
        if name in values:
            values[name] = form(name, values[name])
    return values


def describe_settings(settings: Settings) -> dict[str, Any]:
    """As JSON has them (spec I4)."""
    return {f.name: _as_json(getattr(settings, f.name)) for f in fields(settings)}


def _as_json(value: Any) -> Any:
    if isinstance(value, Networks):
        return [str(network) for network in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, (Rate, Reply)):
        return str(value)
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return list(value) if isinstance(value, tuple) else value
