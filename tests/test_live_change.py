"""A server that is changed while it runs, and waited for."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IProtocolNegotiationFactory
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from tcpsvc import Observer, Rate, Reply, Server, ServerClosed, ServerFactory
from tcpsvc.networks import Networks
from tcpsvc.options import Options, StreamOptions
from tcpsvc.settings import Settings
from tcpsvc.testing import MemoryServer
from tests.anywhere import CREATE, Handlers
from tests.support import in_thread, settle, turn, until

KINDS = ("stream", "protocol", "sock")


def outcome(deferred: Any) -> list[Any]:
    """What a Deferred comes to, once it has."""
    results: list[Any] = []
    deferred.addCallbacks(results.append, lambda f: results.append(f.value))
    return results


# when_connections


@ensureDeferred
async def test_a_number_is_no_condition(serve: Any) -> None:
    """What is called with the number is asked for."""
    server = await serve(Handlers().stream)
    with pytest.raises(TypeError, match="condition=3 is not callable"):
        await server.when_connections(3)


@ensureDeferred
async def test_it_fires_now_or_later(serve: Any, connect: Any) -> None:
    """At the accept and at the release that make it so."""
    server = await serve(Handlers().stream)
    assert outcome(server.when_connections(lambda n: n == 0)) == [None]
    two = server.when_connections(lambda n: n >= 2)
    clients = [connect(server)]
    await server.when_connections(lambda n: n == 1)
    assert not two.called
    clients.append(connect(server))
    await two
    one = outcome(server.when_connections(lambda n: n < 2))
    clients[0].close()
    await until(lambda: one)
    assert server.num_connections == 1


@pytest.mark.parametrize("kind", KINDS)
@ensureDeferred
async def test_it_hears_of_each_change(serve: Any, connect: Any, kind: str) -> None:
    """Accepts, releases, and slots that are given back."""
    counts: list[int] = []
    handlers = Handlers()
    server = await serve(handlers.of(kind), create=CREATE[kind])
    waiting = server.when_connections(counts.append)
    for n in range(2):
        connect(server)
        await until(lambda n=n: len(handlers.started) == n + 1)
    server.connection(1).uncount()
    server.connection(2).close()
    server.connection(1).close()
    server.cancel_handlers()
    await until(lambda: not server.connections)
    assert counts[:4] == [0, 1, 2, 1]
    assert counts[-1] == 0
    waiting.addErrback(lambda f: f.trap(CancelledError))
    waiting.cancel()


def test_a_waiter_is_ones_own() -> None:
    """Cancelling one ends no other's waiting."""
    server = MemoryServer(Handlers().stream)
    waiters = [server.factory.when_connections(lambda n: n == 1) for _ in range(3)]
    results = [outcome(w) for w in waiters]
    waiters[1].cancel()
    assert isinstance(results[1][0], CancelledError)
    server.connect()
    assert (results[0], results[2]) == ([None], [None])
    assert not server.factory._conditions.waiting


def test_what_the_condition_raises_is_the_waiters_own() -> None:
    """Now or later; nobody else hears of it."""
    server = MemoryServer(Handlers().stream)

    def raises(n: int) -> bool:
        if n == 1:
            raise LookupError
        return False

    results = outcome(server.factory.when_connections(raises))
    other = outcome(server.factory.when_connections(lambda n: n == 1))
    client = server.connect()
    assert isinstance(results[0], LookupError)
    assert other == [None]
    assert isinstance(outcome(server.factory.when_connections(raises))[0], LookupError)
    client.send_eof()
    assert server.factory.num_connections == 0


@ensureDeferred
async def test_who_waits_is_told_that_the_number_will_never_come(
    serve: Any, connect: Any
) -> None:
    """And who asks afterwards; one that holds is answered at any time."""
    server = await serve(Handlers().stream)
    connect(server)
    await server.when_connections(lambda n: n == 1)
    none, many = (
        outcome(server.when_connections(condition))
        for condition in (lambda n: n == 0, lambda n: n > 1)
    )
    server.close(close_existing_connections=True)
    server.cancel_handlers()
    await server.close_finished_and_handlers_determined()
    assert none == [None]
    assert isinstance(many[0], ServerClosed)
    assert outcome(server.when_connections(lambda n: n == 0)) == [None]
    assert isinstance(
        outcome(server.when_connections(lambda n: n > 0))[0], ServerClosed
    )


def test_a_condition_may_cancel_its_own_waiter() -> None:
    """Or change the number as it is asked."""
    server = MemoryServer(Handlers().stream)
    waiters: list[Any] = []

    def cancels(n: int) -> bool:
        if n:
            waiters[0].cancel()
        return n > 0

    def closes(n: int) -> bool:
        if n:
            server.factory.close_connections()
        return n == 0 and bool(waiters)

    waiters.append(server.factory.when_connections(cancels))
    first = outcome(waiters[0])
    second = outcome(server.factory.when_connections(closes))
    server.connect()
    assert isinstance(first[0], CancelledError)
    assert len(second) == 1
    server.factory.invariant()


def test_what_one_waiter_does_the_next_is_asked_after() -> None:
    """A waiter fires only while what it waits for is so."""
    server = MemoryServer(Handlers().stream)
    fired: list[str] = []
    waiters = [
        server.factory.when_connections(lambda n: n == 2),
        server.factory.when_connections(lambda n: n == 2),
    ]

    def close_all(_: None) -> None:
        fired.append("first")
        server.factory.close_connections()

    waiters[0].addCallback(close_all)
    waiters[1].addCallback(lambda _: fired.append("second"))
    server.connect()
    server.connect()
    assert fired == ["first"]
    assert server.factory.num_connections == 0
    waiters[1].addErrback(lambda f: f.trap(CancelledError))
    waiters[1].cancel()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("engine", ["auto", "reactor"])
@pytest.mark.parametrize("kind", KINDS)
@ensureDeferred
async def test_the_server_may_be_closed_in_the_callback(
    serve: Any, connect: Any, kind: str, engine: str, existing: bool
) -> None:
    """In the middle of an accept: whoever came is not served after that (H5)."""
    handlers = Handlers()
    server = await serve(handlers.of(kind), create=CREATE[kind], engine=engine)
    server.when_connections(lambda n: n == 1).addCallback(
        lambda _: (server.close(close_existing_connections=existing), None)[1]
    )
    client = connect(server)
    await server.close_finished_and_handlers_determined()
    assert handlers.started == []
    assert server.num_connections == 0
    client.close()
    counters = server._factory.counters
    assert sum(counters.ends.values()) == counters.accepted


def test_held_ones_are_not_served_after_a_close_in_the_callback() -> None:
    """Nor are they left open."""
    handlers = Handlers()
    server = MemoryServer(handlers.stream, max_connections=1)
    first = server.connect()
    held = server.connect()
    counts: list[int] = []

    def closes(n: int) -> bool:
        counts.append(n)
        if counts == [1, 0, 1]:
            server.factory.close()
        return False

    waiting = server.factory.when_connections(closes)
    first.send_eof()
    assert counts[:3] == [1, 0, 1]
    assert held.is_closed
    assert len(handlers.started) == 1
    assert server.factory.when_over().called
    waiting.addErrback(lambda f: f.trap(CancelledError, ServerClosed))
    waiting.cancel()


def test_one_may_connect_in_the_callback() -> None:
    """As a slot becomes free."""
    server = MemoryServer(Handlers().stream, max_connections=1)
    client = server.connect()
    more: list[Any] = []
    server.factory.when_connections(lambda n: n == 0).addCallback(
        lambda _: more.append(server.connect())
    )
    client.send_eof()
    assert len(more) == 1
    assert server.factory.num_connections == 1
    server.factory.invariant()


# set_handler


class Answers:
    """Handlers of each kind that answer with a word."""

    def __init__(self, word: bytes) -> None:
        self.word = word
        self.started = 0
        self.factory: Any = None

    async def stream(self, address: Any, reader: Any, writer: Any) -> None:
        self.started += 1
        async for _ in reader:
            writer.write(self.word)

    async def sock(self, address: Any, client: Any) -> None:
        self.started += 1
        while True:
            try:
                if not client.recv(100):
                    return
                client.send(self.word)
            except BlockingIOError:
                await turn(0.001)

    @property
    def protocol(self) -> Any:
        answers = self

        class Answer(Protocol):
            def connectionMade(self) -> None:
                answers.started += 1

            def dataReceived(self, data: bytes) -> None:
                self.transport.write(answers.word)  # type: ignore[union-attr]

        class Ports(Factory):
            starts = stops = 0

            def startFactory(self) -> None:
                self.starts += 1

            def stopFactory(self) -> None:
                self.stops += 1

        self.factory = Ports.forProtocol(Answer)
        return self.factory


async def ask(client: Any) -> bytes:
    """What a client is answered."""
    await in_thread(client.send, b"?\n")
    answer: bytes = await in_thread(client.read, 3)
    return answer


@pytest.mark.parametrize("engine", ["auto", "reactor"])
@pytest.mark.parametrize("kind", KINDS)
@ensureDeferred
async def test_those_that_are_live_keep_their_handler(
    serve: Any, connect: Any, kind: str, engine: str
) -> None:
    """New ones have the new one; any number of times."""
    one, two = Answers(b"one"), Answers(b"two")
    server = await serve(getattr(one, kind), create=CREATE[kind], engine=engine)
    first = connect(server)
    assert await ask(first) == b"one"
    server.set_handler(getattr(two, kind))
    second = connect(server)
    assert await ask(second) == b"two"
    assert await ask(first) == b"one"
    server.set_handler(getattr(one, kind))
    assert await ask(connect(server)) == b"one"
    assert await ask(second) == b"two"


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("stream", None),
        ("stream", Factory()),
        ("protocol", Answers(b"").stream),
        ("protocol", None),
        ("protocol", Protocol),
        ("sock", 1),
    ],
)
@ensureDeferred
async def test_a_handler_of_another_kind_changes_nothing(
    serve: Any, connect: Any, kind: str, wrong: Any
) -> None:
    """It is a TypeError, and the next client is served as before."""
    one = Answers(b"one")
    server = await serve(getattr(one, kind), create=CREATE[kind])
    with pytest.raises(TypeError):
        server.set_handler(wrong)
    assert await ask(connect(server)) == b"one"


@ensureDeferred
async def test_protocol_factories_hear_of_their_ports(serve: Any) -> None:
    """doStart of the new one, doStop of the old one, doStop at the end."""
    one, two = Answers(b"one"), Answers(b"two")
    server = await serve(one.protocol, create=Server.create_protocol)
    first, second = one.factory, two.protocol
    assert (first.starts, first.numPorts) == (1, 1)
    server.set_handler(second)
    assert (first.stops, first.numPorts) == (1, 0)
    assert (second.starts, second.numPorts) == (1, 1)
    server.set_handler(second)
    assert second.numPorts == 1
    await server.close()
    assert (second.stops, second.numPorts) == (second.starts, 0)
    third = Answers(b"").protocol
    server.set_handler(third)
    assert third.starts == 0


@ensureDeferred
async def test_a_factory_that_does_not_start_is_not_taken(
    serve: Any, connect: Any
) -> None:
    """What was there goes on."""

    class Fails(Factory):
        def startFactory(self) -> None:
            raise LookupError

    one = Answers(b"one")
    server = await serve(one.protocol, create=Server.create_protocol)
    with pytest.raises(LookupError):
        server.set_handler(Fails())
    assert one.factory.numPorts == 1
    assert await ask(connect(server)) == b"one"


@implementer(IProtocolNegotiationFactory)
class Negotiates(Factory):
    def __init__(self, *names: bytes) -> None:
        self.names = list(names)

    def acceptableProtocols(self) -> list[bytes]:
        return self.names


def test_a_new_factory_negotiates_for_itself() -> None:
    """What TLS asks for its protocols (ALPN) is the one that serves."""
    factory = ServerFactory.of_protocols(Negotiates(b"h2"), on_handler_error="ignore")
    assert IProtocolNegotiationFactory(factory).acceptableProtocols() == [b"h2"]
    factory.set_handler(Negotiates(b"http/1.1"))
    assert IProtocolNegotiationFactory(factory).acceptableProtocols() == [b"http/1.1"]
    factory.set_handler(Factory())
    assert not IProtocolNegotiationFactory.providedBy(factory)
    factory.set_handler(Negotiates(b"h3"))
    assert IProtocolNegotiationFactory(factory).acceptableProtocols() == [b"h3"]


def test_one_that_is_held_keeps_the_handler_of_its_accept() -> None:
    """Accepted is accepted."""
    one, two = Answers(b"one"), Answers(b"two")
    server = MemoryServer(one.stream, max_connections=1)
    first = server.connect()
    held = server.connect()
    server.factory.set_handler(two.stream)
    first.send_eof()
    held.send(b"?\n")
    assert held.received == b"one"
    held.send_eof()
    last = server.connect()
    last.send(b"?\n")
    assert last.received == b"two"


# change


def log_accept_error(error: OSError, server: Any) -> None:
    """A hook."""


CHANGES: dict[str, tuple[Any, Any]] = {
    "max_connections": (7, 7),
    "max_accepts_per_batch": (3, 3),
    "backlog": (9, 9),
    "overflow": ("drop", "drop"),
    "refusal": (Reply(b"no"), Reply(b"no")),
    "max_connections_per_peer": (3, 3),
    "accept_rate_per_peer": ("5/s", Rate.parse("5/s")),
    "peer_prefixes": ((24, 48), (24, 48)),
    "accept_rate": ("5/s:9", Rate.parse("5/s:9")),
    "allow": (["127.0.0.0/8"], Networks(["127.0.0.0/8"])),
    "deny": (["10.0.0.0/8"], Networks(["10.0.0.0/8"])),
    "dry_run": (["deny"], frozenset({"deny"})),
    "first_byte_timeout": (1, 1),
    "idle_timeout": (2.5, 2.5),
    "handler_timeout": (3, 3),
    "lifetime": (4, 4),
    "min_throughput": (5, 5),
    "throughput_window": (6, 6),
    "on_exhaustion": ("shed", "shed"),
    "on_accept_error": (log_accept_error, log_accept_error),
    "eof_on_drain": (True, True),
    "keepalive": (True, True),
    "buffer_age_limit": (None, None),
    "flush_timeout": (8, 8),
    "reader_buffer_size": (9, 9),
    "writer_buffer_size": (10, 10),
}
UNCHANGEABLE = {
    "engine": "reactor",
    "drop_incoming_connections": True,
    "socket": None,
    "reactor": None,
    "clock": None,
    "observer": None,
    "on_handler_error": "raise",
    "handler": None,
    "backlogs": 1,
}


def test_every_option_is_one_or_the_other() -> None:
    """What can be changed, and what not."""
    assert set(CHANGES) | set(UNCHANGEABLE) >= set(StreamOptions.__optional_keys__)
    assert set(CHANGES) <= set(Settings.__slots__)


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_can_be_changed(option: str) -> None:
    """In any form in which it may be given."""
    server = MemoryServer(Handlers().stream)
    given, meant = CHANGES[option]
    server.factory.change({option: given})
    found = getattr(server.factory.settings, option)
    assert found == meant or str(found) == str(meant)
    json.dumps(server.factory.describe())
    server.factory.invariant()


@pytest.mark.parametrize("option", UNCHANGEABLE)
def test_these_cannot(option: str) -> None:
    """A TypeError that names it, and nothing is changed."""
    server = MemoryServer(Handlers().stream)
    before = server.factory.settings
    with pytest.raises(TypeError, match=option):
        server.factory.change({"max_connections": 5, option: UNCHANGEABLE[option]})
    assert server.factory.settings is before


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("observer", "add_observer"),
        ("handler", "set_handler"),
        ("drop_incoming_connections", "set_drop_incoming_connections"),
        ("engine", "new server"),
        ("reactor", "new server"),
        ("clock", "new server"),
        ("socket", "new server"),
        ("on_handler_error", "new server"),
        ("backlogs", "no option"),
    ],
)
def test_what_cannot_be_changed_says_what_to_do(option: str, remedy: str) -> None:
    """What there is instead, beside the value."""
    server = MemoryServer(Handlers().stream)
    value = UNCHANGEABLE[option]
    with pytest.raises(TypeError, match=rf"^{option}={value!r} .*{remedy}"):
        server.factory.change({option: value})
    assert server.factory.max_connections != 5


@pytest.mark.parametrize("kind", ["of_protocols", "of_socks"])
@pytest.mark.parametrize(
    "option", sorted(StreamOptions.__optional_keys__ - Options.__optional_keys__)
)
def test_options_of_streams_are_of_no_other_kind(kind: str, option: str) -> None:
    """Neither at first nor later."""
    handler = Factory() if kind == "of_protocols" else Handlers().sock
    factory = getattr(ServerFactory, kind)(handler, on_handler_error="ignore")
    with pytest.raises(TypeError, match=option):
        factory.change({option: 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"lifetime": 0},
        {"lifetime": "1"},
        {"max_connections": 0},
        {"overflow": "sometimes"},
        {"accept_rate": "fast"},
        {"deny": ["nowhere"]},
        {"dry_run": ["keepalive"]},
        {"min_throughput": -1},
        {"throughput_window": None},
        {"peer_prefixes": (0, 129)},
    ],
)
@ensureDeferred
async def test_all_of_them_or_none(serve: Any, wrong: dict[str, Any]) -> None:
    """One that is wrong is named, and the others are not taken either."""
    server = await serve(Handlers().stream)
    before = server.describe()["options"]
    (name,) = wrong
    for changes in ({"keepalive": True, **wrong}, {**wrong, "keepalive": True}):
        with pytest.raises((ValueError, TypeError), match=name):
            server.change(**changes)
    assert server.describe()["options"] == before
    server.change()
    assert server.describe()["options"] == before


@ensureDeferred
async def test_a_larger_limit_lets_those_who_wait_in_at_once(
    serve: Any, connect: Any
) -> None:
    """And a lowered one closes nobody."""
    handlers = Handlers()
    server = await serve(handlers.stream, max_connections=1)
    clients = [connect(server) for _ in range(3)]
    await until(lambda: len(handlers.started) == 1)
    server.change(max_connections=3)
    await until(lambda: len(handlers.started) == 3)
    server.change(max_connections=1)
    server.invariant()
    assert server.num_connections == 3
    clients.append(connect(server))
    await turn()
    assert len(handlers.started) == 3
    server.change(overflow="drop")
    assert await in_thread(clients[3].read_all) == b""
    server.change(max_connections=None)
    assert server.max_connections > 3


@ensureDeferred
async def test_who_is_let_in_is_decided_at_the_next_accept(
    serve: Any, connect: Any
) -> None:
    """Those that are there stay."""
    handlers = Handlers()
    server = await serve(handlers.stream)
    connect(server)
    await until(lambda: len(handlers.started) == 1)
    server.change(deny=["127.0.0.1"], refusal="drop")
    assert await in_thread(connect(server).read_all) == b""
    assert server.num_connections == 1
    server.change(deny=(), max_connections_per_peer=1)
    assert await in_thread(connect(server).read_all) == b""
    assert server._factory.counters.refusals == {"denied": 1, "peer_connections": 1}
    server.change(max_connections_per_peer=None)
    connect(server)
    await until(lambda: len(handlers.started) == 2)


@ensureDeferred
async def test_keepalive_and_buffer_sizes_are_of_new_connections(
    serve: Any, connect: Any
) -> None:
    """Those that are there keep theirs."""
    handlers = Handlers()
    server = await serve(handlers.stream)
    connect(server)
    await until(lambda: len(handlers.started) == 1)
    server.change(keepalive=True, writer_buffer_size=7, reader_buffer_size=8)
    connect(server)
    await until(lambda: len(handlers.started) == 2)

    def of(writer: Any) -> tuple[Any, ...]:
        opened = writer.transport.getHandle()
        keepalive = opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return keepalive, writer._limit, writer.connection.reader._limit

    assert [of(w) for w in handlers.started] == [(0, 131072, 131072), (1, 7, 8)]


@ensureDeferred
async def test_keepalive_is_of_last_words_too(serve: Any, connect: Any) -> None:
    """N6: of all that can be changed it alone concerns them."""
    server = await serve(Handlers().stream, max_connections=1, overflow=Reply(b"full"))
    connect(server)
    await until(lambda: server.num_connections == 1)
    kept_alive: list[int] = []
    replies = server._factory.replies
    connected = replies.connected

    def look(connection: Any) -> None:
        option = socket.SOL_SOCKET, socket.SO_KEEPALIVE
        kept_alive.append(connection._socket.getsockopt(*option))
        connected(connection)

    replies.connected = look
    assert await in_thread(connect(server).read_all) == b"full"
    server.change(keepalive=True)
    assert await in_thread(connect(server).read_all) == b"full"
    assert kept_alive == [0, 1]


def test_the_age_limit_and_the_flush_timeout_are_of_live_connections_too() -> None:
    """The one at the next look, the other at the next close."""
    handlers = Handlers(reads=False)
    server = MemoryServer(handlers.stream)
    clients = [server.connect(is_reading=False) for _ in range(2)]
    handlers.started[0].write(b"x")
    server.clock.advance(1)
    server.factory.change({"buffer_age_limit": 3, "flush_timeout": 2})
    for _ in range(4):
        server.clock.advance(1)
    assert clients[0].is_closed
    server.factory.change({"buffer_age_limit": None})
    handlers.started[1].write(b"x")
    handlers.end.callback(None)
    for _ in range(4):
        server.clock.advance(1)
    assert server.factory.counters.ends == {"too_old": 1, "flush_timeout": 1}


@ensureDeferred
async def test_a_change_of_something_else_lets_nobody_in_before_its_time(
    serve: Any, connect: Any
) -> None:
    """accept_rate, beside a dry run of another limit."""
    from twisted.internet.task import Clock

    clock = Clock()
    handlers = Handlers()
    server = await serve(
        handlers.stream, clock=clock, accept_rate="1/m", dry_run=["deny"]
    )
    for _ in range(2):
        connect(server)
    await until(lambda: len(handlers.started) == 1)
    server.change(lifetime=1000)
    server.change(max_accepts_per_batch=10)
    await settle()
    assert len(handlers.started) == 1
    clock.advance(61)
    await until(lambda: len(handlers.started) == 2)
    server.change(accept_rate=None)
    connect(server)
    await until(lambda: len(handlers.started) == 3)


def test_a_change_in_the_middle_of_an_event() -> None:
    """Of an observer's."""

    class Changes(Observer):
        def limit_reached(self, limit: str) -> None:
            server.factory.change(
                {"max_connections": server.factory.max_connections * 2}
            )

    server = MemoryServer(Handlers().stream, max_connections=1, observer=Changes())
    for _ in range(5):
        server.connect()
    assert server.factory.num_connections == 5
    assert server.factory.max_connections == 8
    server.factory.invariant()


@ensureDeferred
async def test_a_closed_server_can_be_changed_without_effect(serve: Any) -> None:
    """Nothing opens again, and no timer is left."""
    server = await serve(Handlers().stream)
    await server.close()
    server.change(max_connections=5, lifetime=1, accept_rate="1/s")
    server.set_handler(Handlers().stream)
    await turn()
    assert server.is_closed
    done: Deferred[None] = server.close_finished_and_handlers_determined()
    await done
