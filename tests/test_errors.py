"""What is done when a handler fails: ``on_handler_error``, ``failed()`` (spec E)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred, fail, inlineCallbacks
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent

import tcpsvc
from tcpsvc import LOCALHOST, Server, WhereToListen
from tests.support import LOOPBACK, in_thread, turn, until


class Failing:
    """A handler that raises as many errors as clients send a line."""

    def __init__(self) -> None:
        self.started = 0
        self.raised: list[LookupError] = []

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        self.started += 1
        line = await reader.readline()
        if line == b"echo\n":
            writer.write(line)
            return
        self.raised.append(LookupError(line))
        raise self.raised[-1]


def outcome(deferred: Deferred[Any]) -> list[Any]:
    """What a Deferred fires with, once it has."""
    results: list[Any] = []
    deferred.addBoth(results.append)
    return results


async def make_fail(server: Any, connect: Any) -> Any:
    """Have one more handler fail, and end; returns its client."""
    failed = server.describe()["counters"]["failed"]
    client = connect(server)
    client.send(b"fail\n")
    assert await in_thread(client.read_all) == b""
    await until(
        lambda: (
            server.describe()["counters"]["failed"] > failed
            and not any(c.peer.port == client.port for c in server._factory.connections)
        )
    )
    return client


@pytest.fixture
def connect(connect: Any) -> Any:
    """Clients that know their own port."""

    def made(server: Any) -> Any:
        client = connect(server)
        client.port = client.socket.getsockname()[1]
        return client

    return made


# E1


@ensureDeferred
async def test_ignored_errors_are_counted_and_logged_at_debug(
    serve: Any, connect: Any, logs: Any
) -> None:
    """E1: "ignore": nothing more; the server goes on."""
    failing = Failing()
    server = await serve(failing, on_handler_error="ignore")
    failed = server.failed()
    for count in (1, 2):
        await make_fail(server, connect)
        assert server.describe()["counters"]["failed"] == count
    assert not server.is_closed
    assert not failed.called
    logged = [t for t in logs.texts(LogLevel.debug) if "ignored" in t]
    assert len(logged) == len(failing.raised) == 2
    assert all("fail" in text for text in logged)
    assert logs.texts(LogLevel.warn) + logs.texts(LogLevel.error) == []


@ensureDeferred
async def test_a_callable_is_called_once_per_failed_handler_after_its_release(
    serve: Any, connect: Any
) -> None:
    """E1: f(address, failure); the server goes on."""
    calls: list[Any] = []
    failing = Failing()

    def report(address: Any, failure: Any) -> None:
        calls.append((address.port, failure.value, server.num_connections))

    server = await serve(failing, on_handler_error=report)
    clients = [await make_fail(server, connect) for _ in range(3)]
    assert calls == [
        (client.port, error, 0)
        for client, error in zip(clients, failing.raised, strict=True)
    ]
    client = connect(server)
    client.send(b"echo\n")
    assert await in_thread(client.read_all) == b"echo\n"
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["coroutine", "Deferred", "inlineCallbacks"])
@ensureDeferred
async def test_what_the_callable_returns_is_waited_for(
    serve: Any, connect: Any, kind: str
) -> None:
    """E1, X4: cfhd waits for it; the slot does not, and others are served."""
    done: Deferred[None] = Deferred()
    calls: list[Any] = []

    async def as_coroutine(address: Any, failure: Any) -> None:
        calls.append(failure)
        await done

    def as_deferred(address: Any, failure: Any) -> Deferred[None]:
        calls.append(failure)
        return done

    @inlineCallbacks
    def as_inline(address: Any, failure: Any) -> Any:
        calls.append(failure)
        yield done

    report = {
        "coroutine": as_coroutine,
        "Deferred": as_deferred,
        "inlineCallbacks": as_inline,
    }[kind]
    server = await serve(Failing(), on_handler_error=report, max_connections=1)
    await make_fail(server, connect)
    client = connect(server)
    client.send(b"echo\n")
    assert await in_thread(client.read_all) == b"echo\n"
    await server.close()
    over = server.close_finished_and_handlers_determined()
    failed = server.failed()
    await until(lambda: server.num_connections == 0)
    for _ in range(5):
        await turn()
    assert not over.called
    assert not failed.called
    done.callback(None)
    await over
    assert failed.called
    assert len(calls) == 1


@ensureDeferred
async def test_log_error_logs_the_failure_with_its_peer(
    serve: Any, connect: Any, logs: Any
) -> None:
    """E1: tcpsvc.log_error; the server goes on."""
    failing = Failing()
    server = await serve(failing, on_handler_error=tcpsvc.log_error)
    client = await make_fail(server, connect)
    (event,) = [e for e in logs.events if e.get("log_failure") is not None]
    assert event["log_failure"].value is failing.raised[0]
    assert event["peer"].port == client.port
    assert not server.is_closed
    logs.take(event["log_level"])


@pytest.mark.parametrize("policy", ["ignore", "call"])
@ensureDeferred
async def test_a_client_that_is_served_meanwhile_notices_nothing(
    serve: Any, connect: Any, policy: str
) -> None:
    """E1: both: the server goes on, and so do its connections."""
    server = await serve(
        Failing(), on_handler_error=policy if policy == "ignore" else lambda *_: None
    )
    bystander = connect(server)
    for _ in range(3):
        await make_fail(server, connect)
    bystander.send(b"echo\n")
    assert await in_thread(bystander.read_all) == b"echo\n"


# E2


def raises(address: Any, failure: Any) -> None:
    """An ``on_handler_error`` that raises the handler's error again."""
    failure.raiseException()


async def raises_later(address: Any, failure: Any) -> None:
    """The same, after a turn."""
    await turn()
    failure.raiseException()


def returns_failed(address: Any, failure: Any) -> Deferred[None]:
    """The same, with a Deferred."""
    return fail(failure)


CLOSING_POLICIES = ["raise", raises, raises_later, returns_failed]


@pytest.mark.parametrize("policy", CLOSING_POLICIES)
@ensureDeferred
async def test_an_error_that_is_raised_closes_the_listening_socket_only(
    serve: Any, connect: Any, policy: Any
) -> None:
    """E2: is_closed is true before anyone hears; others go on to their end."""
    failing = Failing()
    server = await serve(failing, on_handler_error=policy)
    heard: list[tuple[bool, Any]] = []
    server.failed().addErrback(lambda f: heard.append((server.is_closed, f.value)))
    bystander = connect(server)
    await until(lambda: server.num_connections == 1)
    await make_fail(server, connect)
    await until(lambda: heard)
    assert heard == [(True, failing.raised[0])]
    await server.close_finished()
    with pytest.raises(ConnectionRefusedError):
        connect(server)
    over = server.close_finished_and_handlers_determined()
    await turn()
    assert not over.called
    bystander.send(b"echo\n")
    assert await in_thread(bystander.read_all) == b"echo\n"
    await over


@ensureDeferred
async def test_a_callable_that_raises_its_own_error_fails_with_that(
    serve: Any, connect: Any
) -> None:
    """E2: or an f that raises."""

    def report(address: Any, failure: Any) -> None:
        raise ZeroDivisionError("in f") from failure.value

    server = await serve(Failing(), on_handler_error=report)
    failed = outcome(server.failed())
    await make_fail(server, connect)
    await until(lambda: failed)
    assert isinstance(failed[0].value, ZeroDivisionError)
    assert server.is_closed


@ensureDeferred
async def test_a_callable_of_a_mistaken_kind_is_as_one_that_raises(
    serve: Any, connect: Any
) -> None:
    """E1, E2: a generator would never run, and no error may be lost in it."""

    def report(address: Any, failure: Any) -> Any:
        yield failure

    server = await serve(Failing(), on_handler_error=report)
    failed = outcome(server.failed())
    await make_fail(server, connect)
    await until(lambda: failed)
    assert isinstance(failed[0].value, TypeError)
    assert server.is_closed


@ensureDeferred
async def test_clients_in_the_backlog_are_not_served_after_an_error(
    serve: Any, connect: Any
) -> None:
    """E2, H4: the next waiting client is not accepted any more."""
    started: list[int] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address.port)
        await reader.readline()
        raise LookupError

    server = await serve(handler, on_handler_error="raise", max_connections=1)
    failed = outcome(server.failed())
    first, second = connect(server), connect(server)
    first.send(b"fail\n")
    await until(lambda: failed)
    await server.close_finished_and_handlers_determined()
    assert started == [first.port]
    with pytest.raises(ConnectionResetError):
        await in_thread(second.read_all)


@ensureDeferred
async def test_a_callable_may_close_the_server(serve: Any, connect: Any) -> None:
    """X5: close from on_handler_error, with connections; cfhd after it."""
    events: list[str] = []

    async def report(address: Any, failure: Any) -> None:
        await server.close(close_existing_connections=True)
        events.append("closed")

    server = await serve(Failing(), on_handler_error=report)
    bystander = connect(server)
    await until(lambda: server.num_connections == 1)
    over = server.close_finished_and_handlers_determined()
    over.addCallback(lambda _: events.append("cfhd"))
    connect(server).send(b"fail\n")
    await over
    assert events[:1] == ["closed"]
    assert await in_thread(bystander.read_all) == b""


# E3


@ensureDeferred
async def test_failed_errbacks_with_the_first_error_for_each_who_asks(
    serve: Any, connect: Any, logs: Any
) -> None:
    """E3: before or afterwards; a Deferred of one's own; later ones are logged."""
    failing = Failing()
    server = await serve(failing, on_handler_error="raise")
    early = [outcome(server.failed()) for _ in range(2)]
    cancelled = server.failed()
    cancelled.cancel()
    cancelled.addErrback(lambda _: None)
    second = connect(server)
    await until(lambda: server.num_connections == 1)
    await make_fail(server, connect)
    await until(lambda: all(early))
    assert [r[0].value for r in early] == [failing.raised[0]] * 2
    assert logs.bad() == []

    second.send(b"fail again\n")
    await server.close_finished_and_handlers_determined()
    assert outcome(server.failed())[0].value is failing.raised[0]
    logged = [e["log_failure"].value for e in logs.events if e.get("log_failure")]
    assert logged == [failing.raised[1]]
    logs.take(LogLevel.critical, LogLevel.error)


@ensureDeferred
async def test_an_error_nobody_waits_for_is_logged_critical_once(
    serve: Any, connect: Any, logs: Any
) -> None:
    """E3: with its traceback; asking afterwards still tells, and logs nothing."""
    failing = Failing()
    server = await serve(failing, on_handler_error="raise")
    await make_fail(server, connect)
    await server.close_finished_and_handlers_determined()
    (event,) = [e for e in logs.events if e.get("log_level") is LogLevel.critical]
    assert event["log_failure"].value is failing.raised[0]
    assert "__call__" in event["log_failure"].getTraceback()
    assert logs.take(LogLevel.critical) == [event]
    assert outcome(server.failed())[0].value is failing.raised[0]
    assert logs.bad() == []


@ensureDeferred
async def test_an_error_whose_only_waiter_has_left_is_logged_critical(
    serve: Any, connect: Any, logs: Any
) -> None:
    """E3, E4: a cancelled waiter hears nothing, so that the log has to say it."""
    server = await serve(Failing(), on_handler_error="raise")
    waiter = server.failed()
    waiter.addErrback(lambda _: None)
    waiter.cancel()
    await make_fail(server, connect)
    await server.close_finished_and_handlers_determined()
    assert len(logs.take(LogLevel.critical)) == 1


@ensureDeferred
async def test_failed_fires_none_at_the_end_of_a_server_without_errors(
    serve: Any, connect: Any
) -> None:
    """E3: at cfhd, also when asked for afterwards."""
    events: list[str] = []
    failing = Failing()
    server = await serve(failing, on_handler_error="raise")
    server.failed().addCallback(lambda result: events.append(f"failed {result}"))
    client = connect(server)
    await until(lambda: failing.started)
    await server.close()
    await turn()
    assert events == []
    client.send(b"echo\n")
    await server.close_finished_and_handlers_determined()
    await turn()
    assert events == ["failed None"]
    assert outcome(server.failed()) == [None]


@ensureDeferred
async def test_failed_does_not_fire_before_the_listening_socket_is_closed(
    serve: Any,
) -> None:
    """E3, X1, X4: at cfhd, so not before close() has returned."""
    server = await serve(Failing(), on_handler_error="raise")
    failed = server.failed()
    closing = server.close()
    assert not failed.called
    await closing
    await server.close_finished_and_handlers_determined()
    await turn()
    assert failed.called


# E4


@ensureDeferred
async def test_only_the_first_error_of_a_handler_is_reported_the_later_is_logged(
    serve: Any, connect: Any, logs: Any
) -> None:
    """E4, S6: the age limit was its first error."""
    calls: list[Any] = []
    clock = Clock()
    later = LookupError("later")

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 20_000_000)
        try:
            await writer.flushed()
        except tcpsvc.BufferAgeLimitExceeded:
            raise later from None

    server = await serve(
        handler,
        on_handler_error=lambda _, failure: calls.append(failure.value),
        clock=clock,
        buffer_age_limit=5,
    )
    connect(server)
    await until(lambda: server.num_connections)
    await until(lambda: server._factory.connections[0].writer.bytes_to_write)
    clock.pump([1] * 10)
    await until(lambda: server.num_connections == 0)
    assert [type(c) for c in calls] == [tcpsvc.BufferAgeLimitExceeded]
    counters = server.describe()["counters"]
    assert (counters["later_errors"], counters["too_old"]) == (1, 1)
    (event,) = [e for e in logs.events if e.get("log_failure") is not None]
    assert event["log_failure"].value is later
    logs.take(event["log_level"])


@pytest.mark.parametrize("policy", ["raise", "ignore", "call"])
@ensureDeferred
async def test_no_error_is_lost(
    serve: Any, connect: Any, logs: Any, policy: str
) -> None:
    """E4: every one is counted, and reported or logged."""
    calls: list[Any] = []
    failing = Failing()
    server = await serve(
        failing,
        on_handler_error=(lambda _, f: calls.append(f.value))
        if policy == "call"
        else policy,
    )
    clients = [connect(server) for _ in range(10)]
    await until(lambda: server.num_connections == 10)
    for client in clients:
        client.send(b"fail\n")
    await until(lambda: server.num_connections == 0)
    assert server.describe()["counters"]["failed"] == 10
    told: list[Any] = {
        # The one that closed the server, and the first of the later ones, have their
        # traceback; the others a line.
        "raise": lambda: [
            error
            for error, event in zip(
                failing.raised, logs.take(LogLevel.critical), strict=True
            )
            if ("log_failure" in event) is (error in failing.raised[:2])
            and str(error) in str(event.get("log_failure", formatEvent(event)))
        ],
        "ignore": lambda: [
            error
            for error, text in zip(
                failing.raised,
                [t for t in logs.texts(LogLevel.debug) if "ignored" in t],
                strict=True,
            )
            if str(error) in text
        ],
        "call": lambda: calls,
    }[policy]()
    assert told == failing.raised


# E5


@ensureDeferred
async def test_errors_after_close_are_reported(serve: Any, connect: Any) -> None:
    """E5: to a callable."""
    calls: list[Any] = []
    failing = Failing()
    server = await serve(failing, on_handler_error=lambda *args: calls.append(args))
    client = connect(server)
    await until(lambda: failing.started)
    await server.close()
    client.send(b"fail\n")
    await server.close_finished_and_handlers_determined()
    assert len(calls) == 1


@pytest.mark.parametrize("policy", CLOSING_POLICIES)
@ensureDeferred
async def test_errors_after_close_reach_failed(
    serve: Any, connect: Any, policy: Any
) -> None:
    """E5, E3: with "raise", and an f that raises."""
    failing = Failing()
    server = await serve(failing, on_handler_error=policy)
    failed = outcome(server.failed())
    client = connect(server)
    await until(lambda: failing.started)
    await server.close()
    client.send(b"fail\n")
    await server.close_finished_and_handlers_determined()
    assert [f.value for f in failed] == failing.raised


@ensureDeferred
async def test_errors_after_x3_are_reported(serve: Any, connect: Any) -> None:
    """E5, X3: those that are no ordinary end."""
    calls: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        assert await reader.readline() == b""
        raise LookupError

    server = await serve(handler, on_handler_error=lambda *args: calls.append(args))
    connect(server)
    await until(lambda: server.num_connections == 1)
    await until(lambda: server._factory.connections[0].is_running)
    await server.close(close_existing_connections=True)
    await server.close_finished_and_handlers_determined()
    assert len(calls) == 1


# E6


@pytest.mark.parametrize("create", ["create", "create_sock", "create_protocol"])
@pytest.mark.parametrize("suffix", ["", "_inet"])
def test_on_handler_error_has_no_default(create: str, suffix: str) -> None:
    """E6: a server that hides errors must say so."""
    creator: Callable[..., Any] = getattr(Server, create + suffix)
    with pytest.raises(TypeError, match="on_handler_error"):
        creator(LOOPBACK, Failing())
    parameter = inspect.signature(creator).parameters["on_handler_error"]
    assert parameter.default is inspect.Parameter.empty


@pytest.mark.parametrize("policy", [None, "Raise", "", 3, b"raise"], ids=repr)
@ensureDeferred
async def test_what_is_no_policy_is_named(policy: Any) -> None:
    """E6, W5: and nothing is opened."""
    with pytest.raises(ValueError, match="on_handler_error"):
        await Server.create(LOOPBACK, Failing(), on_handler_error=policy)


@ensureDeferred
async def test_with_raise_a_client_that_leaves_in_mid_message_closes_the_listener(
    serve: Any, connect: Any
) -> None:
    """E6: as the documentation warns."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readexactly(10)

    server = await serve(
        handler, where=WhereToListen.bind_to(LOCALHOST, 0), on_handler_error="raise"
    )
    failed = outcome(server.failed())
    client = connect(server)
    client.send(b"half")
    client.shut()
    await until(lambda: failed)
    assert isinstance(failed[0].value, asyncio.IncompleteReadError)
    assert server.is_closed
    assert "IncompleteReadError" in (Server.create.__doc__ or "")
