"""
The options of a server: what each is for, its default, and what is wrong with a
wrong value (spec A2, W5). Everything is looked at before anything is opened.
"""

from __future__ import annotations

import resource
import socket
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from tcpsvc.handler import OnHandlerError, check_on_handler_error

#: The default of ``backlog``, as in Async.
BACKLOG = 64

#: What fits the kernel's int. It takes what exceeds its own limit as that limit.
MOST_BACKLOG = 2**31 - 1

#: The default of ``max_connections`` where there is no limit of open files.
MOST_CONNECTIONS = 10_000

#: What ``engine`` may be.
ENGINES = ("auto", "reactor")

#: Seconds (spec S6, H3).
BUFFER_AGE_LIMIT = 120.0
FLUSH_TIMEOUT = 30.0

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


def seconds(name: str, value: object) -> float:
    """
    :returns: the value.
    :raises ValueError: ``value`` is not above 0.
    :raises TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is not a number of seconds")
    if not value > 0:
        raise ValueError(f"{name}={value} is not above 0 seconds")
    return float(value)


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
    """

    buffer_age_limit: float | None
    flush_timeout: float
    reader_buffer_size: int
    writer_buffer_size: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked options, with their defaults."""

    on_handler_error: OnHandlerError
    max_connections: int
    max_accepts_per_batch: int = 1
    backlog: int = BACKLOG
    drop_incoming_connections: bool = False
    keepalive: bool = False
    engine: str = "auto"
    buffer_age_limit: float | None = BUFFER_AGE_LIMIT
    flush_timeout: float = FLUSH_TIMEOUT
    reader_buffer_size: int = READER_BUFFER_SIZE
    writer_buffer_size: int = WRITER_BUFFER_SIZE

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
        if self.buffer_age_limit is not None:
            seconds("buffer_age_limit", self.buffer_age_limit)
        seconds("flush_timeout", self.flush_timeout)
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
    values = {k: v for k, v in options.items() if k in Settings.__slots__}
    if values.get("max_connections") is None:
        values["max_connections"] = default_max_connections()
    return Settings(on_handler_error, **values)
