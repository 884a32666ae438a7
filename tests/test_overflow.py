"""What becomes of clients that come when ``max_connections`` are there."""

from __future__ import annotations

import socket
import ssl
from itertools import product
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent
from twisted.protocols.policies import WrappingFactory

from tcpsvc import LOCALHOST, Observer, Reason, Reply, Server, ServerFactory
from tcpsvc.testing import MemoryServer
from tests.kinds import KINDS, Raising, Seen, Staying, echoes, end_of, is_refused, place
from tests.support import (
    PATIENCE,
    Client,
    in_thread,
    settle,
    the_reactor,
    turn,
    until,
)
from tests.tls import client_context

BUSY = Reply(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
#: How a client that is sent away sees each of the ways, on TCP.
SEEN = {"drop": (b"", "eof"), "reset": (b"", "reset"), "reply": (BUSY.data, "eof")}
WAYS: dict[str, Any] = {"drop": "drop", "reset": "reset", "reply": BUSY}


def refusals(server: Any) -> Any:
    """How many clients were sent away, by the reason."""
    return server.describe()["counters"]["refusals"]


def ends(server: Any) -> Any:
    """How many connections have ended, by the reason."""
    return server.describe()["counters"]["ends"]


# Sent away


@ensureDeferred
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["tcp", "unix", "endpoint"])
@pytest.mark.parametrize("kind", KINDS)
async def test_clients_beyond_the_limit_are_sent_away(
    kind: str,
    where: str,
    way: str,
    serve: Any,
    connect: Any,
    staying: Staying,
    tmp_path: Any,
) -> None:
    """Exactly as was chosen; those within the limit see nothing of it."""
    seen = Seen()
    server = await serve(
        KINDS[kind].make(staying),
        where=place(where, tmp_path),
        create=KINDS[kind].create,
        max_connections=2,
        overflow=WAYS[way],
        observer=seen,
    )
    connect(server)
    connect(server)
    await until(lambda: len(staying.started) == 2)
    assert server.num_connections == 2
    expected = SEEN[way]
    if where == "unix" and way == "reset":
        expected = (b"", "eof")  # There is no reset where nothing is unread.
    for number in range(1, 4):
        client = connect(server)
        assert await in_thread(end_of, client) == expected
        assert refusals(server) == {"overflow": number}
        assert server.num_connections == 2
        server.invariant()
    assert [reason for _, reason in seen.of("connection_refused")] == [
        Reason.OVERFLOW
    ] * 3
    if where != "unix":
        port = seen.of("connection_refused")[-1][0].port
        assert port == client.socket.getsockname()[1]
    assert len(staying.started) == 2
    assert server.describe()["counters"]["accepted"] == 2


@ensureDeferred
@pytest.mark.parametrize("way", WAYS)
async def test_a_freed_slot_lets_the_next_client_in(
    full: Any, way: str, connect: Any
) -> None:
    """Who was sent away holds none."""
    server, first = await full(overflow=WAYS[way])
    for _ in range(3):
        await in_thread(end_of, connect(server))
    first.shut()
    await until(lambda: not server.num_connections)
    second = connect(server)
    assert await echoes(second)


@ensureDeferred
@pytest.mark.parametrize("engine", ["auto", "reactor"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_spoke_first_reads_the_whole_reply(
    full: Any, kind: str, engine: str
) -> None:
    """An HTTP request that nobody reads must not make a reset of it."""
    server, _ = await full(kind=kind, overflow=Reply(b"x" * 4096), engine=engine)

    def ask() -> Any:
        client = Client(server)
        client.send(b"POST / HTTP/1.1\r\n\r\n" + b"body" * 5000)
        answer = end_of(client)
        client.close()
        return answer

    for _ in range(20):
        assert await in_thread(ask) == (b"x" * 4096, "eof")


@ensureDeferred
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["stream", "protocol"])
async def test_tls_clients_are_sent_away(
    kind: str, way: str, serve: Any, connect: Any, staying: Staying, tmp_path: Any
) -> None:
    """The gate is below TLS: without a word there is no handshake; a word is said
    within TLS."""
    server = await serve(
        KINDS[kind].make(staying),
        where=place("tls", tmp_path),
        create=KINDS[kind].create,
        max_connections=1,
        overflow=WAYS[way],
    )

    def speak() -> Any:
        address = (LOCALHOST, server.listening_on_address.port)
        # It may be reset before it knows that it is connected.
        try:
            with (
                socket.create_connection(address, PATIENCE) as raw,
                client_context().wrap_socket(raw) as client,
            ):
                return end_of(client)
        except ConnectionResetError:
            return b"", "reset"
        except ssl.SSLEOFError:
            return b"", "eof"

    connect(server)
    await until(lambda: staying.started)
    for number in range(1, 4):
        assert await in_thread(speak) == SEEN[way]
        assert refusals(server) == {"overflow": number}
    await until(lambda: not server._factory.replies._connections)


@ensureDeferred
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("kind", ["stream", "protocol"])
async def test_on_a_port_that_cannot_be_gated(
    kind: str,
    bare: bool,
    way: str,
    serve: Any,
    connect: Any,
    staying: Staying,
    tmp_path: Any,
    logs: Any,
) -> None:
    """The factory does it by itself."""
    options = {"max_connections": 1, "overflow": WAYS[way]}
    port = None
    if bare:
        factory = server = KINDS[kind].of(
            KINDS[kind].make(staying), on_handler_error="ignore", **options
        )
        port = await TCP4ServerEndpoint(the_reactor(), 0, interface=LOCALHOST).listen(
            factory
        )
        address = port.getHost()
    else:
        server = await serve(
            KINDS[kind].make(staying),
            where=place("ungated", tmp_path),
            create=KINDS[kind].create,
            **options,
        )
        address = server.listening_on_address
    connect(address)
    await until(lambda: staying.started)
    for number in range(1, 4):
        client = connect(address)
        client.send(b"hello")
        got = await in_thread(end_of, client)
        assert got[0] == SEEN[way][0]
        if way != "drop":  # With unread input a plain close may reset.
            assert got == SEEN[way]
        assert refusals(server) == {"overflow": number}
        assert server.num_connections == 1
    if port is not None:
        await port.stopListening()
        server.close()
        await server.close_connections()


@pytest.mark.parametrize("kind", ["stream", "protocol"])
@pytest.mark.parametrize("way", WAYS)
def test_in_memory(kind: str, way: str, staying: Staying) -> None:
    """The same in users' tests."""
    make = MemoryServer if kind == "stream" else MemoryServer.of_protocols
    server = make(KINDS[kind].make(staying), max_connections=1, overflow=WAYS[way])
    first = server.connect()
    second = server.connect()
    assert second.is_closed
    assert second.was_reset is (way == "reset")
    assert second.received == SEEN[way][0]
    assert not first.is_closed
    assert server.factory.counters.refusals == {"overflow": 1}
    server.factory.invariant()


# Replies


@ensureDeferred
async def test_more_than_256_replies_at_a_time_are_resets(
    serve: Any, staying: Staying, logs: Any
) -> None:
    """Each costs a descriptor. All are counted, and those that were begun go on."""
    clock = Clock()
    server = await serve(
        staying.stream,
        max_connections=1,
        overflow=BUSY,
        backlog=500,
        max_accepts_per_batch=100,
        clock=clock,
        engine="auto",  # Twisted's transports have read what they sent by then.
    )
    clients = [Client(server) for _ in range(1)]
    await until(lambda: staying.started)
    try:
        # Who has sent something and does not close is waited for.
        for _ in range(300):
            clients.append(Client(server))
            clients[-1].send(b"unread" * 1000)  # More than is read before.
        await until(lambda: refusals(server) == {"overflow": 300})
        await settle()
        seen = [await in_thread(end_of, client) for client in clients[1:]]
        assert seen.count(SEEN["reply"]) == 256
        assert [s for s in seen if s != SEEN["reply"]] == [(b"", "reset")] * 44
        # Those who leave make room.
        for client in clients[1:]:
            client.close()
        late = Client(server)
        clients.append(late)
        await settle()
        assert await in_thread(end_of, late) == SEEN["reply"]
    finally:
        for client in clients:
            client.close()


@ensureDeferred
async def test_who_does_not_take_its_reply_is_let_go_of_after_5_s(
    full: Any, connect: Any, logs: Any
) -> None:
    """A client that has sent something and never closes holds a descriptor, not for
    long."""
    clock = Clock()
    server, _ = await full(overflow=BUSY, clock=clock, engine="auto")
    slow = connect(server)
    slow.send(b"unread" * 1000)  # More than is read before.
    await until(lambda: refusals(server) == {"overflow": 1})
    await settle()
    assert await in_thread(slow.read, len(BUSY.data)) == BUSY.data
    slow.send(b"more and more")
    replies = server._factory.replies
    assert len(replies._connections) == 1
    clock.pump([1.0] * 4)
    await settle()
    assert len(replies._connections) == 1
    clock.pump([1.0] * 2)
    await settle()
    assert len(replies._connections) == 0
    assert clock.getDelayedCalls() == []
    logs.take(LogLevel.info)


@ensureDeferred
async def test_a_tls_client_that_never_shakes_hands_is_let_go_of(
    full: Any, tmp_path: Any, connect: Any
) -> None:
    """What cannot be said holds nothing for long."""
    clock = Clock()
    server, _ = await full(
        where=place("tls", tmp_path), overflow=BUSY, clock=clock, buffer_age_limit=1.0
    )
    silent = connect(server)
    await until(lambda: refusals(server) == {"overflow": 1})
    await settle()
    clock.pump([1.0] * 6)
    assert (await in_thread(end_of, silent))[0] == b""
    assert not server._factory.replies._connections


@ensureDeferred
@pytest.mark.parametrize("existing", [False, True])
async def test_a_close_does_not_wait_for_replies(
    full: Any, existing: bool, connect: Any
) -> None:
    """They are closed with it; what the kernel took arrives."""
    server, first = await full(overflow=BUSY)
    replied, unreplied = connect(server), connect(server)
    replied.send(b"unread")
    await until(lambda: refusals(server) == {"overflow": 2})
    await settle()
    await server.close(close_existing_connections=existing)
    assert (await in_thread(end_of, replied))[0] == BUSY.data
    await in_thread(end_of, unreplied)
    first.shut()
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_a_reply_that_a_wrapping_factory_prevents_is_not_the_next_clients(
    full: Any, connect: Any, logs: Any
) -> None:
    """The wrapper refuses, or fails: what was to be said is forgotten."""

    class Moody(WrappingFactory):
        mood = ""

        def buildProtocol(self, addr: Any) -> Any:
            if self.mood == "refuses":
                return None
            if self.mood == "fails":
                raise ValueError(self.mood)
            built = super().buildProtocol(addr)
            if self.mood == "fails later":
                raise ValueError(self.mood)
            return built

    wrappers: list[Moody] = []

    class Endpoint:
        def listen(self, factory: Any) -> Any:
            wrappers.append(Moody(factory))
            return TCP4ServerEndpoint(the_reactor(), 0, interface=LOCALHOST).listen(
                wrappers[0]
            )

    from twisted.internet.interfaces import IStreamServerEndpoint
    from zope.interface import directlyProvides

    from tcpsvc import WhereToListen

    endpoint = Endpoint()
    directlyProvides(endpoint, IStreamServerEndpoint)
    server, first = await full(where=WhereToListen.of_endpoint(endpoint), overflow=BUSY)
    for number, mood in enumerate(["refuses", "fails", "fails later"], 1):
        wrappers[0].mood = mood
        await in_thread(end_of, connect(server))
        await until(lambda number=number: refusals(server) == {"overflow": number})
    wrappers[0].mood = ""
    assert not server._factory.replies._connections
    first.shut()
    await until(lambda: not server.num_connections)
    served = connect(server)
    assert await echoes(served)
    logs.take(LogLevel.critical)


def test_what_a_reply_may_be() -> None:
    """Bytes, and not too many."""
    Reply(b"x"), Reply(b"x" * 4096)
    for wrong in (b"", b"x" * 4097):
        with pytest.raises(ValueError, match="bytes: not 1 to 4096"):
            Reply(wrong)
    for kind in ("text", bytearray(b"x"), None, 5):
        with pytest.raises(TypeError, match="not bytes"):
            Reply(kind)  # type: ignore[arg-type]


@ensureDeferred
async def test_refusals_are_logged_once_a_minute(
    full: Any, connect: Any, logs: Any
) -> None:
    """And counted each time."""
    clock = Clock()
    server, _ = await full(overflow="drop", clock=clock)

    async def refuse(number: int) -> None:
        for _ in range(number):
            await in_thread(end_of, connect(server))

    await refuse(3)
    clock.advance(59)
    await refuse(2)
    lines = [t for t in logs.texts(LogLevel.warn) if "refusing" in t]
    assert len(lines) == 1 and "overflow, 1 so far (max_connections=1)" in lines[0]
    clock.advance(1)
    await refuse(2)
    lines = [t for t in logs.texts(LogLevel.warn) if "refusing" in t]
    assert len(lines) == 2 and "overflow, 6 so far" in lines[1]


# Changed


@ensureDeferred
async def test_those_who_wait_are_sent_away_when_that_is_chosen(
    full: Any, connect: Any
) -> None:
    """From ``"hold"`` on: those in the backlog are the next clients; nobody who is
    there is closed. And back."""
    server, first = await full()
    waiting = [connect(server) for _ in range(3)]
    await settle()
    server.change(overflow="drop")
    for client in waiting:
        assert await in_thread(end_of, client) == (b"", "eof")
    server.change(overflow="hold")
    held = connect(server)
    held.send(b"hello")
    await settle()
    assert server.num_connections == 1
    assert await echoes(first)
    first.shut()
    assert await in_thread(held.read, 5) == b"hello"
    assert refusals(server) == {"overflow": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("overflow", "refuse"),
        ("overflow", None),
        ("overflow", b"bytes"),
        ("overflow", ["drop"]),
        ("refusal", "hold"),
        ("refusal", "evict"),
        ("refusal", None),
    ],
)
@ensureDeferred
async def test_a_way_that_is_none_is_refused(name: str, value: Any, serve: Any) -> None:
    """Before anything is bound, and before anything is changed."""
    await is_refused(serve, ValueError, name, value)


# Evicted


@ensureDeferred
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *product(KINDS, ["tcp", "unix"]),
        # These have no plain sockets.
        *product(["stream", "protocol"], ["tls", "ungated"]),
    ],
)
async def test_the_longest_idle_is_evicted(
    kind: str,
    where: str,
    serve: Any,
    connect: Any,
    staying: Staying,
    tmp_path: Any,
    logs: Any,
) -> None:
    """Its client reads EOF, its handler is cancelled, and the newcomer is served."""
    clock = Clock()
    seen = Seen()
    server = await serve(
        KINDS[kind].make(staying),
        where=place(where, tmp_path),
        create=KINDS[kind].create,
        max_connections=2,
        overflow="evict",
        clock=clock,
        observer=seen,
    )
    clients = []
    for number in range(1, 6):
        clients.append(connect(server))
        await until(lambda number=number: len(staying.started) == number)
        clock.advance(1)
        assert server.num_connections == min(number, 2)
        server.invariant()
    for client in clients[:3]:
        assert (await in_thread(end_of, client))[0] == b""
    await until(lambda: ends(server) == {"evicted": 3})
    if kind != "stream":  # Which has read EOF, and ended.
        assert len(staying.cancelled) == 3
    assert refusals(server) == {}
    finished = [c.id for (c,) in seen.of("connection_finished")]
    assert finished == [1, 2, 3]
    assert "connection_refused" not in seen.names()


async def come(
    server: Any, connect: Any, staying: Staying, n: int, clock: Clock | None = None
) -> list[Any]:
    """So many clients, one after the other; on a clock, a second apart."""
    clients = []
    for number in range(1, n + 1):
        clients.append(connect(server))
        await until(lambda number=number: len(staying.started) == number)
        if clock is not None:
            clock.advance(1)
    return clients


@ensureDeferred
async def test_active_ones_are_spared(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """It is idleness that counts, not age."""
    clock = Clock()
    server = await serve(
        staying.stream, max_connections=3, overflow="evict", clock=clock
    )
    active = connect(server)
    idle = connect(server)
    await until(lambda: len(staying.started) == 2)
    third = connect(server)
    for _ in range(5):
        clock.advance(1)
        assert await echoes(active)
        clock.advance(1)
        assert await echoes(third)
    newcomer = connect(server)
    assert await echoes(newcomer)
    assert await in_thread(end_of, idle) == (b"", "eof")
    assert await echoes(active)
    assert ends(server) == {"evicted": 1}


@ensureDeferred
async def test_activity_since_the_ranking_spares_too(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """A ranking is used up within its second, but not blindly."""
    clock = Clock()
    server = await serve(
        staying.stream, max_connections=3, overflow="evict", clock=clock
    )
    first, second, third = await come(server, connect, staying, 3)
    clock.advance(10)
    connect(server)
    await until(lambda: len(staying.started) == 4)
    assert await in_thread(end_of, first) == (b"", "eof")
    assert await echoes(second)
    clock.advance(0.5)
    connect(server)
    assert await in_thread(end_of, third) == (b"", "eof")
    await until(lambda: len(staying.started) == 5)
    assert await echoes(second)


class Stubborn:
    """Handlers that take their time when they are cancelled."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.ends: dict[int, Deferred[None]] = {}

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        number = reader._connection.id
        self.started.append(number)
        writer.write(b"!")
        self.ends[number] = Deferred()
        try:
            await Deferred()
        except CancelledError:
            self.cancelled.append(number)
        await self.ends[number]


@pytest.fixture
def stubborn() -> Any:
    """Their handler; all end with the test."""
    made = Stubborn()
    yield made
    for ending in made.ends.values():
        if not ending.called:
            ending.callback(None)


@pytest.fixture
def evicting(serve: Any, connect: Any, stubborn: Stubborn) -> Any:
    """``await evicting(n)``: a server that evicts them, of so many slots, and a client
    in each."""

    async def evicting(slots: int = 1) -> tuple[Any, list[Any]]:
        server = await serve(stubborn, max_connections=slots, overflow="evict")
        clients = [connect(server) for _ in range(slots)]
        await until(lambda: stubborn.started == list(range(1, slots + 1)))
        return server, clients

    return evicting


@ensureDeferred
async def test_a_newcomer_starts_when_the_slot_is_really_free(
    evicting: Any, connect: Any, stubborn: Stubborn
) -> None:
    """In their order; the limit holds at each moment; nobody is evicted twice."""
    server, old = await evicting(2)
    third = connect(server)
    await until(lambda: stubborn.cancelled == [1])
    fourth = connect(server)
    await until(lambda: stubborn.cancelled == [1, 2])
    assert server.num_connections == 2
    assert server.describe()["held"] == 2
    # Everybody has been evicted: further ones wait in the backlog.
    fifth, sixth = connect(server), connect(server)
    await settle()
    assert server.describe()["held"] == 2
    assert not server._listeners.ports[0]._gate._is_accepting
    assert stubborn.started == [1, 2]
    for client in old:
        assert await in_thread(end_of, client) == (b"!", "eof")
    server.invariant()
    stubborn.ends[2].callback(None)
    await until(lambda: stubborn.started == [1, 2, 3])
    await until(lambda: stubborn.cancelled == [1, 2, 3])
    stubborn.ends[1].callback(None)
    await until(lambda: stubborn.started == [1, 2, 3, 4])
    for client in (third, fourth):  # Evicted in turn: what was not sent is not.
        assert (await in_thread(end_of, client))[0] in (b"", b"!")
    assert server.num_connections == 2
    for number in (3, 4):
        await until(lambda number=number: number in stubborn.cancelled)
        stubborn.ends[number].callback(None)
    assert await in_thread(fifth.read, 1) == b"!"
    assert await in_thread(sixth.read, 1) == b"!"
    assert stubborn.cancelled == sorted(set(stubborn.cancelled))
    server.invariant()


@ensureDeferred
async def test_one_slot_that_never_gets_free(
    evicting: Any, connect: Any, stubborn: Stubborn
) -> None:
    """One newcomer is accepted, the rest wait in the backlog; nothing spins."""
    server, _ = await evicting()
    newcomers = [connect(server) for _ in range(5)]
    await until(lambda: stubborn.cancelled == [1])
    await settle()
    assert server.describe()["held"] == 1
    assert server.num_connections == 1
    assert not server._listeners.ports[0]._gate._is_accepting
    asked = []
    server._factory.entrance.has_place = lambda: asked.append(1)
    await settle()
    assert not asked
    del server._factory.entrance.has_place
    await server.close()
    for client in newcomers:
        assert (await in_thread(end_of, client))[0] == b""
    assert refusals(server) == {"unserved": 1}
    assert stubborn.started == [1]


@ensureDeferred
async def test_dropping_sends_newcomers_away_that_wait(
    evicting: Any, connect: Any, stubborn: Stubborn
) -> None:
    """Accepted or not."""
    server, _ = await evicting()
    newcomers = [connect(server) for _ in range(3)]
    await until(lambda: server.describe()["held"] == 1)
    server.set_drop_incoming_connections(True)
    for client in newcomers:
        assert await in_thread(end_of, client) == (b"", "eof")
    assert refusals(server) == {"dropped": 3}
    server.set_drop_incoming_connections(False)
    stubborn.ends[1].callback(None)
    last = connect(server)
    assert await in_thread(last.read, 1) == b"!"


@ensureDeferred
async def test_a_newcomer_that_leaves_while_it_waits_takes_nobodys_place(
    evicting: Any, connect: Any, stubborn: Stubborn
) -> None:
    """The one after it is served."""
    server, _ = await evicting()
    second, third = connect(server), connect(server)
    await until(lambda: server.describe()["held"] == 1)
    second.reset()
    await settle()
    stubborn.ends[1].callback(None)
    await until(lambda: len(stubborn.started) > 1)
    if 2 in stubborn.started:
        await until(lambda: 2 in stubborn.cancelled)
        stubborn.ends[2].callback(None)
    assert await in_thread(third.read, 1) == b"!"
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("kind", KINDS)
async def test_nobody_is_evicted_before_its_start(
    kind: str, serve: Any, connect: Any, staying: Staying
) -> None:
    """Not even in a batch of clients for one slot."""
    server = await serve(
        KINDS[kind].make(staying),
        create=KINDS[kind].create,
        max_connections=1,
        max_accepts_per_batch=10,
        overflow="evict",
    )
    clients = [connect(server) for _ in range(5)]
    await until(lambda: ends(server) == {"evicted": 4})
    await until(lambda: len(staying.started) == 5)
    for client in clients[:4]:
        assert (await in_thread(end_of, client))[0] == b""
    ports = [client.socket.getsockname()[1] for client in clients]
    assert [address.port for address in staying.started] == ports
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("kind", ["stream", "protocol"])
async def test_one_that_is_evicted_before_its_start_never_starts(
    kind: str, serve: Any, connect: Any, staying: Staying, tmp_path: Any, logs: Any
) -> None:
    """Nobody would cancel its handler. A port that cannot be gated accepts many at
    once."""
    server = await serve(
        KINDS[kind].make(staying),
        create=KINDS[kind].create,
        where=place("ungated", tmp_path),
        max_connections=1,
        overflow="evict",
    )
    clients = [connect(server) for _ in range(5)]
    await until(lambda: ends(server) == {"evicted": 4})
    await settle()
    assert len(staying.started) - len(staying.cancelled) <= 1
    for client in clients[:4]:
        assert (await in_thread(end_of, client))[0] == b""
    assert ends(server) == {"evicted": 4}
    assert server.describe()["counters"]["accepted"] == 5
    assert staying.started[-1].port == clients[4].socket.getsockname()[1]
    server.invariant()


@ensureDeferred
async def test_no_more_are_evicted_than_are_needed(
    evicting: Any, connect: Any, stubborn: Stubborn
) -> None:
    """A slot that is about to be free, and that nobody waits for, is enough."""
    server, clients = await evicting(3)
    connect(server)
    await until(lambda: stubborn.cancelled == [1])
    # The third ends by itself: the newcomer has its slot.
    clients[2].close()
    server.connection(3).cancel_handler()
    stubborn.ends[3].callback(None)
    await until(lambda: stubborn.started == [1, 2, 3, 4])
    assert stubborn.cancelled == [1, 3]
    connect(server)
    await until(lambda: server.describe()["held"] == 1)
    await settle()
    assert stubborn.cancelled == [1, 3]
    stubborn.ends[1].callback(None)
    await until(lambda: stubborn.started == [1, 2, 3, 4, 5])


@ensureDeferred
async def test_under_a_lowered_limit_as_many_go_as_a_newcomer_needs(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """The lowering itself closes nobody."""
    clock = Clock()
    server = await serve(
        staying.stream, max_connections=5, overflow="evict", clock=clock
    )
    await come(server, connect, staying, 5, clock)
    server.change(max_connections=2)
    await settle()
    assert server.num_connections == 5
    newcomer = connect(server)
    assert await echoes(newcomer)
    assert server.num_connections == 2
    assert ends(server) == {"evicted": 4}
    server.invariant()


@ensureDeferred
async def test_uncounted_ones_are_not_evicted(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """Not even if they were counted when all were ranked."""
    clock = Clock()
    server = await serve(
        staying.stream, max_connections=3, overflow="evict", clock=clock
    )
    clients = await come(server, connect, staying, 3, clock)
    server.connection(1).uncount()
    clients.append(connect(server))
    await until(lambda: len(staying.started) == 4)
    assert ends(server) == {}
    clock.advance(10)
    clients.append(connect(server))  # Ranks them, and has the second one go.
    await until(lambda: len(staying.started) == 5)
    assert await in_thread(end_of, clients[1]) == (b"", "eof")
    server.connection(3).uncount()
    clients.append(connect(server))
    await until(lambda: len(staying.started) == 6)
    assert ends(server) == {"evicted": 1}
    clients.append(connect(server))
    await until(lambda: len(staying.started) == 7)
    assert await in_thread(end_of, clients[3]) == (b"", "eof")
    for client in (clients[0], clients[2]):
        assert await echoes(client)
    server.invariant()


@ensureDeferred
async def test_an_evicted_one_that_gives_its_slot_back_is_not_waited_for(
    evicting: Any, connect: Any, stubborn: Stubborn
) -> None:
    """``uncount`` of one that was evicted and does not end lets the newcomer in, and
    further ones can still evict that."""
    server, _ = await evicting()
    connect(server)
    await until(lambda: server.describe()["held"] == 1)
    server.connection(1).uncount()
    await until(lambda: stubborn.started == [1, 2])
    connect(server)
    await until(lambda: stubborn.cancelled == [1, 2])
    stubborn.ends[2].callback(None)
    await until(lambda: stubborn.started == [1, 2, 3])
    assert server.num_connections == 1
    server.invariant()


@ensureDeferred
async def test_evicting_does_not_rank_all_for_each_newcomer(
    serve: Any, staying: Staying, monkeypatch: Any
) -> None:
    """A flood of newcomers among active connections costs a look at few of them."""
    clock = Clock()
    server = MemoryServer(
        staying.stream, max_connections=200, overflow="evict", clock=clock
    )
    clients = [server.connect() for _ in range(200)]
    looks = 0
    look = type(server.factory.connections[0]).look

    def counted(self: Any, now: float) -> float:
        nonlocal looks
        looks += 1
        return look(self, now)

    monkeypatch.setattr(type(server.factory.connections[0]), "look", counted)
    clock.advance(5)
    for _ in range(100):
        for client in clients:
            if not client.is_closed:
                client.send(b"x")
        clients.append(server.connect())
    assert server.factory.counters.ends == {"evicted": 100}
    assert looks < 2000
    server.factory.invariant()


@ensureDeferred
async def test_the_ranking_holds_nobody_that_has_gone(staying: Staying) -> None:
    """Whoever waits for evicted connections to be collected must not wait for the
    next flood."""
    import gc
    import weakref

    server = MemoryServer(staying.stream, max_connections=20, overflow="evict")
    clients = [server.connect() for _ in range(20)]
    server.clock.advance(5)
    clients.append(server.connect())
    refs = [weakref.ref(c) for c in server.factory.connections]
    for client in clients:
        client.reset()
    del client
    clients.clear()
    server.clock.advance(1)
    assert server.factory.num_connections == 0
    await turn()
    gc.collect()
    assert [r() for r in refs if r() is not None] == []


@ensureDeferred
async def test_a_close_in_the_middle_of_an_eviction(
    serve: Any, connect: Any, logs: Any
) -> None:
    """The evicted handler's last act closes the server: the newcomer's handler does
    not start (H5)."""
    started = []
    servers: list[Any] = []

    async def handler(address: Any, client: Any) -> None:
        started.append(address)
        try:
            await Deferred()
        finally:
            servers[0].close()

    server = await serve(handler, create=Server.create_sock, max_connections=1)
    servers.append(server)
    server.change(overflow="evict")
    connect(server)
    await until(lambda: started)
    newcomer = connect(server)
    assert (await in_thread(end_of, newcomer))[0] == b""
    await server.close_finished_and_handlers_determined()
    assert len(started) == 1
    server.invariant()


class ClosesAtAccept(Observer):
    """Closes the server when a connection is accepted."""

    server: Any = None

    def connection_accepted(self, connection: Any) -> None:
        if self.server is not None:
            self.server.close()


@ensureDeferred
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [False, True])
async def test_a_close_by_an_observer_starts_no_handler(
    kind: str, held: bool, serve: Any, connect: Any, staying: Staying, monkeypatch: Any
) -> None:
    """H5, also for a newcomer that is let in after it has waited."""
    observer = ClosesAtAccept()
    server = await serve(
        KINDS[kind].make(staying),
        create=KINDS[kind].create,
        max_connections=1,
        overflow="evict",
        observer=observer,
    )
    if held:
        connect(server)
        await until(lambda: staying.started)
        # It does not end at once.
        taken = server._factory.connections[0]
        monkeypatch.setattr(type(taken), "end", lambda self, reason: None)
    before = len(staying.started)
    observer.server = server
    newcomer = connect(server)
    if held:
        await until(lambda: server.describe()["held"])
        taken.close()
        taken.cancel_handler()
    assert (await in_thread(end_of, newcomer))[0] == b""
    await server.close_finished_and_handlers_determined()
    assert len(staying.started) == before
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("overflow", ["drop", "evict", BUSY])
async def test_an_observer_that_raises_harms_nobody(
    full: Any, overflow: Any, connect: Any, logs: Any
) -> None:
    """It is logged each time, and that is all."""
    server, first = await full(overflow=overflow, observer=Raising())
    second = connect(server)
    if overflow == "evict":
        assert await in_thread(end_of, first) == (b"", "eof")
        assert await echoes(second)
    else:
        assert (await in_thread(end_of, second))[1] == "eof"
        assert await echoes(first)
    assert {"ObserverError"} == {
        e["log_failure"].type.__name__ for e in logs.take(LogLevel.critical)
    }
    await server.close(close_existing_connections=True)
    await server.close_finished_and_handlers_determined()
    logs.take(LogLevel.critical)


@ensureDeferred
async def test_a_protocol_that_builds_none_frees_its_slot(
    serve: Any, connect: Any
) -> None:
    """With evict and without: it never had a handler."""
    built = []

    class Unwilling(Factory):
        def buildProtocol(self, addr: Any) -> Any:
            built.append(addr)
            return None if len(built) > 1 else Protocol()

    server = await serve(
        Unwilling(),
        create=Server.create_protocol,
        max_connections=1,
        overflow="evict",
    )
    connect(server)
    await until(lambda: server.num_connections)
    second = connect(server)
    assert await in_thread(end_of, second) == (b"", "eof")
    await until(lambda: not server.num_connections)
    assert refusals(server) == {"unserved": 1}
    assert ends(server) == {"evicted": 1}
    server.invariant()


def loud(logs: Any) -> list[str]:
    """The lines above debug that name a client."""
    return [
        formatEvent(e)
        for e in logs.events
        if "client" in e
        and e["log_level"] in (LogLevel.info, LogLevel.warn, LogLevel.error)
    ]


@pytest.mark.parametrize("limit", ["flush_timeout", "buffer_age_limit"])
@ensureDeferred
async def test_who_does_not_take_its_bytes_is_no_line_each(
    serve: Any, connect: Any, logs: Any, limit: str
) -> None:
    """One in a minute, with how many there were; the others are at debug."""
    clock = Clock()

    async def much(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 10_000_000)

    options: dict[str, Any] = {"flush_timeout": 1000.0, limit: 5.0}
    server = await serve(much, clock=clock, **options)
    counters = server._factory.counters

    async def five() -> None:
        for _ in range(5):
            connect(server)
        await until(lambda: server.num_connections == 5)
        await until(lambda: {c.handler for c in server.connections} == {"finished"})
        for _ in range(40):
            # What a kernel on a busy machine takes late puts the end off.
            clock.advance(1)
            await settle()
            if server.num_connections == 0:
                break
        assert server.num_connections == 0

    await five()
    assert len(loud(logs)) == 1
    assert len([t for t in logs.texts(LogLevel.debug) if "so far" in t]) == 4
    clock.advance(60)
    await five()
    assert len(loud(logs)) == 2
    assert "6 so far" in loud(logs)[-1]
    assert counters.too_old + counters.aborted == 10


@ensureDeferred
async def test_who_does_not_take_its_last_word_is_no_line_each(
    serve: Any, connect: Any, logs: Any
) -> None:
    """It is refused, which has a line of its own, once in a minute."""
    clock = Clock()
    # The reactor's own transports read what comes before the reply, and then there is
    # nothing that the client could be waited for.
    server = await serve(
        Staying().stream,
        clock=clock,
        engine="auto",
        overflow=Reply(b"busy"),
        max_connections=1,
    )
    connect(server)
    await until(lambda: server.num_connections == 1)
    replies = server._factory.replies._connections
    clients = [connect(server) for _ in range(5)]
    for client in clients:
        client.send(b"I go on" * 2000)  # More than is read before the reply.
    await until(lambda: len(replies) == 5)
    await until(lambda: all(c._discarded for c in replies.values()))
    clock.pump([1] * 8)
    await until(lambda: not replies)
    assert loud(logs) == []
    assert len([t for t in logs.texts(LogLevel.warn) if "refusing clients" in t]) == 1


@ensureDeferred
async def test_a_factory_of_sockets_that_listens_alone_is_no_line_each(
    connect: Any, logs: Any
) -> None:
    """What is wrong is said, with what to do, and not for each client."""
    factory = ServerFactory.of_socks(Staying().sock, on_handler_error="ignore")
    port = the_reactor().listenTCP(0, factory, interface=LOCALHOST)
    for _ in range(5):
        connect(port.getHost())
    await until(lambda: factory.counters.refused == 5)
    assert len(loud(logs)) == 1
    assert "Server.create_sock" in loud(logs)[0]
    await port.stopListening()
