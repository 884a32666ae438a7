"""
Stopping step by step, on a clock of the test's own (issue 2, section 3; issue 4,
section 6; spec G1, G2, G5).
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent

from tcpsvc import DrainReport, Observer, Reason
from tcpsvc.drain_lines import REPORT_INTERVAL
from tcpsvc.drain_options import GRACE
from tcpsvc.stream_connection import StreamConnection
from tests.drains import (
    Release,
    deaf,
    floods,
    reads,
    remaining,
    report_of,
    stubborn_and_its_release,
    until_over,
)
from tests.support import (
    LOOPBACK,
    Fired,
    Logs,
    in_thread,
    settle,
    the_reactor,
    turn,
    until,
)


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
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """Exactly once, at once and then each second; nobody is closed by it."""
    server, clients = await serving(reads, 3)
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
    await report_of(over, clock)
    assert len(remaining(logs)) == 7


@ensureDeferred
async def test_a_handler_finishes_what_it_does(serving: Any, clock: Clock) -> None:
    """Its client reads it all, and the drain ends with it."""
    go: Deferred[None] = Deferred()

    async def answers(address: Any, reader: Any, writer: Any) -> None:
        await go
        writer.write(b"x" * 1_000_000)

    server, (client,) = await serving(answers)
    over = Fired(server.drain(timeout=30.0))
    clock.advance(29.0)
    go.callback(None)
    assert await in_thread(client.read_all) == b"x" * 1_000_000
    await report_of(over, clock, client)


@ensureDeferred
async def test_when_the_time_is_up_what_is_left_is_closed(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """On the dot, also when the timeout is no whole number of seconds."""
    server, clients = await serving(reads, 2)
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


class CreepingClock(Clock):
    """Some microseconds go by between two looks, as on any real clock."""

    def seconds(self) -> float:
        self.rightNow += 0.00001
        return super().seconds()


@ensureDeferred
async def test_the_lines_count_one_and_say_round_numbers(
    serve: Any, connect: Any, logs: Logs
) -> None:
    """Not "1 connections remain, waited 1 s of 4.00007 s"."""
    clock = CreepingClock()
    server = await serve(reads, clock=clock)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    over = Fired(server.drain(timeout=4.0))
    clock.advance(REPORT_INTERVAL)
    assert "1 connection remains, waited 1 s of 4 s" in logs.texts()[-1]
    clock.advance(3.0)
    assert "closing 1 connection that remains" in "".join(logs.texts())
    await report_of(over, clock, client)


@ensureDeferred
async def test_a_timeout_of_nothing_closes_at_once(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """--drain-timeout 0."""
    server, (client,) = await serving(reads)
    over = Fired(server.drain(timeout=0))
    assert not over
    assert await in_thread(client.read_all) == b""
    await until_over(over, clock)
    assert remaining(logs) == []


@ensureDeferred
async def test_without_a_timeout_it_waits_for_ever(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """``drain_timeout=None``."""
    server, (client,) = await serving(reads)
    over = Fired(server.drain(timeout=None))
    clock.pump([REPORT_INTERVAL] * 1000)
    assert remaining(logs) == [1] * 1001
    assert "of any time" in [t for t in logs.texts() if "draining" in t][-1]
    assert not over
    await report_of(over, clock, client)


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
    serving: Any, clock: Clock, logs: Logs
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
    server, _ = await serving(stubborn, 2)
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
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """The second signal: no grace before the cancellation; twice is once."""
    server, clients = await serving(deaf, 2)
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
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """After the time was up, a signal still cancels at once."""
    server, _ = await serving(deaf)
    over = Fired(server.drain(timeout=1.0))
    clock.advance(1.0)
    assert not over
    server.force_drain()
    clock.advance(0)
    await until_over(over, clock)
    assert len([t for t in logs.texts() if "closing 1 connection" in t]) == 1


@ensureDeferred
async def test_force_does_not_put_off_the_giving_up(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """Signal after signal, the end comes one grace after the cancellation."""
    waiting: Deferred[None] = Deferred()

    async def stubborn(address: Any, reader: Any, writer: Any) -> None:
        while not waiting.called:
            try:
                await Deferred()
            except CancelledError:
                pass

    server, _ = await serving(stubborn)
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
    serving: Any, clock: Clock
) -> None:
    """Cancelling one, or its callbacks, change nothing for the next."""
    server, (client,) = await serving(reads)
    first, second, third = (server.drain(timeout=30.0) for _ in range(3))
    first.addErrback(lambda _: None)
    first.cancel()
    second.addCallback(lambda _: "changed")
    over = Fired(third)
    await report_of(over, clock, client)
    assert Fired(server.drain())


# The announcement.


@ensureDeferred
async def test_while_it_is_announced_it_still_accepts(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """Health checks fail first; handlers are not told before it accepts nobody."""
    told: list[bool] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        told.append(writer.draining)
        await writer.when_draining()
        told.append(writer.draining)
        writer.write(b"bye")

    server = await serve(handler, clock=clock)
    assert server.is_draining is False
    assert server.describe()["is_draining"] is False
    over = Fired(server.drain(announce=5.0, timeout=30.0))
    assert server.is_draining is True
    assert server.describe()["is_draining"] is True
    assert "listening, draining" in repr(server)
    assert not server.is_closed
    assert [t for t in logs.texts() if "accepting for another 5 s" in t]
    client = connect(server)
    await until(lambda: told == [False])
    clock.advance(4.999)
    assert not server.is_closed
    assert told == [False]
    clock.advance(0.001)
    assert server.is_closed
    assert await in_thread(client.read_all) == b"bye"
    assert told == [False, True]
    await report_of(over, clock, client)
    assert server.is_draining is True
    assert over.results == [DrainReport(finished=1)]


@ensureDeferred
async def test_an_idle_server_is_drained_when_the_announcement_is_over(
    serve: Any, clock: Clock, logs: Logs
) -> None:
    """Not before: a client may still come. And at once then."""
    server = await serve(reads, clock=clock)
    over = Fired(server.drain(announce=3.0, timeout=None, spread=9.0))
    clock.advance(2.999)
    await settle()
    assert not over
    clock.advance(0.001)
    assert await report_of(over, clock) == DrainReport()
    assert "drained in 3.0 s: no connections" in logs.texts()[-1]


@pytest.mark.parametrize("how", ["close", "close all", "error"])
@ensureDeferred
async def test_who_closes_the_server_ends_its_announcement(
    serve: Any, connect: Any, clock: Clock, how: str
) -> None:
    """There is nothing to announce any more: the handlers are told."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        if await reader.read(1) == b"!":
            raise ValueError("oh dear")

    server = await serve(handler, clock=clock, on_handler_error="raise")
    failed = server.failed()
    failed.addErrback(lambda failure: failure.trap(ValueError) and None)
    clients = [connect(server) for _ in range(2)]
    await until(lambda: server.num_connections == 2)
    await turn()
    over = Fired(server.drain(announce=60.0, timeout=30.0))
    waiting = [server.connection(c.id).when_draining() for c in server.connections]
    if how == "error":
        clients[0].send(b"!")
    else:
        server.close(close_existing_connections=how == "close all")
        assert not server._factory.is_draining  # Not within close.
    await until(lambda: server._factory.is_draining)
    if how == "close":
        assert [w.called for w in waiting] == [True, True]
    await report_of(over, clock, *clients)
    # What had ended by then was there before the server accepted nobody, or after.
    assert over.results[0].given_up == over.results[0].cancelled == 0


@ensureDeferred
async def test_dropping_goes_on_while_it_is_announced(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """D1: they are accepted and closed, and no part of the drain."""
    server = await serve(reads, clock=clock, drop_incoming_connections=True)
    over = Fired(server.drain(announce=3.0))
    assert await in_thread(connect(server).read_all) == b""
    server.set_drop_incoming_connections(False)
    served = connect(server)
    await until(lambda: server.num_connections == 1)
    server.set_drop_incoming_connections(True)
    assert await in_thread(connect(server).read_all) == b""
    clock.advance(3.0)
    served.close()
    await until_over(over, clock)
    assert over.results[0].connections == 1


@ensureDeferred
async def test_a_server_on_hold_is_announced(
    serving: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """G1, Z2: its port is open, and who waits is served if it is resumed in time."""
    server, clients = await serving(reads)
    server.pause("hold")
    over = Fired(server.drain(announce=2.0, timeout=30.0))
    assert "about to drain, paused for another 2 s" in logs.texts()[-1]
    clients.append(connect(server))
    clock.advance(1.0)
    assert server.is_draining
    assert not server.is_closed
    server.resume()
    await until(lambda: server.num_connections == 2)
    server.pause("hold")
    clock.advance(0.999)
    assert not server.is_closed
    clock.advance(0.001)
    assert server.is_closed
    for client in clients:
        client.close()
    await until_over(over, clock)
    assert over.results == [DrainReport(finished=2)]


@ensureDeferred
async def test_a_server_that_refuses_is_not_announced(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """G1, Z3: clients are refused already, so it goes on to its handlers at once."""
    log: list[Any] = []
    server, clients = await serving(reads)
    server.add_observer(Watcher(log))
    [told] = [server.connection(c.id).when_draining() for c in server.connections]
    await server.pause("refuse")
    over = Fired(server.drain(announce=60.0, timeout=30.0))
    assert server.is_draining
    assert server.is_closed
    assert told.called
    assert log == ["draining"]
    assert not [t for t in logs.texts() if "about to drain" in t]
    clients[0].close()
    await until_over(over, clock)
    assert over.results == [DrainReport(finished=1)]
    assert clock.seconds() == 0


@pytest.mark.parametrize("before", [None, "hold"])
@ensureDeferred
async def test_a_pause_that_refuses_ends_the_announcement(
    serving: Any, clock: Clock, before: Any
) -> None:
    """G2: as a close does; the pause has happened all the same."""
    log: list[Any] = []
    server, clients = await serving(reads)
    server.add_observer(Watcher(log))
    over = Fired(server.drain(announce=60.0, timeout=30.0))
    clock.advance(1.0)
    if before is not None:
        await server.pause(before)
    assert not server.is_closed
    await server.pause("refuse")
    assert server.is_closed
    assert server.is_paused is None
    assert server._factory.is_draining
    server.invariant()
    clients[0].close()
    await until_over(over, clock)
    assert over.results == [DrainReport(finished=1)]
    assert clock.seconds() == 1.0
    assert server._factory._observers.added[1:] == []


@ensureDeferred
async def test_several_listeners_are_one_drain(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """With one report, and each of them in its lines."""
    server = await serve(reads, where=[LOOPBACK, LOOPBACK], clock=clock)
    addresses = [listener.address for listener in server.listeners]
    clients = [connect(address) for address in addresses]
    await until(lambda: server.num_connections == 2)
    over = Fired(server.drain(timeout=30.0))
    assert await report_of(over, clock, *clients) == DrainReport(finished=2)
    said = logs.texts()[-1]
    assert all(f"127.0.0.1:{address.port}" in said for address in addresses)


# What is asked for.


@pytest.mark.parametrize("name", ["announce", "timeout", "spread", "grace"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (float("nan"), ValueError),
        (float("-inf"), ValueError),
        ("5", TypeError),
        (True, TypeError),
        (b"", TypeError),
    ],
)
@ensureDeferred
async def test_bad_values_are_refused_before_anything_happens(
    serve: Any, clock: Clock, name: str, value: Any, error: Any
) -> None:
    """They are named; the server goes on."""
    server = await serve(reads, clock=clock)
    with pytest.raises(error, match=f"^{name}="):
        server.drain(**{"timeout": 1.0, "announce": 1.0, name: value})
    assert not server.is_draining
    assert not server.is_closed
    over = Fired(server.drain(announce=7.0))
    with pytest.raises(error, match=f"^{name}="):
        server.drain(**{"announce": 0.0, name: value})
    assert not server.is_closed
    server.drain(announce=0)
    await until_over(over, clock)


@ensureDeferred
async def test_what_would_never_end_is_refused_but_for_the_timeout(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """None, and infinity, are any time to finish."""
    server, (client,) = await serving(reads)
    for name in ("announce", "spread", "grace"):
        with pytest.raises(ValueError, match=f"{name}=inf"):
            server.drain(**{name: float("inf")})
        with pytest.raises(TypeError, match=f"{name}=None"):
            server.drain(**{name: None})
    with pytest.raises(TypeError, match="unknown option patience=3"):
        server.drain(patience=3)
    assert not server.is_draining
    over = Fired(server.drain(timeout=float("inf")))
    assert "of any time" in logs.texts()[-1]
    await report_of(over, clock, client)


# Called again.


@ensureDeferred
async def test_a_further_call_shortens_the_announcement(
    serve: Any, clock: Clock
) -> None:
    """To so long from now on, and never more."""
    server = await serve(reads, clock=clock)
    first = Fired(server.drain(announce=10.0))
    clock.advance(2.0)
    second = Fired(server.drain(announce=5.0))
    third = Fired(server.drain(announce=60.0))
    fourth = Fired(server.drain())
    clock.advance(4.999)
    assert not server.is_closed
    clock.advance(0.001)
    assert server.is_closed
    await until_over(fourth, clock)
    assert first.results == second.results == third.results == [DrainReport()]


@ensureDeferred
async def test_a_further_call_shortens_the_timeout(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """From now on; what would end later than before changes nothing."""
    server, (client,) = await serving(reads)
    over = Fired(server.drain(timeout=None))
    clock.advance(100.0)
    server.drain(timeout=10.0)
    clock.advance(6.0)
    server.drain(timeout=10.0)
    server.drain(timeout=None)
    assert "of 110 s" in logs.texts()[-1]
    clock.advance(3.999)
    assert not server._factory.connections[0].is_socket_closed
    clock.advance(0.001)
    assert await in_thread(client.read_all) == b""
    assert await report_of(over, clock) == DrainReport(closed=1, longest_wait=110.0)


@ensureDeferred
async def test_a_further_call_shortens_what_is_still_to_come(
    serving: Any, clock: Clock
) -> None:
    """Each phase by itself; what is not named stays as it was."""
    server, _ = await serving(deaf, 2)
    over = Fired(server.drain(announce=1.0, timeout=20.0, spread=20.0, grace=20.0))
    server.drain(timeout=2.0)
    server.drain(spread=4.0, grace=8.0)
    server.drain(grace=9.0)
    opened = [c.when_socket_closed for c in server._factory.connections]
    clock.advance(1.0)
    assert server.is_closed
    clock.advance(2.0)
    for second in (2.0, 2.0):
        clock.advance(second - 0.001)
        closed = sum(e.has_happened for e in opened)
        clock.advance(0.001)
        assert sum(e.has_happened for e in opened) == closed + 1
    clock.advance(7.999)
    await turn()
    assert not over
    clock.advance(0.001)
    assert await report_of(over, clock) == DrainReport(cancelled=2, longest_wait=14.0)


@ensureDeferred
async def test_a_further_call_shortens_the_graces(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """The one before the cancellation, and the one after it."""
    handler, release = stubborn_and_its_release()
    server, _ = await serving(handler)
    over = Fired(server.drain(timeout=0, grace=10.0))
    clock.advance(1.0)
    assert release.cancels == 0
    server.drain(grace=4.0)
    clock.advance(3.999)
    assert release.cancels == 0
    clock.advance(0.001)
    assert release.cancels == 1
    clock.advance(1.0)
    server.drain(grace=2.0)
    server.drain(grace=100.0)
    clock.advance(1.999)
    assert not over
    clock.advance(0.001)
    assert await report_of(over, clock) == DrainReport(given_up=1, longest_wait=8.0)
    logs.take(LogLevel.error)
    release()


@ensureDeferred
async def test_a_shorter_spread_is_spread_anew(serving: Any, clock: Clock) -> None:
    """What is left, evenly over what is left of the time."""
    server, _ = await serving(reads, 6)
    over = Fired(server.drain(timeout=0, spread=60.0))
    clock.advance(20.0)
    assert len(server._factory.connections) == 4
    server.drain(spread=8.0)
    for left in (3, 2, 1, 0):
        clock.advance(1.999)
        assert len(server._factory.connections) == left + 1
        clock.advance(0.001)
        assert len(server._factory.connections) == left
    assert await report_of(over, clock) == DrainReport(closed=6, longest_wait=28.0)


@ensureDeferred
async def test_no_time_at_all_goes_on_at_once(serving: Any, clock: Clock) -> None:
    """``drain(timeout=0)`` in the midst of a patient one."""
    server, (client,) = await serving(reads)
    over = Fired(server.drain(announce=10.0, timeout=None, spread=5.0))
    server.drain(announce=0, timeout=0, spread=0)
    assert await in_thread(client.read_all) == b""
    await until_over(over, clock)


# Spreading.


@ensureDeferred
async def test_the_closes_are_spread_evenly(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """One by one over the whole window, the last at its end; lines go on."""
    server, _ = await serving(reads, 10)
    over = Fired(server.drain(timeout=1.0, spread=10.0))
    clock.advance(1.0)
    left = []
    for _ in range(20):
        left.append(len(server._factory.connections))
        clock.advance(0.5)
    assert left == [10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert await report_of(over, clock) == DrainReport(closed=10, longest_wait=11.0)
    assert "closing 10 connections that remain, over 10 s" in "".join(logs.texts())
    assert len(remaining(logs)) == 10  # At 0 s, and from 2 s to 10 s.


@ensureDeferred
async def test_who_leaves_meanwhile_makes_room_for_the_others(
    serving: Any, clock: Clock
) -> None:
    """The window stays the same, its steps grow."""
    server, clients = await serving(reads, 8)
    over = Fired(server.drain(timeout=0, spread=8.0))
    clock.advance(2.0)
    assert len(server._factory.connections) == 6
    for client in clients:
        client.close()
    await until(lambda: not server._factory.connections)
    assert await report_of(over, clock) == DrainReport(
        closed=2, finished=6, longest_wait=2.0
    )


@ensureDeferred
async def test_many_closes_come_several_at_a_time(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """No timer for each of many; evenly all the same, and never late."""
    server = await serve(reads, clock=clock, max_accepts_per_batch=50, backlog=128)
    for _ in range(100):
        connect(server)
    await until(lambda: server.num_connections == 100)
    await turn()
    over = Fired(server.drain(timeout=0, spread=0.5))
    clock.advance(0.01)
    assert len(server._factory.connections) == 100
    for tenth in range(1, 6):
        for _ in range(9 if tenth == 1 else 10):
            clock.advance(0.01)
        assert abs(len(server._factory.connections) - (100 - 20 * tenth)) <= 4
    assert await report_of(over, clock) == DrainReport(
        closed=100, longest_wait=pytest.approx(0.5)
    )


@ensureDeferred
async def test_with_handlers_alone_there_is_nothing_to_spread(
    serving: Any, clock: Clock
) -> None:
    """Their clients are gone: they are cancelled a grace later."""
    server, (client,) = await serving(deaf)
    client.reset()
    await until(lambda: server._factory.connections[0].is_socket_closed)
    over = Fired(server.drain(timeout=0, spread=60.0))
    clock.advance(GRACE)
    assert await report_of(over, clock) == DrainReport(cancelled=1, longest_wait=GRACE)


# The end.


@ensureDeferred
async def test_who_is_given_up_is_named(serving: Any, clock: Clock, logs: Logs) -> None:
    """By the peer; of many the first ten. Their later end harms nobody."""
    handler, release = stubborn_and_its_release()
    server, clients = await serving(handler, 12)
    over = Fired(server.drain(timeout=0, grace=2.0))
    clock.pump([2.0, 2.0])
    assert await report_of(over, clock) == DrainReport(given_up=12, longest_wait=4.0)
    (line,) = [formatEvent(e) for e in logs.take(LogLevel.error)]
    named = [c for c in clients if f":{c.socket.getsockname()[1]}" in line]
    assert len(named) == 10
    assert line.endswith(" and 2 more")
    # What was closed stays so, and the reason why.
    assert {c.reason for c in server._factory.connections} == {Reason.DRAINED}
    release()
    await server.close_finished_and_handlers_determined()
    assert Fired(server.drain()).results == over.results


@ensureDeferred
async def test_a_socket_that_does_not_close_is_reset(
    serving: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One grace after the cancellation."""
    monkeypatch.setattr(StreamConnection, "close_now", lambda self: None)
    server, (client,) = await serving(floods)
    over = Fired(server.drain(timeout=0, grace=2.0))
    clock.advance(2.0)  # The handler is cancelled; a flush that does not end follows.
    (connection,) = server._factory.connections
    assert not connection.is_running
    assert connection.reason is Reason.DRAINED
    clock.advance(1.999)
    assert not over
    clock.advance(0.001)
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read_all)
    assert await report_of(over, clock) == DrainReport(aborted=1, longest_wait=4.0)


@ensureDeferred
async def test_no_grace_is_no_grace(serving: Any, clock: Clock, logs: Logs) -> None:
    """Closed, cancelled and given up at once; the port is waited for all the same."""
    handler, release = stubborn_and_its_release()
    server, _ = await serving(handler)
    over = Fired(server.drain(timeout=0, grace=0))
    assert over.results == [DrainReport(given_up=1)]
    logs.take(LogLevel.error)
    release()
    server, _ = await serving(deaf)
    over = Fired(server.drain(timeout=0, grace=0))
    assert not over
    assert await report_of(over, clock) == DrainReport(cancelled=1)
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("heeds_the_time", [True, False])
@ensureDeferred
async def test_a_call_of_on_handler_error_is_waited_for(
    serving: Any, clock: Clock, logs: Logs, heeds_the_time: bool
) -> None:
    """Not without end."""
    reporting: Deferred[None] = Deferred()

    async def fails(address: Any, reader: Any, writer: Any) -> None:
        await reader.read(1)
        raise ValueError("oh dear")

    server, (client,) = await serving(fails, on_handler_error=lambda *_: reporting)
    over = Fired(server.drain(timeout=5.0))
    clock.advance(1.0)
    client.send(b"x")
    await until(lambda: server.num_connections == 0)
    await turn()
    assert not over
    if heeds_the_time:
        reporting.callback(None)
    else:
        clock.pump([4.0, GRACE, GRACE])
    assert await report_of(over, clock) == DrainReport(
        finished=1, errors=1, longest_wait=1.0
    )
    if not heeds_the_time:
        (line,) = logs.take(LogLevel.error)
        assert line["remaining"] == "calls of on_handler_error"
        reporting.callback(None)


@ensureDeferred
async def test_close_existing_connections_in_its_midst(
    serving: Any, clock: Clock
) -> None:
    """It ends with them; they were closed, and not by the drain."""
    server, clients = await serving(reads, 2)
    connections = server._factory.connections
    over = Fired(server.drain(timeout=None))
    server.close(close_existing_connections=True)
    for client in clients:
        assert await in_thread(client.read_all) == b""
    await until_over(over, clock)
    assert [c.reason for c in connections] == [Reason.CLOSED] * 2
    assert over.results == [DrainReport(closed=2)]


@ensureDeferred
async def test_the_report_of_a_mixed_crowd(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """Each connection is counted once, by the last thing that was done to it."""
    release = Release()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        order = await reader.readline()
        if order == b"idle\n":
            reader.eof_when_draining()
            await reader.read(1)
        elif order == b"idle error\n":
            reader.eof_when_draining()
            await reader.read(1)
            raise ValueError("oh dear")
        elif order == b"error\n":
            await writer.when_draining()
            raise ValueError("oh dear")
        elif order == b"flood\n":
            writer.write(b"x" * 20_000_000)
        elif order == b"deaf\n":
            await Deferred()
        elif order == b"stubborn\n":
            await release.wait()
        else:
            await reader.drain_to_eof()

    server = await serve(handler, clock=clock)
    orders = [
        "finish", "finish", "idle", "idle", "idle", "idle error", "error", "flood",
        "close", "close", "deaf", "stubborn",
    ]  # fmt: skip
    clients = [connect(server) for _ in orders]
    await until(lambda: server.num_connections == len(orders))
    for client, order in zip(clients, orders, strict=True):
        client.send(order.encode() + b"\n")
    connections = server._factory.connections
    await until(lambda: all(c.bytes_in > 4 for c in connections))
    await until(lambda: connections[7].reason is Reason.FINISHED)
    over = Fired(server.drain(timeout=10.0, grace=1.0))
    clock.advance(3.0)
    clients[0].shut()
    clients[1].reset()
    await until(lambda: [c.is_over for c in connections[:2]] == [True, True])
    clock.advance(7.0)
    clock.advance(1.0)
    clock.advance(1.0)
    await until_over(over, clock)
    assert over.results == [
        DrainReport(
            finished=3,  # Two clients that left, and a handler that failed.
            closed_idle=4,
            closed=3,  # With the flood that nobody reads.
            cancelled=1,
            given_up=1,
            errors=2,
            longest_wait=12.0,
        )
    ]
    assert over.results[0].connections == len(orders)
    expected = "3 finished, 4 closed idle, 3 closed, 1 cancelled, 1 given up, 2 failed"
    assert f"drained in 12.0 s: {expected}; longest wait 12.0 s" in logs.texts()[-1]
    logs.take(LogLevel.error)
    reasons = [c.reason for c in connections]
    drained = Reason.DRAINED
    assert reasons == [
        Reason.EOF, Reason.RESET, drained, drained, drained, Reason.ERROR, Reason.ERROR,
        Reason.FINISHED, drained, drained, drained, drained,
    ]  # fmt: skip
    release()


def test_a_report_is_a_value() -> None:
    """Comparable, unchangeable, and a line to print."""
    report = DrainReport(finished=1, given_up=2, longest_wait=1.25)
    assert report == DrainReport(finished=1, given_up=2, longest_wait=1.25)
    assert report.connections == 3
    assert str(report) == "1 finished, 2 given up; longest wait 1.2 s"
    assert str(DrainReport()) == "no connections"
    assert DrainReport(unserved=2).connections == 0
    assert str(DrainReport(unserved=2)) == "2 unserved"
    with pytest.raises(FrozenInstanceError):
        report.finished = 2  # type: ignore[misc]


# By force.


@ensureDeferred
async def test_force_ends_an_announcement(serving: Any, clock: Clock) -> None:
    """Everything at once, whatever was still to come."""
    server, (client,) = await serving(deaf)
    over = Fired(server.drain(announce=60.0, timeout=None, spread=60.0, grace=60.0))
    forced = Fired(server.force_drain())
    assert await in_thread(client.read_all) == b""
    await until_over(over, clock)
    assert forced.results == over.results == [DrainReport(cancelled=1)]


@ensureDeferred
async def test_force_without_a_drain_begins_one(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """With one grace for those who take their time to end."""
    handler, release = stubborn_and_its_release()
    server, _ = await serving(handler)
    over = Fired(server.force_drain())
    assert release.cancels == 1
    clock.advance(GRACE - 0.001)
    assert not over
    clock.advance(0.001)
    assert await report_of(over, clock) == DrainReport(given_up=1, longest_wait=GRACE)
    logs.take(LogLevel.error)
    release()


@pytest.mark.parametrize("when", ["finishing", "spreading", "closing", "cancelling"])
@ensureDeferred
async def test_force_resets_what_does_not_close(
    serving: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """At once, in whichever phase."""
    monkeypatch.setattr(StreamConnection, "close_now", lambda self: None)
    server, (client,) = await serving(floods)
    over = Fired(server.drain(timeout=2.0, spread=2.0, grace=2.0))
    phases = ["finishing", "spreading", "closing", "cancelling"]
    clock.pump([1.0] + [2.0] * phases.index(when))
    server.force_drain()
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read_all)
    await until_over(over, clock)
    assert over.results[0].aborted == 1


# Who hears of it, and calls in its midst.


class Watcher(Observer):
    """Notes what it is told of the drain."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def server_draining(self) -> None:
        self.log.append("draining")

    def connection_finished(self, connection: Any) -> None:
        self.log.append(connection.reason)

    def server_drained(self, report: Any) -> None:
        self.log.append(report)


@ensureDeferred
async def test_observers_are_told_of_the_beginning_and_the_end(
    serving: Any, clock: Clock
) -> None:
    """Once each, whoever calls how often; nobody observes any longer than that."""
    log: list[Any] = []
    server, (client,) = await serving(reads, observer=Watcher(log))
    over = server.drain(announce=1.0, timeout=1.0)
    over.addCallback(log.append)
    assert log == ["draining"]
    server.drain()
    clock.advance(1.0)
    clock.advance(1.0)
    assert await in_thread(client.read_all) == b""
    await until(lambda: over.called)
    report = DrainReport(closed=1, longest_wait=1.0)
    assert log == ["draining", Reason.DRAINED, report, report]
    server.drain()
    server.force_drain()
    assert len(log) == 4
    assert len(server._factory._observers.added) == 1


@ensureDeferred
async def test_who_was_just_accepted_is_served(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """H5 is for those who were to start after the close: these start before it."""

    class Hasty(Observer):
        def connection_accepted(self, connection: Any) -> None:
            the_reactor().callLater(0, server.drain)

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"open" if not server.is_closed else b"closed")

    server = await serve(handler, clock=clock, observer=Hasty())
    client = connect(server)
    assert await in_thread(client.read_all) == b"open"
    client.close()
    over = Fired(server.drain())
    assert await report_of(over, clock) == DrainReport(finished=1)


@ensureDeferred
async def test_who_was_accepted_and_cannot_start_any_more_is_unserved(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """H5: it had a slot, and had not come to be started. It is counted once."""

    class Hastier(Observer):
        def connection_accepted(self, connection: Any) -> None:
            reports.append(Fired(server.drain()))

    reports: list[Any] = []
    server = await serve(reads, clock=clock, observer=Hastier())
    client = connect(server)
    assert await in_thread(client.read_all) == b""
    await until(lambda: reports and reports[0])
    assert reports[0].results == [DrainReport(unserved=1)]
    counters = server.describe()["counters"]
    assert (counters["ends"], counters["refused"]) == ({"unserved": 1}, 1)


@ensureDeferred
async def test_who_was_held_for_an_evicted_ones_slot_is_unserved(
    serve: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """H5, N1: no handler had started for it; the evicted one is a connection."""
    handler, release = stubborn_and_its_release()
    server = await serve(handler, clock=clock, max_connections=1, overflow="evict")
    clients = [connect(server)]
    await until(lambda: server.num_connections == 1)
    await turn()
    clients.append(connect(server))
    await until(lambda: server.describe()["held"] == 1)
    over = Fired(server.drain(timeout=30.0))
    assert await in_thread(clients[1].read_all) == b""
    clock.advance(2.0)
    release()
    await until_over(over, clock)
    assert over.results == [DrainReport(finished=1, unserved=1, longest_wait=2.0)]
    assert over.results[0].connections == 1
    said = "drained in 2.0 s: 1 finished, 1 unserved; longest wait 2.0 s"
    assert said in logs.texts()[-1]


@ensureDeferred
async def test_whom_somebody_elses_close_has_left_unserved_is_not_the_drains(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """The report is of what was there when the drain found the server closed."""
    handler, release = stubborn_and_its_release()
    server = await serve(handler, clock=clock, max_connections=1, overflow="evict")
    connect(server)
    await until(lambda: server.num_connections == 1)
    await turn()
    newcomer = connect(server)
    await until(lambda: server.describe()["held"] == 1)
    over = Fired(server.drain(announce=5.0, timeout=30.0))
    server.close()
    assert await in_thread(newcomer.read_all) == b""
    release()
    await until_over(over, clock)
    assert over.results[0].unserved == 0


@ensureDeferred
async def test_it_may_be_called_from_its_own_midst(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """From an observer, from handlers that are told, and from who waits for it."""
    fired: list[Any] = []

    class Eager(Observer):
        def server_draining(self) -> None:
            fired.append(Fired(server.drain(timeout=20.0)))

        def server_drained(self, report: Any) -> None:
            fired.append(Fired(server.drain()))

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await writer.when_draining()
        fired.append(Fired(server.drain(timeout=0)))
        await reader.drain_to_eof()
        fired.append(Fired(server.drain()))

    server = await serve(handler, clock=clock, observer=Eager())
    clients = [connect(server) for _ in range(3)]
    await until(lambda: server.num_connections == 3)
    await turn()
    over = server.drain(timeout=30.0)
    over.addCallback(lambda r: fired.append(Fired(server.force_drain())) or r)
    fired.append(Fired(over))
    for client in clients:
        assert await in_thread(client.read_all) == b""
    await until(lambda: len(fired) == 10 and all(fired))
    assert clock.getDelayedCalls() == []
    reports = {report for f in fired for report in f.results}
    assert len(reports) == 1
    assert reports.pop().connections == 3


@ensureDeferred
async def test_a_handler_may_drain_its_own_server(serving: Any, clock: Clock) -> None:
    """It need not wait for itself, and is cancelled if it does."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(await reader.readline())
        await server.drain(timeout=5.0)

    server, (client,) = await serving(handler)
    client.send(b"the end\n")
    await until(lambda: server.is_closed)
    over = Fired(server.drain())
    clock.advance(5.0)
    assert await in_thread(client.read_all) == b"the end\n"
    clock.advance(GRACE)
    assert await report_of(over, clock) == DrainReport(
        cancelled=1, longest_wait=5.0 + GRACE
    )
