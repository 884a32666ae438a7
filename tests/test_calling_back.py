"""
Whoever is told of something calls the server at once: to close, to cancel, to end what
it was just told of. Everything ends as if it had been called from outside.
"""

from __future__ import annotations

from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel

from tcpsvc import Observer, Reason, Server
from tests.support import Client, in_thread, turn, until

#: So many that one call for each of them, one within the other, is too deep.
CROWD = 300


@ensureDeferred
@pytest.mark.parametrize("told", ["handlers", "an observer"])
@pytest.mark.parametrize("close", ["sockets", "handlers", "both", "no listener"])
async def test_all_of_a_crowd_close_the_server(
    told: str, close: str, serve: Any, connect: Any
) -> None:
    """Each at its own end, which is the next one's."""

    def close_all() -> None:
        if close == "no listener":
            server.cancel_handlers()
            return
        server.close(
            close_existing_connections=close != "handlers",
            cancel_handlers=close != "sockets",
        )

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        try:
            await reader.read(1)
        finally:
            if told == "handlers":
                close_all()

    class Closing(Observer):
        def connection_finished(self, connection: Any) -> None:
            if told == "an observer":
                close_all()

    server = await serve(
        handle, max_accepts_per_batch=CROWD, backlog=CROWD, observer=Closing()
    )
    clients: list[Client] = [connect(server) for _ in range(CROWD)]
    await until(
        lambda: sum(c.handler == "running" for c in server.connections) == CROWD
    )
    clients[0].send(b"x")
    await until(lambda: not server.num_connections)
    server.invariant()
    server.close()
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_closes_within_closes_wait_for_the_same(serve: Any, connect: Any) -> None:
    """Each is told when all are closed, by a Deferred of its own."""
    fired: list[Any] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        await reader.read(1)
        closed = server.close(close_existing_connections=True)
        closed.addCallback(
            lambda _: fired.append([c.socket for c in server.connections])
        )
        await turn()
        await turn()

    server = await serve(handle, max_accepts_per_batch=3)
    for _ in range(3):
        connect(server)
    await until(lambda: sum(c.handler == "running" for c in server.connections) == 3)
    await server.close(close_existing_connections=True)
    await server.close_finished_and_handlers_determined()
    assert len(fired) == 3
    assert all(socket == "closed" for sockets in fired for socket in sockets)


@ensureDeferred
@pytest.mark.parametrize("kind", ["coroutine", "inlineCallbacks"])
@pytest.mark.parametrize("how", ["close", "cancel_handlers"])
async def test_a_handler_has_itself_cancelled_in_its_first_step(
    kind: str, how: str, serve: Any, connect: Any
) -> None:
    """It is, where it waits first, whatever it turns out to be."""

    def cancel() -> None:
        if how == "close":
            server.close(cancel_handlers=True)
        else:
            server.cancel_handlers()

    async def of_coroutine(*_: Any) -> None:
        cancel()
        await Deferred[None]()

    @inlineCallbacks
    def of_generator(*_: Any) -> Any:
        cancel()
        yield Deferred[None]()

    server = await serve(of_coroutine if kind == "coroutine" else of_generator)
    client = connect(server)
    assert await in_thread(client.read_all) == b""
    await until(lambda: not server.num_connections)
    assert server.describe()["counters"]["ends"] == {Reason.CANCELLED.value: 1}


@ensureDeferred
@pytest.mark.parametrize("create", [Server.create, Server.create_sock])
@pytest.mark.parametrize("how", ["close", "cancel_handlers"])
async def test_an_observer_cancels_the_handler_that_it_hears_start(
    create: Any, how: str, serve: Any, connect: Any
) -> None:
    """As if the handler had done so itself, in its first step."""

    class Cancelling(Observer):
        def handler_started(self, connection: Any) -> None:
            if how == "close":
                server.close(cancel_handlers=True)
            else:
                server.cancel_handlers()

    async def handle(*_: Any) -> None:
        await Deferred[None]()

    server = await serve(handle, create=create, observer=Cancelling())
    client = connect(server)
    assert await in_thread(client.read_all) == b""
    await until(lambda: not server.num_connections)
    assert server.describe()["counters"]["ends"] == {Reason.CANCELLED.value: 1}


@ensureDeferred
@pytest.mark.parametrize("how", ["close", "abort", "server"])
async def test_a_protocol_that_an_observer_hears_start_and_closes_is_told_in_order(
    how: str, serve: Any, connect: Any
) -> None:
    """It hears of no end of what it was not connected to, and is not connected then."""
    told: list[str] = []
    ended: list[str] = []

    class Telling(Protocol):
        def connectionMade(self) -> None:
            told.append("made")

        def connectionLost(self, reason: Any = None) -> None:
            told.append("lost")

    class Closing(Observer):
        def handler_started(self, connection: Any) -> None:
            if how == "server":
                server.close(close_existing_connections=True)
            else:
                getattr(connection, how)()

        def handler_ended(self, connection: Any, outcome: str, failure: Any) -> None:
            ended.append(outcome)

    server = await serve(
        Factory.forProtocol(Telling), create=Server.create_protocol, observer=Closing()
    )
    connect(server)
    await until(lambda: server.describe()["counters"]["ends"])
    assert ended == ["finished"]
    assert told in ([], ["made", "lost"])
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("how", ["connection", "reader", "server", "protocol"])
async def test_a_greeting_and_a_close_in_the_same_turn(
    how: str, serve: Any, connect: Any, logs: Any
) -> None:
    """The kernel has said "readable" and "room to send" at once."""

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        writer.write(b"hello")
        await reader.read(1)
        if how == "connection":
            reader.connection.close()
        elif how == "reader":
            reader.close()
        else:
            server.close(close_existing_connections=True)

    class Greeting(Protocol):
        def connectionMade(self) -> None:
            self.transport.write(b"hello")  # type: ignore[union-attr]

        def dataReceived(self, _: bytes) -> None:
            server.close(close_existing_connections=True)

    if how == "protocol":
        server = await serve(
            Factory.forProtocol(Greeting), create=Server.create_protocol
        )
    else:
        server = await serve(handle)
    client = connect(server)
    client.send(b"x")
    await until(lambda: server.describe()["counters"]["ends"])
    await turn()
    assert logs.bad() == []
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("policy", ["raise", "callable", "close"])
async def test_zero_is_reached_before_a_last_error_closes_the_server(
    policy: str, serve: Any, connect: Any
) -> None:
    """Whoever waits for that is told so, not that it never will be."""

    def on_error(_: Any, error: Any) -> None:
        if policy == "close":
            server.close()
        else:
            error.raiseException()

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        await reader.read(1)
        raise LookupError

    server = await serve(
        handle, on_handler_error="raise" if policy == "raise" else on_error
    )
    server.failed().addErrback(lambda _: None)
    client = connect(server)
    await until(lambda: server.num_connections)
    reached = server.when_connections(lambda n: n == 0)
    client.send(b"x")
    await reached


@ensureDeferred
async def test_a_condition_that_exits_keeps_nobody_out(
    serve: Any, connect: Any
) -> None:
    """Its waiter has the error; the next client comes in."""

    def exits(n: int) -> bool:
        if n == 0:
            raise SystemExit("of a condition")
        return False

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        writer.write(await reader.readline())

    server = await serve(handle, max_connections=1)
    first, second = connect(server), connect(server)
    await until(lambda: server.num_connections)
    waiter = server.when_connections(exits)
    first.send(b"one\n")
    second.send(b"two\n")
    with pytest.raises(SystemExit):
        await waiter
    assert await in_thread(second.read_all) == b"two\n"


@ensureDeferred
async def test_who_is_closed_for_one_dry_run_is_in_no_other(
    serve: Any, connect: Any
) -> None:
    """It is over by then, and to be forgotten."""
    clock = Clock()
    told: list[Reason] = []

    class Closing(Observer):
        def refused_in_dry_run(self, address: Any, reason: Reason) -> None:
            told.append(reason)
            server.connection(server.connections[0].id).close()

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        await reader.read(1)

    server = await serve(
        handle,
        clock=clock,
        idle_timeout=1,
        lifetime=1,
        dry_run=True,
        observer=Closing(),
    )
    connect(server)
    await until(
        lambda: server.connections and server.connections[0].handler == "running"
    )
    clock.pump([0.25] * 10)
    await until(lambda: not server.num_connections)
    assert len(told) == 1
    assert not server._factory._dry_run.told
    server.invariant()


@ensureDeferred
async def test_who_is_closed_before_its_start_has_ended_and_was_not_refused(
    serve: Any, connect: Any
) -> None:
    """Observers were told that it came in, so they are told that it has left."""
    heard: list[str] = []

    class Closing(Observer):
        def connection_accepted(self, connection: Any) -> None:
            heard.append("accepted")
            connection.close()

        def connection_refused(self, address: Any, reason: Reason) -> None:
            heard.append("refused")

        def connection_finished(self, connection: Any) -> None:
            heard.append(f"finished: {connection.reason.value}")

    server = await serve(lambda *_: None, observer=Closing())
    client = connect(server)
    assert await in_thread(client.read_all) == b""
    await until(lambda: len(heard) == 2)
    assert heard == ["accepted", f"finished: {Reason.CLOSED.value}"]
    counters = server.describe()["counters"]
    assert (counters["refused"], counters["refusals"]) == (0, {})


@ensureDeferred
@pytest.mark.parametrize("kind", ["create", "create_sock", "create_protocol"])
async def test_whoever_takes_the_last_slot_of_a_server_closed_by_that_is_refused(
    kind: str, serve: Any, connect: Any
) -> None:
    """Nobody is accepted after a close, whoever closes."""
    heard: list[str] = []

    class Closing(Observer):
        def limit_reached(self, limit: str) -> None:
            server.close()

        def connection_accepted(self, connection: Any) -> None:
            heard.append("accepted")

        def connection_refused(self, address: Any, reason: Reason) -> None:
            heard.append(reason.value)

    def handle(*_: Any) -> None:
        heard.append("started")

    is_protocol = kind == "create_protocol"
    handler: Any = Factory.forProtocol(Protocol) if is_protocol else handle
    server = await serve(
        handler, create=getattr(Server, kind), max_connections=1, observer=Closing()
    )
    client = connect(server)
    assert await in_thread(client.read_all) == b""
    await server.close_finished_and_handlers_determined()
    assert heard == [Reason.UNSERVED.value]
    server.invariant()


@ensureDeferred
async def test_equal_observers_are_two(serve: Any) -> None:
    """Whoever is removed is the one, not whoever is like it."""

    class Alike(Observer):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Alike)

        __hash__ = None  # type: ignore[assignment]

    one, other = Alike(), Alike()
    server = await serve(lambda *_: None, observer=one)
    server.add_observer(other)
    server.remove_observer(other)
    assert server._factory._observers.added == [one]
    assert server._factory._observers.added[0] is one
    with pytest.raises(ValueError, match="was not added"):
        server.remove_observer(other)


@ensureDeferred
async def test_a_factory_that_fails_to_stop_is_left_all_the_same(
    serve: Any, logs: Any
) -> None:
    """The new one serves, and the old one is told of each port."""

    class Told(Factory):
        protocol = Protocol
        ports = 0

        def doStart(self) -> None:
            self.ports += 1

        def doStop(self) -> None:
            self.ports -= 1
            if self is before:
                raise LookupError

    before, after = Told(), Told()
    server = await serve(before, create=Server.create_protocol)
    server.set_handler(after)
    assert (before.ports, after.ports) == (0, 1)
    assert server._factory.handler is after
    assert len(logs.take(LogLevel.critical)) == 1


@ensureDeferred
@pytest.mark.parametrize("event", ["handler_started", "connection_finished"])
@pytest.mark.parametrize("error", [GeneratorExit, SystemExit])
async def test_what_no_observer_should_raise_costs_no_slot(
    event: str,
    error: type[BaseException],
    serve: Any,
    connect: Any,
    logs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even ``SystemExit``, which stops the reactor, as a handler's does."""
    stopped: list[BaseException] = []

    def fails(self: Any, *told: Any) -> None:
        raise error

    server = await serve(
        lambda *_: None,
        max_connections=1,
        observer=type("", (Observer,), {event: fails})(),
    )
    monkeypatch.setattr(
        server._factory.reactor, "stop", lambda: stopped.append(error())
    )
    for _ in range(2):
        client = connect(server)
        assert await in_thread(client.read_all) == b""
    await until(lambda: not server.num_connections)
    server.invariant()
    assert bool(stopped) is (error is SystemExit)
    assert logs.take(LogLevel.critical)
