"""
What every test here stands on: a check that it left nothing behind, a way to
serve, and plain blocking clients in threads.

pytest-twisted sees no dirty reactor, no unhandled Deferred error and no logged
failure. The autouse fixture :func:`nothing_left_behind` does, and fails the test.
"""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import tcp
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen
from tcpsvc.engine import subreactor


def the_reactor() -> Any:
    """
    The reactor. It is not imported with this module, which pytest loads before
    pytest-twisted has installed the one asked for with ``--reactor``.
    """
    from twisted.internet import reactor

    return reactor


#: How long anything here may take before a test is given up, in seconds. Nothing
#: waits for this long but a failing test.
PATIENCE = 10.0

LOOPBACK = WhereToListen.bind_to(LOCALHOST, 0)


def turn(delay: float = 0) -> Deferred[None]:
    """One turn of the reactor."""
    return deferLater(the_reactor(), delay, lambda: None)


async def settle() -> None:
    """As many turns as anything that is due needs, and more."""
    for _ in range(20):
        await turn()


async def until(condition: Callable[[], Any], patience: float = PATIENCE) -> None:
    """Turn the reactor until a condition holds; fail when it never does."""
    deadline = the_reactor().seconds() + patience
    while not condition():
        assert the_reactor().seconds() < deadline, f"waited in vain for {condition}"
        # Not for luck: it only leaves the core to the client's thread.
        await turn(0.001)


class Fired:
    """Whether a Deferred has fired, and with what."""

    def __init__(self, deferred: Deferred[Any]) -> None:
        self.results: list[Any] = []
        deferred.addBoth(self.results.append)

    def __bool__(self) -> bool:
        return len(self.results) == 1 and not isinstance(self.results[0], Failure)


def in_thread(function: Callable[..., Any], *args: Any) -> Deferred[Any]:
    """Run something blocking in a thread."""
    return deferToThread(function, *args)


def is_bad(event: dict[str, Any]) -> bool:
    """Whether an event is a failure or a critical line, which no test may leave."""
    return bool(
        event.get("log_level") is LogLevel.critical
        or event.get("isError")
        or event.get("log_failure") is not None
    )


class Logs:
    """What was logged during a test, by anybody."""

    #: A test that logs more than that is a storm: the oldest harmless lines go.
    MOST = 5000

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if len(self.events) > 2 * self.MOST:
            old = [e for e in self.events[: -self.MOST] if is_bad(e)]
            self.events = old + self.events[-self.MOST :]

    def texts(self, level: LogLevel | None = None) -> list[str]:
        """The lines, of one level or of all."""
        return [
            formatEvent(e)
            for e in self.events
            if level is None or e.get("log_level") is level
        ]

    def take(self, *levels: LogLevel) -> list[dict[str, Any]]:
        """Remove the expected events of some levels, so that they do not fail
        the test, and return them."""
        taken = [e for e in self.events if e.get("log_level") in levels]
        self.events = [e for e in self.events if e.get("log_level") not in levels]
        return taken

    def unreadable(self) -> list[str]:
        """Lines of ours that show an address as Python does, not as people do."""
        return [
            text
            for e in self.events
            if (e.get("log_namespace") or "").startswith("tcpsvc")
            and "Address(" in (text := formatEvent(e))
        ]

    def bad(self) -> list[str]:
        """Logged failures and critical lines, which no test may leave."""
        return [
            formatEvent(e)
            + (
                "\n" + e["log_failure"].getTraceback()
                if e.get("log_failure") is not None
                else ""
            )
            for e in self.events
            if is_bad(e)
        ]


@pytest.fixture
def logs() -> Iterator[Logs]:
    """The test's log lines; ``logs.take(level)`` what is expected."""
    observer = Logs()
    globalLogPublisher.addObserver(observer)
    yield observer
    globalLogPublisher.removeObserver(observer)


def open_descriptors() -> dict[int, str]:
    """This process's descriptors, and what each is."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # The one that listed them.
    return found


def leftovers(
    descriptors: dict[int, str], calls: set[Any], selectables: set[Any]
) -> list[str]:
    """What is there now that was not there before."""
    reactor = the_reactor()
    left = [f"delayed call: {c}" for c in reactor.getDelayedCalls() if c not in calls]
    left += [
        f"in the reactor: {s}"
        for s in {*reactor.getReaders(), *reactor.getWriters()} - selectables
    ]
    left += [
        f"descriptor {fd}: {what}"
        for fd, what in open_descriptors().items()
        if descriptors.get(fd) != what
    ]
    return left


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays() -> None:
    """Each test collects its garbage: what was there before need not be looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind(logs: Logs) -> Iterator[None]:
    """
    After each test: no reader, writer or delayed call in the reactor, no
    descriptor, no unhandled Deferred error, no logged failure, that was not
    there before or taken by the test.
    """
    # The first turn opens what the reactor keeps for ever, and Twisted's first
    # port a descriptor that it reserves for the process.
    pytest_twisted.blockon(turn())
    tcp._reservedFD.reserve()
    # What the engine has learnt of other tests' clients is none of this one's.
    subreactor._sub_reactors.clear()
    reactor = the_reactor()
    before = (
        open_descriptors(),
        set(reactor.getDelayedCalls()),
        {*reactor.getReaders(), *reactor.getWriters()},
    )
    yield
    # A close of the test's last line takes a few turns to be through.
    for _ in range(200):
        if not leftovers(*before):
            break
        pytest_twisted.blockon(turn(0.005))
    left = leftovers(*before)
    gc.collect()
    problems = left + logs.bad() + logs.unreadable()
    assert not problems, "left behind:\n" + "\n".join(problems)


@pytest.fixture
def clock() -> Clock:
    """What times the servers of the test, if it gives it to them."""
    return Clock()


@pytest.fixture
def serve() -> Iterator[Callable[..., Awaitable[Server[Any, Any]]]]:
    """
    ``await serve(handler, **options)``: a server on a free port of the loopback
    address (or ``where=``), closed with its connections after the test.
    ``create=`` is another creator than ``Server.create``.
    """
    made: list[Server[Any, Any]] = []

    async def serve(
        handler: Any,
        *,
        where: Any = LOOPBACK,
        create: Any = Server.create,
        on_handler_error: Any = "ignore",
        **options: Any,
    ) -> Server[Any, Any]:
        server: Server[Any, Any] = await create(
            where, handler, on_handler_error=on_handler_error, **options
        )
        made.append(server)
        return server

    yield serve
    for server in made:
        server.invariant()
        pytest_twisted.blockon(server.close(close_existing_connections=True))
        for connection in server._factory.connections:
            connection.cancel_handler()
        server.invariant()


class Client:
    """
    A plain blocking client. Its blocking methods are for threads
    (``await in_thread(client.read_all)``); connecting to loopback and sending a
    little block nobody.
    """

    def __init__(self, server: Server[Any, Any] | Any) -> None:
        address = getattr(server, "listening_on_address", server)
        if isinstance(address, tcpsvc.where.UNIXAddress):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(PATIENCE)
            self.socket.connect(address.name)
        else:
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
            self.socket = socket.create_connection((host, address.port), PATIENCE)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, n: int) -> bytes:
        """Exactly n bytes, fewer at EOF."""
        got = bytearray()
        while len(got) < n:
            data = self.socket.recv(n - len(got))
            if not data:
                break
            got += data
        return bytes(got)

    def read_all(self) -> bytes:
        """Everything up to EOF. A reset is an error."""
        got = bytearray()
        while data := self.socket.recv(65536):
            got += data
        return bytes(got)

    def shut(self) -> None:
        """FIN: no more from us."""
        self.socket.shutdown(socket.SHUT_WR)

    def finish(self) -> bytes:
        """FIN, and everything up to EOF."""
        self.shut()
        return self.read_all()

    def reset(self) -> None:
        """RST."""
        self.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.socket.close()

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """``connect(server)``: a client, closed after the test."""
    made: list[Client] = []

    def connect(server: Any) -> Client:
        client = Client(server)
        made.append(client)
        return client

    yield connect
    for client in made:
        client.close()
