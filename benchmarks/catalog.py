"""
What is measured, and against whom.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import tcpsvc

#: The most idle connections; the limit of open files may allow fewer.
IDLE_CONNECTIONS = 5000


@dataclass(frozen=True, slots=True)
class Work:
    """
    One kind of work for a server.

    :ivar kind: the kind of server that does it.
    :ivar load: what load.c calls it.
    :ivar connections: how many at a time.
    :ivar size: of a message, in bytes.
    :ivar title: what an operation is, in words.
    :ivar unit: of the figure.
    """

    name: str
    kind: str
    load: str
    connections: int
    size: int
    title: str
    unit: str = "µs"

    @property
    def is_idle(self) -> bool:
        """Whether memory is measured, and not CPU time."""
        return self.load == "idle"


WORKS = {
    work.name: work
    for work in (
        Work(
            "protocol",
            "protocol",
            "exchange",
            50,
            64,
            "a Protocol echoes 64 bytes, 50 connections",
        ),
        Work(
            "lines",
            "lines",
            "exchange",
            50,
            64,
            "a handler reads a line of 64 bytes and writes it, 50 connections",
        ),
        Work(
            "chunks",
            "chunks",
            "exchange",
            50,
            64,
            "a handler reads whatever is there (64 bytes) and writes it, "
            "50 connections",
        ),
        Work(
            "oneshot",
            "oneshot",
            "oneshot",
            50,
            64,
            "connect, one line and its echo, the server closes; 50 at a time",
        ),
        Work(
            "churn",
            "chunks",
            "churn",
            50,
            64,
            "connect, 64 bytes and their echo, the client resets; 50 at a time",
        ),
        Work(
            "bulk",
            "chunks",
            "bulk",
            8,
            65536,
            "64 KiB are echoed, 8 connections with 256 KiB under way on each",
        ),
        Work(
            "idle",
            "chunks",
            "idle",
            IDLE_CONNECTIONS,
            64,
            "memory of a connection that has echoed once and now waits",
            "bytes",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Peer:
    """
    A library, and how its server is started.

    :ivar module: the file in ``benchmarks/servers``, without its ending.
    :ivar kinds: the kinds of server that there are.
    :ivar package: what has to be installed; ``None`` for what is compiled.
    :ivar arguments: what the module is given after the kind.
    :ivar is_ours: whether the report brings it out.
    """

    name: str
    module: str
    kinds: tuple[str, ...]
    package: str | None
    arguments: tuple[str, ...] = ()
    is_ours: bool = False

    @property
    def is_compiled(self) -> bool:
        """Whether it needs a C compiler, and no Python."""
        return self.package is None


def installed_version(package: str) -> str | None:
    """The version of what would be measured, or ``None`` if there is none."""
    if package == "tcpsvc":
        # The one beside this package is measured, installed or not.
        return tcpsvc.__version__
    if package in ("asyncio", "python"):
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_ALL = ("protocol", "lines", "chunks", "oneshot")
_STREAMS = ("lines", "chunks", "oneshot")
_BUFFERLESS = ("protocol", "chunks", "oneshot")

PEERS = {
    peer.name: peer
    for peer in (
        Peer("tcpsvc", "with_tcpsvc", _ALL, "tcpsvc", is_ours=True),
        Peer(
            "tcpsvc (reactor)",
            "with_tcpsvc",
            _ALL,
            "tcpsvc",
            ("reactor",),
            is_ours=True,
        ),
        Peer("Twisted", "with_twisted", _ALL, "twisted"),
        Peer("asyncio", "with_asyncio", _ALL, "asyncio"),
        Peer("uvloop", "with_asyncio", _ALL, "uvloop", ("uvloop",)),
        Peer("trio", "with_trio", ("chunks",), "trio"),
        Peer("gevent", "with_gevent", _STREAMS, "gevent"),
        # These have no buffers, and so read no lines. Their echo is a protocol's and
        # a handler's alike.
        Peer("Python (epoll)", "with_python", _BUFFERLESS, "python"),
        Peer("C (epoll)", "with_epoll", _BUFFERLESS, None),
    )
}
