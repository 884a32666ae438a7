"""
Accepts that fail: backing off, shedding, and ``on_accept_error`` (issue 4, section 11;
spec A6). That nobody is lost, and that a process does not spin, is in test_accepting.py
too.

Here the descriptors of this very process run out: :class:`Hoard` has all that are left.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel

import tcpsvc.exhaustion
from tcpsvc import LOCALHOST, Server, ServerFactory, WhereToListen, tap
from tcpsvc.creation import bind
from tcpsvc.events import Observer
from tcpsvc.exhaustion import EXHAUSTION_PAUSE, SHED_PAUSE, Exhaustion
from tcpsvc.kernel import is_readable
from tcpsvc.overflow import Reply
from tests.daemons import processes_in, twistd, wait_for_end
from tests.support import LOOPBACK, in_thread, open_descriptors, settle, until
from tests.test_accepting import Handlers, handlers, watched

__all__ = ["handlers", "watched"]

#: A rest of a Clock, with what its additions may lose.
PAUSE = 0.05 + 1e-9


class Hoard:
    """Every descriptor that this process has left; none until :meth:`fill`."""

    def __init__(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._held: list[int] = []

    def fill(self) -> None:
        """Take what there is, with a limit that is near."""
        if not self._held:
            spare = max(open_descriptors()) + 10
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare, self._limits[1]))
        with contextlib.suppress(OSError):
            while True:
                self._held.append(os.open("/dev/zero", os.O_RDONLY))

    def free(self, number: int = 1) -> None:
        """Let others have some."""
        for _ in range(number):
            os.close(self._held.pop())

    def end(self) -> None:
        """Let go of all."""
        self.free(len(self._held))
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


@pytest.fixture
def hoard() -> Iterator[Hoard]:
    """The test's descriptors."""
    made = Hoard()
    yield made
    made.end()


def exhausting(test: Callable[..., Any]) -> Any:
    """A test with a hoard, which ends before pytest needs descriptors to report it."""

    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        try:
            await test(*args, **kwargs)
        finally:
            for given in (*args, *kwargs.values()):
                if isinstance(given, Hoard):
                    given.end()

    return ensureDeferred(run)


@pytest.fixture
def lines(logs: Any) -> Callable[[], list[str]]:
    """``lines()``: what was said of accepts that fail."""
    return lambda: [t for t in logs.texts() if "cannot accept" in t]


def was_reset(client: Any) -> bool:
    """Whether the client hears a reset, and nothing else."""
    try:
        client.read_all()
    except ConnectionResetError:
        return True
    return False


def heard(clients: list[Any]) -> int:
    """How many clients have heard something by now."""
    return sum(is_readable(client.socket) for client in clients)


def accept_errors(server: Any) -> int:
    """How many accepts have failed."""
    found: int = server._factory.counters.accept_errors
    return found


def reserves() -> list[int]:
    """The descriptors that are in reserve."""
    return [
        fd
        for fd, what in open_descriptors().items()
        if what == os.devnull and fd > 2 and fd not in _OTHERS
    ]


_OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def others(nothing_left_behind: None) -> None:
    """Descriptors of this kind that pytest and Twisted have."""
    _OTHERS.clear()
    _OTHERS.update(reserves())


class Watching(Observer):
    """Counts to a number of failed accepts, and calls what it is to."""

    def __init__(self) -> None:
        self.failures = 0
        self.reached: dict[int, Deferred[None]] = {}
        self.on_refused: Callable[[], object] = lambda: None
        self.on_failed: Callable[[], object] = lambda: None

    def accept_failed(self, error: OSError) -> None:
        self.failures += 1
        self.on_failed()
        if self.failures in self.reached:
            self.reached[self.failures].callback(None)

    def connection_refused(self, address: Any, reason: Any) -> None:
        self.on_refused()

    def after(self, number: int) -> Deferred[None]:
        """Fires at so many failures from now on."""
        return self.reached.setdefault(self.failures + number, Deferred())


# Backing off


@exhausting
async def test_backing_off_clients_wait_and_are_tried_again_every_50_ms(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, lines: Any
) -> None:
    """A6: by default; the connections that are there go on."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    first = connect(server)
    await until(lambda: handlers.running == 1)
    waiting = [connect(server) for _ in range(3)]
    hoard.fill()
    for tries in range(1, 6):
        await until(lambda n=tries: accept_errors(server) == n)
        await settle()
        assert accept_errors(server) == tries, "it spins"
        [call] = clock.getDelayedCalls()
        assert call.getTime() - clock.seconds() == pytest.approx(EXHAUSTION_PAUSE)
        assert heard(waiting) == 0
        clock.advance(PAUSE)
    first.send(b"1\n")
    await until(lambda: handlers.lines == [b"1\n"])
    hoard.free(3)
    clock.advance(PAUSE)
    await until(lambda: handlers.running == 4)
    assert server.describe()["counters"]["refusals"] == {}
    assert len(lines()) == 1
    assert "1 connections go on, further clients wait" in lines()[0]
    for client in (first, *waiting):
        client.shut()
    handlers.end_all()
    await until(lambda: server.num_connections == 0)


@exhausting
async def test_accepting_goes_on_soon_after_descriptors_are_free(
    serve: Any,
    connect: Any,
    handlers: Handlers,
    hoard: Hoard,
    logs: Any,
    record_property: Any,
) -> None:
    """A6: descriptors of others, of which nobody tells the server. The real time."""
    watching = Watching()
    server = await serve(handlers, observer=watching)
    took = []
    for number in range(1, 4):
        client = connect(server)
        hoard.fill()
        await watching.after(2)
        began = time.monotonic()
        hoard.free()
        await until(lambda n=number: handlers.running == n)
        took.append(time.monotonic() - began)
        hoard.end()
        client.shut()
    record_property("seconds until a client is served", took)
    assert max(took) < 1.0
    handlers.end_all()


@exhausting
@pytest.mark.parametrize("policy", ["back-off", "shed"])
async def test_an_episode_costs_no_measurable_cpu(
    policy: Any, serve: Any, connect: Any, hoard: Hoard, logs: Any, record_property: Any
) -> None:
    """A6: a second of tries in vain, with a client that waits. To shed, none can: it
    backs off then."""
    watching = Watching()
    server = await serve(lambda *_: None, observer=watching, on_exhaustion=policy)
    if policy == "shed":
        server._factory.exhaustion._reserve.give_up()
    client = connect(server)
    hoard.fill()
    await watching.after(1)
    used, began = resource.getrusage(resource.RUSAGE_THREAD), time.monotonic()
    await watching.after(20)
    took = time.monotonic() - began
    now = resource.getrusage(resource.RUSAGE_THREAD)
    cpu = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
    record_property(f"share of a core, {policy}", cpu / took)
    assert took > 0.9
    assert cpu < 0.05 * took
    hoard.end()
    assert await in_thread(client.read_all) == b""


@exhausting
async def test_at_the_limit_there_is_one_line_while_clients_wait(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, lines: Any
) -> None:
    """A6: that one gets in and the next does not is the same episode."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    clients = [connect(server) for _ in range(12)]
    hoard.fill()
    await until(lambda: accept_errors(server) == 1)
    hoard.free()
    clock.advance(PAUSE)
    for number, client in enumerate(clients):
        await until(lambda n=number: len(handlers.addresses) == n + 1)
        await settle()
        client.shut()
        handlers.end_oldest()
    await until(lambda: server.num_connections == 0)
    assert accept_errors(server) > 5
    assert len(lines()) == 1


@ensureDeferred
async def test_many_short_episodes_are_not_a_line_each(
    serve: Any, connect: Any, watched: Any, handlers: Handlers, lines: Any
) -> None:
    """A6: five at once, and one a minute."""
    clock = Clock()
    server = await serve(handlers, clock=clock)
    for number in range(1, 11):
        watched.errors[:] = [errno.EMFILE]
        client = connect(server)
        await until(clock.getDelayedCalls)
        if number == 10:
            clock.advance(60)
            break
        clock.advance(PAUSE)
        await until(lambda n=number: handlers.running == n)
        client.shut()
        assert len(lines()) == min(number, 5)
    await until(lambda: handlers.running == 10)
    watched.errors[:] = [errno.EMFILE]
    client = connect(server)
    await until(lambda: len(lines()) == 6)
    handlers.end_all()


# Shedding


@exhausting
@pytest.mark.parametrize("refusal", ["reset", "drop", Reply(b"sorry\n")])
async def test_shedding_tells_all_who_wait_at_once(
    refusal: Any,
    serve: Any,
    connect: Any,
    handlers: Handlers,
    hoard: Hoard,
    lines: Any,
    record_property: Any,
    logs: Any,
) -> None:
    """A6: without the clock, in one turn, in the way of ``refusal``; for a reply
    there is no descriptor. It is counted, and said once."""
    server = await serve(
        handlers, clock=Clock(), on_exhaustion="shed", refusal=refusal, backlog=128
    )
    first = connect(server)
    await until(lambda: handlers.running == 1)
    clients = [connect(server) for _ in range(100)]
    hoard.fill()
    began = time.monotonic()
    await until(lambda: heard(clients) == 100)
    record_property("seconds until 100 have heard", time.monotonic() - began)
    assert accept_errors(server) == 1
    for client in clients:
        assert was_reset(client) is (refusal != "drop")
    assert server._factory.counters.refusals == {"shed": 100}
    assert handlers.running == 1
    # Those that are there go on.
    first.send(b"1\n")
    await until(lambda: handlers.lines == [b"1\n"])
    assert len(lines()) == 1
    assert "further clients are turned away" in lines()[0]
    hoard.end()
    assert not [t for t in logs.texts() if "refusing" in t]
    handlers.end_all()
    assert await in_thread(first.read_all) == b"done 1\n"


@exhausting
async def test_shedding_on_a_unix_socket(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, tmp_path: Path
) -> None:
    """A6: there a reset is an EOF."""
    server = await serve(
        handlers, where=WhereToListen.of_file(tmp_path / "s"), on_exhaustion="shed"
    )
    client = connect(server)
    hoard.fill()
    assert await in_thread(client.read_all) == b""
    assert server._factory.counters.refusals == {"shed": 1}


@exhausting
async def test_a_server_that_drops_goes_on_dropping(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """A6, D1: for want of a descriptor too, and with FIN."""
    server = await serve(handlers, on_exhaustion="shed", drop_incoming_connections=True)
    client = connect(server)
    hoard.fill()
    assert await in_thread(client.read_all) == b""
    assert server._factory.counters.refusals == {"dropped": 1}


@exhausting
async def test_who_comes_after_the_shedding_hears_after_the_pause(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, monkeypatch: Any
) -> None:
    """A6: 50 ms, and there is no timer when nobody comes."""
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed")
    client = connect(server)
    late = connect(server)
    late.reset()
    hoard.fill()
    await until(lambda: heard([client]) == 1)
    hoard.free()
    late = connect(server)
    hoard.fill()
    await settle()
    assert heard([late]) == 0
    assert accept_errors(server) == 1
    [call] = clock.getDelayedCalls()
    assert call.getTime() - clock.seconds() == EXHAUSTION_PAUSE
    clock.advance(PAUSE)
    await until(lambda: heard([late]) == 1)
    assert accept_errors(server) == 2
    clock.advance(PAUSE)
    await settle()
    assert clock.getDelayedCalls() == []
    assert accept_errors(server) == 2


@exhausting
async def test_shedding_is_in_batches_with_a_rest_between_them(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, monkeypatch: Any
) -> None:
    """A6: what a turn takes is bounded, and clients that come again at once do not
    keep the process busy."""
    monkeypatch.setattr(tcpsvc.exhaustion, "SHED_BATCH", 10)
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed")
    clients = [connect(server) for _ in range(25)]
    hoard.fill()
    for told in (10, 20, 25):
        await until(lambda n=told: heard(clients) >= n)
        await settle()
        assert heard(clients) == told
        [call] = clock.getDelayedCalls()
        rest = SHED_PAUSE if told < 25 else EXHAUSTION_PAUSE
        assert call.getTime() - clock.seconds() == pytest.approx(rest)
        clock.advance(SHED_PAUSE)


@exhausting
async def test_a_shedding_server_serves_again_when_a_descriptor_is_free(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """A6: one of its own without the clock, and one of others after the pause."""
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed")
    first, second, third = (connect(server) for _ in range(3))
    hoard.fill()
    hoard.free(2)
    await until(lambda: heard([third]) == 1)
    assert handlers.running == 2
    # A client closes its own descriptor, too, which the fourth needs.
    first.reset()
    fourth = connect(server)
    await until(lambda: handlers.running == 3)
    assert clock.getDelayedCalls() == []
    assert heard([second, fourth]) == 0
    second.shut()
    fourth.shut()
    handlers.end_all()


@ensureDeferred
@pytest.mark.parametrize("number", [errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_it_backs_off_where_the_reserve_does_not_help(
    number: int, serve: Any, connect: Any, watched: Any, handlers: Handlers
) -> None:
    """A6: the host is short of something. Nobody is lost."""
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed")
    watched.errors[:] = [number] * 2
    client = connect(server)
    await until(clock.getDelayedCalls)
    await settle()
    assert len(watched.calls) == 2
    [call] = clock.getDelayedCalls()
    assert call.getTime() == EXHAUSTION_PAUSE
    clock.advance(PAUSE)
    await until(lambda: handlers.running == 1)
    assert server._factory.counters.refusals == {}
    client.shut()
    handlers.end_all()


@ensureDeferred
async def test_a_lost_client_is_not_the_end_of_a_batch(
    serve: Any, connect: Any, watched: Any, handlers: Handlers
) -> None:
    """A6: ECONNABORTED and its kin, for ever too."""
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed")
    watched.errors[:] = [errno.EMFILE, errno.ECONNABORTED, errno.EPERM]
    client = connect(server)
    assert await in_thread(was_reset, client)
    clock.advance(PAUSE)
    watched.errors[:] = [errno.EMFILE] + [errno.EPERM] * 10_000
    connect(server)
    await until(lambda: len(watched.errors) < 10_000)
    await settle()
    assert len(watched.errors) > 9_000
    watched.errors.clear()


@ensureDeferred
async def test_an_unknown_error_sheds_nobody(
    serve: Any, connect: Any, watched: Any, handlers: Handlers, logs: Any
) -> None:
    """A6: it is no exhaustion."""
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed")
    watched.errors[:] = [errno.EIO]
    client = connect(server)
    await until(clock.getDelayedCalls)
    clock.advance(PAUSE)
    await until(lambda: handlers.running == 1)
    assert len(logs.take(LogLevel.critical)) == 1
    client.shut()
    handlers.end_all()


@exhausting
async def test_without_a_reserve_it_backs_off_until_it_has_one(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, monkeypatch: Any
) -> None:
    """A6: somebody took it. The first that is free is for the reserve: else waiting
    clients would take each, and the others were never told."""
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed")
    clients = [connect(server) for _ in range(3)]
    reserve = server._factory.exhaustion._reserve
    reserve.give_up()
    hoard.fill()
    for tries in range(1, 4):
        await until(lambda n=tries: accept_errors(server) == n)
        await settle()
        assert heard(clients) == 0
        clock.advance(PAUSE)
    await until(lambda: accept_errors(server) == 4)
    hoard.free()
    clock.advance(PAUSE)
    await until(lambda: heard(clients) == 3)
    assert handlers.running == 0
    assert reserve.is_held
    # It is had again, too, when a connection of the server closes.
    hoard.free()
    clock.advance(PAUSE)
    client = connect(server)
    hoard.free(2)
    await until(lambda: handlers.running == 1)
    reserve.give_up()
    hoard.fill()
    assert not reserve.is_held
    client.reset()
    await until(lambda: reserve.is_held)
    handlers.end_all()


@exhausting
async def test_a_thief_of_the_reserve(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """A6: another thread takes the descriptor while it is given up."""
    watching = Watching()
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed", observer=watching)
    reserve = server._factory.exhaustion._reserve
    clients = [connect(server) for _ in range(5)]
    hoard.fill()
    give_up = reserve.give_up

    def steal() -> None:
        give_up()
        hoard.fill()

    reserve.give_up = steal
    await until(lambda: watching.failures == 1)
    await settle()
    assert heard(clients) == 0
    reserve.give_up = give_up
    assert not reserve.is_held
    hoard.free()
    clock.advance(PAUSE)
    await until(lambda: heard(clients) == 5)


@ensureDeferred
async def test_the_reserve_is_one_descriptor_while_it_may_be_needed(
    serve: Any, handlers: Handlers
) -> None:
    """A6: none by default; it follows the option, stops and starts of the gate, and
    the end. Children do not inherit it."""
    plain = await serve(handlers)
    assert reserves() == []
    server = await serve(handlers, on_exhaustion="shed")
    [descriptor] = reserves()
    assert not os.get_inheritable(descriptor)
    server._listeners.ports[0]._gate.close()
    assert reserves() == []
    server._listeners.ports[0]._gate.open()
    assert len(reserves()) == 1
    server._factory.change({"on_exhaustion": "back-off"})
    assert reserves() == []
    server._factory.change({"on_exhaustion": "shed"})
    server._factory.change({"on_exhaustion": "shed"})
    assert len(reserves()) == 1
    await server.close()
    assert reserves() == []
    server._factory.change({"on_exhaustion": "shed"})
    assert reserves() == []
    await plain.close()


@ensureDeferred
async def test_a_creation_that_fails_leaves_no_reserve(
    serve: Any, handlers: Handlers
) -> None:
    """A6, W8: the port is taken; and one that was bound and never begun."""
    server = await serve(handlers, on_exhaustion="shed")
    taken = WhereToListen.bind_to(LOCALHOST, server.listening_on)
    with pytest.raises(CannotListenError):
        await Server.create(
            taken, handlers, on_handler_error="ignore", on_exhaustion="shed"
        )
    assert len(reserves()) == 1
    bound = await bind(
        Server,
        LOOPBACK,
        lambda **options: ServerFactory.of_streams(
            handlers, on_handler_error="ignore", **options
        ),
        {"on_exhaustion": "shed"},
    )
    assert len(reserves()) == 1, "a daemon has still to fork"
    bound.abandon()


@exhausting
@pytest.mark.parametrize("when", ["on_failed", "on_refused"])
@pytest.mark.parametrize("policy", ["back-off", "shed"])
async def test_a_server_may_be_closed_by_who_is_told(
    policy: Any, when: str, serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """A6, X5: neither a timer nor a descriptor is left."""
    watching = Watching()
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion=policy, observer=watching)
    setattr(watching, when, server.close)
    calls: list[OSError] = []
    if when == "on_failed":
        server._factory.change({"on_accept_error": lambda e, _: calls.append(e)})
    clients = [connect(server) for _ in range(3)]
    hoard.fill()
    await until(lambda: watching.failures == 1)
    await settle()
    if (policy, when) == ("back-off", "on_refused"):
        await server.close()
    await server.close_finished()
    assert calls == []
    assert clock.getDelayedCalls() == []
    assert reserves() == []
    assert heard(clients) == 3
    refused = (policy, when) == ("shed", "on_refused")
    assert server._factory.counters.refusals == ({"shed": 1} if refused else {})


@pytest.mark.parametrize("when", ["hook", "on_failed", "on_refused"])
@exhausting
async def test_who_waits_for_the_end_of_a_pause_is_not_shed(
    when: str, serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """Z1: whoever is told of the shortage may pause the server."""
    watching = Watching()
    server = await serve(handlers, on_exhaustion="shed", observer=watching)

    def pause(*_: Any) -> None:
        server.pause("hold")

    if when == "hook":
        server.change(on_accept_error=pause)
    else:
        setattr(watching, when, pause)
    clients = [connect(server) for _ in range(3)]
    hoard.fill()
    await until(lambda: server.is_paused)
    await settle()
    shed = 1 if when == "on_refused" else 0
    assert heard(clients) == shed
    hoard.end()
    await server.resume()
    await until(lambda: handlers.running == 3 - shed)


@exhausting
async def test_who_is_told_of_the_shedding_may_free_a_descriptor(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """A6: then nobody else is shed for now."""
    watching = Watching()
    clock = Clock()
    server = await serve(handlers, clock=clock, on_exhaustion="shed", observer=watching)
    connect(server)
    await until(lambda: handlers.running == 1)
    watching.on_refused = server._factory.close_connections
    clients = [connect(server) for _ in range(2)]
    hoard.fill()
    await until(lambda: len(handlers.addresses) == 2)
    assert server._factory.counters.refusals == {"shed": 1}
    assert heard(clients) == 1
    clients[1].shut()
    handlers.end_all()


class FakePort:
    """A port with clients that only can be turned away."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting

    @property
    def is_awaited(self) -> bool:
        return self.waiting > 0

    def turn_away(self) -> None:
        if not self.waiting:
            raise BlockingIOError(errno.EAGAIN, "")
        self.waiting -= 1


def test_the_ports_of_a_server_share_an_episode_and_a_reserve(lines: Any) -> None:
    """A6: each is shed at, and nothing is left after the last."""
    clock = Clock()
    factory = ServerFactory.of_streams(
        lambda *_: None, on_handler_error="ignore", clock=clock, on_exhaustion="shed"
    )
    shared: Any = Exhaustion(factory, lambda: None)
    ports = [FakePort(3), FakePort(1000), FakePort(0)]
    for port in ports:
        shared.enter(port)
    assert len(reserves()) == 1
    error = OSError(errno.EMFILE, "Too many open files")
    shared.failed(error)
    assert [p.waiting for p in ports] == [0, 1000 - 128, 0]
    shared.failed(error)
    [call] = clock.getDelayedCalls()
    assert call.getTime() == SHED_PAUSE
    shared.accepted()
    assert shared.episode is not None, "clients wait"
    ports[1].waiting = 0
    shared.accepted()
    assert shared.episode is None
    shared.leave(ports[0])
    shared.leave(ports[0])
    shared.leave(ports[1])
    assert len(reserves()) == 1
    assert shared.pause is not None
    shared.leave(ports[2])
    assert reserves() == []
    assert clock.getDelayedCalls() == []
    assert len(lines()) == 1


# The hook


@exhausting
@pytest.mark.parametrize("policy", ["back-off", "shed"])
@pytest.mark.parametrize("kind", ["streams", "protocol", "sock"])
async def test_a_hook_that_closes_a_connection_makes_room_at_once(
    kind: str, policy: Any, serve: Any, connect: Any, hoard: Hoard, lines: Any
) -> None:
    """A6: without the clock, also where the socket is closed in the next turn; and
    then nobody is shed."""
    told: list[Any] = []
    started: list[Any] = []

    def close_oldest(error: OSError, server: Any) -> None:
        told.append((error.errno, server))
        server._factory.connections[0].close()

    async def handler(*args: Any) -> None:
        started.append(args)
        await Deferred()

    class Keeps(Protocol):
        def connectionMade(self) -> None:
            started.append(self)

    creates = {
        "streams": (Server.create, handler),
        "protocol": (Server.create_protocol, Factory.forProtocol(Keeps)),
        "sock": (Server.create_sock, handler),
    }
    create, served = creates[kind]
    clock = Clock()
    server = await serve(
        served,
        create=create,
        clock=clock,
        on_exhaustion=policy,
        on_accept_error=close_oldest,
    )
    first = connect(server)
    await until(lambda: len(started) == 1)
    second = connect(server)
    hoard.fill()
    await until(lambda: len(started) == 2)
    assert clock.seconds() == 0
    assert told == [(errno.EMFILE, server)]
    assert await in_thread(first.read_all) == b""
    assert heard([second]) == 0
    assert server._factory.counters.refusals == {}
    assert len(lines()) == 1


@exhausting
async def test_a_hook_that_frees_nothing_is_called_at_each_try(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """A6: every 50 ms; and clients are shed all the same."""
    calls: list[OSError] = []
    clock = Clock()
    server = await serve(
        handlers,
        clock=clock,
        on_accept_error=lambda error, _: calls.append(error),
    )
    client = connect(server)
    hoard.fill()
    for tries in range(1, 5):
        await until(lambda n=tries: len(calls) == n)
        await settle()
        assert len(calls) == tries
        clock.advance(PAUSE)
    await until(lambda: len(calls) == 5)
    server._factory.change({"on_exhaustion": "shed"})
    hoard.free()
    clock.advance(PAUSE)
    await until(lambda: len(calls) == 6)
    assert heard([client]) == 0
    clock.advance(0)
    await until(lambda: heard([client]) == 1)
    # The option counts from the next failure on.
    server._factory.change({"on_accept_error": None})
    clock.advance(PAUSE)
    hoard.free()
    client = connect(server)
    hoard.fill()
    assert await in_thread(was_reset, client)
    assert len(calls) == 6


@exhausting
@pytest.mark.parametrize("kind", ["function", "coroutine", "deferred"])
async def test_a_hook_that_fails_is_logged_and_changes_nothing(
    kind: str, serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, logs: Any
) -> None:
    """A6: once an episode."""
    calls: list[int] = []

    def function(error: OSError, server: Any) -> Any:
        calls.append(1)
        raise ValueError("oh dear")

    async def coroutine(error: OSError, server: Any) -> None:
        function(error, server)

    def deferred(error: OSError, server: Any) -> Deferred[None]:
        return Deferred.fromCoroutine(coroutine(error, server))

    clock = Clock()
    server = await serve(handlers, clock=clock, on_accept_error=locals()[kind])
    client = connect(server)
    hoard.fill()
    for tries in range(1, 4):
        await until(lambda n=tries: len(calls) == n)
        clock.advance(PAUSE)
    await until(lambda: len(calls) == 4)
    hoard.free()
    clock.advance(PAUSE)
    await until(lambda: handlers.running == 1)
    [line] = logs.take(LogLevel.critical)
    assert line["log_failure"].getErrorMessage() == "oh dear"
    assert not server.is_closed
    client.shut()
    hoard.end()
    handlers.end_all()


@exhausting
async def test_a_hook_that_takes_its_time_is_not_called_again_meanwhile(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, logs: Any
) -> None:
    """A6: and its failure is logged whenever it comes."""
    calls: list[Deferred[None]] = []

    async def hook(error: OSError, server: Any) -> None:
        calls.append(Deferred())
        await calls[-1]

    clock = Clock()
    server = await serve(handlers, clock=clock, on_accept_error=hook)
    client = connect(server)
    hoard.fill()
    for tries in range(1, 4):
        await until(lambda n=tries: accept_errors(server) == n)
        clock.advance(PAUSE)
    assert len(calls) == 1
    calls[0].callback(None)
    await until(lambda: accept_errors(server) == 4)
    clock.advance(PAUSE)
    await until(lambda: len(calls) == 2)
    hoard.free()
    clock.advance(PAUSE)
    await until(lambda: handlers.running == 1)
    calls[1].errback(ValueError("too late"))
    assert len(logs.take(LogLevel.critical)) == 1
    client.shut()
    hoard.end()
    handlers.end_all()


@exhausting
@pytest.mark.parametrize("policy", ["back-off", "shed"])
async def test_a_hook_may_close_the_server(
    policy: Any, serve: Any, connect: Any, handlers: Handlers, hoard: Hoard
) -> None:
    """A6, X5: no timer, no descriptor, no further call."""
    calls: list[int] = []

    async def hook(error: OSError, server: Any) -> None:
        calls.append(1)
        await server.close(close_existing_connections=True)

    clock = Clock()
    server = await serve(
        handlers, clock=clock, on_exhaustion=policy, on_accept_error=hook
    )
    client = connect(server)
    hoard.fill()
    assert await in_thread(was_reset, client)
    await server.close_finished_and_handlers_determined()
    assert calls == [1]
    assert clock.getDelayedCalls() == []
    assert reserves() == []


@exhausting
async def test_a_hook_may_stop_the_process(
    serve: Any, connect: Any, handlers: Handlers, hoard: Hoard, monkeypatch: Any,
    logs: Any,
) -> None:  # fmt: skip
    """H7 for the hook: SystemExit is no failure to go on after."""

    def hook(error: OSError, server: Any) -> None:
        raise SystemExit(3)

    stopped: list[BaseException] = []
    server = await serve(handlers, clock=Clock(), on_accept_error=hook)
    monkeypatch.setattr(server._factory, "stop_reactor", stopped.append)
    connect(server)
    hoard.fill()
    await until(lambda: stopped)
    assert stopped[0].args == (3,)
    logs.take(LogLevel.critical)


# The options


@pytest.mark.parametrize("bad", ["backoff", "", None, True, ["shed"]])
def test_a_bad_policy_is_named(bad: Any) -> None:
    """W5: before anything is opened, and live."""
    with pytest.raises(ValueError, match=r"on_exhaustion=.*'back-off', 'shed'"):
        ServerFactory.of_streams(
            lambda *_: None, on_handler_error="ignore", on_exhaustion=bad
        )
    factory = ServerFactory.of_streams(lambda *_: None, on_handler_error="ignore")
    with pytest.raises(ValueError, match="on_exhaustion="):
        factory.change({"on_exhaustion": bad})
    assert factory.settings.on_exhaustion == "back-off"


@pytest.mark.parametrize("bad", ["shed", 3, True])
def test_a_hook_that_cannot_be_called_is_named(bad: Any) -> None:
    """W5: as above."""
    with pytest.raises(TypeError, match="on_accept_error="):
        ServerFactory.of_socks(
            lambda *_: None, on_handler_error="ignore", on_accept_error=bad
        )
    factory = ServerFactory.of_streams(lambda *_: None, on_handler_error="ignore")
    with pytest.raises(TypeError, match="on_accept_error="):
        factory.change({"on_accept_error": bad})


def free_something(error: OSError, server: Any) -> None:
    """A hook with a name."""


def test_describe_shows_both_options() -> None:
    """I4: as JSON has it."""
    factory = ServerFactory.of_streams(lambda *_: None, on_handler_error="ignore")
    options = json.loads(json.dumps(factory.describe()["options"]))
    assert options["on_exhaustion"] == "back-off"
    assert options["on_accept_error"] is None
    factory.change({"on_exhaustion": "shed", "on_accept_error": free_something})
    options = json.loads(json.dumps(factory.describe()["options"]))
    assert options["on_exhaustion"] == "shed"
    assert options["on_accept_error"] == "free_something"


def test_twistd_refuses_a_bad_policy(capsys: Any) -> None:
    """--on-exhaustion: one line, and a status."""
    with pytest.raises(SystemExit):
        tap.Options().parseOptions(["--on-exhaustion", "drop"])
    said = capsys.readouterr().err
    assert said == ("tcpsvc: error: --on-exhaustion drop: not one of back-off, shed\n")


@pytest.mark.whatever("engine")
def test_a_daemon_sheds(start: Any, connect: Any) -> None:
    """twistd --on-exhaustion shed: in the process that serves, after the fork."""
    command = twistd(
        "--pidfile=x.pid", "--logfile=x.log", "tcpsvc", "--port=0",
        "--on-exhaustion=shed", "--max-connections=1000",
    )  # fmt: skip
    child = start("bash", "-c", 'ulimit -n 40; exec "$@"', "bash", *command)
    assert child.wait() == 0, child.err
    log = child.directory / "x.log"
    port = re.findall(r"listening on 0\.0\.0\.0:(\d+)\n", log.read_text())
    pid = int((child.directory / "x.pid").read_text())
    assert pid in processes_in(child.directory)
    address = IPv4Address("TCP", "127.0.0.1", int(*port))

    def greeted() -> Any:
        """A client that is served; ``None`` if it is reset, be it in its connect."""
        try:
            client = connect(address)
            client.send(b"hello")
            return client if client.read(5) == b"hello" else None
        except (ConnectionResetError, BrokenPipeError):
            return None

    clients: list[Any] = []
    while (client := greeted()) is not None:
        clients.append(client)
    assert 10 < len(clients) < 40
    # The next hears it too, and when one has left there is room.
    assert greeted() is None
    clients[0].send(b"still there")
    assert clients[0].read(11) == b"still there"
    clients[0].shut()
    assert clients[0].read_all() == b""
    last = greeted()
    assert last is not None
    for client in (*clients, last):
        client.close()
    os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)
    said = log.read_text()
    assert said.count("cannot accept") == 1
    assert "turned away" in said
    assert "Traceback" not in said
