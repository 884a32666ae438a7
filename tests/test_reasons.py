"""
Why connections end, and why clients are not let in: for each reason a scene that
yields it, and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from tcpsvc import ConnectionGone, Observer, Reason, Reply, Server
from tcpsvc.reasons import LIMITS
from tests.anywhere import Handlers, MemoryEnd, everywhere
from tests.support import in_thread, turn, until

MUCH = b"x" * 20_000_000


class Ends(Observer):
    """Notes why connections were over, and clients refused."""

    def __init__(self) -> None:
        self.ended: list[Reason] = []
        self.refused: list[Reason] = []
        self.gone: list[BaseException] = []

    def connection_finished(self, connection: Any) -> None:
        self.ended.append(connection.reason)
        assert connection.snapshot().reason is connection.reason
        assert connection.describe()["reason"] == connection.reason.value

    def connection_refused(self, address: Any, reason: Reason) -> None:
        self.refused.append(reason)

    def handler_ended(self, connection: Any, outcome: str, failure: Any) -> None:
        if failure is not None and isinstance(failure.value, ConnectionGone):
            self.gone.append(failure.value)


class Obedient(Handlers):
    """
    Do what the first line of a client says: ``finish``, ``raise``, ``abort``,
    ``close``, ``wait``, ``drain`` (write more than goes, and wait for that),
    ``write`` (and finish).
    """

    async def stream(self, address: Any, reader: Any, writer: Any) -> None:
        self.started.append(writer)
        how = await reader.readline()
        if how == b"raise\n":
            raise LookupError
        if how == b"abort\n":
            writer.abort()
        if how == b"reader\n":
            reader.close()
            await writer.drain()
        if how == b"close\n":
            writer.close()
        if how in (b"drain\n", b"write\n"):
            writer.write(MUCH)
        if how == b"drain\n":
            await writer.drain()
        if how == b"wait\n":
            await self.wait()
        if how == b"closed\n":
            await writer.close_finished()
        if how == b"eof\n":
            await reader.read()

    async def sock(self, address: Any, client: Any) -> None:
        self.started.append(client)
        how = b""
        while not how.endswith(b"\n"):
            with contextlib.suppress(BlockingIOError):
                data = client.recv(100)
                if not data:
                    return
                how += data
            await turn(0.001)
        if how == b"raise\n":
            raise LookupError
        if how == b"wait\n":
            await self.wait()
        if how == b"eof\n":
            while True:
                with contextlib.suppress(BlockingIOError):
                    if not client.recv(100):
                        return
                await turn(0.001)

    @property
    def protocol(self) -> Any:
        handlers = self

        class Obeys(Protocol):
            got = b""

            def connectionMade(self) -> None:
                handlers.started.append(self)

            def dataReceived(self, data: bytes) -> None:
                self.got += data
                if not self.got.endswith(b"\n"):
                    return
                if self.got == b"raise\n":
                    raise LookupError
                if self.got == b"abort\n":
                    self.transport.abortConnection()  # type: ignore[attr-defined]
                if self.got == b"finish\n":
                    self.transport.loseConnection()  # type: ignore[union-attr]
                if self.got == b"write\n":
                    self.transport.write(MUCH)  # type: ignore[union-attr]
                    self.transport.loseConnection()  # type: ignore[union-attr]

        return Factory.forProtocol(Obeys)


async def command(s: Any, line: bytes) -> None:
    """Have the handler do what a line says."""
    await in_thread(s.client.send, line)
    for _ in range(3):
        await turn()


# What ends a connection: each takes a scene.


async def finish(s: Any) -> None:
    """The handler finishes, or the protocol loses its connection."""
    await command(s, b"finish\n")
    if not isinstance(s.client, MemoryEnd):
        await in_thread(s.client.read_all)
    s.client.close()


async def client_ends(s: Any) -> None:
    """The client's FIN."""
    if s.kind == "stream":
        await command(s, b"eof\n")
    await in_thread(s.client.shut)


async def client_resets(s: Any) -> None:
    """The client's RST."""
    if isinstance(s.client, MemoryEnd):
        s.client.stop_reading()
    if s.kind == "stream":
        await command(s, b"drain\n")
    s.client.reset()


async def client_resets_and_the_handler_waits_for_that(s: Any) -> None:
    """Whoever waits for the end ends at it."""
    await command(s, b"closed\n")
    s.client.reset()


async def client_resets_the_rest(s: Any) -> None:
    """The client's RST while the last bytes are sent."""
    await command(s, b"write\n")
    s.client.reset()


async def error(s: Any) -> None:
    """The handler raises."""
    await command(s, b"raise\n")
    if not isinstance(s.client, MemoryEnd):
        with contextlib.suppress(ConnectionResetError):
            await in_thread(s.client.read_all)
        s.client.close()


async def server_closes(s: Any) -> None:
    """close(close_existing_connections=True)"""
    if s.server is not None:
        await s.server.close(close_existing_connections=True)
    else:
        s.factory.close()
        await s.factory.close_connections()


async def closed(s: Any) -> None:
    """connection.close()"""
    s.connection.close()


async def aborted(s: Any) -> None:
    """connection.abort()"""
    s.connection.abort()


async def aborts(s: Any) -> None:
    """writer.abort(), or abortConnection()"""
    await command(s, b"abort\n")


async def closes_the_reader(s: Any) -> None:
    """reader.close()"""
    await command(s, b"reader\n")


async def cancelled(s: Any) -> None:
    """cancel_handlers()"""
    await command(s, b"wait\n")
    s.factory.cancel_handlers()
    s.client.close()


async def time_passes(s: Any) -> None:
    """Nothing but that."""
    s.passes(20.0, 0.5)


async def is_idle(s: Any) -> None:
    """It sends a byte, and then none."""
    await s.send(b"x")
    s.passes(20.0, 0.5)


async def is_slow(s: Any) -> None:
    """It sends a byte a second."""
    for _ in range(8):
        if not s.is_over:
            await s.send(b"x")
            s.passes(1.0)


async def does_not_read(s: Any) -> None:
    """The client does not read."""
    await command(s, b"drain\n")
    if not isinstance(s.client, MemoryEnd):
        await s.stuck()
    s.passes(30.0, 0.5)


async def does_not_take_the_rest(s: Any) -> None:
    """Nor when the handler has finished."""
    await command(s, b"write\n")
    if not isinstance(s.client, MemoryEnd):
        await s.stuck()
    s.passes(30.0, 0.5)


Scenario = tuple[Reason, Callable[[Any], Awaitable[None]], dict[str, Any], str, str]
ALL, STREAMS = "stream protocol sock", "stream"
ANYWHERE = "tcp tcp-reactor unix unix-reactor tls tls-reactor memory"
SOCKETS = "tcp tcp-reactor unix unix-reactor tls tls-reactor"
PLAIN = "tcp tcp-reactor unix unix-reactor"

#: The reason, what brings it about, with which options, for which kinds, and where.
SCENARIOS: list[Scenario] = [
    (Reason.FINISHED, finish, {}, ALL, ANYWHERE),
    (Reason.EOF, client_ends, {}, ALL, ANYWHERE),
    (Reason.RESET, client_resets, {}, "stream protocol", "tcp tcp-reactor memory"),
    (
        Reason.RESET,
        client_resets_and_the_handler_waits_for_that,
        {},
        STREAMS,
        "tcp tcp-reactor memory",
    ),
    (
        Reason.FINISHED,
        client_resets_the_rest,
        {},
        "stream protocol",
        "tcp tcp-reactor",
    ),
    (Reason.ERROR, error, {}, ALL, ANYWHERE),
    (Reason.CLOSED, server_closes, {}, ALL, ANYWHERE),
    (Reason.CLOSED, closed, {}, ALL, ANYWHERE),
    (Reason.ABORTED, aborted, {}, ALL, ANYWHERE),
    (Reason.ABORTED, aborts, {}, "stream protocol", ANYWHERE),
    (Reason.FINISHED, closes_the_reader, {}, STREAMS, ANYWHERE),
    (Reason.CANCELLED, cancelled, {}, "stream sock", ANYWHERE),
    (
        Reason.FIRST_BYTE,
        time_passes,
        {"first_byte_timeout": 5},
        "stream protocol",
        ANYWHERE,
    ),
    (Reason.FIRST_BYTE, time_passes, {"first_byte_timeout": 5}, "sock", "tcp"),
    (Reason.IDLE, is_idle, {"idle_timeout": 5}, "stream protocol", ANYWHERE),
    (Reason.IDLE, is_idle, {"idle_timeout": 5}, "sock", "tcp"),
    (Reason.HANDLER_TIMEOUT, time_passes, {"handler_timeout": 5}, ALL, ANYWHERE),
    (
        Reason.LIFETIME,
        time_passes,
        {"lifetime": 5, "idle_timeout": 5},
        "stream protocol",
        ANYWHERE,
    ),
    (
        Reason.LIFETIME,
        time_passes,
        {"lifetime": 5, "handler_timeout": 5},
        ALL,
        ANYWHERE,
    ),
    (
        Reason.SLOW,
        is_slow,
        {"min_throughput": 100, "throughput_window": 3},
        "stream protocol",
        ANYWHERE,
    ),
    (Reason.TOO_OLD, does_not_read, {"buffer_age_limit": 5}, STREAMS, SOCKETS),
    (
        Reason.FLUSH_TIMEOUT,
        does_not_take_the_rest,
        {"flush_timeout": 5, "buffer_age_limit": None},
        STREAMS,
        SOCKETS,
    ),
]


@pytest.mark.parametrize(
    ("reason", "happens", "options", "kind", "place"),
    [
        pytest.param(
            reason,
            happens,
            options,
            kind,
            place,
            id=f"{reason.value}-{happens.__name__}-{kind}-{place}",
        )
        for reason, happens, options, kinds, places in SCENARIOS
        for kind, place in itertools.product(kinds.split(), places.split())
        if kind != "sock" or place in PLAIN
    ],
)
@ensureDeferred
async def test_a_connection_ends_for_one_reason(
    scene: Any,
    logs: Any,
    reason: Reason,
    happens: Any,
    options: dict[str, Any],
    kind: str,
    place: str,
) -> None:
    """The same for the counters, observers, the connection, and ConnectionGone."""
    observer = Ends()
    s = await scene(kind, place, handlers=Obedient(), observer=observer, **options)
    assert s.connection.reason is None
    await happens(s)
    await until(lambda: s.is_over)
    assert observer.ended == [reason]
    assert observer.refused == []
    assert s.counters.ends == {reason.value: 1}
    assert s.counters.accepted == 1
    # The handler itself knows why its own connection is gone.
    known = None if happens is closes_the_reader else reason
    assert [e.reason for e in observer.gone] == [known] * len(observer.gone)
    assert len(s.errors) == (reason in (Reason.ERROR, Reason.TOO_OLD))


@everywhere("stream", places=("tcp", "tls", "memory"))
@ensureDeferred
async def test_connection_gone_has_the_reason(
    scene: Any, kind: str, place: str
) -> None:
    """Raised to a handler that writes on after the end, whatever that was."""
    raised: list[Any] = []

    class Writes(Handlers):
        async def stream(self, address: Any, reader: Any, writer: Any) -> None:
            self.started.append(writer)
            await reader.read()
            try:
                await writer.drain()
            except ConnectionGone as error:
                raised.append(error)

    for end, options, reason in (
        (closed, {}, Reason.CLOSED),
        (aborted, {}, Reason.ABORTED),
        (time_passes, {"lifetime": 2}, Reason.LIFETIME),
        (client_resets, {}, Reason.RESET),
    ):
        if place == "tls" and reason is Reason.RESET:
            continue
        s = await scene(kind, place, handlers=Writes(), **options)
        await end(s)
        await until(lambda s=s: s.is_over)
        (gone,) = raised
        raised.clear()
        assert gone.reason is reason
        assert str(gone).endswith(f"is gone: {reason.value}")


@ensureDeferred
async def test_a_drain_closes_what_is_left(scene: Any, logs: Any) -> None:
    """The connection has ended since the server did."""
    s = await scene("stream")
    drained = s.server.drain(timeout=1.0)
    for _ in range(3):
        s.clock.advance(1)
    await drained
    assert s.connection.reason is Reason.DRAINED


@implementer(IHalfCloseableProtocol)
class HalfCloseable(Protocol):
    """Loses its connection after the client's FIN."""

    def connectionMade(self) -> None:
        made.append(self)

    def readConnectionLost(self) -> None:
        self.transport.loseConnection()  # type: ignore[union-attr]

    def writeConnectionLost(self) -> None:
        pass


made: list[Any] = []


@everywhere("protocol", places=("tcp", "tcp-reactor", "unix", "memory"))
@pytest.mark.parametrize("first", ["client", "protocol"])
@ensureDeferred
async def test_a_protocol_that_is_half_closed(
    scene: Any, kind: str, place: str, first: str
) -> None:
    """Whose end came first is why."""

    class Half(Handlers):
        @property
        def protocol(self) -> Any:
            made.clear()
            self.started = made
            return Factory.forProtocol(HalfCloseable)

    s = await scene(kind, place, handlers=Half())
    if first == "client":
        s.client.shut()
    else:
        made[0].transport.loseConnection()
    await until(lambda: s.is_over)
    assert s.counters.ends == {"eof" if first == "client" else "finished": 1}


REFUSALS: list[tuple[Reason, dict[str, Any]]] = [
    (Reason.DROPPED, {"drop_incoming_connections": True}),
    (Reason.OVERFLOW, {"max_connections": 1, "overflow": "drop"}),
    (Reason.OVERFLOW, {"max_connections": 1, "overflow": "reset"}),
    (Reason.OVERFLOW, {"max_connections": 1, "overflow": Reply(b"full\n")}),
    (Reason.PEER_CONNECTIONS, {"max_connections_per_peer": 1}),
    (Reason.PEER_RATE, {"accept_rate_per_peer": "1/h"}),
    (Reason.DENIED, {"deny": ["127.0.0.0/8"]}),
    (Reason.DENIED, {"allow": ["10.0.0.0/8"]}),
]


@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@pytest.mark.parametrize(
    ("reason", "options"), REFUSALS, ids=lambda v: str(v) if isinstance(v, str) else ""
)
@ensureDeferred
async def test_a_client_is_refused_for_one_reason(
    serve: Any, connect: Any, kind: str, reason: Reason, options: dict[str, Any]
) -> None:
    """Counted and told, and nobody is accepted for it."""
    observer = Ends()
    create = {
        "stream": Server.create,
        "protocol": Server.create_protocol,
        "sock": Server.create_sock,
    }
    server = await serve(
        Handlers().of(kind), create=create[kind], observer=observer, **options
    )
    connect(server)
    if reason not in (Reason.DROPPED, Reason.DENIED):
        await until(lambda: server.num_connections == 1)
        connect(server)
    await until(lambda: observer.refused)
    assert observer.refused == [reason]
    assert reason.is_refusal
    counters = server._factory.counters
    assert counters.refusals == {reason.value: 1}
    assert counters.accepted == server.num_connections
    assert counters.ends == {}


@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@ensureDeferred
async def test_an_evicted_connection(serve: Any, connect: Any, kind: str) -> None:
    """It is the one that was idle for longest."""
    observer = Ends()
    handlers = Handlers()
    create = {
        "stream": Server.create,
        "protocol": Server.create_protocol,
        "sock": Server.create_sock,
    }
    server = await serve(
        handlers.of(kind),
        create=create[kind],
        observer=observer,
        max_connections=1,
        overflow="evict",
    )
    connect(server)
    await until(lambda: len(handlers.started) == 1)
    connect(server)
    await until(lambda: len(handlers.started) == 2)
    assert observer.ended == [Reason.EVICTED]
    assert server._factory.counters.ends == {"evicted": 1}


@ensureDeferred
async def test_unserved_connections(serve: Any, connect: Any) -> None:
    """The factory builds no protocol, or the server closes before the start."""

    class Builds(Factory):
        def buildProtocol(self, addr: Any) -> Any:
            return None

    observer = Ends()
    server = await serve(Builds(), create=Server.create_protocol, observer=observer)
    connect(server)
    await until(lambda: observer.refused)
    assert observer.refused == [Reason.UNSERVED]
    counters = server._factory.counters
    assert sum(counters.ends.values()) == counters.accepted


@pytest.mark.parametrize("seed", range(3))
@ensureDeferred
async def test_in_the_end_there_is_one_reason_for_each_accepted(
    serve: Any, connect: Any, seed: int
) -> None:
    """sum(ends) == accepted, of many that end in many ways at a time."""
    handlers = Obedient()
    server = await serve(handlers.stream, max_connections=100)
    lines = [
        b"finish\n",
        b"raise\n",
        b"abort\n",
        b"reader\n",
        b"drain\n",
        b"",
        b"eof\n",
    ]
    clients = []
    for n in range(70):
        client = connect(server)
        clients.append(client)
        client.send(lines[(n * (seed + 1)) % len(lines)] or b"x")
        if n % 3 == seed:
            client.reset()
        if n % 5 == seed:
            await turn()
    server.close(close_existing_connections=True)
    server.cancel_handlers()
    await server.close_finished_and_handlers_determined()
    counters = server._factory.counters
    assert sum(counters.ends.values()) == counters.accepted
    assert counters.finished + counters.left + counters.failed <= counters.accepted


def test_the_list_is_closed() -> None:
    """Each reason is its own text, and says whether it is a refusal."""
    assert all(str(r) == r.value == r for r in Reason)
    assert len({r.value for r in Reason}) == len(Reason)
    refusals = {r.value for r in Reason if r.is_refusal}
    assert refusals == {
        "dropped",
        "overflow",
        "peer_connections",
        "peer_rate",
        "accept_rate",
        "denied",
        "unserved",
        "shed",
    }
    assert {Reason(r) for r in LIMITS.values()} <= set(Reason)
