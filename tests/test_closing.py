"""Closing a server and its connections (spec X, and H5)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import defer
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.protocols.policies import WrappingFactory
from twisted.protocols.wire import Echo
from twisted.python.failure import Failure
from zope.interface import implementer

from tcpsvc import ConnectionGone, Server, ServerClosed, ServerFactory, WhereToListen
from tests.support import (
    LOOPBACK,
    in_thread,
    open_descriptors,
    settle,
    the_reactor,
    turn,
    until,
)
from tests.tls import client_context, tls_endpoint


async def echo(address: Any, reader: Any, writer: Any) -> None:
    """Answer each line."""
    async for line in reader:
        writer.write(line)


async def echoes(client: Any) -> bool:
    """Whether a client is served."""
    client.send(b"hello\n")
    return bool(await in_thread(client.read, 6) == b"hello\n")


def ended(client: Any) -> bytes:
    """What a client read until its connection ended, in whichever way."""
    got = b""
    try:
        while data := client.socket.recv(65536):
            got += data
    except ConnectionResetError:
        pass
    return got


def queued_before(connect: Any, number: int) -> tuple[Any, list[Any]]:
    """A place whose kernel has clients already, and these clients."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = IPv4Address("TCP", *listening.getsockname())
    clients = [connect(address) for _ in range(number)]
    return WhereToListen.of_fd(listening.detach(), own=True), clients


class Stuck:
    """Handlers that wait until they are told, whatever their connection does."""

    def __init__(self) -> None:
        self.told: Deferred[None] = Deferred()
        self.started = 0
        self.writers: list[Any] = []

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        self.started += 1
        self.writers.append(writer)
        mine: Deferred[None] = Deferred()
        self.told.chainDeferred(mine)
        await mine


@pytest.fixture
def stuck() -> Stuck:
    """The handlers of the test."""
    return Stuck()


@implementer(IListeningPort)
class QuickPort:
    """A port that is no tcp.Port, and stops at once, as in-memory ones do."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.stopped = 0

    def startListening(self) -> None:
        """It does already."""

    def stopListening(self) -> Any:
        self.stopped += 1
        return self._answer

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "127.0.0.1", 1)


@implementer(IStreamServerEndpoint)
class QuickEndpoint:
    def __init__(self, answer: Any) -> None:
        self.port = QuickPort(answer)

    def listen(self, factory: Any) -> Any:
        return succeed(self.port)


# X1


@ensureDeferred
@pytest.mark.parametrize("unix", [False, True])
async def test_close_fires_when_the_listening_socket_is_gone(
    unix: bool, serve: Any, connect: Any, tmp_path: Path
) -> None:
    """X1: is_closed at once; the Deferred not before close() has returned; then the
    descriptor is gone, the port free, the path unlinked."""
    where: Any = WhereToListen.of_file(tmp_path / "s") if unix else LOOPBACK
    server = await serve(echo, where=where)
    listening = server.listening_socket
    number = listening.fileno()
    client = connect(server)
    assert await echoes(client)
    assert server.is_closed is False
    closing = server.close()
    assert server.is_closed is True
    assert not closing.called
    assert await closing is None
    assert listening.fileno() == -1
    assert number not in open_descriptors()
    if unix:
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(FileNotFoundError):
            connect(server)
    else:
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", server.listening_on))
            again.listen(1)
    # Existing connections go on.
    assert await echoes(client)
    assert server.num_connections == 1


@ensureDeferred
@pytest.mark.parametrize("unix", [False, True])
async def test_clients_in_the_backlog_are_reset(
    unix: bool, serve: Any, connect: Any, stuck: Stuck, tmp_path: Path
) -> None:
    """X1: by the kernel; none of them gets a handler."""
    where: Any = WhereToListen.of_file(tmp_path / "s") if unix else LOOPBACK
    server = await serve(stuck, where=where, max_connections=1)
    connect(server)
    await until(lambda: stuck.started == 1)
    waiting = [connect(server) for _ in range(3)]
    await server.close()
    for client in waiting:
        with pytest.raises(ConnectionResetError):
            await in_thread(client.read_all)
    stuck.told.callback(None)
    await server.close_finished_and_handlers_determined()
    assert stuck.started == 1
    assert server.describe()["counters"]["accepted"] == 1


@ensureDeferred
async def test_nobody_is_accepted_in_the_turn_of_the_close(
    serve: Any, connect: Any
) -> None:
    """X1: though the kernel reports the new client and the byte that closes the
    server at once."""
    started: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)
        await reader.readline()
        server.close()
        writer.write(b"closed")

    server = await serve(handler)
    first = connect(server)
    await until(lambda: started)
    await settle()
    first.send(b"\n")
    second = connect(server)
    assert await in_thread(first.read_all) == b"closed"
    # If it came first it was accepted, and then its handler must not start (H5).
    assert await in_thread(ended, second) == b""
    await server.close_finished()
    assert len(started) == 1


@ensureDeferred
@pytest.mark.parametrize("answer", [None, succeed(None)], ids=["None", "fired"])
async def test_close_does_not_fire_before_it_returns_however_fast_the_port(
    answer: Any, serve: Any
) -> None:
    """X1: a port that stops at once; it is told to once only."""
    endpoint = QuickEndpoint(answer)
    server = await serve(echo, where=WhereToListen.of_endpoint(endpoint))
    asked_before = server.close_finished()
    closing = server.close()
    assert server.is_closed
    assert not closing.called
    assert not asked_before.called
    again = server.close()
    assert not again.called
    for one in (closing, again, asked_before):
        assert await one is None
    assert endpoint.port.stopped == 1
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_a_port_that_fails_to_stop_is_logged_and_close_fires(
    serve: Any, logs: Any
) -> None:
    """X1: nobody waits for ever."""
    failing: Deferred[None] = Deferred()
    endpoint = QuickEndpoint(failing)
    server = await serve(echo, where=WhereToListen.of_endpoint(endpoint))
    closing = server.close()
    failing.errback(OSError("stuck"))
    assert await closing is None
    (line,) = logs.take(LogLevel.critical)
    assert line["log_failure"].type is OSError


# X2


@ensureDeferred
async def test_each_caller_has_a_deferred_of_its_own(serve: Any) -> None:
    """X2: what one's callbacks make of it does not reach the next."""
    server = await serve(echo)
    made = [
        server.close(),
        server.close_finished(),
        server.close(),
        server.close(close_existing_connections=True),
        server.close_finished_and_handlers_determined(),
        server.close_finished_and_handlers_determined(),
    ]
    assert len({id(d) for d in made}) == len(made)
    for number, one in enumerate(made):
        one.addCallback(lambda result, n=number: (result, n))
    assert [await one for one in made] == [(None, n) for n in range(len(made))]
    # One asked for afterwards has fired already.
    for late in (
        server.close(),
        server.close_finished(),
        server.close(close_existing_connections=True),
        server.close_finished_and_handlers_determined(),
    ):
        assert late.called
        assert await late is None


@ensureDeferred
async def test_a_caller_that_raises_does_not_reach_the_next(serve: Any) -> None:
    """X2."""
    server = await serve(echo)

    def fail(_: object) -> None:
        raise ValueError("mine")

    mine = server.close().addCallback(fail)
    other = server.close()
    with pytest.raises(ValueError, match="mine"):
        await mine
    assert await other is None


@ensureDeferred
async def test_close_finished_and_close_fire_at_the_same_moment(serve: Any) -> None:
    """X2: in the order they were asked for, in one turn."""
    server = await serve(echo)
    fired: list[str] = []
    for name, ask in [
        ("finished", server.close_finished),
        ("close", server.close),
        ("close again", server.close),
    ]:
        ask().addCallback(lambda _, n=name: fired.append(n))
    assert fired == []
    await server.close()
    assert fired == ["finished", "close", "close again"]


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
async def test_cancelling_one_affects_nobody_else(
    close_existing_connections: bool, serve: Any, connect: Any
) -> None:
    """X2: the cancelled one fails with CancelledError; the server closes."""
    server = await serve(echo)
    client = connect(server)
    assert await echoes(client)
    others = [
        server.close_finished(),
        server.close_finished_and_handlers_determined(),
        server.close(),
    ]
    mine = server.close(close_existing_connections=close_existing_connections)
    mine.cancel()
    with pytest.raises(CancelledError):
        await mine
    for cancelled in (
        server.close_finished(),
        server.close_finished_and_handlers_determined(),
    ):
        cancelled.cancel()
        with pytest.raises(CancelledError):
            await cancelled
    if not close_existing_connections:
        client.close()
    for other in others:
        assert await other is None


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
async def test_a_close_with_a_timeout_times_out_as_any_deferred(
    close_existing_connections: bool, serve: Any
) -> None:
    """X2: addTimeout cancels, and tells by the CancelledError."""
    endpoint = QuickEndpoint(stopping := Deferred())
    server = await serve(echo, where=WhereToListen.of_endpoint(endpoint))
    clock = Clock()
    closing = server.close(close_existing_connections=close_existing_connections)
    closing.addTimeout(1, clock)
    clock.advance(1)
    try:
        with pytest.raises(defer.TimeoutError):
            await closing
    finally:
        stopping.callback(None)
    await server.close()


@ensureDeferred
async def test_close_finished_closes_nothing(serve: Any, connect: Any) -> None:
    """X2, X4: nor does cfhd; they only wait."""
    server = await serve(echo)
    waiting = [server.close_finished(), server.close_finished_and_handlers_determined()]
    await settle()
    assert not server.is_closed
    assert not any(one.called for one in waiting)
    client = connect(server)
    assert await echoes(client)
    client.close()
    await until(lambda: server.num_connections == 0)
    await settle()
    assert not any(one.called for one in waiting)
    await server.close()
    for one in waiting:
        await one


# X3


@ensureDeferred
@pytest.mark.parametrize("plain_first", [False, True])
async def test_what_the_kernel_took_is_delivered_and_then_eof(
    plain_first: bool, serve: Any, connect: Any, stuck: Stuck
) -> None:
    """X3: also after a plain close. It does not wait for handlers."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 50_000)
        await writer.flushed()
        await stuck(address, reader, writer)

    server = await serve(handler)
    clients = [connect(server) for _ in range(3)]
    await until(lambda: stuck.started == 3)
    if plain_first:
        await server.close()
        assert server.num_connections == 3
    over = server.close_finished_and_handlers_determined()
    closing = server.close(close_existing_connections=True)
    assert await closing is None
    for client in clients:
        assert await in_thread(client.read_all) == b"x" * 50_000
    assert server.num_connections == 3
    assert [c["socket"] for c in server.describe()["connections"]] == ["closed"] * 3
    server.invariant()
    assert not over.called
    stuck.told.callback(None)
    await over
    assert server.num_connections == 0
    server.invariant()


@ensureDeferred
async def test_what_only_the_server_holds_is_discarded(
    serve: Any, connect: Any, stuck: Stuck
) -> None:
    """X3: the client reads a part, then EOF, and nobody waits for it to read."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 30_000_000)
        await stuck(address, reader, writer)

    server = await serve(handler)
    client = connect(server)
    await until(lambda: stuck.started == 1)
    await until(lambda: server.describe()["connections"][0]["bytes_out"])
    await server.close(close_existing_connections=True)
    got = await in_thread(client.read_all)
    assert 0 < len(got) < 30_000_000
    stuck.told.callback(None)
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_with_unread_input_it_may_be_a_reset(
    serve: Any, connect: Any, stuck: Stuck
) -> None:
    """X3: Linux sends RST then; in any case the connection ends at once."""
    server = await serve(stuck, reader_buffer_size=1000)
    client = connect(server)
    await until(lambda: stuck.started == 1)
    client.send(b"x" * 300_000)
    await settle()
    await server.close(close_existing_connections=True)
    assert await in_thread(ended, client) == b""
    stuck.told.callback(None)


@ensureDeferred
@pytest.mark.parametrize("kind", ["sock", "protocol", "tls", "unix"])
async def test_every_kind_of_connection_is_closed(
    kind: str, serve: Any, connect: Any, stuck: Stuck, tmp_path: Path
) -> None:
    """X3: and the client reads EOF."""
    reasons: list[Failure] = []

    class Hold(Protocol):
        def connectionMade(self) -> None:
            stuck.started += 1

        def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
            reasons.append(reason)

    async def with_sock(address: Any, client: socket.socket) -> None:
        await stuck(address, None, None)

    create, handler, where = {
        "sock": (Server.create_sock, with_sock, LOOPBACK),
        "protocol": (Server.create_protocol, Factory.forProtocol(Hold), LOOPBACK),
        "tls": (
            Server.create,
            stuck,
            WhereToListen.of_endpoint(tls_endpoint(tmp_path)),
        ),
        "unix": (Server.create, stuck, WhereToListen.of_file(tmp_path / "s")),
    }[kind]
    server = await serve(handler, create=create, where=where)
    client = connect(server)
    await until(lambda: stuck.started == 1)
    if kind == "tls":
        client.socket = await in_thread(client_context().wrap_socket, client.socket)
    await server.close(close_existing_connections=True)
    assert await in_thread(ended, client) == b""
    if kind == "protocol":
        assert [reason.type for reason in reasons] == [ConnectionDone]
        assert server.num_connections == 0
    else:
        assert server.num_connections == 1
        stuck.told.callback(None)
        await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_a_handler_that_writes_afterwards_is_not_held(
    serve: Any, connect: Any
) -> None:
    """X3 [+]: it sees ConnectionGone, and has ended ordinarily; no clock is needed.
    The original holds it for 30 s."""
    seen: list[Any] = []
    blamed: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        seen.append(await reader.read())
        writer.write(b"more")
        seen.append(writer.bytes_to_write)
        await writer.drain()

    clock = Clock()
    server = await serve(
        handler, clock=clock, on_handler_error=lambda a, f: blamed.append(f)
    )
    client = connect(server)
    await until(lambda: server.describe()["counters"]["accepted"] == 1)
    await settle()
    server.close(close_existing_connections=True)
    await server.close_finished_and_handlers_determined()
    assert seen == [b"", 0]
    assert blamed == []
    assert server.describe()["counters"]["left"] == 1
    assert await in_thread(client.read_all) == b""
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_pending_waits_of_a_handler_end(serve: Any, connect: Any) -> None:
    """X3, S8: drain and flushed fail with ConnectionGone; a read ends in EOF."""
    ends: list[Any] = []

    async def stream_handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 30_000_000)
        waiting = [writer.flushed(), Deferred.fromCoroutine(writer.drain())]
        reading = Deferred.fromCoroutine(reader.readexactly(10))
        for one in waiting:
            try:
                await one
            except ConnectionGone as error:
                ends.append(type(error))
        await reading

    server = await serve(stream_handler, on_handler_error="raise")
    client = connect(server)
    client.send(b"half")
    await until(lambda: server.num_connections == 1)
    await settle()
    await server.close(close_existing_connections=True)
    await server.close_finished_and_handlers_determined()
    assert ends == [ConnectionGone, ConnectionGone]
    # IncompleteReadError after X3 is an ordinary end (H6).
    counters = server.describe()["counters"]
    assert (counters["left"], counters["failed"]) == (1, 0)
    await server.failed()


@ensureDeferred
async def test_a_handler_that_hears_of_the_reset_cannot_write_any_more(
    serve: Any, connect: Any
) -> None:
    """S4, S8: by the time consumer_left fires, drain and flushed say ConnectionGone;
    so a handler that goes on at once does end."""
    ends: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await writer.consumer_left()
        writer.write(b"into the void")
        ends.append(writer.bytes_to_write)
        for wait in (writer.drain, writer.flushed):
            try:
                ends.append(await wait())
            except ConnectionGone:
                ends.append("gone")

    server = await serve(handler)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    await settle()
    client.reset()
    await until(lambda: server.num_connections == 0)
    assert ends == [0, "gone", "gone"]


@ensureDeferred
async def test_a_connection_in_its_final_flush_is_closed_too(
    serve: Any, connect: Any
) -> None:
    """X3: its handler has ended; cfhd follows at once."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 30_000_000)

    server = await serve(handler, clock=Clock())
    client = connect(server)
    await until(
        lambda: [c["handler"] for c in server.describe()["connections"]] == ["finished"]
    )
    await server.close(close_existing_connections=True)
    assert server.num_connections == 0
    await server.close_finished_and_handlers_determined()
    assert len(await in_thread(client.read_all)) < 30_000_000


@ensureDeferred
async def test_a_connection_that_lingers_is_closed_too(
    serve: Any, connect: Any
) -> None:
    """X3: all is sent, and the client's FIN is waited for no longer."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        writer.write(b"x" * 500_000)

    server = await serve(handler, clock=Clock())
    client = connect(server)
    client.send(b"\nmore")
    assert len(await in_thread(client.read_all)) == 500_000
    await server.close(close_existing_connections=True)
    assert server.num_connections == 0
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_connections_that_were_accepted_and_not_started_are_closed(
    serve: Any, connect: Any
) -> None:
    """X3, H5: between their accept and their handler's turn."""
    where, clients = queued_before(connect, 3)
    started: list[Any] = []

    def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)

    server = await serve(handler, where=where, max_accepts_per_batch=3)
    port = server._listeners.ports[0].port
    accept_batch = port.doRead
    closing: list[Deferred[None]] = []

    def accept_and_close() -> None:
        accept_batch()
        closing.append(server.close(close_existing_connections=True))

    port.doRead = accept_and_close
    await until(lambda: closing)
    await closing[0]
    assert server.num_connections == 0
    assert started == []
    for client in clients:
        assert await in_thread(client.read_all) == b""
    await server.close_finished_and_handlers_determined()
    assert server.describe()["counters"]["refused"] == 3
    server.invariant()


# X4


@ensureDeferred
async def test_the_order_at_the_end_of_the_last_handler(
    serve: Any, connect: Any
) -> None:
    """X4, H4: socket closed, slot released, on_handler_error, then cfhd."""
    happened: list[Any] = []
    reported: Deferred[None] = Deferred()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.close_finished().addCallback(
            lambda _: happened.append(("socket closed", server.num_connections))
        )
        await reader.readline()
        writer.write(b"bye")
        happened.append(("handler ends", server.num_connections))
        raise ValueError("no")

    def on_error(address: Any, failure: Failure) -> Deferred[None]:
        happened.append(("on_handler_error", server.num_connections))
        return reported

    server = await serve(handler, on_handler_error=on_error)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    await turn()  # The handler starts in it (H1), or never (H5).
    await server.close()
    happened.append("close finished")
    over = server.close_finished_and_handlers_determined()
    over.addCallback(lambda _: happened.append("over"))
    client.send(b"\n")
    assert await in_thread(client.read_all) == b"bye"
    client.close()
    await until(lambda: "on_handler_error" in str(happened))
    await settle()
    assert not over.called
    # It may look at the server meanwhile: nothing is live, and it is not over.
    assert server.num_connections == 0
    server.invariant()
    reported.callback(None)
    await over
    assert happened == [
        "close finished",
        ("handler ends", 1),
        ("socket closed", 1),
        ("on_handler_error", 0),
        "over",
    ]


@ensureDeferred
async def test_the_end_waits_for_the_listening_socket(serve: Any) -> None:
    """X4: cfhd not before close_finished, with no connection at all."""
    endpoint = QuickEndpoint(stopping := Deferred())
    server = await serve(echo, where=WhereToListen.of_endpoint(endpoint))
    fired: list[str] = []
    over = server.close_finished_and_handlers_determined()
    over.addCallback(lambda _: fired.append("over"))
    server.close_finished().addCallback(lambda _: fired.append("finished"))
    server.close()
    await settle()
    assert fired == []
    stopping.callback(None)
    await over
    assert fired == ["finished", "over"]


@ensureDeferred
async def test_failed_fires_at_the_end_and_not_before(serve: Any) -> None:
    """E3, X4: failed() fires None at cfhd, when the socket is closed too."""
    endpoint = QuickEndpoint(stopping := Deferred())
    server = await serve(
        echo, where=WhereToListen.of_endpoint(endpoint), on_handler_error="raise"
    )
    failed = server.failed()
    server.close()
    early = failed.called
    await settle()
    stopping.callback(None)
    await server.close_finished_and_handlers_determined()
    assert await failed is None
    assert not early


@ensureDeferred
async def test_a_handler_whose_client_is_gone_delays_the_end(
    serve: Any, connect: Any, stuck: Stuck
) -> None:
    """X4, A5 [+]: the original's cfhd fires under it."""
    server = await serve(stuck)
    client = connect(server)
    await until(lambda: stuck.started == 1)
    client.reset()
    await until(
        lambda: stuck.writers[0].consumer_left().called or server.num_connections == 0
    )
    await server.close()
    over = server.close_finished_and_handlers_determined()
    await settle()
    assert not over.called
    assert server.num_connections == 1
    stuck.told.callback(None)
    await over


@ensureDeferred
async def test_several_connections_end_in_any_order(serve: Any, connect: Any) -> None:
    """X4: cfhd is at the last one."""
    server = await serve(echo)
    clients = [connect(server) for _ in range(4)]
    await until(lambda: server.num_connections == 4)
    await settle()  # All have started: none does after a close.
    server.close()
    over = server.close_finished_and_handlers_determined()
    for client, left in zip(
        [clients[2], clients[0], clients[3]], [3, 2, 1], strict=True
    ):
        client.close()
        await until(lambda left=left: server.num_connections == left)
        assert not over.called
    clients[1].close()
    await over
    assert server.num_connections == 0


# X5


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
async def test_close_from_inside_a_handler(
    close_existing_connections: bool, serve: Any, connect: Any
) -> None:
    """X5: at its first statement, and awaited; it does not wait for itself."""
    ends: list[str] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"bye")
        await writer.flushed()
        await server.close(close_existing_connections=close_existing_connections)
        ends.append("closed")
        await server.close()
        assert not server.close_finished_and_handlers_determined().called

    server = await serve(handler, on_handler_error="raise")
    client = connect(server)
    assert await in_thread(client.read_all) == b"bye"
    client.close()
    await server.close_finished_and_handlers_determined()
    assert ends == ["closed"]
    await server.failed()


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
async def test_close_from_on_handler_error(
    close_existing_connections: bool, serve: Any, connect: Any, stuck: Stuck
) -> None:
    """X5: nobody who waited is accepted afterwards."""
    started = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)
        await reader.readline()
        raise ValueError("no")

    async def on_error(address: Any, failure: Failure) -> None:
        await server.close(close_existing_connections=close_existing_connections)

    server = await serve(handler, on_handler_error=on_error, max_connections=2)
    first, other = connect(server), connect(server)
    await until(lambda: len(started) == 2)
    waiting = connect(server)
    first.send(b"\n")
    with pytest.raises(ConnectionResetError):
        await in_thread(waiting.read_all)
    assert server.is_closed
    if close_existing_connections:
        assert await in_thread(other.read_all) == b""
    else:
        other.close()
    await server.close_finished_and_handlers_determined()
    assert len(started) == 2


@ensureDeferred
async def test_close_from_a_callback_of_its_own(serve: Any, connect: Any) -> None:
    """X5: in any state, any number of times, from every Deferred it gives."""
    server = await serve(echo)
    client = connect(server)
    assert await echoes(client)
    closing = server.close().addCallback(
        lambda _: server.close(close_existing_connections=True)
    )
    over = server.close_finished_and_handlers_determined().addCallback(
        lambda _: server.close(close_existing_connections=True)
    )
    assert await closing is None
    assert await over is None
    server.invariant()


@ensureDeferred
async def test_close_from_the_callback_of_create(connect: Any) -> None:
    """X5: before anybody could be accepted."""
    where, clients = queued_before(connect, 2)
    started: list[Any] = []
    server = await Server.create(
        where, lambda a, r, w: started.append(a), on_handler_error="ignore"
    ).addCallback(lambda server: server.close().addCallback(lambda _: server))
    await server.close_finished_and_handlers_determined()
    for client in clients:
        with pytest.raises(ConnectionResetError):
            await in_thread(client.read_all)
    assert started == []


class Closing(Protocol):
    """Closes the server in the method of the name."""

    def __init__(self, at: str, close: Any) -> None:
        self._at, self._close = at, close
        self.happened: list[str] = []

    def _maybe(self, method: str) -> None:
        self.happened.append(method)
        if method == self._at:
            self._close()

    def makeConnection(self, transport: Any) -> None:
        super().makeConnection(transport)
        self._maybe("makeConnection")

    def dataReceived(self, data: bytes) -> None:
        self._maybe("dataReceived")

    def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
        self._maybe("connectionLost")


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
@pytest.mark.parametrize("at", ["makeConnection", "dataReceived", "connectionLost"])
async def test_close_from_inside_a_protocol(
    at: str, close_existing_connections: bool, serve: Any, connect: Any
) -> None:
    """X5: and the rest of its batch is not served."""
    where, clients = queued_before(connect, 3)
    made: list[Closing] = []

    class Making(Factory):
        def buildProtocol(self, addr: Any) -> Protocol:
            made.append(
                Closing(
                    at,
                    lambda: server.close(
                        close_existing_connections=close_existing_connections
                    ),
                )
            )
            return made[-1]

    clients[0].send(b"x")
    server = await serve(
        Making(),
        create=Server.create_protocol,
        where=where,
        max_accepts_per_batch=3,
        on_handler_error="raise",
    )
    if at == "connectionLost":
        await until(lambda: made)
        clients[0].close()
    await until(lambda: server.is_closed)
    if at == "makeConnection":
        assert len(made) == 1
    if close_existing_connections:
        for client in clients:
            if client.socket.fileno() != -1:
                assert await in_thread(ended, client) == b""
    for client in clients:
        client.close()
    await server.close_finished_and_handlers_determined()
    assert all(p.happened.count("connectionLost") == 1 for p in made)
    server.invariant()
    await server.failed()


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
async def test_close_from_build_protocol(
    close_existing_connections: bool, serve: Any, connect: Any
) -> None:
    """X5, H5, X4: the protocol that was being built is not connected any more, and
    nothing is live after the end."""
    where, clients = queued_before(connect, 3)
    made: list[Closing] = []
    live_at_the_end: list[int] = []

    class Making(Factory):
        def buildProtocol(self, addr: Any) -> Protocol:
            over = server.close_finished_and_handlers_determined()
            over.addCallback(lambda _: live_at_the_end.append(server.num_connections))
            server.close(close_existing_connections=close_existing_connections)
            made.append(Closing("never", None))
            return made[-1]

    server = await serve(
        Making(), create=Server.create_protocol, where=where, max_accepts_per_batch=3
    )
    await until(lambda: server.is_closed)
    for client in clients:
        assert await in_thread(ended, client) == b""
    await server.close_finished_and_handlers_determined()
    server.invariant()
    assert live_at_the_end == [0]
    assert [p.happened for p in made] == [[]]


@implementer(IStreamServerEndpoint)
class ClosingEndpoint:
    """Its wrapping factory closes the server between our buildProtocol and our
    makeConnection."""

    def __init__(self, close: Any) -> None:
        self._close = close

    def listen(self, factory: Any) -> Any:
        close = self._close

        class Wrapping(WrappingFactory):
            def buildProtocol(self, addr: Any) -> Any:
                built = WrappingFactory.buildProtocol(self, addr)
                close()
                return built

        inner = TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1")
        return inner.listen(Wrapping(factory))


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
@pytest.mark.parametrize("kind", ["stream", "protocol"])
async def test_close_from_a_wrapping_factory(
    kind: str, close_existing_connections: bool, serve: Any, connect: Any
) -> None:
    """X5: a connection that has its slot and not yet its transport."""
    started: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)

    def close() -> None:
        closing.append(
            server.close(close_existing_connections=close_existing_connections)
        )

    closing: list[Deferred[None]] = []
    server = await serve(
        handler if kind == "stream" else Factory.forProtocol(Echo),
        create=Server.create if kind == "stream" else Server.create_protocol,
        where=WhereToListen.of_endpoint(ClosingEndpoint(close)),
    )
    client = connect(server)
    if kind == "protocol" and not close_existing_connections:
        client.close()
    else:
        assert await in_thread(ended, client) == b""
    await until(lambda: closing)
    await closing[0]
    await server.close_finished_and_handlers_determined()
    assert server.num_connections == 0
    assert started == []
    server.invariant()


@ensureDeferred
async def test_the_rest_of_a_batch_is_closed_unstarted(
    serve: Any, connect: Any
) -> None:
    """H5 [+]: close() from the first handler of a batch of accepts; the original
    runs the others. They read EOF, also if they spoke early."""
    where, clients = queued_before(connect, 4)
    clients[2].send(b"early")
    started: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)
        server.close()
        writer.write(b"served")

    server = await serve(handler, where=where, max_accepts_per_batch=4)
    assert await in_thread(clients[0].read_all) == b"served"
    for client in (clients[1], clients[3]):
        assert await in_thread(client.read_all) == b""
    assert await in_thread(ended, clients[2]) == b""
    clients[0].close()
    await server.close_finished_and_handlers_determined()
    assert len(started) == 1
    counters = server.describe()["counters"]
    assert (counters["accepted"], counters["refused"]) == (4, 3)
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("close_existing_connections", [False, True])
async def test_the_rest_of_a_batch_of_socks_is_closed_unstarted(
    close_existing_connections: bool, serve: Any, connect: Any
) -> None:
    """H5, X5: also for create_sock."""
    where, clients = queued_before(connect, 3)
    started: list[Any] = []

    async def handler(address: Any, client: socket.socket) -> None:
        started.append(address)
        await server.close(close_existing_connections=close_existing_connections)

    server = await serve(
        handler, create=Server.create_sock, where=where, max_accepts_per_batch=3
    )
    for client in clients:
        assert await in_thread(client.read_all) == b""
    await server.close_finished_and_handlers_determined()
    assert len(started) == 1
    server.invariant()


@ensureDeferred
async def test_a_bare_factory_closed_by_its_first_handler(connect: Any) -> None:
    """H5: those that it holds, and those that were to start, are closed."""
    started: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)
        factory.close()

    factory = ServerFactory.of_streams(
        handler, on_handler_error="ignore", max_connections=2
    )
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = IPv4Address("TCP", *listening.getsockname())
    clients = [connect(address) for _ in range(5)]
    listening.setblocking(False)
    port = the_reactor().adoptStreamPort(listening.fileno(), socket.AF_INET, factory)
    listening.close()
    for client in clients:
        assert await in_thread(client.read_all) == b""
    await factory.when_over()
    assert len(started) == 1
    assert factory.num_connections == 0
    factory.invariant()
    await port.stopListening()


# X6


@ensureDeferred
async def test_what_a_closed_server_still_answers(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """X6: where it listened, and who is live; not its socket."""
    server = await serve(echo)
    address, port = server.listening_on_address, server.listening_on
    client = connect(server)
    assert await echoes(client)
    await server.close()
    assert (server.listening_on_address, server.listening_on) == (address, port)
    assert server.num_connections == 1
    with pytest.raises(ServerClosed):
        _ = server.listening_socket
    assert server.describe()["is_closed"] is True
    assert "closed" in repr(server)
    client.close()
    await server.close_finished_and_handlers_determined()
    assert server.num_connections == 0
    assert (server.listening_on_address, server.listening_on) == (address, port)
    unix = await serve(echo, where=WhereToListen.of_file(tmp_path / "s"))
    await unix.close()
    assert unix.listening_on == str(tmp_path / "s")
    assert unix.listening_on_address.name == str(tmp_path / "s").encode()
    with pytest.raises(ServerClosed):
        _ = unix.listening_socket


@ensureDeferred
async def test_a_closed_endpoint_server_still_answers(serve: Any) -> None:
    """X6: whose port is Twisted's."""
    where = WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    server = await serve(echo, where=where)
    assert server.listening_socket.getsockname()[1] == server.listening_on.port
    address = server.listening_on_address
    await server.close()
    assert server.listening_on_address == address
    assert server.listening_on == address
    with pytest.raises(ServerClosed):
        _ = server.listening_socket
    server.max_connections = 5
    server.set_drop_incoming_connections(True)
    server.invariant()
