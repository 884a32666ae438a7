"""Connections as things: what is known of each, and what may be done to one."""

from __future__ import annotations

import json
import select
import socket
import struct
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from zope.interface.verify import verifyObject

from tcpsvc import ConnectionSnapshot, IConnection, Observer, Reason, Server, kernel
from tcpsvc.testing import MemoryServer
from tests.anywhere import CREATE, Handlers, everywhere
from tests.support import in_thread, the_reactor, turn, until

EVERYWHERE = ("tcp", "tcp-reactor", "unix", "unix-reactor", "tls", "memory")


# Snapshots


@everywhere()
@ensureDeferred
async def test_every_field_of_a_snapshot(scene: Any, kind: str, place: str) -> None:
    """Of a connection that runs."""
    s = await scene(kind, place)
    s.clock.advance(7.0)
    (snapshot,) = (c.snapshot() for c in s.factory.connections)
    assert isinstance(snapshot, ConnectionSnapshot)
    assert snapshot.id == s.connection.id == 1
    assert snapshot.peer is s.connection.peer
    assert snapshot.age == s.connection.age == 7.0
    assert snapshot.handler == "running"
    assert snapshot.socket == "open"
    assert snapshot.holds_slot is True
    assert snapshot.label is None
    assert snapshot.reason is None
    if place.startswith("unix") and kind == "sock":
        assert (snapshot.bytes_in, snapshot.bytes_out) == (None, None)
    elif not (place.startswith("tls") and kind == "protocol"):
        assert (snapshot.bytes_in, snapshot.bytes_out) == (0, 0)
        await s.send(b"four")
        s.write(b"seven..")
        await until(lambda: s.connection.snapshot().bytes_out == 7)
        assert s.connection.snapshot().bytes_in == 4
        assert (s.connection.bytes_in, s.connection.bytes_out) == (4, 7)
    with pytest.raises(FrozenInstanceError):
        snapshot.label = "mine"  # type: ignore[misc]
    verifyObject(IConnection, s.connection)


@everywhere()
@ensureDeferred
async def test_what_is_idle_is_known_without_a_sweep_and_with_one(
    scene: Any, kind: str, place: str
) -> None:
    """By the clock that the server has."""
    if kind == "sock" and place.startswith("unix"):
        pytest.skip("nobody knows")
    for options in ({}, {"lifetime": 1000.0}):
        s = await scene(kind, place, **options)
        s.clock.advance(1.0)
        await s.send(b"x")
        # It is seen when it is looked at.
        s.clock.advance(1.0)
        assert s.connection.snapshot().idle <= 1.0
        for _ in range(5):
            s.clock.advance(1.0)
        assert s.connection.snapshot().idle == pytest.approx(5.0, abs=0.1)
        assert s.connection.snapshot().age == 7.0
        s.clock.advance(1.0)
        await s.push(b"x")
        assert s.connection.snapshot().idle <= 1.0
        if s.server is not None:
            s.client.close()
            await s.server.close(close_existing_connections=True)
            s.factory.cancel_handlers()


@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@ensureDeferred
async def test_by_the_reactors_clock_the_kernel_knows_what_is_idle(
    serve: Any, connect: Any, kind: str
) -> None:
    """Though nobody has looked at it meanwhile."""
    handlers = Handlers()
    server = await serve(handlers.of(kind), create=CREATE[kind])
    client = connect(server)
    await until(lambda: handlers.started)
    sent = the_reactor().seconds()
    client.send(b"x")
    await until(lambda: server.connections[0].bytes_in == 1)
    seen = the_reactor().seconds()
    # Nobody looks, in between.
    await turn(0.15)
    least = the_reactor().seconds() - seen
    snapshot = server.connections[0]
    idle = snapshot.idle
    # The kernel's ticks are up to 10 ms.
    assert least - 0.02 <= idle <= the_reactor().seconds() - sent + 0.02
    assert snapshot.age >= idle


@everywhere(places=EVERYWHERE)
@ensureDeferred
async def test_a_description_is_of_json(scene: Any, kind: str, place: str) -> None:
    """What nobody knows is left out of it."""
    s = await scene(kind, place)
    described = json.loads(json.dumps(s.connection.describe()))
    assert set(described) >= {"id", "peer", "age", "idle", "handler", "socket"}
    assert set(described) <= {f.name for f in fields(ConnectionSnapshot)}
    assert "label" not in described and "reason" not in described
    s.connection.label = ("a", object())
    s.connection.close()
    described = json.loads(json.dumps(s.connection.describe()))
    assert described["label"].startswith("('a', <object")
    assert described["reason"] == "closed"
    assert described["socket"] == "closed"
    if s.server is not None:
        json.dumps(s.server.describe())


@everywhere(places=EVERYWHERE)
@ensureDeferred
async def test_a_connection_that_has_ended_meanwhile(
    scene: Any, kind: str, place: str
) -> None:
    """What was taken of it says what was; it itself what has become of it."""
    s = await scene(kind, place)
    before = s.connection.snapshot()
    s.clock.advance(3.0)
    s.connection.close()
    s.factory.cancel_handlers()
    await until(lambda: s.is_over)
    assert (before.handler, before.socket, before.reason) == ("running", "open", None)
    after = s.connection.snapshot()
    assert after.handler in ("finished", "left")
    assert after.socket == "closed"
    assert after.holds_slot is False
    assert after.reason is Reason.CLOSED
    json.dumps(s.connection.describe())
    repr(s.connection)
    assert s.factory.connections == []
    with pytest.raises(KeyError):
        s.factory.connection(before.id)


@ensureDeferred
async def test_connections_stand_in_the_order_of_their_accepts(
    serve: Any, connect: Any
) -> None:
    """And each can be found by its number."""
    server = await serve(Handlers().stream)
    clients = []
    for n in range(3):
        clients.append(connect(server))
        await until(lambda n=n: server.num_connections == n + 1)
    snapshots = server.connections
    assert isinstance(snapshots, tuple)
    assert [c.id for c in snapshots] == [1, 2, 3]
    ports = [c.socket.getsockname()[1] for c in clients]
    assert [c.peer.port for c in snapshots] == ports
    assert [server.connection(n).peer.port for n in (1, 2, 3)] == ports
    for missing in (0, 4, None):
        with pytest.raises(KeyError):
            server.connection(missing)  # type: ignore[arg-type]


# Labels


@everywhere("stream", places=("tcp", "tls", "memory"))
@ensureDeferred
async def test_a_handler_sets_its_label(scene: Any, kind: str, place: str) -> None:
    """By its reader or its writer, which both know the connection."""

    class Labels(Handlers):
        async def stream(self, address: Any, reader: Any, writer: Any) -> None:
            assert reader.connection is writer.connection
            assert writer.connection.label is None
            reader.connection.label = f"user {await reader.readline()!r}"
            self.started.append(writer)
            await self.wait()
            assert reader.connection is writer.connection

    handlers = Labels()
    server = MemoryServer(handlers.stream)
    server.connect().send(b"Bob\n")
    assert server.factory.connections[0].snapshot().label == "user b'Bob\\n'"
    handlers.end.callback(None)
    assert server.factory.counters.finished == 1


# What may be done to one


@pytest.mark.parametrize("how", ["close", "abort"])
@everywhere()
@ensureDeferred
async def test_a_connection_is_ended_from_outside(
    scene: Any, kind: str, place: str, how: str
) -> None:
    """Twice is once; and what is over stays so."""
    s = await scene(kind, place)
    getattr(s.connection, how)()
    getattr(s.connection, how)()
    s.connection.close()
    s.factory.cancel_handlers()
    await until(lambda: s.is_over)
    for _ in range(2):
        s.connection.close()
        s.connection.abort()
        s.connection.uncount()
    await turn()
    assert s.counters.ends == {"closed" if how == "close" else "aborted": 1}
    assert s.errors == []
    assert s.factory.num_connections == 0
    s.factory.invariant()
    if place == "memory":
        assert s.client._client.is_closed
        assert s.client._client.was_reset is (how == "abort")
    elif how == "close":
        assert await in_thread(s.client.read_all) == b""
    else:
        # A UNIX socket, and TLS over a reset one, may only say that it is over.
        try:
            await in_thread(s.client.read_all)
        except (ConnectionResetError, OSError):
            return
        assert place.startswith(("unix", "tls"))


@pytest.mark.parametrize("how", ["close", "abort", "uncount"])
@everywhere("stream", places=("tcp", "tcp-reactor", "unix", "tls", "memory"))
@ensureDeferred
async def test_a_handler_does_it_to_its_own(
    scene: Any, kind: str, place: str, how: str
) -> None:
    """And goes on; its streams are as after any end."""
    heard: list[Any] = []

    class Does(Handlers):
        async def stream(self, address: Any, reader: Any, writer: Any) -> None:
            self.started.append(writer)
            await reader.readexactly(1)
            getattr(writer.connection, how)()
            getattr(writer.connection, how)()
            heard.append(writer.is_closed)
            await self.wait()
            if how != "uncount":
                heard.append(await reader.read())

    s = await scene(kind, place, handlers=Does())
    await in_thread(s.client.send, b"x")
    await until(lambda: heard)
    assert s.factory.num_connections == (how != "uncount")
    assert heard == [how != "uncount"]
    s.handlers.end.callback(None)
    s.client.close()
    await until(lambda: s.is_over)
    assert s.counters.ends == {
        {"close": "closed", "abort": "aborted", "uncount": "finished"}[how]: 1
    }
    assert s.errors == []


@pytest.mark.parametrize("how", ["close", "abort"])
@everywhere(places=("tcp", "tcp-reactor", "unix", "memory"))
@ensureDeferred
async def test_a_protocol_or_socket_handler_does_it_to_its_own(
    scene: Any, kind: str, place: str, how: str
) -> None:
    """Out of the middle of what it does."""
    if kind == "stream":
        return
    s: Any = None

    class Does(Handlers):
        async def sock(self, address: Any, client: Any) -> None:
            self.started.append(client)
            await go
            getattr(s.connection, how)()

        @property
        def protocol(self) -> Any:
            handlers = self

            class Ends(Protocol):
                def connectionMade(self) -> None:
                    handlers.started.append(self)

                def dataReceived(self, data: bytes) -> None:
                    getattr(s.connection, how)()
                    handlers.heard.append("after")

            return Factory.forProtocol(Ends)

    go: Deferred[None] = Deferred()
    s = await scene(kind, place, handlers=Does())
    if kind == "protocol":
        await in_thread(s.client.send, b"x")
    else:
        go.callback(None)
    await until(lambda: s.is_over)
    assert s.counters.ends == {"closed" if how == "close" else "aborted": 1}
    assert s.errors == []


class DoesAtOnce(Observer):
    """Does something to a connection at an event."""

    def __init__(self, event: str, how: str) -> None:
        self.how = how
        setattr(self, event, self.act)

    def act(self, connection: Any, *_: Any) -> None:
        getattr(connection, self.how)()


@pytest.mark.parametrize("how", ["close", "abort", "uncount"])
@pytest.mark.parametrize(
    "event",
    [
        "connection_accepted",
        "handler_started",
        "handler_ended",
        "connection_finished",
    ],
)
@pytest.mark.parametrize("engine", ["auto", "reactor"])
@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@ensureDeferred
async def test_an_observer_does_it_at_any_event(
    serve: Any, connect: Any, logs: Any, kind: str, event: str, how: str, engine: str
) -> None:
    """No handler starts for what was closed before; nothing is left."""
    handlers = Handlers()
    errors: list[Any] = []
    server = await serve(
        handlers.of(kind),
        create=CREATE[kind],
        observer=DoesAtOnce(event, how),
        on_handler_error=lambda _, failure: errors.append(failure.value),
        engine=engine,
    )
    client = connect(server)
    counters = server._factory.counters
    await until(lambda: counters.accepted == 1)
    if event == "connection_accepted" and how != "uncount":
        await until(lambda: counters.ends)
        assert handlers.started == []
    if how == "uncount" and event in ("connection_accepted", "handler_started"):
        # The handler starts in a turn after the accept.
        await until(lambda: server.num_connections == 0)
        assert len(server.connections) == 1
    await turn()
    if not handlers.end.called:
        handlers.end.callback(None)
    client.close()
    await until(lambda: counters.ends)
    assert sum(counters.ends.values()) == 1
    assert errors == []
    server.invariant()


# uncount


@everywhere(places=("tcp", "tcp-reactor", "unix"))
@ensureDeferred
async def test_uncounted_it_lets_the_next_client_in(
    scene: Any, connect: Any, kind: str, place: str
) -> None:
    """And stays: close includes it, and so does whoever waits for the end."""
    s = await scene(kind, place, max_connections=1)
    server = s.server
    connect(server)
    await turn()
    assert len(s.handlers.started) == 1
    server.connection(1).uncount()
    await until(lambda: len(s.handlers.started) == 2)
    assert server.num_connections == 1
    assert [c.holds_slot for c in server.connections] == [False, True]
    server.invariant()
    over = server.close_finished_and_handlers_determined()
    server.connection(2).close()
    server.cancel_handlers() if kind == "sock" else None
    if kind == "sock":
        # Both were cancelled: the first is one of them.
        assert s.handlers.heard == ["cancelled", "cancelled"]
    else:
        await until(lambda: len(server.connections) == 1)
        assert server.num_connections == 0
        await server.close()
        assert not over.called
        await server.close(close_existing_connections=True)
    await server.close()
    await over
    assert s.is_over
    assert s.counters.ends["closed"] == 2 - (kind == "sock")


def test_uncounted_connections_are_many() -> None:
    """As many as come: each makes room for the next."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.connection.uncount()
        await reader.read()

    server = MemoryServer(handler, max_connections=1)
    clients = [server.connect() for _ in range(50)]
    assert server.factory.num_connections == 0
    assert len(server.factory.connections) == 50
    server.factory.invariant()
    server.factory.max_connections = 3
    clients[3].send_eof()
    assert len(server.factory.connections) == 49
    assert server.factory.num_connections == 0
    server.factory.invariant()
    server.factory.close()
    over = server.factory.when_over()
    server.factory.close_connections()
    assert over.called
    assert server.factory.counters.ends == {"eof": 1, "closed": 49}


@ensureDeferred
async def test_an_uncounted_one_is_neither_evicted_nor_in_the_way(
    serve: Any, connect: Any
) -> None:
    """Also when it was being evicted as it gave its slot back."""
    held: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        held.append(writer)
        mine: Deferred[None] = Deferred(lambda d: d.callback(None))
        await mine
        if len(held) == 1:
            writer.connection.uncount()
            await end

    end: Deferred[None] = Deferred()
    server = await serve(handler, max_connections=1, overflow="evict")
    for n in range(3):
        connect(server)
        await until(lambda n=n: len(held) == n + 1)
    assert server._factory.counters.ends == {"evicted": 1}
    end.callback(None)


def test_limits_and_timeouts_go_on_for_an_uncounted_one() -> None:
    """It is live."""
    server = MemoryServer(Handlers().stream, lifetime=2, max_connections_per_peer=1)
    client = server.connect()
    server.factory.connections[0].uncount()
    assert server.connect().is_closed
    server.clock.advance(3)
    assert client.is_closed
    assert server.factory.counters.ends == {"lifetime": 1}


# Bytes at the end


@everywhere()
@ensureDeferred
async def test_its_bytes_age_and_reason_are_final_when_it_is_finished(
    scene: Any, kind: str, place: str
) -> None:
    """Exact, also what the client had not acknowledged."""
    seen: list[Any] = []

    class Final(Observer):
        def connection_finished(self, connection: Any) -> None:
            seen.append((connection.bytes_in, connection.bytes_out, connection.reason))
            assert connection.age == 5.0

    s = await scene(kind, place, observer=Final())
    s.clock.advance(5.0)
    await s.send(b"four")
    s.write(b"x" * 100_000)
    if kind != "sock":
        await until(lambda: s.connection.snapshot().bytes_out >= 100_000)
    s.connection.close()
    s.factory.cancel_handlers()
    await until(lambda: s.is_over)
    ((bytes_in, bytes_out, reason),) = seen
    assert reason is Reason.CLOSED
    if kind == "sock" and place.startswith("unix"):
        assert (bytes_in, bytes_out) == (None, None)
    elif kind == "protocol" and place.startswith("tls"):
        assert bytes_in > 4
        assert bytes_out > 100_000
    else:
        assert (bytes_in, bytes_out) == (4, 100_000)
    # It still says so.
    assert s.connection.bytes_in == bytes_in
    assert s.connection.age == 5.0
    s.clock.advance(5.0)
    assert s.connection.age == 5.0


@pytest.mark.parametrize("kind", ["protocol", "sock"])
@ensureDeferred
async def test_a_fin_is_no_byte(scene: Any, kind: str) -> None:
    """Neither the client's nor our own."""
    s = await scene(kind)
    await s.send(b"four")
    s.write(b"seven..")
    given = s.handlers.started[0]
    if kind == "sock":
        given.shutdown(socket.SHUT_WR)
    else:
        await turn()
        given.transport.loseWriteConnection()
    assert await in_thread(s.client.read_all) == b"seven.."
    for _ in range(20):
        await turn(0.003)
        snapshot = s.connection.snapshot()
        assert (snapshot.bytes_in, snapshot.bytes_out) == (4, 7)


@pytest.mark.parametrize("kind", ["protocol", "sock"])
@pytest.mark.parametrize(
    "way", ["reset", "reset, read", "fin, reset", "own fin, reset", "own, fin"]
)
@ensureDeferred
async def test_bytes_are_exact_however_the_client_has_ended(
    scene: Any, kind: str, way: str
) -> None:
    """A reset is no byte, and comes after a FIN of either side or after none."""
    seen: list[Any] = []

    class Final(Observer):
        def connection_finished(self, connection: Any) -> None:
            seen.append((connection.bytes_in, connection.bytes_out))

    s = await scene(kind, observer=Final())
    given = s.handlers.started[0]
    connected = given if kind == "sock" else given.transport.getHandle()
    await s.send(b"four")
    await turn()
    if way == "fin, reset" and kind == "protocol":
        given.transport.pauseProducing()  # Or else the FIN is its end.
    if kind == "sock" and way != "reset":
        assert given.recv(100) == b"four"
    s.write(b"seven..")
    assert await in_thread(s.client.read, 7) == b"seven.."
    if way.startswith("own"):
        if kind == "sock":
            given.shutdown(socket.SHUT_WR)
        else:
            given.transport.loseWriteConnection()
        assert await in_thread(s.client.read, 1) == b""
    if "fin" in way.split(", "):
        s.client.shut()
    if "reset" in way:
        s.client.reset()
    if way == "fin, reset" and kind == "protocol":
        given.transport.resumeProducing()
    if kind == "sock":
        closed = 7  # TCP_CLOSE
        option = socket.IPPROTO_TCP, socket.TCP_INFO, 1
        await until(lambda: connected.getsockopt(*option)[0] == closed)
        if way == "reset, read":
            with pytest.raises(ConnectionResetError):
                given.recv(1)
        s.handlers.end.callback(None)
    await until(lambda: s.is_over)
    assert seen == [(4, 7)]


def test_a_kernel_that_does_not_tell_of_fins_is_believed(monkeypatch: Any) -> None:
    """Before Linux 4.18 and 4.19 a reset may cost a byte, or add one."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        connected, _ = listening.accept()
    with connected:
        client.sendall(b"four")
        assert connected.recv(4) == b"four"
        connected.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        poll = select.poll()
        poll.register(connected, 0)
        assert poll.poll(10_000) == [
            (connected.fileno(), select.POLLHUP | select.POLLERR)
        ]
        assert kernel.taken_at_end(connected) == (4, 0)
        monkeypatch.setattr(kernel, "_TCP_INQ", 9999)
        monkeypatch.setattr(kernel, "_TCP_INFO_SIZE_WITH_SENT", 1000)
        assert kernel.taken_at_end(connected) == (3, 1)


@ensureDeferred
async def test_server_connections_are_snapshots_of_a_server(
    serve: Any, connect: Any
) -> None:
    """Not the connections themselves."""
    server: Server[Any, Any] = await serve(Handlers().stream)
    connect(server)
    await until(lambda: server.num_connections == 1)
    assert isinstance(server.connections[0], ConnectionSnapshot)
    assert server.connections[0] is not server.connections[0]
