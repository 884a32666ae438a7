"""
What a client has sent before its handler starts: read when the handler first waits,
before the kernel is asked to tell of more. Nothing of it shows but the time it takes.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.logger import LogLevel

from tcpsvc import Observer, Reason
from tcpsvc.engine.subreactor import (
    FAILED_FIRST_READS,
    LEAST_RECEIVED,
    MOST_TURNS_OF_REST,
    SubReactor,
)
from tests.middle import CountsSends
from tests.support import in_thread, the_reactor, turn, until
from tests.tls import client_context, make_certificate


@pytest.fixture(autouse=True)
def with_the_engine(request: pytest.FixtureRequest) -> None:
    """Twisted's own transports read from the accept on."""
    if request.config.getoption("--engine") == "reactor":
        pytest.skip("of the engine, which is switched off")


def group() -> SubReactor:
    """The sub-reactor of the reactor."""
    return SubReactor.of(the_reactor())


def one_that_can_be_turned() -> Any:
    """The reactor, if a handler can call its ``iterate``."""
    reactor = the_reactor()
    if hasattr(reactor, "_asyncioEventloop"):
        pytest.skip("asyncio's loop cannot be turned from within")
    return reactor


class Watching:
    """A handler that notes after each line whether the kernel was to tell of more."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.was_watched: list[bool] = []
        self.ended = Deferred[None]()

    async def handle(self, _: Any, reader: Any, writer: Any) -> None:
        while True:
            line = await reader.readline()
            self.lines.append(line)
            self.was_watched.append(reader.transport in group().getReaders())
            if not line:
                break
            writer.write(line)
        self.ended.callback(None)


@ensureDeferred
async def test_first_bytes_are_read_before_the_kernel_is_asked(
    serve: Any, connect: Any
) -> None:
    """It is asked when the handler waits for the first time."""
    watching = Watching()
    server = await serve(watching.handle)
    client = connect(server)
    client.send(b"one\ntwo\n")
    await until(lambda: len(watching.lines) == 2)
    assert await in_thread(client.read, 8) == b"one\ntwo\n"
    client.send(b"three\n")
    assert await in_thread(client.read, 6) == b"three\n"
    client.shut()
    await watching.ended
    assert watching.lines == [b"one\n", b"two\n", b"three\n", b""]
    assert watching.was_watched[:3] == [False, False, True]


@ensureDeferred
async def test_a_handler_that_ends_with_them_is_never_watched(
    serve: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole life is in the start."""
    watched: list[Any] = []
    add_reader = SubReactor.addReader
    monkeypatch.setattr(
        SubReactor,
        "addReader",
        lambda self, reader: (watched.append(reader), add_reader(self, reader)),
    )

    async def echo_one(_: Any, reader: Any, writer: Any) -> None:
        writer.write(await reader.readline())

    server = await serve(echo_one)
    client = connect(server)
    client.send(b"one\n")
    assert await in_thread(client.read_all) == b"one\n"
    await until(lambda: not server.num_connections)
    assert watched == []
    assert server.describe()["counters"]["ends"] == {Reason.FINISHED.value: 1}


@ensureDeferred
async def test_more_than_is_read_first_comes_after(serve: Any, connect: Any) -> None:
    """In its order."""
    data = bytes(range(256)) * (LEAST_RECEIVED // 256) * 3

    async def echo_all(_: Any, reader: Any, writer: Any) -> None:
        writer.write(await reader.readexactly(len(data)))

    server = await serve(echo_all)
    client = connect(server)
    client.send(data)
    assert await in_thread(client.read_all) == data


@ensureDeferred
async def test_the_end_alone_is_eof(serve: Any, connect: Any) -> None:
    """The client has sent nothing, and ended its side."""
    watching = Watching()
    server = await serve(watching.handle)
    client = connect(server)
    client.shut()
    await watching.ended
    assert watching.lines == [b""]
    assert await in_thread(client.read_all) == b""
    await until(lambda: not server.num_connections)
    assert server.describe()["counters"]["ends"] == {Reason.EOF.value: 1}


@ensureDeferred
@pytest.mark.parametrize("sent", [b"", b"half a line"])
async def test_a_reset_before_the_start_is_one(
    sent: bytes, serve: Any, connect: Any
) -> None:
    """The handler reads what had come, then EOF; the end is counted as it was."""
    lines: list[bytes] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        lines.append(await reader.readline())

    server = await serve(handle)
    client = connect(server)
    client.send(sent)
    client.reset()
    await until(lambda: server.describe()["counters"]["ends"])
    assert lines == [sent]
    assert server.describe()["counters"]["ends"] == {Reason.RESET.value: 1}


@ensureDeferred
async def test_a_handler_that_pauses_its_transport_is_not_read(
    serve: Any, connect: Any
) -> None:
    """What its first statements decide stands."""
    goes_on = Deferred[None]()
    buffered: list[int] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        reader.transport.pauseProducing()
        await goes_on
        buffered.append(reader.bytes_buffered)
        reader.transport.resumeProducing()
        writer.write(await reader.readexactly(8))

    server = await serve(handle)
    client = connect(server)
    client.send(b"one\n")
    await until(lambda: server.num_connections == 1)
    client.send(b"two\n")
    await turn()
    await turn()
    assert group().getReaders() == []
    goes_on.callback(None)
    assert await in_thread(client.read_all) == b"one\ntwo\n"
    assert buffered == [0]


@ensureDeferred
async def test_a_full_buffer_is_not_read_on(serve: Any, connect: Any) -> None:
    """Its reader has paused before the handler has begun."""
    goes_on = Deferred[None]()

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        await goes_on
        while data := await reader.read(10):
            writer.write(data)

    server = await serve(handle, reader_buffer_size=16)
    client = connect(server)
    client.send(b"x" * 100)
    await until(lambda: server.num_connections == 1)
    await turn()
    assert group().getReaders() == []
    goes_on.callback(None)
    assert await in_thread(client.read, 100) == b"x" * 100
    client.shut()
    assert await in_thread(client.read_all) == b""


@ensureDeferred
@pytest.mark.parametrize("how", ["close", "abort", "loseConnection", "server"])
async def test_a_connection_that_ends_in_its_start_is_not_watched_after(
    how: str, serve: Any, connect: Any
) -> None:
    """Whoever has closed it."""
    servers: list[Any] = []
    goes_on = Deferred[None]()

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        if how == "close":
            reader.close()
        elif how == "abort":
            writer.abort()
        elif how == "loseConnection":
            writer.transport.loseConnection()
        else:
            servers[0].close(close_existing_connections=True)
        await goes_on

    server = await serve(handle)
    servers.append(server)
    client = connect(server)
    client.send(b"one\n")
    await until(lambda: server.connections and server.connections[0].socket == "closed")
    assert group().getReaders() == []
    goes_on.callback(None)
    await until(lambda: not server.num_connections)
    client.close()


@ensureDeferred
async def test_a_crowd_of_new_clients_is_read_first_up_to_a_limit(
    serve: Any, connect: Any
) -> None:
    """The rest waits for the kernel to tell, as everybody else does."""
    read_first: list[bool] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        writer.write(await reader.readexactly(LEAST_RECEIVED))
        read_first.append(reader.transport not in group().getReaders())

    server = await serve(handle, max_accepts_per_batch=64)
    clients = [connect(server) for _ in range(30)]
    for client in clients:
        client.send(b"x" * LEAST_RECEIVED)
    await until(lambda: len(read_first) == 30)
    assert sorted(read_first) == [False] * 14 + [True] * 16
    for client in clients:
        assert len(await in_thread(client.read_all)) == LEAST_RECEIVED


@ensureDeferred
async def test_clients_that_do_not_speak_first_are_tried_ever_more_seldom(
    serve: Any, connect: Any
) -> None:
    """Each failed try costs a system call."""
    watching = Watching()
    server = await serve(watching.handle)
    tried: list[bool] = []
    for n in range(1, FAILED_FIRST_READS + 1):
        client = connect(server)
        await until(lambda n=n: len(group().getReaders()) == n)  # type: ignore[misc]
        tried.append(group().first_bytes > 0)
    assert tried == [True] * (FAILED_FIRST_READS - 1) + [False]
    rests = []
    for _ in range(8):
        before = group().turn
        while not group().first_bytes:
            client.send(b"x\n")
            await in_thread(client.read, 2)
        rests.append(group().turn - before)
        group().first_read_failed()
        assert not group().first_bytes
    assert rests == [1, 2, 4, 8, 16, 32, 32, 32]
    assert max(rests) == MOST_TURNS_OF_REST
    group().first_read_succeeded(0)
    group().first_bytes = 1
    group().first_read_failed()
    assert group().first_bytes == 1
    client.shut()
    await watching.ended


@ensureDeferred
async def test_streams_behind_a_server_that_closes_between_leave_no_trace(
    serve: Any, connect: Any
) -> None:
    """The engine may have left the reactor when the handler first waits."""
    heard: list[bytes] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        server.close()
        await turn()
        heard.append(await reader.readline())
        heard.append(await reader.readline())

    server = await serve(handle)
    client = connect(server)
    client.send(b"one\n")
    await until(lambda: heard)
    client.send(b"two\n")
    await until(lambda: len(heard) == 2)
    assert heard == [b"one\n", b"two\n"]
    await server.close_finished_and_handlers_determined()


@ensureDeferred
@pytest.mark.parametrize("how", ["loseConnection", "abortConnection"])
async def test_a_transport_that_is_lost_before_the_start_costs_nobody_theirs(
    how: str, serve: Any, connect: Any
) -> None:
    """H1: its handler reads what had come, and those accepted after it start too."""
    accepted: list[Any] = []
    lines: list[bytes] = []

    class Noting(Observer):
        def connection_accepted(self, connection: Any) -> None:
            accepted.append(connection)

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        lines.append(await reader.readline())

    server = await serve(handle, observer=Noting())
    factory = server._factory
    factory.starts.hold()
    for line in (b"one\n", b"two\n"):
        connect(server).send(line)
    await until(lambda: len(accepted) == 2)
    getattr(accepted[0].transport, how)()
    await until(lambda: accepted[0].is_socket_closed)
    factory.starts.begin()
    await until(lambda: not server.num_connections)
    assert lines == [b"one\n", b"two\n"]


def test_any_number_of_clients_may_not_speak_first() -> None:
    """The rest between tries grows no further, nor does what it takes to say so."""
    group()._failed_first_reads = 1 << 62
    group().first_read_failed()
    assert group()._rests_until - group().turn == MOST_TURNS_OF_REST - 1
    group().first_read_succeeded(0)


@ensureDeferred
async def test_a_first_statement_may_start_tls(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """The client has spoken TLS at once, so its first bytes are TLS's."""
    certificate = str(make_certificate(tmp_path))
    context = DefaultOpenSSLContextFactory(certificate, certificate)

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        reader.transport.startTLS(context)
        writer.write((await reader.readline()).upper())

    server = await serve(handle, on_handler_error="raise")
    client = connect(server)
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = client_context().wrap_bio(received, to_send)

    def until_done(step: Callable[..., bytes | None], *args: Any) -> bytes | None:
        while True:
            try:
                return step(*args)
            except ssl.SSLWantReadError:
                if to_send.pending:
                    client.send(to_send.read())
                received.write(client.socket.recv(65536))

    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    client.send(to_send.read())

    def talk() -> bytes | None:
        until_done(tls.do_handshake)
        tls.write(b"hello\n")
        client.send(to_send.read())
        return until_done(tls.read, 100)

    assert await in_thread(talk) == b"HELLO\n"


@ensureDeferred
async def test_a_first_statement_may_put_another_protocol_in_place(
    serve: Any, connect: Any
) -> None:
    """That gets what has come."""
    heard: list[bytes] = []
    has_heard = Deferred[None]()

    class Other(Protocol):
        def dataReceived(self, data: bytes) -> None:
            heard.append(data)
            has_heard.callback(None)

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        reader.transport.protocol = Other()
        await has_heard
        writer.close()

    server = await serve(handle)
    client = connect(server)
    client.send(b"hello")
    assert await in_thread(client.read_all) == b""
    assert heard == [b"hello"]


@ensureDeferred
async def test_a_first_statement_may_give_the_socket_away(
    serve: Any, connect: Any
) -> None:
    """With all that has come."""
    heard: list[bytes] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        reader.transport.pauseProducing()
        with reader.transport.getHandle().dup() as given:
            heard.append(given.recv(100))

    server = await serve(handle)
    client = connect(server)
    client.send(b"hello")
    assert await in_thread(client.read_all) == b""
    assert heard == [b"hello"]


@pytest.mark.parametrize("then", ["ends", "waits"])
@ensureDeferred
async def test_what_a_first_step_writes_is_sent_in_one_piece(
    serve: Any, connect: Any, then: str
) -> None:
    """S5: whether its handler is over then or not, as in every later turn."""
    sockets: list[CountsSends] = []
    going_on = Deferred[None]()

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        sockets.append(CountsSends(writer.transport))
        writer.write(b"HTTP/1.0 200 OK\r\n")
        writer.write(b"\r\n")
        writer.write(b"body")
        if then == "waits":
            await going_on

    client = connect(await serve(handler))
    assert await in_thread(client.read, 23) == b"HTTP/1.0 200 OK\r\n\r\nbody"
    assert sockets[0].sends == [23]
    going_on.callback(None)
    assert await in_thread(client.read_all) == b""


@ensureDeferred
async def test_a_first_step_that_turns_the_reactor_has_sent_what_it_wrote(
    serve: Any, connect: Any
) -> None:
    """Its own end may be far: within it another starts that does the same."""
    reactor = one_that_can_be_turned()
    clients: list[Any] = []
    greeted: set[int] = set()

    def come() -> None:
        number = len(clients)
        clients.append(connect(server))
        reading = in_thread(clients[number].read, 6)
        reading.addCallback(lambda read: greeted.add(number))

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        number = len(clients) - 1
        writer.write(b"hello ")
        if number < 2:
            come()
        turns = 0
        while number not in greeted and turns < 500:
            turns += 1
            reactor.iterate(0.01)
        writer.write(b"world" if number in greeted else b"too late")

    server = await serve(handler)
    come()
    await until(lambda: len(greeted) == 3 and server.num_connections == 0)
    for client in clients:
        assert await in_thread(client.read_all) == b"world"


@ensureDeferred
async def test_a_producer_that_fails_in_a_first_step_keeps_nobody_from_starting(
    serve: Any, connect: Any, logs: Any
) -> None:
    """It is its connection's end, as in a turn."""
    started: list[int] = []

    class Fails:
        def resumeProducing(self) -> None:
            raise RuntimeError("no more")

        def stopProducing(self) -> None:
            pass

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        started.append(len(started))
        if len(started) == 1:
            writer.write(b"first ")
            writer.transport.registerProducer(Fails(), True)
            writer.transport.producerPaused = True
        writer.write(b"bytes")
        await reader.read()

    server = await serve(handler, max_accepts_per_batch=2)
    clients = [connect(server), connect(server)]
    assert await in_thread(clients[0].read_all) == b"first bytes"
    assert await in_thread(clients[1].read, 5) == b"bytes"
    assert started == [0, 1]
    (failed,) = logs.take(LogLevel.critical)
    assert "no more" in str(failed["log_failure"].value)


# Who turns the reactor before the first wait is told of what comes, too.


def bytes_buffered(reader: Any, _: Any) -> Callable[[], bool]:
    """Nine or ten bytes have come."""
    return lambda: reader.bytes_buffered >= 9


def bytes_read(reader: Any, _: Any) -> Callable[[], bool]:
    """Ten have."""
    return lambda: reader.bytes_read == 10


def at_eof(reader: Any, _: Any) -> Callable[[], bool]:
    """The client has ended its side."""
    return lambda: reader.at_eof() or reader.has_eof  # With some unread.


def consumer_left(_: Any, writer: Any) -> Callable[[], bool]:
    """It has reset the connection."""
    left = writer.consumer_left()
    return lambda: left.called


def close_finished(_: Any, writer: Any) -> Callable[[], bool]:
    """That has closed it."""
    closed = writer.close_finished()
    return lambda: closed.called


@ensureDeferred
@pytest.mark.parametrize("has_read", [False, True])
@pytest.mark.parametrize(
    "what", [bytes_buffered, bytes_read, at_eof, consumer_left, close_finished]
)
@pytest.mark.parametrize("engine", ["auto", "reactor"])
async def test_who_turns_the_reactor_in_the_first_step_is_told_of_what_comes(
    serve: Any, connect: Any, engine: str, what: Any, has_read: bool
) -> None:
    """By both engines alike: before it has read anything, and after a first read."""
    reactor = one_that_can_be_turned()
    done: list[bool] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        if has_read:
            assert await reader.read(0) == b""
            assert await reader.read(1) == b"1"
        is_done = what(reader, writer)
        reactor.callLater(0, talk)
        give_up = reactor.seconds() + 2
        while not is_done() and reactor.seconds() < give_up:
            reactor.iterate(0.01)
        done.append(is_done())

    def talk() -> None:
        client.send(b"67890")
        if what in (consumer_left, close_finished):
            client.reset()
        elif what is at_eof:
            client.shut()

    server = await serve(handle, engine=engine)
    client = connect(server)
    client.send(b"12345")
    await until(lambda: done)
    assert done == [True]


@ensureDeferred
async def test_who_turns_the_reactor_for_an_answer_has_asked(
    serve: Any, connect: Any
) -> None:
    """Each time: nothing else may happen that would make the engine send."""
    reactor = one_that_can_be_turned()
    answers: list[int] = []
    clients: list[Any] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        for asked in range(1, 4):
            writer.write(b"?")
            turns = 0
            while reader.bytes_buffered < asked and turns < 200:
                turns += 1
                reactor.iterate(0.01)
                answer()
            answers.append(reader.bytes_buffered)

    def answer() -> None:
        """The client's part, without a thread whose end would wake the reactor."""
        try:
            clients[0].socket.send(b"!" * len(clients[0].socket.recv(100)))
        except BlockingIOError:
            pass

    server = await serve(handler)
    clients.append(connect(server))
    clients[0].socket.setblocking(False)
    await until(lambda: len(answers) == 3)
    assert answers == [1, 2, 3]
