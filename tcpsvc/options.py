"""
The options of a server: what each is for, its default, and what is wrong with a
wrong value (spec A2, W5). Everything is looked at before anything is opened.
"""

from __future__ import annotations

import math
import resource
import socket
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Literal, TypedDict

from tcpsvc.events import check_observer
from tcpsvc.handler import OnHandlerError, check_on_handler_error
from tcpsvc.networks import Networks
from tcpsvc.overflow import Overflow, Refusal, Reply, check_overflow, check_refusal
from tcpsvc.rate import Rate
from tcpsvc.reasons import LIMITS

#: The default of ``backlog``, as in Async.
BACKLOG = 64

#: What fits the kernel's int. It takes what exceeds its own limit as that limit.
MOST_BACKLOG = 2**31 - 1

#: The default of ``max_connections`` where there is no limit of open files.
MOST_CONNECTIONS = 10_000

#: What a network may be given as.
Network = str | IPv4Address | IPv4Network | IPv6Address | IPv6Network

#: What ``engine`` may be.
ENGINES = ("auto", "reactor")

#: What ``on_exhaustion`` may be.
EXHAUSTION_POLICIES = ("back-off", "shed")

#: What is called with the error of an accept, and the :class:`tcpsvc.Server`.
AcceptErrorCallable = Callable[[OSError, Any], object]

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


def positive(name: str, value: object, unit: str) -> float:
    """
    :returns: the value.
    :raises ValueError: ``value`` is not above 0, or is not finite.
    :raises TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is not a number of {unit}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} is not above 0 {unit}")
    return float(value)


def seconds(name: str, value: object) -> float:
    """As :func:`positive`, of seconds."""
    return positive(name, value, "seconds")


def check_prefixes(value: object) -> None:
    """
    :raises ValueError: it is no pair of prefix lengths for IPv4 and IPv6.
    """
    if not (
        isinstance(value, tuple)
        and [type(length) for length in value] == [int, int]
        and 1 <= value[0] <= 32
        and 1 <= value[1] <= 128
    ):
        raise ValueError(
            f"peer_prefixes={value!r} is not a pair of prefix lengths, of IPv4 (1 to "
            "32) and IPv6 (1 to 128)"
        )


def rate(name: str, value: object) -> Rate | None:
    """
    The rate that an option means.

    :raises ValueError: it is no rate.
    :raises TypeError: it is nothing like one.
    """
    if value is None or isinstance(value, Rate):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is neither a Rate nor its text")
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


#: Options that are given in more than one form, and what makes one of them.
_FORMS: dict[str, Callable[[str, Any], Any]] = {
    "accept_rate": rate,
    "accept_rate_per_peer": rate,
    "allow": lambda name, value: None if value is None else networks(name, value),
    "deny": lambda name, value: networks(name, () if value is None else value),
    "dry_run": limits,
}


class Options(TypedDict, total=False):
    """
    The keyword options of every ``create`` (the types are checked by mypy).

    ``max_connections``
        How many connections at a time, their handlers included; at least 1.
        Further clients wait in the kernel's backlog (A1). Default: what the soft
        limit of open files allows, at most 10 000 (A2).
    ``max_accepts_per_batch``
        How many clients are accepted in one turn of the reactor; at least 1,
        default 1.
    ``backlog``
        How many clients may wait in the kernel; at least 1, default 64. An
        endpoint has a backlog of its own, which stands.
    ``drop_incoming_connections``
        Close each client at once (D). Default false.
    ``socket``
        An unbound socket of yours, which is bound to ``where`` and used as it
        is. The server owns it, and closes it also when creation fails (W7).
    ``engine``
        ``"auto"`` (the default) serves connections by tcpsvc's own sub-reactor
        where it can: on Linux, with any reactor that can watch a descriptor.
        ``"reactor"`` serves them by the reactor itself, as Twisted does. What
        happens is the same; how fast is not.
    ``overflow``
        What becomes of a client that comes when ``max_connections`` are there:
        ``"hold"`` (the default: it waits in the kernel's backlog), ``"drop"``
        (closed with FIN), ``"reset"`` (with RST), :class:`Reply(bytes)
        <tcpsvc.Reply>` (told, then closed), ``"evict"`` (the connection that was
        idle for longest is closed and its handler cancelled; the client starts when
        that slot is free).
    ``refusal``
        What becomes of clients that the further limits keep out: ``"reset"`` (the
        default), ``"drop"``, or a :class:`Reply(bytes) <tcpsvc.Reply>`.
    ``max_connections_per_peer``
        How many live connections a peer may have. Default: no limit.
    ``accept_rate_per_peer``
        How often a peer may come: a :class:`tcpsvc.Rate`, or its text, such as
        ``"10/s:20"``. Default: no limit.
    ``peer_prefixes``
        What a peer is: how many bits of an IPv4 address, and of an IPv6 address.
        Default ``(32, 64)``. UNIX clients are never limited.
    ``accept_rate``
        How often clients are accepted at all; further ones wait in the kernel's
        backlog. Default: no limit.
    ``allow``, ``deny``
        Networks, such as ``["10.0.0.0/8", "::1"]``. Only clients out of ``allow``
        are let in, if it is given, and none out of ``deny``, which has the last
        word.
    ``dry_run``
        Limits, by the names of their options, or ``True`` for all, that let pass
        what they would refuse or end, and count and log it. Default ``()``.
    ``first_byte_timeout``
        Seconds, from its slot on, in which a client must have sent something; under
        TLS, something more than its handshake. Default: no limit.

        When this timeout or one of the next four is over, the connection is closed as
        by ``close(close_existing_connections=True)`` and its handler cancelled, once:
        an ordinary end, which is not reported. That is not before its time, and at
        most a quarter of it (and 0.05 s, or a second) later. A handler that has ended
        is left to ``flush_timeout``, one whose socket is closed to
        ``handler_timeout``. What a UNIX socket of ``create_sock`` moves nobody
        knows: for it there are only ``handler_timeout`` and ``lifetime``.
    ``idle_timeout``
        Seconds without a byte either way: received, or taken by this kernel or, of
        TCP, the client's. Default: no limit.
    ``handler_timeout``
        Seconds, from its slot on, that a handler may run. Default: no limit.
    ``lifetime``
        Seconds, from its slot on, that a connection may last. Default: no limit.
    ``min_throughput``
        Bytes a second that a connection must move, either way, on average of each
        ``throughput_window``, when it moves any or has some waiting to be sent: one
        that is silent is idle, not slow. What the client's kernel has acknowledged
        counts too. Default: no limit.
    ``throughput_window``
        Seconds. Default 30.
    ``on_exhaustion``
        What becomes of clients that come while the process has no descriptor for
        them: ``"back-off"`` (the default: they wait in the kernel's backlog), or
        ``"shed"`` (they are turned away, as ``refusal`` says but never with a reply,
        by means of a descriptor that the server keeps for this).
    ``on_accept_error``
        ``f(error, server)``, called whenever the kernel fails to give a client, for
        want of descriptors, say: at first, every 50 ms while it goes on, and whenever
        a descriptor of the server has been closed in vain. It may close connections;
        as soon as a descriptor is free accepting goes on. A coroutine or Deferred of
        its is followed, and it is not called again meanwhile. What it raises is
        logged.
    ``observer``
        Is told what happens: a :class:`tcpsvc.Observer`.
    ``keepalive``
        Set SO_KEEPALIVE on connections, so that a client that vanished does not
        hold its slot for ever. Default false.
    ``reactor``
        What serves. Default: the global reactor.
    ``clock``
        What times everything, an ``IReactorTime``. Default: the reactor.
    """

    max_connections: int | None
    max_accepts_per_batch: int
    backlog: int
    drop_incoming_connections: bool
    socket: socket.socket | None
    overflow: Overflow
    refusal: Refusal
    max_connections_per_peer: int | None
    accept_rate_per_peer: Rate | str | None
    peer_prefixes: tuple[int, int]
    accept_rate: Rate | str | None
    allow: Iterable[Network] | None
    deny: Iterable[Network]
    dry_run: bool | Collection[str]
    first_byte_timeout: float | None
    idle_timeout: float | None
    handler_timeout: float | None
    lifetime: float | None
    min_throughput: float | None
    throughput_window: float
    on_exhaustion: Literal["back-off", "shed"]
    on_accept_error: AcceptErrorCallable | None
    observer: Any
    keepalive: bool
    engine: Literal["auto", "reactor"]
    reactor: Any
    clock: Any


class StreamOptions(Options, total=False):
    """
    The further options of stream handlers (``create`` and ``create_inet``).

    ``buffer_age_limit``
        Seconds after which a client that does not take its bytes is closed
        (S6); ``None`` for never. Default 120.
    ``flush_timeout``
        Seconds after which a connection that is to close is aborted when its
        client takes no byte (H3). Default 30.
    ``reader_buffer_size``
        How many bytes may wait to be read, and the longest line (S2, S3).
        Default 131072.
    ``writer_buffer_size``
        How many bytes may wait to be sent before ``drain`` waits (S5). Default
        131072.
    ``eof_on_drain``
        While the server drains (:meth:`tcpsvc.Server.drain`), a read that waits with
        nothing buffered is at EOF, so that handlers that wait for a next message
        end. A handler may say otherwise: :meth:`tcpsvc.Reader.eof_when_draining`.
        Default false.
    """

    buffer_age_limit: float | None
    flush_timeout: float
    reader_buffer_size: int
    writer_buffer_size: int
    eof_on_drain: bool


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
    peer_prefixes: tuple[int, int] = (32, 64)
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
        check_overflow(self.overflow)
        check_refusal(self.refusal)
        check_prefixes(self.peer_prefixes)
        if self.on_exhaustion not in EXHAUSTION_POLICIES:
            raise ValueError(
                f"on_exhaustion={self.on_exhaustion!r} is not one of "
                + ", ".join(map(repr, EXHAUSTION_POLICIES))
            )
        if self.on_accept_error is not None and not callable(self.on_accept_error):
            raise TypeError(
                f"on_accept_error={self.on_accept_error!r} is no callable "
                "f(error, server)"
            )
        if self.engine not in ENGINES:
            raise ValueError(
                f"engine={self.engine!r} is not one of {', '.join(map(repr, ENGINES))}"
            )
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
        raise TypeError(f"unknown option {unknown[0]}={options[unknown[0]]!r}")
    if options.get("observer") is not None:
        check_observer(options["observer"])
    values = _formed(options)
    if values.get("max_connections") is None:
        values["max_connections"] = default_max_connections()
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
        if name not in known.__optional_keys__ or name not in Settings.__slots__:
            raise TypeError(f"{name}={value!r} is no option of this server")
        if name in ("engine", "drop_incoming_connections"):
            raise TypeError(f"{name} cannot be changed so{_INSTEAD.get(name, '')}")
    changed = _formed(changes)
    if "max_connections" in changed and changed["max_connections"] is None:
        changed["max_connections"] = default_max_connections()
    return replace(settings, **changed)


_INSTEAD = {"drop_incoming_connections": ": use set_drop_incoming_connections"}


def _formed(options: dict[str, Any]) -> dict[str, Any]:
    values = {k: v for k, v in options.items() if k in Settings.__slots__}
    for name, form in _FORMS.items():
        if name in values:
            values[name] = form(name, values[name])
    return values


def limits_text(settings: Settings) -> str:
    """The limits in a line, for a log: those that there are."""
    told = [f"max_connections={settings.max_connections}"]
    for name in (*LIMITS, "overflow"):
        value = getattr(settings, name)
        if name == "max_connections" or value is None or value == NO_NETWORKS:
            continue
        told.append(f"{name}={_limit_text(name, value)}")
    if settings.dry_run:
        told.append(f"dry run of {', '.join(sorted(settings.dry_run))}")
    return ", ".join(told)


def _limit_text(name: str, value: object) -> str:
    if isinstance(value, Networks):
        found = [str(network) for network in value]
        return " ".join(found) if len(found) <= 5 else f"{len(found)} networks"
    if isinstance(value, Reply):
        return f"a reply of {len(value.data)} bytes"
    if isinstance(value, float):
        unit = "bytes/s" if name == "min_throughput" else "s"
        return f"{value:g} {unit}"
    return str(value)
