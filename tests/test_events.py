"""What happens in a server, told to its observers."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyClass, verifyObject

from tcpsvc import IObserver, Observer, Reason, ServerFactory, WhereToListen
from tcpsvc.counters import Counters
from tcpsvc.testing import MemoryServer
from tests.anywhere import CREATE, Handlers, everywhere
from tests.kinds import end_of
from tests.support import LOOPBACK, in_thread, until
from tests.tls import tls_endpoint

EVENTS = [name for name in IObserver.names() if not name.startswith("_")]


class Notes(Observer):
    """Notes all it hears, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    @property
    def names(self) -> list[Any]:
        """The events."""
        return [event[0] for event in self.heard]


def _noting(event: str) -> Any:
    def note(self: Notes, *told: Any) -> None:
        self.heard.append((event, *told))

    return note


for _event in EVENTS:
    setattr(Notes, _event, _noting(_event))


class Fails(Observer):
    """Raises at each event."""


def _fail(self: Any, *told: Any) -> None:
    raise LookupError("an observer's own")


for _event in EVENTS:
    setattr(Fails, _event, _fail)


# Their kind


def test_an_observer_is_one_of_each_method() -> None:
    """What is derived from, and what counts, provide the interface."""
    assert verifyClass(IObserver, Observer)
    assert verifyObject(IObserver, Observer())
    assert verifyObject(IObserver, Notes())
    assert verifyObject(IObserver, Counters())
    assert all(getattr(Observer(), name) for name in EVENTS)


class NoObserver:
    pass


@implementer(IObserver)
class Incomplete:
    def connection_accepted(self, connection: Any) -> None:
        pass


class WrongArguments(Observer):
    def connection_accepted(self) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    "wrong", [NoObserver(), Incomplete(), WrongArguments(), Observer, 1]
)
@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@ensureDeferred
async def test_a_wrong_observer_is_refused_before_anything_is_bound(
    serve: Any, tmp_path: Any, kind: str, wrong: Any
) -> None:
    """And what it lacks is said."""
    from tcpsvc import WhereToListen

    where = WhereToListen.of_file(tmp_path / "s")
    with pytest.raises(ValueError, match=r"observer=.*tcpsvc\.Observer") as caught:
        await serve(
            Handlers().of(kind), where=where, create=CREATE[kind], observer=wrong
        )
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "s").exists()
    server = MemoryServer(Handlers().stream)
    with pytest.raises(ValueError, match="is no IObserver"):
        server.factory.add_observer(wrong)
    assert not server.factory.is_observed


# What they are told


@everywhere(places=("tcp", "tcp-reactor", "unix", "tls", "memory"))
@ensureDeferred
async def test_the_events_of_a_life(scene: Any, kind: str, place: str) -> None:
    """In order, each with the same connection."""
    notes = Notes()
    s = await scene(kind, place, observer=notes)
    assert notes.heard == [
        ("connection_accepted", s.connection),
        ("handler_started", s.connection),
    ]
    s.clock.advance(2.0)
    s.connection.close()
    s.factory.cancel_handlers()
    await until(lambda: s.is_over)
    outcome, failure = notes.heard[2][2:]
    assert notes.heard[2:] == [
        ("handler_ended", s.connection, outcome, failure),
        ("connection_finished", s.connection),
    ]
    assert outcome == ("left" if kind == "sock" else "finished")
    assert (failure is None) == (outcome == "finished")


@everywhere(places=("tcp", "memory"))
@ensureDeferred
async def test_the_slot_is_still_taken_as_it_is_told_to_be_finished(
    scene: Any, kind: str, place: str
) -> None:
    """What is over is told before the error, and before the next is let in."""
    seen: list[Any] = []

    class Looks(Observer):
        def handler_ended(self, connection: Any, outcome: str, failure: Any) -> None:
            seen.append((outcome, s.factory.num_connections, connection.is_over))

        def connection_finished(self, connection: Any) -> None:
            seen.append(("finished", s.factory.num_connections, connection.is_over))
            assert s.errors == []

    s = await scene(kind, place, observer=Looks())
    s.connection.close()
    s.factory.cancel_handlers()
    await until(lambda: s.is_over)
    assert seen[1:] == [("finished", 1, True)]
    assert s.factory.num_connections == 0


def test_a_failed_handler() -> None:
    """With its failure; it is over before that is reported."""
    notes = Notes()
    order: list[str] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        raise LookupError

    class Ordered(Observer):
        def connection_finished(self, connection: Any) -> None:
            order.append("finished")

    server = MemoryServer(
        handler,
        observer=notes,
        on_handler_error=lambda *_: order.append("reported"),
    )
    server.factory.add_observer(Ordered())
    server.connect()
    event, connection, outcome, failure = notes.heard[2]
    assert (event, outcome) == ("handler_ended", "failed")
    assert isinstance(failure, Failure)
    assert failure.check(LookupError)
    assert connection.reason is Reason.ERROR
    assert order == ["finished", "reported"]


@pytest.mark.parametrize("engine", ["auto", "reactor"])
@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@ensureDeferred
async def test_clients_that_are_not_let_in(
    serve: Any, connect: Any, kind: str, engine: str
) -> None:
    """With their addresses; and the limit, once each time it is reached."""
    notes = Notes()
    handlers = Handlers()
    server = await serve(
        handlers.of(kind),
        create=CREATE[kind],
        observer=notes,
        engine=engine,
        max_connections=1,
        overflow="reset",
        dry_run=["lifetime"],
    )
    connect(server)
    await until(lambda: handlers.started)
    refused = connect(server)
    port = refused.socket.getsockname()[1]
    await until(lambda: "connection_refused" in notes.names)
    (told,) = [e for e in notes.heard if e[0] == "connection_refused"]
    assert told[1].port == port
    assert told[2] is Reason.OVERFLOW
    assert notes.heard[0] == ("limit_reached", "max_connections")
    assert notes.names.count("limit_reached") == 1
    assert set(notes.names) <= set(EVENTS)


def test_what_a_dry_run_lets_pass() -> None:
    """With the address of who would have been refused."""
    notes = Notes()
    server = MemoryServer(
        Handlers().stream, observer=notes, max_connections=1, dry_run=True
    )
    server.connect()
    server.connect()
    dry = [e for e in notes.heard if e[0] == "refused_in_dry_run"]
    assert [e[2] for e in dry] == [Reason.OVERFLOW]


def test_a_limit_in_a_dry_run_is_not_reached(logs: Any) -> None:
    """N5: nobody waits, and nobody is refused; nor does the log say so."""
    notes = Notes()
    server = MemoryServer(
        Handlers().stream,
        observer=notes,
        max_connections=1,
        accept_rate="1/s:1",
        dry_run=True,
    )
    for _ in range(3):
        server.connect()
    assert "limit_reached" not in notes.names
    assert not [text for text in logs.texts() if "further clients wait" in text]


@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@ensureDeferred
async def test_the_rate_is_a_limit_that_is_reached(
    serve: Any, connect: Any, kind: str
) -> None:
    """N3: each time it makes clients wait, however many and for however many."""
    clock, notes, handlers = Clock(), Notes(), Handlers()
    server = await serve(
        handlers.of(kind),
        create=CREATE[kind],
        clock=clock,
        observer=notes,
        accept_rate="1/s:2",
    )

    def reached() -> list[Any]:
        return [e[1] for e in notes.heard if e[0] == "limit_reached"]

    connect(server)
    await until(lambda: len(handlers.started) == 1)
    assert reached() == []
    for _ in range(3):
        connect(server)
    await until(lambda: len(handlers.started) == 2)
    assert reached() == ["accept_rate"]
    server.change(accept_rate="1/s:1")  # They wait already.
    assert reached() == ["accept_rate"]
    clock.advance(1)
    await until(lambda: len(handlers.started) == 3)
    assert reached() == ["accept_rate"] * 2
    clock.advance(1)
    await until(lambda: len(handlers.started) == 4)
    assert reached() == ["accept_rate"] * 3
    clock.advance(10)
    assert reached() == ["accept_rate"] * 3
    assert server.describe()["counters"]["refusals"] == {}


def test_the_rate_is_reached_where_clients_are_held() -> None:
    """N3: on a port that cannot be gated they wait accepted; and by a change."""
    clock, notes = Clock(), Notes()
    server = MemoryServer(
        Handlers().stream, clock=clock, observer=notes, accept_rate="1/s:1"
    )
    for _ in range(3):
        server.connect()
    assert notes.heard[0] == ("limit_reached", "accept_rate")
    assert notes.names.count("limit_reached") == 1
    server.factory.change({"accept_rate": None})
    assert notes.names.count("connection_accepted") == 3
    server.factory.change({"accept_rate": "1/s:1"})
    assert notes.names.count("limit_reached") == 1
    server.connect()
    assert notes.names.count("limit_reached") == 2


def test_a_peers_limit_is_told_by_its_refusals() -> None:
    """N2: it is reached for one peer, not for clients at large."""
    notes = Notes()
    server = MemoryServer(
        Handlers().stream,
        observer=notes,
        max_connections_per_peer=1,
        accept_rate_per_peer="1/s:1",
    )
    server.connect()
    server.connect()
    assert "limit_reached" not in notes.names
    assert notes.names.count("connection_refused") == 1


# Several, and changes


def test_several_are_told_in_the_order_of_their_adding() -> None:
    """The counters before all; one that was added twice hears twice."""
    heard: list[Any] = []

    class Named(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def connection_accepted(self, connection: Any) -> None:
            heard.append((self.name, server.factory.counters.accepted))

    one, two = Named("one"), Named("two")
    server = MemoryServer(Handlers().stream, observer=one)
    server.factory.add_observer(two)
    server.factory.add_observer(one)
    server.connect()
    assert heard == [("one", 1), ("two", 1), ("one", 1)]
    server.factory.remove_observer(one)
    server.factory.remove_observer(one)
    with pytest.raises(ValueError, match="was not added"):
        server.factory.remove_observer(one)
    server.connect()
    assert heard[3:] == [("two", 2)]
    server.factory.remove_observer(two)
    assert not server.factory.is_observed
    assert server.factory.events is server.factory.counters
    server.connect()
    assert len(heard) == 4


def test_one_may_leave_or_bring_another_in_the_middle_of_an_event() -> None:
    """From the next event on."""
    notes = Notes()

    class Comes(Observer):
        def connection_accepted(self, connection: Any) -> None:
            server.factory.remove_observer(self)
            server.factory.add_observer(notes)

    server = MemoryServer(Handlers().stream, observer=Comes())
    server.connect()
    assert notes.names == ["handler_started"]


def test_one_that_is_added_later_hears_the_rest() -> None:
    """And what a connection has moved before is known to it."""
    for make in (MemoryServer, MemoryServer.of_protocols):
        seen: list[Any] = []

        class Final(Observer):
            def connection_finished(self, connection: Any, seen: Any = seen) -> None:
                seen.append((connection.bytes_in, connection.age))

        handlers = Handlers()
        server = make(handlers.stream if make is MemoryServer else handlers.protocol)
        client = server.connect()
        client.send(b"four")
        server.clock.advance(3)
        server.factory.add_observer(Final())
        client.send_eof()
        assert seen == [(4, 3.0)]


# Those that fail


@everywhere(places=("tcp", "tcp-reactor", "tls", "memory"))
@ensureDeferred
async def test_an_observer_that_raises_harms_nobody(
    scene: Any, logs: Any, kind: str, place: str
) -> None:
    """It is logged, with the event; the others hear it."""
    notes = Notes()
    s = await scene(kind, place, observer=Fails(), on_handler_error="raise")
    s.factory.add_observer(notes)
    s.connection.close()
    s.factory.cancel_handlers()
    await until(lambda: s.is_over)
    assert notes.names == ["handler_ended", "connection_finished"]
    assert s.counters.ends == {"closed": 1}
    assert not s.factory.is_closed
    taken = logs.take(LogLevel.critical)
    assert {e["event"] for e in taken if "event" in e} >= {
        "connection_accepted",
        "handler_started",
        "handler_ended",
        "connection_finished",
    }
    assert all(e["log_failure"].check(LookupError) for e in taken)


@pytest.mark.parametrize(
    ("event", "limits"),
    [
        ("limit_reached", {"max_connections": 1}),
        ("limit_reached", {"accept_rate": "1/s:1"}),
        ("connection_accepted", {}),
        ("handler_started", {}),
        ("handler_ended", {}),
        ("connection_finished", {}),
    ],
)
def test_one_may_close_the_server_in_the_middle_of_an_event(
    event: str, limits: Any
) -> None:
    """Of any; everything ends once, and nobody is served after it."""

    class Closes(Observer):
        pass

    def close(self: Any, *_: Any) -> None:
        server.factory.close()
        server.factory.close_connections()

    setattr(Closes, event, close)
    handlers = Handlers()
    server = MemoryServer(handlers.stream, observer=Closes(), **limits)
    client = server.connect()
    if not client.is_closed:
        client.send_eof()
    assert server.factory.when_over().called
    counters = server.factory.counters
    assert sum(counters.ends.values()) == counters.accepted
    assert counters.accepted + counters.refused == 1
    assert bool(counters.refused) is (event == "limit_reached")
    if event in ("limit_reached", "connection_accepted"):
        assert handlers.started == []


@pytest.mark.parametrize("kind", ["of_streams", "of_protocols", "of_socks"])
def test_a_factory_takes_an_observer(kind: str) -> None:
    """Also one that an application listens with itself."""
    handler = Factory() if kind == "of_protocols" else Handlers().stream
    make = getattr(ServerFactory, kind)
    factory = make(handler, on_handler_error="ignore", observer=Observer())
    assert factory.is_observed
    with pytest.raises(ValueError, match="observer"):
        make(handler, on_handler_error="ignore", observer=NoObserver())


@ensureDeferred
async def test_server_add_and_remove_observer(serve: Any, connect: Any) -> None:
    """While it serves."""
    notes = Notes()
    server = await serve(Handlers().stream)
    server.add_observer(notes)
    client = connect(server)
    await until(lambda: notes.names == ["connection_accepted", "handler_started"])
    server.remove_observer(notes)
    client.close()
    await until(lambda: server.num_connections == 0)
    assert len(notes.names) == 2
    with pytest.raises(ValueError, match="was not added"):
        server.remove_observer(notes)


@pytest.mark.parametrize("kind", ["stream", "protocol"])
@pytest.mark.parametrize("place", ["tcp", "tcp-reactor", "tls", "tls-reactor"])
@pytest.mark.parametrize("what", ["close", "abort", "end", "server", "drain"])
@pytest.mark.parametrize(
    "event", ["limit_reached", "connection_accepted", "handler_started"]
)
@ensureDeferred
async def test_whoever_is_told_of_a_connection_may_end_it(
    serve: Any,
    connect: Any,
    tmp_path: Any,
    event: str,
    what: str,
    place: str,
    kind: str,
) -> None:
    """Under TLS too, which is in the midst of its own beginning then."""

    class Ends(Observer):
        pass

    def end(self: Any, *_: Any) -> None:
        for one in server._factory.connections:
            {"close": one.close, "abort": one.abort}.get(what, lambda: None)()
            if what == "end":
                one.end(Reason.EVICTED)
        if what == "server":
            server.close(close_existing_connections=True)
        elif what == "drain":
            server.force_drain()

    setattr(Ends, event, end)
    where: Any = LOOPBACK
    if place.startswith("tls"):
        where = WhereToListen.of_endpoint(tls_endpoint(tmp_path))
    server = await serve(
        Handlers().of(kind),
        where=where,
        create=CREATE[kind],
        observer=Ends(),
        max_connections=1,
        engine="reactor" if place.endswith("reactor") else "auto",
    )
    client = connect(server)
    _, how = await in_thread(end_of, client)
    assert how in ("eof", "reset")
    await until(lambda: not server._factory.connections)
    server.invariant()
