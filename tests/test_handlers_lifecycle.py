"""Handlers: when they start, how they end (spec H)."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks, succeed
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.logger import LogLevel
from zope.interface import implementer

from tcpsvc import ConnectionGone, Server, ServerFactory, WhereToListen, kernel
from tests.support import in_thread, settle, the_reactor, turn, until

PAYLOAD = b"x" * 8_000_000


class Errors:
    """An ``on_handler_error`` that remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, BaseException]] = []

    def __call__(self, address: Any, failure: Any) -> None:
        self.calls.append((address, failure.value))

    @property
    def types(self) -> list[type[BaseException]]:
        """The kinds of the errors."""
        return [type(error) for _, error in self.calls]


def memory_factory(
    handler: Any, **options: Any
) -> tuple[ServerFactory, Clock, Callable[[], Any]]:
    """A factory without a reactor, its clock, and what connects to it."""
    clock = Clock()
    options.setdefault("on_handler_error", "ignore")
    factory = ServerFactory.of_streams(handler, reactor=clock, clock=clock, **options)

    def connect() -> StringTransportWithDisconnection:
        transport = StringTransportWithDisconnection()
        transport.protocol = factory.buildProtocol(transport.getPeer())
        transport.protocol.makeConnection(transport)
        return transport

    return factory, clock, connect


# H1


def test_a_handler_starts_in_the_turn_after_its_accept() -> None:
    """H1: not inside the accept; its slot is taken before."""
    started: list[Any] = []
    factory, clock, connect = memory_factory(lambda *args: started.append(args))
    connect()
    assert (started, factory.num_connections) == ([], 1)
    clock.advance(0)
    assert len(started) == 1


@ensureDeferred
async def test_handlers_of_a_batch_start_in_order_and_see_all_counted(
    serve: Any, connect: Any
) -> None:
    """H1: in the order of accepts; num_connections counts them all by then."""
    seen: list[tuple[int, int]] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        seen.append((address.port, server.num_connections))
        await reader.read()

    server = await serve(handler, max_accepts_per_batch=5)
    clients = [connect(server) for _ in range(5)]
    await until(lambda: len(seen) == 5)
    assert seen == [(c.socket.getsockname()[1], 5) for c in clients]


@ensureDeferred
async def test_no_handler_starts_before_create_has_fired(
    serve: Any, connect: Any
) -> None:
    """H1: not even when the endpoint's port accepts before it is announced."""
    events: list[str] = []
    announce: Deferred[Any] = Deferred()
    ports: list[Any] = []

    @implementer(IStreamServerEndpoint)
    class Early:
        def listen(self, factory: Any) -> Deferred[Any]:
            ports.append(the_reactor().listenTCP(0, factory, interface="127.0.0.1"))
            return announce

    creating = Deferred.fromCoroutine(
        serve(
            lambda *args: events.append("handler"),
            where=WhereToListen.of_endpoint(Early()),
        )
    )
    creating.addCallback(lambda server: events.append("created") or server)
    connect(ports[0].getHost())
    for _ in range(10):
        await turn()
    assert events == []
    announce.callback(ports[0])
    await creating
    await until(lambda: len(events) == 2)
    assert events == ["created", "handler"]


def plain_raiser(address: Any, reader: Any, writer: Any) -> None:
    """Raises before it has done anything."""
    raise LookupError("at once")


async def coroutine_raiser(address: Any, reader: Any, writer: Any) -> None:
    """The same as a coroutine."""
    raise LookupError("at once")


@inlineCallbacks
def inline_raiser(address: Any, reader: Any, writer: Any) -> Any:
    """The same with inlineCallbacks."""
    raise LookupError("at once")
    yield


@pytest.mark.parametrize("handler", [plain_raiser, coroutine_raiser, inline_raiser])
@ensureDeferred
async def test_an_error_at_the_first_statement_is_an_ordinary_one(
    serve: Any, connect: Any, handler: Any
) -> None:
    """H1: reported once; the client reads EOF; the next client is served."""
    errors = Errors()
    server = await serve(handler, on_handler_error=errors)
    for count in (1, 2):
        client = connect(server)
        assert await in_thread(client.read_all) == b""
        await until(lambda: server.num_connections == 0)
        assert errors.types == [LookupError] * count
        assert errors.calls[-1][0].port == client.socket.getsockname()[1]


# H2


async def as_coroutine(address: Any, reader: Any, writer: Any) -> None:
    """Answers one line."""
    writer.write(await reader.readline())


@inlineCallbacks
def as_inline_callbacks(address: Any, reader: Any, writer: Any) -> Any:
    """Answers one line; the reader's coroutine is yielded."""
    line = yield reader.readline()
    writer.write(line)
    yield writer.drain()
    yield writer.flushed()


def as_deferred(address: Any, reader: Any, writer: Any) -> Deferred[None]:
    """Answers one line."""
    return Deferred.fromCoroutine(reader.readline()).addCallback(writer.write)


class AsAwaitable:
    """Answers one line, by an awaitable that is no coroutine."""

    def __call__(self, *args: Any) -> AsAwaitable:
        self.args = args
        return self

    def __await__(self) -> Any:
        return as_coroutine(*self.args).__await__()


@pytest.mark.parametrize(
    "handler",
    [
        as_coroutine,
        as_inline_callbacks,
        as_deferred,
        AsAwaitable(),
        functools.partial(as_coroutine),
    ],
    ids=["coroutine", "inlineCallbacks", "Deferred", "awaitable", "partial"],
)
@ensureDeferred
async def test_a_handler_of_any_kind_is_followed_to_its_end(
    serve: Any, connect: Any, handler: Any
) -> None:
    """H2."""
    errors = Errors()
    server = await serve(handler, on_handler_error=errors)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    client.send(b"hello\n")
    assert await in_thread(client.read_all) == b"hello\n"
    await until(lambda: server.num_connections == 0)
    assert errors.calls == []
    assert server.describe()["counters"]["finished"] == 1


@pytest.mark.parametrize("result", [None, 3, "text", b"", succeed(5)], ids=repr)
@ensureDeferred
async def test_a_plain_value_has_finished_at_once(
    serve: Any, connect: Any, result: Any
) -> None:
    """H2: what it wrote is sent."""

    def handler(address: Any, reader: Any, writer: Any) -> Any:
        writer.write(b"written")
        return result

    server = await serve(handler, on_handler_error="raise")
    assert await in_thread(connect(server).read_all) == b"written"
    await until(lambda: server.num_connections == 0)


def returns_generator(address: Any, reader: Any, writer: Any) -> Any:
    """Forgot inlineCallbacks."""
    yield reader.readline()


async def returns_async_generator(address: Any, reader: Any, writer: Any) -> Any:
    """A yield in an async def."""
    yield await reader.readline()


def returns_future(address: Any, reader: Any, writer: Any) -> Any:
    """A future of another world."""
    loop = asyncio.new_event_loop()
    try:
        return loop.create_future()
    finally:
        loop.close()


@pytest.mark.parametrize(
    ("handler", "named"),
    [
        (returns_generator, "inlineCallbacks"),
        (returns_async_generator, "async generator"),
        (returns_future, "Future"),
    ],
)
@ensureDeferred
async def test_a_mistaken_kind_of_handler_is_an_error_that_names_the_mistake(
    serve: Any, connect: Any, handler: Any, named: str
) -> None:
    """H2."""
    errors = Errors()
    server = await serve(handler, on_handler_error=errors)
    assert await in_thread(connect(server).read_all) == b""
    await until(lambda: errors.calls)
    assert named in str(errors.calls[0][1])
    assert handler.__name__ in str(errors.calls[0][1])


@ensureDeferred
async def test_awaiting_an_asyncio_future_is_an_error_and_no_hang(
    serve: Any, connect: Any
) -> None:
    """H2: a coroutine that awaits what Twisted cannot wait for."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await returns_future(address, reader, writer)

    server = await serve(handler, on_handler_error=errors)
    assert await in_thread(connect(server).read_all) == b""
    await until(lambda: errors.calls)


@ensureDeferred
async def test_a_handler_that_awaits_for_ever_holds_its_slot_until_cancelled(
    hold: Any,
) -> None:
    """H2, H6: its client's leaving alone does not end it."""
    held = await hold()
    server, client = held.server, held.client
    client.reset()
    await until(lambda: held.writer.is_closed)
    assert server.num_connections == 1
    server._factory.cancel_handlers()
    assert held.has_ended
    assert server.num_connections == 0
    assert held.errors == []


# H3


@ensureDeferred
async def test_what_a_finished_handler_wrote_is_read_whole_and_then_eof(
    serve: Any, connect: Any
) -> None:
    """H3: flushed, then FIN."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(PAYLOAD)

    server = await serve(handler)
    client = connect(server)
    assert await in_thread(client.read_all) == PAYLOAD
    client.close()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_what_a_raising_handler_wrote_is_read_whole_and_then_eof(
    serve: Any, connect: Any
) -> None:
    """H3: or raises."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(PAYLOAD)
        raise LookupError

    server = await serve(handler, on_handler_error=errors)
    client = connect(server)
    assert await in_thread(client.read_all) == PAYLOAD
    client.close()
    await until(lambda: server.num_connections == 0)
    assert errors.types == [LookupError]


@ensureDeferred
async def test_unread_input_does_not_cost_the_client_its_answer(
    serve: Any, connect: Any
) -> None:
    """H3 [+]: lingering close; a plain close would reset."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(PAYLOAD)

    server = await serve(handler)
    client = connect(server)
    client.send(b"never read" * 1000)
    assert await in_thread(client.read_all) == PAYLOAD
    client.close()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_client_that_sends_all_before_it_reads_gets_its_answer(
    serve: Any, connect: Any
) -> None:
    """H3 [+]: input is discarded meanwhile, more than any buffer holds."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(PAYLOAD)

    server = await serve(handler, reader_buffer_size=1000)
    client = connect(server)

    def talk() -> bytes:
        client.send(b"y" * 20_000_000)
        client.shut()
        got: bytes = client.read_all()
        return got

    assert await in_thread(talk) == PAYLOAD
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_full_paused_reader_does_not_stop_the_lingering_close(
    hold: Any,
) -> None:
    """H3 [+], S3: reading was paused when the handler ended."""
    held = await hold(reader_buffer_size=1000)
    server, client = held.server, held.client

    def talk() -> bytes:
        client.send(b"y" * 20_000_000)
        client.shut()
        got: bytes = client.read_all()
        return got

    talking = in_thread(talk)
    await until(lambda: held.reader.bytes_read >= 1000)
    for _ in range(5):
        await turn()
    held.writer.write(PAYLOAD)
    held.end.callback(None)
    assert await talking == PAYLOAD
    await until(lambda: server.num_connections == 0)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@ensureDeferred
async def test_with_nothing_pending_the_socket_is_closed_at_once(
    hold: Any, tmp_path: Any, kind: str
) -> None:
    """H3: the client need not do anything, no time need pass."""
    options = {} if kind == "tcp" else {"where": WhereToListen.of_file(tmp_path / "s")}
    held = await hold(**options)
    server = held.server
    held.end.callback(None)
    assert server.num_connections == 0
    assert held.clock.getDelayedCalls() == []


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@ensureDeferred
async def test_a_handler_that_awaits_flushed_and_returns_ends_cleanly(
    serve: Any, connect: Any, tmp_path: Any, kind: str
) -> None:
    """H3, S5: it ends from inside of the transport's own write."""
    options = {} if kind == "tcp" else {"where": WhereToListen.of_file(tmp_path / "s")}

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        writer.write(b"answer")
        await writer.flushed()

    server = await serve(handler, on_handler_error="raise", **options)
    for _ in range(5):
        client = connect(server)
        client.send(b"question\n")
        assert await in_thread(client.read_all) == b"answer"
        client.close()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_client_that_takes_nothing_is_aborted_after_flush_timeout(
    hold: Any,
) -> None:
    """H3: 30 s without one byte taken."""
    held = await hold()
    server, client = held.server, held.client
    held.narrow()
    held.writer.write(PAYLOAD * 5)
    held.end.callback(None)
    took = await held.seconds_until(lambda: server.num_connections == 0)
    assert 30 <= took <= 45
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read_all)
    assert server.describe()["counters"]["aborted"] == 1


@ensureDeferred
async def test_flush_timeout_is_an_option(hold: Any) -> None:
    """H3: flush_timeout."""
    held = await hold(flush_timeout=7)
    server = held.server
    held.narrow()
    held.writer.write(PAYLOAD * 5)
    held.end.callback(None)
    assert 7 <= await held.seconds_until(lambda: not server.num_connections) <= 22


@ensureDeferred
async def test_after_its_own_close_the_timeout_is_five_seconds(hold: Any) -> None:
    """H3: 5 s after the handler's own close(); the slot waits for the handler."""
    held = await hold()
    server, client = held.server, held.client
    held.narrow()
    held.writer.write(PAYLOAD * 5)
    closed = held.writer.close_finished()
    held.writer.close()
    assert 5 <= await held.seconds_until(lambda: closed.called) <= 20
    assert server.num_connections == 1
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read_all)
    held.end.callback(None)
    assert server.num_connections == 0


@ensureDeferred
async def test_a_slow_client_that_takes_something_is_not_aborted(hold: Any) -> None:
    """H3: the timeout is without one byte taken."""
    held = await hold(buffer_age_limit=None)
    server, client = held.server, held.client
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    held.writer.write(PAYLOAD * 5)
    held.end.callback(None)
    for _ in range(6):
        for _ in range(20):
            held.clock.advance(1)
            await turn()
        assert server.num_connections == 1
        # More than a window, so that the kernel does say so to its peer.
        await in_thread(client.read, 1_000_000)
        await settle()
    assert server.num_connections == 1
    assert len(await in_thread(client.read_all)) == len(PAYLOAD) * 5 - 6_000_000
    await held.seconds_until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_client_that_sends_for_ever_is_aborted_in_the_end(hold: Any) -> None:
    """H3: discarding its input does not go on for ever."""
    held = await hold()
    server, client = held.server, held.client

    def blast() -> None:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                client.send(b"z" * 65536)

    blasting = in_thread(blast)
    [connection] = server._factory.connections
    # The reader is full, and there is more: else it might be closed at once.
    await until(lambda: held.reader.bytes_buffered >= 131_072)
    await until(lambda: not kernel.nothing_pending(connection._socket))
    held.end.callback(None)
    # It still sends: one that had stopped would be closed at the next look.
    await until(lambda: connection._discarded)
    assert 30 <= await held.seconds_until(lambda: not server.num_connections) <= 45
    await blasting


@ensureDeferred
async def test_a_lingering_client_that_says_nothing_is_aborted_in_the_end(
    hold: Any,
) -> None:
    """H3: it has spoken, read all, and then neither speaks nor leaves."""
    held = await hold()
    server, client = held.server, held.client
    client.send(b"unread")
    held.writer.write(PAYLOAD)
    held.end.callback(None)
    assert await in_thread(client.read_all) == PAYLOAD
    assert await held.seconds_until(lambda: not server.num_connections) <= 45
    assert held.clock.getDelayedCalls() == []


@ensureDeferred
async def test_create_sock_shuts_down_before_it_closes(
    serve: Any, connect: Any
) -> None:
    """H3: the client reads EOF though its input was not read."""

    def handler(address: Any, sock: socket.socket) -> None:
        sock.send(b"sent")

    server = await serve(handler, create=Server.create_sock, on_handler_error="raise")
    client = connect(server)
    client.send(b"never read")
    assert await in_thread(client.read_all) == b"sent"
    await until(lambda: server.num_connections == 0)


@pytest.mark.parametrize("taking", ["close", "detach"])
@ensureDeferred
async def test_a_handler_of_create_sock_may_close_or_keep_its_socket(
    serve: Any, connect: Any, taking: str
) -> None:
    """H3: what is closed or taken away is not closed again."""
    taken: list[Any] = []

    def handler(address: Any, sock: socket.socket) -> None:
        taken.append(getattr(sock, taking)())

    server = await serve(handler, create=Server.create_sock, on_handler_error="raise")
    client = connect(server)
    await until(lambda: taken and server.num_connections == 0)
    if taking == "detach":
        kept = socket.socket(fileno=taken[0])
        kept.send(b"still there")
        kept.close()
    assert await in_thread(client.read_all) == (
        b"still there" if taking == "detach" else b""
    )


# H4


def note_accepts(server: Any, note: Callable[[str], None]) -> None:
    """Note each accept, as it takes its slot."""
    admit = server._factory._admit

    def noted(connection: Any) -> None:
        note("accepted")
        admit(connection)

    server._factory._admit = noted


@ensureDeferred
async def test_the_order_of_a_normal_end(serve: Any, connect: Any) -> None:
    """H4: finished, flushed, socket closed, slot released, error, next, cfhd."""
    events: list[tuple[str, int]] = []
    ends: list[Deferred[None]] = []

    def note(event: str) -> None:
        events.append((event, server.num_connections))

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        name = f"{len(ends)}"
        ends.append(Deferred())
        await ends[-1]
        writer.write(PAYLOAD)
        writer.flushed().addCallback(lambda _: note(f"{name} flushed"))
        writer.close_finished().addCallback(lambda _: note(f"{name} closed"))
        note(f"{name} finished")
        raise LookupError

    server = await serve(
        handler, max_connections=1, on_handler_error=lambda *_: note("error")
    )
    note_accepts(server, note)
    first, second = connect(server), connect(server)
    await until(lambda: len(ends) == 1)
    ends[0].callback(None)
    for _ in range(5):
        await turn()
    assert server.num_connections == 1
    assert await in_thread(first.read_all) == PAYLOAD
    first.close()
    await until(lambda: len(ends) == 2)
    server.close()
    over = server.close_finished_and_handlers_determined()
    over.addCallback(lambda _: note("cfhd"))
    ends[1].callback(None)
    assert await in_thread(second.read_all) == PAYLOAD
    second.close()
    await over
    assert events == [
        ("accepted", 0),
        ("0 finished", 1),
        ("0 flushed", 1),
        ("0 closed", 1),
        ("error", 0),
        ("accepted", 0),
        ("1 finished", 1),
        ("1 flushed", 1),
        ("1 closed", 1),
        ("error", 0),
        ("cfhd", 0),
    ]


@pytest.mark.parametrize("way", ["X3", "abort"])
@ensureDeferred
async def test_the_order_of_an_end_that_begins_with_the_socket(
    serve: Any, connect: Any, way: str
) -> None:
    """H4: after X3 or an abort the socket is closed first."""
    events: list[tuple[str, int]] = []

    def note(event: str) -> None:
        events.append((event, server.num_connections))

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.close_finished().addCallback(lambda _: note("closed"))
        await reader.read()
        await end
        note("finished")
        raise LookupError

    end: Deferred[None] = Deferred()
    server = await serve(handler, on_handler_error=lambda *_: note("error"))
    client = connect(server)
    await until(lambda: server._factory.connections)
    connection = server._factory.connections[0]
    await until(lambda: connection.is_running)
    if way == "abort":
        connection.writer.abort()
    server.close(close_existing_connections=True)
    over = server.close_finished_and_handlers_determined()
    over.addCallback(lambda _: note("cfhd"))
    await until(lambda: events)
    end.callback(None)
    await over
    assert events == [("closed", 1), ("finished", 1), ("error", 0), ("cfhd", 0)]
    client.close()


# H5


@ensureDeferred
async def test_no_handler_starts_within_the_batch_in_which_close_was_called(
    serve: Any, connect: Any
) -> None:
    """H5 [+]: those sockets are closed, with EOF."""
    started: list[int] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address.port)
        server.close()

    server = await serve(handler, max_accepts_per_batch=5)
    clients = [connect(server) for _ in range(3)]
    over = server.close_finished_and_handlers_determined()
    await over
    assert started == [clients[0].socket.getsockname()[1]]
    for client in clients:
        assert await in_thread(client.read_all) == b""
    assert server.describe()["counters"]["refused"] == 2


def test_no_handler_starts_that_was_only_accepted_when_close_was_called() -> None:
    """H5: between the accept and the turn in which it would have started."""
    started: list[Any] = []
    factory, clock, connect = memory_factory(lambda *args: started.append(args))
    transport = connect()
    factory.close()
    assert not transport.connected
    clock.advance(0)
    assert (started, factory.num_connections) == ([], 0)


@ensureDeferred
async def test_x3_out_of_a_batch_ends_those_who_have_not_started(
    serve: Any, connect: Any
) -> None:
    """H5, X3, X5: close(close_existing_connections=True) at a first statement."""
    started: list[int] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address.port)
        server.close(close_existing_connections=True)
        assert await reader.read() == b""

    server = await serve(handler, max_accepts_per_batch=5, on_handler_error="raise")
    clients = [connect(server) for _ in range(3)]
    await server.close_finished_and_handlers_determined()
    assert len(started) == 1
    for client in clients:
        assert await in_thread(client.read_all) == b""


# H6


@ensureDeferred
async def test_incomplete_read_after_x3_is_an_ordinary_end(
    serve: Any, connect: Any, logs: Any
) -> None:
    """H6: counted, logged at debug, not reported."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readexactly(100)

    server = await serve(handler, on_handler_error=errors)
    client = connect(server)
    client.send(b"half")
    await until(lambda: server._factory.connections)
    await until(lambda: server._factory.connections[0].reader.bytes_read == 4)
    server.close(close_existing_connections=True)
    await server.close_finished_and_handlers_determined()
    assert errors.calls == []
    counters = server.describe()["counters"]
    assert (counters["left"], counters["failed"]) == (1, 0)
    assert any("IncompleteReadError" in t for t in logs.texts(LogLevel.debug))


@pytest.mark.parametrize("leaving", ["shut", "reset", "close"])
@ensureDeferred
async def test_incomplete_read_is_otherwise_an_error(
    serve: Any, connect: Any, leaving: str
) -> None:
    """H6: the client left in the middle of a message."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readuntil(b"\r\n")

    server = await serve(handler, on_handler_error=errors)
    client = connect(server)
    client.send(b"GET / HT")
    await until(lambda: server._factory.connections)
    await until(lambda: server._factory.connections[0].reader.bytes_read == 8)
    getattr(client, leaving)()
    await until(lambda: errors.calls)
    error = errors.calls[0][1]
    assert isinstance(error, asyncio.IncompleteReadError)
    assert error.partial == b"GET / HT"


@pytest.mark.parametrize("waiting_in", ["drain", "flushed"])
@pytest.mark.parametrize("way", ["reset", "X3"])
@ensureDeferred
async def test_a_handler_that_only_writes_ends_when_its_connection_has(
    serve: Any, connect: Any, logs: Any, way: str, waiting_in: str
) -> None:
    """H6, S4, X3 [+]: by ConnectionGone, which is not reported."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        while True:
            writer.write(b"x" * 100_000)
            await getattr(writer, waiting_in)()

    server = await serve(handler, on_handler_error=errors)
    client = connect(server)
    await in_thread(client.read, 300_000)
    if way == "reset":
        client.reset()
    else:
        server.close(close_existing_connections=True)
    await until(lambda: server.num_connections == 0)
    assert errors.calls == []
    counters = server.describe()["counters"]
    assert (counters["left"], counters["failed"]) == (1, 0)
    assert any("ConnectionGone" in t for t in logs.texts(LogLevel.debug))


@ensureDeferred
async def test_the_connection_gone_of_another_connection_is_an_error(
    serve: Any, connect: Any
) -> None:
    """H6: of its own connection only."""
    errors = Errors()
    streams: list[tuple[Any, Any]] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        streams.append((reader, writer))
        if len(streams) == 1:
            await reader.read()
            await until(lambda: len(streams) == 2)
        else:
            await reader.readline()
            await streams[0][1].drain()

    server = await serve(handler, on_handler_error=errors)
    first = connect(server)
    await until(lambda: len(streams) == 1)
    second = connect(server)
    await until(lambda: len(streams) == 2)
    first.reset()
    await until(lambda: streams[0][1].is_closed)
    second.send(b"now\n")
    await until(lambda: errors.calls)
    assert errors.types == [ConnectionGone]
    assert errors.calls[0][0].port == second.socket.getsockname()[1]


@ensureDeferred
async def test_a_connection_error_of_the_handlers_own_making_is_an_error(
    serve: Any, connect: Any
) -> None:
    """H6: such as of a connection that it opened itself."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        raise ConnectionGone("made by hand") if b"x" else None

    server = await serve(handler, on_handler_error=errors)
    connect(server).send(b"\n")
    await until(lambda: errors.calls)
    assert errors.types == [ConnectionGone]


@pytest.mark.parametrize("kind", ["coroutine", "Deferred", "inlineCallbacks"])
@ensureDeferred
async def test_a_handler_that_the_server_cancelled_has_ended_ordinarily(
    serve: Any, connect: Any, kind: str
) -> None:
    """H6: the connection ends as ever, with FIN."""
    errors = Errors()

    async def as_coroutine(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"begun")
        await reader.readline()

    @inlineCallbacks
    def as_inline(address: Any, reader: Any, writer: Any) -> Any:
        writer.write(b"begun")
        yield reader.readline()

    def as_deferred(address: Any, reader: Any, writer: Any) -> Any:
        writer.write(b"begun")
        return Deferred()

    handler = {
        "coroutine": as_coroutine,
        "Deferred": as_deferred,
        "inlineCallbacks": as_inline,
    }[kind]
    server = await serve(handler, on_handler_error=errors)
    client = connect(server)
    assert await in_thread(client.read, 5) == b"begun"
    server._factory.cancel_handlers()
    assert await in_thread(client.read_all) == b""
    await until(lambda: server.num_connections == 0)
    assert errors.calls == []
    assert server.describe()["counters"]["left"] == 1


@pytest.mark.parametrize("error", [CancelledError, asyncio.CancelledError])
@ensureDeferred
async def test_a_cancellation_that_is_not_the_servers_is_an_error(
    serve: Any, connect: Any, error: Any
) -> None:
    """H6: ended by it, and the server did it."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        raise error()

    server = await serve(handler, on_handler_error=errors)
    connect(server)
    await until(lambda: errors.calls)
    assert errors.types == [error]


@ensureDeferred
async def test_another_error_of_a_cancelled_handler_is_an_error(
    serve: Any, connect: Any
) -> None:
    """H6: it did not end by the cancellation."""
    errors = Errors()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        try:
            await reader.readline()
        finally:
            raise LookupError("in the clean-up")

    server = await serve(handler, on_handler_error=errors)
    connect(server)
    await until(lambda: server.num_connections)
    await until(lambda: server._factory.connections[0].is_running)
    server._factory.cancel_handlers()
    await until(lambda: errors.calls)
    assert errors.types == [LookupError]


@ensureDeferred
async def test_a_handler_that_outlives_its_cancellation_is_finished_by_itself(
    serve: Any, connect: Any
) -> None:
    """H6: it may finish what it was doing."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        try:
            await reader.readline()
        except CancelledError:
            writer.write(b"goodbye")

    server = await serve(handler, on_handler_error="raise")
    client = connect(server)
    await until(lambda: server.num_connections)
    await until(lambda: server._factory.connections[0].is_running)
    server._factory.cancel_handlers()
    assert await in_thread(client.read_all) == b"goodbye"
    assert server.describe()["counters"]["finished"] == 1


# H7


def stops_as_plain(error: BaseException) -> Any:
    """A plain handler that raises it."""

    def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(PAYLOAD)
        raise error

    return handler


def stops_as_coroutine(error: BaseException) -> Any:
    """A coroutine that raises it after it has waited."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        writer.write(PAYLOAD)
        raise error

    return handler


def stops_as_deferred(error: BaseException) -> Any:
    """A Deferred that fails with it."""

    def fail(writer: Any) -> None:
        writer.write(PAYLOAD)
        raise error

    def handler(address: Any, reader: Any, writer: Any) -> Deferred[None]:
        reading = Deferred.fromCoroutine(reader.readline())
        return reading.addCallback(lambda _: fail(writer))

    return handler


@pytest.mark.parametrize(
    "kind", [stops_as_plain, stops_as_coroutine, stops_as_deferred]
)
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@ensureDeferred
async def test_what_stops_a_program_stops_the_reactor(
    serve: Any, connect: Any, logs: Any, monkeypatch: Any, error: Any, kind: Any
) -> None:
    """H7: not reported, logged critical; the connection ends as in H3."""
    errors = Errors()
    stops: list[bool] = []
    server = await serve(kind(error), on_handler_error=errors)
    monkeypatch.setattr(the_reactor(), "stop", lambda: stops.append(True))
    client = connect(server)
    client.send(b"go\n")
    assert await in_thread(client.read_all) == PAYLOAD
    client.close()
    await until(lambda: server.num_connections == 0)
    assert (stops, errors.calls) == ([True], [])
    assert server._factory.failures.stopped_by is error
    assert not server.is_closed
    (event,) = logs.take(LogLevel.critical)
    assert event["log_failure"].value is error


@ensureDeferred
async def test_a_reactor_that_is_stopping_is_not_stopped_again(
    serve: Any, connect: Any, logs: Any, monkeypatch: Any
) -> None:
    """H7: the second handler to raise; the first one's status counts."""
    from twisted.internet.error import ReactorNotRunning

    raised = [SystemExit(3), SystemExit(4)]
    waiting = list(raised)

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        raise waiting.pop(0)

    def stop() -> None:
        if len(waiting) < 1:
            raise ReactorNotRunning

    server = await serve(handler)
    monkeypatch.setattr(the_reactor(), "stop", stop)
    for _ in range(2):
        assert await in_thread(connect(server).read_all) == b""
    await until(lambda: not waiting and not server.num_connections)
    assert server._factory.failures.stopped_by is raised[0]
    assert len(logs.take(LogLevel.critical)) == 2
