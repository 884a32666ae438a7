"""Looking at a server: invariant, listening_socket, repr, describe (spec I)."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.protocols.wire import Echo

import tcpsvc
from tcpsvc import LOCALHOST, Server, ServerFactory, WhereToListen
from tests.support import LOOPBACK, in_thread, the_reactor, turn, until


class Held:
    """Handlers that answer one line, and wait until they are told."""

    def __init__(self) -> None:
        self.told: Deferred[None] = Deferred()
        self.arguments: list[tuple[Any, Any, Any]] = []

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        self.arguments.append((address, reader, writer))
        writer.write(await reader.readline())
        mine: Deferred[None] = Deferred()
        self.told.chainDeferred(mine)
        await mine


@pytest.fixture
def held() -> Held:
    """The handlers of the test."""
    return Held()


# I1


@ensureDeferred
async def test_the_invariant_holds_at_every_step(
    serve: Any, connect: Any, held: Held
) -> None:
    """I1: from the creation to the very end, also in the callbacks."""
    server = await serve(held, max_connections=2)
    server.invariant()
    clients = [connect(server) for _ in range(3)]
    await until(lambda: len(held.arguments) == 2)
    server.invariant()
    server.max_connections = 1
    server.invariant()
    server.close().addCallback(lambda _: server.invariant())
    over = server.close_finished_and_handlers_determined()
    over.addCallback(lambda _: server.invariant())
    server.invariant()
    for client in clients:
        client.close()
    held.told.callback(None)
    await over
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda f: setattr(f.slots, "_limit", 0), id="max_connections < 1"),
        pytest.param(
            lambda f: object.__setattr__(f.settings, "max_accepts_per_batch", 0),
            id="max_accepts_per_batch < 1",
        ),
        pytest.param(
            lambda f: f._live.update({99: f.connections[0]}), id="known twice"
        ),
        pytest.param(
            lambda f: (
                setattr(f.slots, "_limit", 1),
                setattr(f.slots, "_allowed", 1),
            ),
            id="too many",
        ),
        pytest.param(lambda f: f.ending._when_over.happen(), id="live after the end"),
    ],
)
async def test_a_broken_invariant_raises_with_the_description(
    break_it: Any, connect: Any, held: Held
) -> None:
    """I1: each of its clauses."""
    server = await Server.create(LOOPBACK, held, on_handler_error="ignore")
    clients = [connect(server) for _ in range(2)]
    await until(lambda: len(held.arguments) == 2)
    server.invariant()
    factory = server._factory
    live = dict(factory._live)
    settings = factory.settings.max_accepts_per_batch
    limits = factory.slots._limit, factory.slots._allowed
    break_it(factory)
    with pytest.raises(AssertionError) as caught:
        server.invariant()
    assert f"127.0.0.1:{clients[0].socket.getsockname()[1]}" in str(caught.value)
    # Mended, so that it can be closed.
    factory._live.clear()
    factory._live.update(live)
    factory.slots._limit, factory.slots._allowed = limits
    object.__setattr__(factory.settings, "max_accepts_per_batch", settings)
    factory.ending._when_over.has_happened = False
    held.told.callback(None)
    server.invariant()
    await server.close(close_existing_connections=True)
    await server.close_finished_and_handlers_determined()


# I2


@ensureDeferred
async def test_the_listening_socket_is_the_real_one(
    serve: Any, connect: Any, held: Held
) -> None:
    """I2: for its options, and for handing on; accepting on it circumvents the
    limits."""
    server = await serve(held, max_connections=1)
    listening = server.listening_socket
    assert isinstance(listening, socket.socket)
    assert listening.getsockname() == ("127.0.0.1", server.listening_on)
    assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    connect(server)
    await until(lambda: server.num_connections == 1)
    beyond = connect(server)
    accepted, _ = listening.accept()
    with accepted:
        accepted.sendall(b"past the limit")
    assert await in_thread(beyond.read_all) == b"past the limit"
    assert server.num_connections == 1
    text = " ".join((Server.listening_socket.__doc__ or "").split())
    assert "circumvents" in text and "max_connections" in text


# I3


def is_one_line(text: str) -> bool:
    """Whether a text is one line, and harmless on a terminal."""
    return bool(text) and len(text.splitlines()) == 1 and text.isprintable()


@ensureDeferred
async def test_every_public_object_has_a_one_line_repr(
    serve: Any, connect: Any, held: Held, tmp_path: Path
) -> None:
    """I3: and it says what it is of."""
    unix = WhereToListen.of_file(tmp_path / "s")
    endpoint = TCP4ServerEndpoint(the_reactor(), 0, interface=LOCALHOST)
    server = await serve(held)
    client = connect(server)
    await until(lambda: held.arguments)
    assert "127.0.0.1" in repr(server) and "1/" in repr(server)
    server.set_drop_incoming_connections(True)
    assert "dropping" in repr(server)
    server.set_drop_incoming_connections(False)
    _, reader, writer = held.arguments[0]
    peer = client.socket.getsockname()[1]
    assert str(peer) in repr(reader) and str(peer) in repr(writer)
    assert str(tmp_path) in repr(unix)
    objects = [
        server,
        reader,
        writer,
        unix,
        LOOPBACK,
        WhereToListen.bind_to("::", 0, dual_stack=True),
        WhereToListen.of_fd(3),
        WhereToListen.of_endpoint("tcp:0"),
        WhereToListen.of_endpoint(endpoint),
        await serve(held, where=unix),
        await serve(held, where=WhereToListen.of_endpoint(endpoint)),
        await serve(lambda a, s: None, create=Server.create_sock),
        await serve(Factory.forProtocol(Echo), create=Server.create_protocol),
        ServerFactory.of_streams(held, on_handler_error="ignore"),
        tcpsvc.BufferAgeLimitExceeded(121.5, 120),
        tcpsvc.ConnectionGone("gone"),
        tcpsvc.ServerClosed("closed"),
        *server._factory.connections,
    ]
    for one in objects:
        assert is_one_line(repr(one)), repr(one)
        # Not the default one, though an endpoint of Twisted's may have it.
        assert type(one).__repr__ is not object.__repr__
    await server.close()
    held.told.callback(None)
    assert is_one_line(repr(server)) and "closed" in repr(server)
    client.close()
    await server.close_finished_and_handlers_determined()
    for one in (server, reader, writer):
        assert is_one_line(repr(one)), repr(one)


@ensureDeferred
async def test_a_path_with_a_newline_keeps_the_repr_on_one_line(
    serve: Any, held: Held, tmp_path: Path
) -> None:
    """I3: a path may hold anything but a NUL; nor may it forge a log line."""
    where = WhereToListen.of_file(tmp_path / "a\nb\x1b[0m")
    assert is_one_line(repr(where)), repr(where)
    server = await serve(held, where=where)
    assert is_one_line(repr(server)), repr(server)


# I4


def as_json(what: Any) -> dict[str, Any]:
    """Through JSON and back: strictly, so that no NaN passes."""
    found: dict[str, Any] = json.loads(json.dumps(what, allow_nan=False))
    assert found == what, "it is not what JSON makes of it"
    return found


@ensureDeferred
async def test_describe_says_where_and_with_which_options(serve: Any) -> None:
    """I4: every option, and the real address."""
    options: dict[str, Any] = {
        "max_connections": 7,
        "max_accepts_per_batch": 3,
        "backlog": 11,
        "drop_incoming_connections": True,
        "overflow": "evict",
        "refusal": "drop",
        "max_connections_per_peer": 5,
        "accept_rate_per_peer": "3/m:2",
        "peer_prefixes": [24, 48],
        "accept_rate": "100/s:7",
        "allow": ["10.0.0.0/8", "127.0.0.0/8", "::/0"],
        "deny": ["10.1.0.0/16"],
        "dry_run": ["deny", "idle_timeout"],
        "on_exhaustion": "shed",
        "on_accept_error": None,
        "first_byte_timeout": 1.5,
        "idle_timeout": 2.5,
        "handler_timeout": 3.5,
        "lifetime": 4.5,
        "min_throughput": 5.5,
        "throughput_window": 6.5,
        "keepalive": True,
        "engine": "reactor",
        "buffer_age_limit": 12.5,
        "flush_timeout": 2.5,
        "reader_buffer_size": 1234,
        "writer_buffer_size": 4321,
        "eof_on_drain": True,
    }
    server = await serve(print, **options | {"peer_prefixes": (24, 48)})
    described = as_json(server.describe())
    assert described["where"] == "127.0.0.1:0"
    assert described["address"] == f"127.0.0.1:{server.listening_on}"
    assert described["listening_on"] == server.listening_on
    assert described["options"] == {**options, "on_handler_error": "ignore"}
    assert described["is_closed"] is False
    assert described["is_dropping_incoming_connections"] is True
    assert (described["num_connections"], described["max_connections"]) == (0, 7)
    assert described["connections"] == []
    server.max_connections = 8
    server.set_drop_incoming_connections(False)
    await server.close()
    described = as_json(server.describe())
    assert described["max_connections"] == 8
    assert described["is_closed"] is True
    assert described["is_dropping_incoming_connections"] is False
    assert described["listening_on"] == server.listening_on


class Policy:
    """An on_handler_error with state that nobody may copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, address: Any, failure: Any) -> None:
        raise NotImplementedError

    def method(self, address: Any, failure: Any) -> None:
        raise NotImplementedError


@ensureDeferred
@pytest.mark.parametrize("kind", ["object", "method", "function", "raise"])
async def test_describe_says_what_is_done_with_errors(kind: str, serve: Any) -> None:
    """I4: whatever the callable is; it is named, not copied."""
    policy: Any = {
        "object": Policy(),
        "method": Policy().method,
        "function": tcpsvc.log_error,
        "raise": "raise",
    }[kind]
    server = await serve(print, on_handler_error=policy, buffer_age_limit=None)
    options = as_json(server.describe())["options"]
    assert options["buffer_age_limit"] is None
    expected = {
        "object": "Policy",
        "method": "Policy.method",
        "function": "log_error",
        "raise": "raise",
    }
    assert expected[kind] in options["on_handler_error"]


@ensureDeferred
async def test_describe_is_of_every_kind_of_place(
    serve: Any, held: Held, tmp_path: Path, connect: Any
) -> None:
    """I4: JSON-able wherever it listens."""
    unix = await serve(held, where=WhereToListen.of_file(tmp_path / "s"))
    connect(unix)
    await until(lambda: held.arguments)
    described = as_json(unix.describe())
    assert described["listening_on"] == str(tmp_path / "s")
    assert described["address"] == f"unix:{tmp_path / 's'}"
    where = WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    described = as_json((await serve(held, where=where)).describe())
    assert described["where"] == "tcp:0:interface=127.0.0.1"
    where6 = WhereToListen.bind_to("::1", 0)
    described = as_json((await serve(held, where=where6)).describe())
    assert described["where"] == "[::1]:0"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        where_fd = WhereToListen.of_fd(listening.fileno())
        server = await serve(held, where=where_fd)
        assert str(listening.fileno()) in as_json(server.describe())["where"]
        await server.close()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0tcpsvc-{tmp_path}")  # An abstract name.
        listening.listen(1)
        where_fd = WhereToListen.of_fd(listening.fileno())
        server = await serve(held, where=where_fd)
        as_json(server.describe())
        await server.close()
    held.told.callback(None)


@ensureDeferred
async def test_describe_tells_of_each_connection(
    serve: Any, connect: Any, held: Held
) -> None:
    """I4: peer, age, bytes in and out, the handler's state."""
    clock = Clock()
    server = await serve(held, clock=clock, max_connections=5)
    first = connect(server)
    await until(lambda: len(held.arguments) == 1)
    clock.advance(3)
    second = connect(server)
    await until(lambda: len(held.arguments) == 2)
    clock.advance(0.5)
    first.send(b"hello\nmore")
    assert await in_thread(first.read, 6) == b"hello\n"
    await until(lambda: held.arguments[0][1].bytes_read == 10)
    await until(lambda: not held.arguments[0][2].bytes_to_write)
    one, two = as_json(server.describe())["connections"]
    assert str(first.socket.getsockname()[1]) in one["peer"]
    assert str(second.socket.getsockname()[1]) in two["peer"]
    assert (one["age"], two["age"]) == (3.5, 0.5)
    assert (one["bytes_in"], one["bytes_out"]) == (10, 6)
    assert (two["bytes_in"], two["bytes_out"]) == (0, 0)
    assert (one["handler"], two["handler"]) == ("running", "running")
    assert (one["socket"], two["socket"]) == ("open", "open")
    assert one["id"] != two["id"]
    first.reset()
    await until(lambda: server.describe()["connections"][0]["socket"] == "closed")
    assert as_json(server.describe())["connections"][0]["handler"] == "running"
    held.told.callback(None)
    second.send(b"x\n")
    await until(lambda: server.num_connections == 0)
    described = as_json(server.describe())
    assert described["connections"] == []
    counters = described["counters"]
    assert (counters["accepted"], counters["finished"]) == (2, 2)


@ensureDeferred
async def test_describe_asks_the_kernel_for_the_bytes_of_other_connections(
    serve: Any, connect: Any
) -> None:
    """I4: nobody counts them in the process, with a socket or a protocol."""
    told: Deferred[None] = Deferred()

    async def handler(address: Any, client: socket.socket) -> None:
        client.sendall(b"hello")
        await told

    server = await serve(handler, create=Server.create_sock)
    assert await in_thread(connect(server).read, 5) == b"hello"
    (one,) = as_json(server.describe())["connections"]
    assert (one["bytes_in"], one["bytes_out"]) == (0, 5)
    assert (one["handler"], one["socket"]) == ("running", "open")
    told.callback(None)
    server = await serve(Factory.forProtocol(Echo), create=Server.create_protocol)
    client = connect(server)
    client.send(b"hi")
    assert await in_thread(client.read, 2) == b"hi"
    (one,) = as_json(server.describe())["connections"]
    assert (one["bytes_in"], one["bytes_out"]) == (2, 2)
    assert one["handler"] == "running"


@ensureDeferred
async def test_describe_counts_what_happened(serve: Any, connect: Any) -> None:
    """I4: accepted, dropped, finished, failed, left."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        line = await reader.readline()
        if line == b"fail\n":
            raise ValueError("no")
        if line == b"gone\n":
            while True:
                writer.write(b"x")
                await writer.drain()
                await turn()

    server = await serve(handler)
    for line in (b"fine\n", b"fail\n", b"fail\n"):
        client = connect(server)
        client.send(line)
        assert await in_thread(client.read_all) == b""
        client.close()
    gone = connect(server)
    gone.send(b"gone\n")
    await until(lambda: server.describe()["connections"])
    await turn()
    await until(lambda: server.describe()["connections"][0]["bytes_in"] == 5)
    gone.reset()
    await until(lambda: server.num_connections == 0)
    server.set_drop_incoming_connections(True)
    assert await in_thread(connect(server).read_all) == b""
    counters = as_json(server.describe())["counters"]
    assert {
        name: counters[name]
        for name in ("accepted", "dropped", "finished", "failed", "left", "refused")
    } == {
        "accepted": 4,
        "dropped": 1,
        "finished": 1,
        "failed": 2,
        "left": 1,
        "refused": 0,
    }


@ensureDeferred
async def test_the_bare_factory_describes_itself(connect: Any, held: Held) -> None:
    """I4, A1: with the surplus that it holds."""
    factory = ServerFactory.of_streams(
        held, on_handler_error="ignore", max_connections=1
    )
    port = the_reactor().listenTCP(0, factory, interface="127.0.0.1")
    clients = [connect(port.getHost()) for _ in range(3)]
    await until(lambda: factory.describe()["held"] == 2)
    described = as_json(factory.describe())
    assert (described["num_connections"], len(described["connections"])) == (1, 1)
    assert is_one_line(repr(factory)) and "1/1" in repr(factory)
    factory.invariant()
    for client in clients:
        client.close()
    held.told.callback(None)
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()
