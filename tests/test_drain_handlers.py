"""
What handlers hear of a drain, and how they are stopped (issue 4, sections 6 and 7;
spec G3, G4, X7).
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.logger import LogLevel, formatEvent

from tcpsvc import DrainReport, Reason, Server, WhereToListen, kernel
from tcpsvc.drain_options import GRACE
from tcpsvc.testing import MemoryServer
from tests.drains import Release, deaf, reads, report_of, until_over
from tests.support import Fired, Logs, in_thread, settle, the_reactor, turn, until
from tests.tls import client_context, tls_endpoint

# They are told.


@ensureDeferred
async def test_each_connection_is_told_by_a_deferred_of_ones_own(
    serving: Any, clock: Clock
) -> None:
    """Of the writer's and of the connection's; also when it is asked for later."""
    seen: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        seen.append((reader, writer))
        await reader.drain_to_eof()

    server, clients = await serving(handler, 3)
    (reader, writer), (_, other), (_, late) = seen
    connection = server.connection(1)
    assert (reader.draining, writer.draining, connection.draining) == (False,) * 3
    first, second = writer.when_draining(), writer.when_draining()
    third, fourth = connection.when_draining(), other.when_draining()
    first.addErrback(lambda failure: failure.trap(CancelledError) and None)
    first.cancel()
    second.addCallback(lambda _: "changed")
    over = Fired(server.drain(timeout=30.0))
    assert Fired(second).results == ["changed"]
    assert Fired(third).results == Fired(fourth).results == [None]
    assert (reader.draining, writer.draining, connection.draining) == (True,) * 3
    assert Fired(writer.when_draining()).results == [None]
    assert Fired(late.when_draining()).results == [None]
    await report_of(over, clock, *clients)
    # Those who ask when all is over are told too.
    assert writer.draining
    assert Fired(connection.when_draining()).results == [None]


@ensureDeferred
async def test_a_connection_that_is_over_is_told_nothing(serving: Any) -> None:
    """Nor does a plain close tell anybody."""
    server, (client,) = await serving(reads)
    waiting = server.connection(1).when_draining()
    server.close()
    await turn()
    assert not waiting.called
    client.close()
    await server.close_finished_and_handlers_determined()
    await server.drain()
    assert not waiting.called


@ensureDeferred
async def test_handlers_of_sockets_and_protocols_are_told_too(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """By the connection, see server.connection(id)."""

    async def sock(address: Any, client: socket.socket) -> None:
        await server.connection(1).when_draining()
        client.send(b"bye")

    class Waits(Protocol):
        def connectionMade(self) -> None:
            told = server.connection(1).when_draining()
            told.addCallback(lambda _: self.transport.write(b"bye"))  # type: ignore[union-attr]
            told.addCallback(lambda _: self.transport.loseConnection())  # type: ignore[union-attr]

    for create, handler in (
        (Server.create_sock, sock),
        (Server.create_protocol, Factory.forProtocol(Waits)),
    ):
        server = await serve(handler, create=create, clock=clock)
        client = connect(server)
        await until(lambda server=server: server.num_connections == 1)
        await turn()
        over = Fired(server.drain(timeout=30.0))
        assert await in_thread(client.read_all) == b"bye"
        client.close()
        await until_over(over, clock)
        assert over.results == [DrainReport(finished=1)]


# EOF for those who wait for a next message.


async def first_line(reader: Any) -> bytes:
    """The next line."""
    async for line in reader:
        return bytes(line)
    return b""


READS = {
    "read": lambda reader: reader.read(10),
    "read all": lambda reader: reader.read(),
    "readline": lambda reader: reader.readline(),
    "readuntil": lambda reader: reader.readuntil(b";"),
    "readexactly": lambda reader: reader.readexactly(10),
    "peek": lambda reader: reader.peek(10),
    "async for": first_line,
    "drain_to_eof": lambda reader: reader.drain_to_eof(),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("asks", ["option", "handler"])
@ensureDeferred
async def test_a_read_that_waits_with_nothing_buffered_is_at_eof(
    serving: Any, clock: Clock, read: str, asks: str
) -> None:
    """Whichever read; that is an ordinary end, and the reason is the drain."""
    results: list[Any] = []
    errors: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        if asks == "handler":
            reader.eof_when_draining()
        try:
            results.append(await READS[read](reader))
        finally:
            assert reader.at_eof()
            writer.write(b"bye")

    server, (client,) = await serving(
        handler,
        eof_on_drain=asks == "option",
        on_handler_error=lambda *args: errors.append(args),
    )
    connection = server.connection(1)
    over = Fired(server.drain(timeout=30.0))
    assert await in_thread(client.read_all) == b"bye"
    assert await report_of(over, clock, client) == DrainReport(closed_idle=1)
    assert connection.reason is Reason.DRAINED
    assert errors == []
    if read in ("readuntil", "readexactly"):
        assert results == []
        assert connection.snapshot().handler == "left"
    else:
        assert results in ([b""], [None])


@pytest.mark.parametrize(
    ("option", "asked", "is_at_eof"),
    [
        (False, None, False),
        (False, False, False),
        (False, True, True),
        (True, None, True),
        (True, False, False),
        (True, True, True),
    ],
)
@ensureDeferred
async def test_the_handler_has_the_last_word(
    serving: Any, clock: Clock, option: bool, asked: Any, is_at_eof: bool
) -> None:
    """The option is for those who do not say."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        if asked is not None:
            reader.eof_when_draining(asked)
        await reader.read(1)

    server, (client,) = await serving(handler, eof_on_drain=option)
    over = Fired(server.drain(timeout=30.0))
    assert server.num_connections == (0 if is_at_eof else 1)
    await report_of(over, clock, client)
    assert over.results[0].closed_idle == is_at_eof


@ensureDeferred
async def test_asked_for_in_its_midst(serving: Any, clock: Clock) -> None:
    """By who is told, of a read that waits already; and by a change of the option."""
    readers: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        readers.append(reader)
        await reader.read(1)

    server, clients = await serving(handler, 2)
    over = Fired(server.drain(timeout=30.0))
    assert server.num_connections == 2
    assert all(reader.connection.is_running for reader in readers)
    readers[0].eof_when_draining()
    assert not readers[0].connection.is_running
    server.change(eof_on_drain=True)
    clock.advance(1.0)
    await until(lambda: server.num_connections == 0)
    await report_of(over, clock, *clients)
    assert over.results[0].closed_idle == 2


async def answers(address: Any, reader: Any, writer: Any) -> None:
    """Answers each line with itself."""
    async for line in reader:
        writer.write(line)


@ensureDeferred
async def test_a_message_that_has_begun_is_read_and_answered(
    serving: Any, clock: Clock
) -> None:
    """Not before its end is there a boundary, where the reader is at EOF."""
    server, (client,) = await serving(answers, eof_on_drain=True)
    client.send(b"one\ntw")
    await until(lambda: server.connection(1).bytes_in == 6)
    over = Fired(server.drain(timeout=30.0))
    await settle()
    assert server.connection(1).is_running
    client.send(b"o\nthree\n")
    assert await in_thread(client.read_all) == b"one\ntwo\nthree\n"
    assert await report_of(over, clock, client) == DrainReport(closed_idle=1)


@ensureDeferred
async def test_a_message_that_waits_in_the_kernel_is_answered(
    serving: Any, clock: Clock
) -> None:
    """It was on its way when the drain began."""
    server, (client,) = await serving(answers, eof_on_drain=True)
    client.send(b"one\n")
    over = Fired(server.drain(timeout=30.0))
    assert await in_thread(client.read_all) == b"one\n"
    assert await report_of(over, clock, client) == DrainReport(closed_idle=1)


@ensureDeferred
async def test_what_waits_in_the_kernel_and_is_no_message_is_looked_for_again(
    serving: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a record of TLS's own: once a second."""
    server, (client,) = await serving(answers, eof_on_drain=True)
    monkeypatch.setattr(kernel, "has_input", lambda connected: True)
    over = Fired(server.drain(timeout=30.0))
    monkeypatch.undo()
    assert server.connection(1).is_running
    clock.advance(1.0)
    assert await in_thread(client.read_all) == b""
    await report_of(over, clock, client)


@ensureDeferred
async def test_a_handler_that_is_busy_is_at_eof_at_its_next_read(
    serving: Any, clock: Clock
) -> None:
    """When it has answered."""
    work: Deferred[None] = Deferred()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            await work
            writer.write(line)

    server, (client,) = await serving(handler, eof_on_drain=True)
    client.send(b"one\n")
    await until(lambda: server.connection(1).bytes_in == 4)
    over = Fired(server.drain(timeout=30.0))
    clock.advance(10.0)
    assert server.num_connections == 1
    work.callback(None)
    assert await in_thread(client.read_all) == b"one\n"
    assert await report_of(over, clock, client) == DrainReport(
        closed_idle=1, longest_wait=10.0
    )


@ensureDeferred
async def test_a_message_of_several_reads(serving: Any, clock: Clock) -> None:
    """A handler takes its wish back while it reads one."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        reader.eof_when_draining()
        while not reader.at_eof():
            size = await reader.readexactly(1)
            reader.eof_when_draining(False)
            writer.write(await reader.readexactly(size[0]))
            reader.eof_when_draining()

    server, (client,) = await serving(handler)
    client.send(b"\x03")
    await until(lambda: server.connection(1).bytes_in == 1)
    over = Fired(server.drain(timeout=30.0))
    await settle()
    client.send(b"abc")
    assert await in_thread(client.read_all) == b"abc"
    assert await report_of(over, clock, client) == DrainReport(closed_idle=1)


@ensureDeferred
async def test_without_a_drain_there_is_no_such_eof(
    serving: Any, serve: Any, connect: Any, clock: Clock
) -> None:
    """Neither while it is announced, nor by a plain close."""
    server, (client,) = await serving(answers, eof_on_drain=True)
    over = Fired(server.drain(announce=5.0, timeout=5.0))
    client.send(b"one\n")
    assert await in_thread(client.read, 4) == b"one\n"
    closed = await serve(answers, clock=clock, eof_on_drain=True)
    other = connect(closed)
    other.send(b"two\n")
    assert await in_thread(other.read, 4) == b"two\n"
    await closed.close()
    other.send(b"three\n")
    assert await in_thread(other.read, 6) == b"three\n"
    assert await in_thread(other.finish) == b""
    clock.advance(5.0)
    assert await in_thread(client.read_all) == b""
    await report_of(over, clock, client)


@ensureDeferred
async def test_what_a_handler_raises_after_that_eof_is_its_error(
    serving: Any, clock: Clock
) -> None:
    """But for IncompleteReadError, which says only that there was EOF."""
    errors: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.read(1)
        raise ValueError("oh dear")

    server, (client,) = await serving(
        handler,
        eof_on_drain=True,
        on_handler_error=lambda address, failure: errors.append(failure.type),
    )
    connection = server.connection(1)
    over = Fired(server.drain(timeout=30.0))
    await report_of(over, clock, client)
    assert errors == [ValueError]
    assert connection.reason is Reason.ERROR
    assert over.results == [DrainReport(closed_idle=1, errors=1)]


@ensureDeferred
async def test_the_clients_own_eof_in_the_midst_of_a_message_stays_an_error(
    serving: Any, clock: Clock
) -> None:
    """H6: only what the server has ended is ordinary."""
    errors: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.readexactly(10)

    server, (client,) = await serving(
        handler,
        eof_on_drain=True,
        on_handler_error=lambda address, failure: errors.append(failure.type),
    )
    client.send(b"abc")
    await until(lambda: server.connection(1).bytes_in == 3)
    over = Fired(server.drain(timeout=30.0))
    client.shut()
    await until_over(over, clock)
    assert errors == [asyncio.IncompleteReadError]
    assert over.results == [DrainReport(finished=1, errors=1)]


@ensureDeferred
async def test_under_tls_idle_handlers_are_at_eof(
    serve: Any, connect: Any, clock: Clock, tmp_path: Path
) -> None:
    """And what they write then arrives."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            writer.write(line)
        writer.write(b"bye\n")

    server = await serve(
        handler,
        where=WhereToListen.of_endpoint(tls_endpoint(tmp_path)),
        clock=clock,
        eof_on_drain=True,
    )
    client = connect(server)
    client.socket = await in_thread(client_context().wrap_socket, client.socket)
    client.send(b"one\n")
    assert await in_thread(client.read, 4) == b"one\n"
    over = Fired(server.drain(timeout=30.0))
    assert await in_thread(client.read_all) == b"bye\n"
    assert await report_of(over, clock, client) == DrainReport(closed_idle=1)


def test_in_memory_handlers_are_told_by_the_factory() -> None:
    """What a test of a handler needs."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            writer.write(line)
        writer.write(b"bye\n" if writer.draining else b"?")

    server = MemoryServer(handler, eof_on_drain=True)
    idle, busy = server.connect(), server.connect()
    busy.send(b"on")
    server.factory.tell_of_drain()
    assert idle.received == b"bye\n"
    assert idle.is_closed
    busy.send(b"e\n")
    assert busy.received == b"one\nbye\n"


# Stopping handlers.


class Handler:
    """Writes something, waits, and notes what it sees."""

    def __init__(self) -> None:
        self.saw: list[str] = []

    async def __call__(self, address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 20_000_000)
        try:
            await Deferred()
        except CancelledError:
            self.saw.append("closed" if writer.is_closed else "open")
            raise


@pytest.mark.parametrize("closes", [False, True])
@ensureDeferred
async def test_close_cancels_handlers(serving: Any, clock: Clock, closes: bool) -> None:
    """
    After the closing. With the connections closed too, what only we hold is
    discarded; without, the client reads everything.
    """
    handler = Handler()
    errors: list[Any] = []
    server, (client,) = await serving(
        handler,
        on_handler_error=lambda *args: errors.append(args),
    )
    connection = server.connection(1)
    closed = server.close(close_existing_connections=closes, cancel_handlers=True)
    assert server.is_closed
    assert handler.saw == ["closed" if closes else "open"]
    await closed
    got = await in_thread(client.read_all)
    assert (len(got) < 20_000_000) is closes
    client.close()
    await server.close_finished_and_handlers_determined()
    assert connection.reason is (Reason.CLOSED if closes else Reason.CANCELLED)
    assert errors == []
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_close_without_that_cancels_nobody(serving: Any) -> None:
    """As ever."""
    handler = Handler()
    server, _ = await serving(handler)
    await server.close(close_existing_connections=True)
    assert handler.saw == []
    server.close(cancel_handlers=True)
    assert handler.saw == ["closed"]


@ensureDeferred
async def test_handlers_of_every_kind_are_cancelled(
    serve: Any, connect: Any, clock: Clock
) -> None:
    """Coroutines and Deferreds; a protocol is neither, and goes on."""
    cancelled: list[str] = []

    async def sock(address: Any, client: socket.socket) -> None:
        try:
            await Deferred()
        finally:
            cancelled.append("socket")

    def by_deferred(address: Any, reader: Any, writer: Any) -> Any:
        return Deferred(lambda _: cancelled.append("deferred"))

    echo = Factory.forProtocol(Echo)
    for create, handler in (
        (Server.create_sock, sock),
        (Server.create, by_deferred),
        (Server.create_protocol, echo),
    ):
        server = await serve(handler, create=create, clock=clock)
        client = connect(server)
        await until(lambda server=server: server.num_connections == 1)
        await turn()
        server.close(cancel_handlers=True)
        if handler is echo:
            client.send(b"still here")
            assert await in_thread(client.read, 10) == b"still here"
            client.shut()
        assert await in_thread(client.read_all) == b""
        client.close()
        await server.close_finished_and_handlers_determined()
    assert cancelled == ["socket", "deferred"]


class Echo(Protocol):
    """Writes what it reads."""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


@ensureDeferred
async def test_who_does_not_heed_the_cancellation_is_named(
    serving: Any, clock: Clock, logs: Logs
) -> None:
    """A grace later, and nobody waits; who ends within it is not."""
    release = Release()
    cleaned_up: list[None] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        if await reader.readline() == b"stubborn\n":
            await release.wait()
        try:
            await Deferred()
        finally:
            await deferLater(clock, GRACE / 2, lambda: None)
            cleaned_up.append(None)

    server, clients = await serving(handler, 2)
    clients[0].send(b"stubborn\n")
    clients[1].send(b"tidy\n")
    await until(lambda: all(c.bytes_in for c in server.connections))
    await server.close(cancel_handlers=True)
    clock.advance(GRACE / 2)
    assert cleaned_up == [None]
    assert not logs.take(LogLevel.error)
    clock.advance(GRACE / 2)
    (line,) = [formatEvent(e) for e in logs.take(LogLevel.error)]
    port = clients[0].socket.getsockname()[1]
    expected = "1 handler does not end, not even when cancelled: 127.0.0.1"
    assert line == f"{expected}:{port}"
    assert server.num_connections == 2 - 1
    release()
    clients[0].close()
    server.cancel_handlers()
    clock.advance(GRACE)
    await server.close_finished_and_handlers_determined()


@ensureDeferred
async def test_no_timer_is_left_when_they_end_before_the_grace_is_over(
    serving: Any, clock: Clock
) -> None:
    """The server's end takes it away."""
    waiting: Deferred[None] = Deferred()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        try:
            await Deferred()
        finally:
            await waiting

    server, _ = await serving(handler)
    server.close(close_existing_connections=True, cancel_handlers=True)
    assert clock.getDelayedCalls()
    waiting.callback(None)
    await server.close_finished_and_handlers_determined()
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_a_cancelled_handler_that_returns_was_cancelled(serving: Any) -> None:
    """What it writes at its end arrives; the reason stays what it was."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        try:
            await Deferred()
        except CancelledError:
            writer.write(b"bye")

    server, (client,) = await serving(handler)
    connection = server.connection(1)
    server.close(cancel_handlers=True)
    assert await in_thread(client.read_all) == b"bye"
    client.close()
    await server.close_finished_and_handlers_determined()
    assert connection.reason is Reason.CANCELLED


@ensureDeferred
async def test_close_cancels_handlers_in_the_midst_of_a_drain(
    serving: Any, clock: Clock
) -> None:
    """The drain ends with them, and says so."""
    server, (client,) = await serving(deaf)
    over = Fired(server.drain(timeout=None))
    server.close(cancel_handlers=True)
    assert await in_thread(client.read_all) == b""
    assert await report_of(over, clock, client) == DrainReport(cancelled=1)


# Many at once.


@ensureDeferred
async def test_a_client_that_never_reads_does_not_hold_a_drain_up(
    serving: Any, clock: Clock
) -> None:
    """Neither while its handler writes, nor while the last bytes wait."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"x" * 20_000_000)
        if await reader.readline() == b"drain\n":
            await writer.drain()

    server, clients = await serving(handler, 2)
    clients[0].send(b"drain\n")
    clients[1].send(b"return\n")
    await until(lambda: server.connection(2).reason is Reason.FINISHED)
    over = Fired(server.drain(timeout=5.0))
    clock.advance(5.0)
    assert await report_of(over, clock) == DrainReport(closed=2, longest_wait=5.0)


@ensureDeferred
async def test_a_thousand_clients_lose_no_answer(serve: Any, connect: Any) -> None:
    """
    400 are idle, 300 have asked, 150 ask while it drains, 150 never will: each
    answer that was under way arrives whole, and it is over in time.
    """
    answer = b"a" * 30_000 + b"\n"

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            await deferLater(the_reactor(), float(line), lambda: None)
            writer.write(answer)

    server = await serve(
        handler,
        backlog=1100,
        max_connections=1000,
        max_accepts_per_batch=100,
        eof_on_drain=True,
    )
    clients = [connect(server) for _ in range(1000)]
    await until(lambda: server.num_connections == 1000)
    asked, begun, lost = clients[400:700], clients[700:850], clients[850:]
    for number, client in enumerate(asked):
        client.send(b"%.3f\n" % (number / 1000))
    for client in begun + lost:
        client.send(b"0.1")
    await until(lambda: sum(c.bytes_in for c in server.connections) >= 300 * 6 + 900)
    began = the_reactor().seconds()
    over = server.drain(timeout=2.0, spread=0.5)
    for client in begun:
        client.send(b"\n")

    def read_all() -> list[bytes]:
        return [client.read_all() for client in clients]

    got = await in_thread(read_all)
    for client in clients:
        client.close()
    report = await over
    assert got[:400] == [b""] * 400
    assert got[400:850] == [answer] * 450
    assert got[850:] == [b""] * 150
    assert (report.closed_idle, report.closed) == (850, 150)
    assert report.connections == 1000
    assert 2.4 < report.longest_wait < 5
    assert the_reactor().seconds() - began < 10
