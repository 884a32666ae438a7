"""Stopping step by step, on a clock of the test's own (issue 2, section 3)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.python.failure import Failure

from tcpsvc.drain_lines import REPORT_INTERVAL
from tcpsvc.drain_options import GRACE
from tests.support import Logs, in_thread, turn, until


class Fired:
    """Whether a Deferred has fired, and with what."""

    def __init__(self, deferred: Deferred[Any]) -> None:
        self.results: list[Any] = []
        deferred.addBoth(self.results.append)

    def __bool__(self) -> bool:
        return len(self.results) == 1 and not isinstance(self.results[0], Failure)


async def until_over(fired: Any, clock: Clock) -> None:
    """Wait for the end of a drain, and that it has left no timer."""
    await until(lambda: fired)
    assert clock.getDelayedCalls() == []


async def reads(address: Any, reader: Any, writer: Any) -> None:
    """Goes on until its client has left or was closed."""
    await reader.drain_to_eof()


async def deaf(address: Any, reader: Any, writer: Any) -> None:
    """Does not see that its connection was closed, but heeds a cancellation."""
    await Deferred()


@pytest.fixture
def clock() -> Clock:
    """What times the server and its drain."""
    return Clock()


def remaining(logs: Logs) -> list[int]:
    """What the lines say, one after the other."""
    found = [re.search(r"draining, (\d+) connections", t) for t in logs.texts()]
    return [int(m.group(1)) for m in found if m]


async def serving(
    serve: Callable[..., Any], connect: Any, handler: Any, clock: Clock, n: int
) -> tuple[Any, list[Any]]:
    """A server with so many clients, whose handlers run."""
    server = await serve(handler, clock=clock)
    clients = [connect(server) for _ in range(n)]
    await until(lambda: server.num_connections == n)
    await turn()
    return server, clients


@ensureDeferred
async def test_with_no_connection_it_is_over_when_the_port_is_closed(
    serve: Any, clock: Clock, logs: Logs
) -> None:
    """No line, no timer, no wait."""
    server = await serve(reads, clock=clock)
    over = Fired(server.drain(timeout=30.0))
    assert server.is_closed
    assert not over
    await until_over(over, clock)
    assert remaining(logs) == []
    server.force_drain()
    server.force_drain()
    assert not [t for t in logs.texts() if "closing" in t]
    assert Fired(server.drain())


@ensureDeferred
async def test_a_closed_server_that_has_ended_is_drained_at_once(
    serve: Any, clock: Clock
) -> None:
    """There is nothing to wait for."""
    server = await serve(reads, clock=clock)
    server.close()
    await server.close_finished_and_handlers_determined()
    assert Fired(server.drain(timeout=30.0))
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_once_a_second_a_line_says_how_many_remain(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """Exactly once, at once and then each second; nobody is closed by it."""
    server, clients = await serving(serve, connect, reads, clock, 3)
    over = Fired(server.drain(timeout=30.0))
    assert remaining(logs) == [3]
    clock.advance(REPORT_INTERVAL / 2)
    assert remaining(logs) == [3]
    clock.advance(REPORT_INTERVAL / 2)
    assert remaining(logs) == [3, 3]
    clients[0].close()
    await until(lambda: server.num_connections == 2)
    assert remaining(logs) == [3, 3]
    for _ in range(5):
        clock.advance(REPORT_INTERVAL)
    assert remaining(logs) == [3, 3, 2, 2, 2, 2, 2]
    texts = [t for t in logs.texts() if "draining" in t]
    assert "waited 6 s of 30 s" in texts[-1]
    assert str(server.listening_on) in texts[-1]
    assert {e["log_level"] for e in logs.events if "remaining" in e} == {LogLevel.info}
    for client in clients[1:]:
        client.close()
    await until_over(over, clock)
    assert len(remaining(logs)) == 7


@ensureDeferred
async def test_a_handler_finishes_what_it_does(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """Its client reads it all, and the drain ends with it."""
    go: Deferred[None] = Deferred()

    async def answers(address: Any, reader: Any, writer: Any) -> None:
        await go
        writer.write(b"x" * 1_000_000)

    server, (client,) = await serving(serve, connect, answers, clock, 1)
    over = Fired(server.drain(timeout=30.0))
    clock.advance(29.0)
    go.callback(None)
    assert await in_thread(client.read_all) == b"x" * 1_000_000
    client.close()
    await until_over(over, clock)


@ensureDeferred
async def test_when_the_time_is_up_what_is_left_is_closed(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """On the dot, also when the timeout is no whole number of seconds."""
    server, clients = await serving(serve, connect, reads, clock, 2)
    over = Fired(server.drain(timeout=2.5))
    clock.advance(1.0)
    clock.advance(1.0)
    clock.advance(0.499)
    assert not [t for t in logs.texts() if "closing" in t]
    clock.advance(0.001)
    (line,) = [e for e in logs.events if "closing" in e["log_format"]]
    assert line["remaining"] == "2 connections"
    assert line["log_level"] is LogLevel.warn
    assert remaining(logs) == [2, 2, 2]
    for client in clients:
        assert await in_thread(client.read_all) == b""
    await until_over(over, clock)


@ensureDeferred
async def test_a_timeout_of_nothing_closes_at_once(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """--drain-timeout 0."""
    server, (client,) = await serving(serve, connect, reads, clock, 1)
    over = Fired(server.drain(timeout=0))
    assert not over
    assert await in_thread(client.read_all) == b""
    await until_over(over, clock)
    assert remaining(logs) == []


@ensureDeferred
async def test_without_a_timeout_it_waits_for_ever(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """``drain_timeout=None``."""
    server, (client,) = await serving(serve, connect, reads, clock, 1)
    over = Fired(server.drain(timeout=None))
    clock.pump([REPORT_INTERVAL] * 1000)
    assert remaining(logs) == [1] * 1001
    assert "of any" in [t for t in logs.texts() if "draining" in t][-1]
    assert not over
    client.close()
    await until_over(over, clock)


@ensureDeferred
async def test_a_handler_that_outlives_its_connection_is_cancelled(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """A grace after the close; that is an ordinary end (H6)."""
    errors: list[Any] = []
    ended: list[type[BaseException]] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        try:
            await Deferred()
        except BaseException as error:
            ended.append(type(error))
            raise

    server = await serve(
        handler, clock=clock, on_handler_error=lambda *args: errors.append(args)
    )
    connect(server)
    await until(lambda: server.num_connections == 1)
    await turn()
    over = Fired(server.drain(timeout=1.0))
    clock.advance(1.0)
    clock.advance(GRACE - 0.001)
    assert ended == []
    clock.advance(0.001)
    assert ended == [CancelledError]
    await until_over(over, clock)
    assert errors == []


@ensureDeferred
async def test_a_handler_that_does_not_end_is_given_up(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """With a line that says how many; the drain is over without them."""
    release: Deferred[None] = Deferred()
    cancels: list[None] = []

    async def stubborn(address: Any, reader: Any, writer: Any) -> None:
        while not release.called:
            waiting: Deferred[None] = Deferred()
            waiters.append(waiting)
            try:
                await waiting
            except CancelledError:
                cancels.append(None)

    waiters: list[Deferred[None]] = []
    server, _ = await serving(serve, connect, stubborn, clock, 2)
    over = Fired(server.drain(timeout=0.0))
    clock.advance(GRACE)
    assert len(cancels) == 2
    clock.advance(GRACE - 0.001)
    assert not over
    clock.advance(0.001)
    await until_over(over, clock)
    (line,) = [e for e in logs.events if e.get("log_level") is LogLevel.error]
    assert line["remaining"] == "2 handlers"
    release.callback(None)
    for waiter in waiters[-2:]:
        waiter.callback(None)
    await until(lambda: server.num_connections == 0)
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_force_closes_and_cancels_at_once(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """The second signal: no grace before the cancellation; twice is once."""
    server, clients = await serving(serve, connect, deaf, clock, 2)
    over = Fired(server.drain(timeout=30.0))
    clock.advance(1.0)
    server.force_drain()
    server.force_drain()
    clock.advance(0)
    for client in clients:
        assert await in_thread(client.read_all) == b""
    await until_over(over, clock)
    assert len([t for t in logs.texts() if "closing 2 connections" in t]) == 1


@ensureDeferred
async def test_force_ends_the_grace_of_a_timeout(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """After the time was up, a signal still cancels at once."""
    server, _ = await serving(serve, connect, deaf, clock, 1)
    over = Fired(server.drain(timeout=1.0))
    clock.advance(1.0)
    assert not over
    server.force_drain()
    clock.advance(0)
    await until_over(over, clock)
    assert len([t for t in logs.texts() if "closing 1 connections" in t]) == 1


@ensureDeferred
async def test_force_does_not_put_off_the_giving_up(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """Signal after signal, the end comes one grace after the cancellation."""
    waiting: Deferred[None] = Deferred()

    async def stubborn(address: Any, reader: Any, writer: Any) -> None:
        while not waiting.called:
            try:
                await Deferred()
            except CancelledError:
                pass

    server, _ = await serving(serve, connect, stubborn, clock, 1)
    over = Fired(server.drain(timeout=30.0))
    server.force_drain()
    clock.advance(0)
    clock.advance(GRACE / 2)
    server.force_drain()
    clock.advance(GRACE / 2)
    await until_over(over, clock)
    logs.take(LogLevel.error)
    waiting.callback(None)
    server.cancel_handlers()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_each_who_waits_has_a_deferred_of_their_own(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """Cancelling one, or its callbacks, change nothing for the next."""
    server, (client,) = await serving(serve, connect, reads, clock, 1)
    first, second, third = (server.drain(timeout=30.0) for _ in range(3))
    first.addErrback(lambda _: None)
    first.cancel()
    second.addCallback(lambda _: "changed")
    over = Fired(third)
    client.close()
    await until_over(over, clock)
    assert Fired(server.drain())
