"""
What each end of a connection does to its streams: every cell of the table of
spec S8, and S9, on real sockets.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import gc
import socket
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred

from tcpsvc import BufferAgeLimitExceeded, ConnectionGone, Reason, WhereToListen
from tcpsvc.stream_connection import StreamConnection
from tests.kinds import place
from tests.streams import Held, ended, outcome
from tests.support import in_thread, settle, turn, until

#: More than the kernel takes of a client that does not read.
MUCH = b"x" * 20_000_000


class Scene(Held):
    """
    One connection. Its handler has given the streams to the test and waits to be
    told to end; six bytes of the client are in the reader's buffer.
    """

    async def closed(self) -> None:
        """Wait until the socket is closed."""
        finished = outcome(self.writer.close_finished())
        await ended(finished)


@pytest.fixture
def scene(serve: Any, connect: Any) -> Callable[..., Awaitable[Scene]]:
    """``await scene(before=bytes, **options)``."""

    async def scene(before: bytes = b"before", **options: Any) -> Scene:
        made = Scene()
        await made.begin(serve, connect, buffer_age_limit=10, **options)
        made.client.send(before)
        await made.started()
        await until(lambda: made.reader.bytes_read >= len(before))
        return made

    return scene


# The ends.


async def own_close(scene: Scene) -> None:
    """writer.close()"""
    scene.writer.close()


async def reader_close(scene: Scene) -> None:
    """reader.close()"""
    scene.reader.close()


async def own_eof(scene: Scene) -> None:
    """write_eof()"""
    scene.writer.write_eof()


async def client_fin(scene: Scene) -> None:
    """client FIN"""
    scene.client.shut()
    connection = scene.server._factory.connections[0]
    await until(lambda: connection.reader.has_eof)


async def client_rst(scene: Scene) -> None:
    """client RST"""
    scene.client.reset()
    await scene.closed()


async def own_abort(scene: Scene) -> None:
    """writer.abort()"""
    scene.writer.abort()


async def x3(scene: Scene) -> None:
    """close(close_existing_connections=True)"""
    await scene.server.close(close_existing_connections=True)


async def age_limit(scene: Scene) -> None:
    """age limit"""
    if not scene.writer.bytes_to_write:
        scene.writer.write(MUCH)
    scene.clock.pump([1] * 13)


End = Callable[[Scene], Awaitable[None]]


def ends(*chosen: End) -> Any:
    """For each of these ends."""
    return pytest.mark.parametrize("end", chosen, ids=lambda end: end.__doc__)


GONE = [client_rst, x3, age_limit, own_abort]
GONE_ERROR = {age_limit: BufferAgeLimitExceeded}


# reads


@ends(own_close, client_fin, *GONE)
@ensureDeferred
async def test_the_reader_is_at_eof_after_what_is_buffered(
    scene: Any, end: End
) -> None:
    """S8, reads: EOF after what is buffered; as often as it is asked."""
    s = await scene()
    await end(s)
    assert await s.reader.readexactly(3) == b"bef"
    assert not s.reader.at_eof()
    assert await s.reader.read() == b"ore"
    assert s.reader.at_eof()
    assert await s.reader.read(10) == b""
    assert await s.reader.readline() == b""


@ends(own_close, client_fin, *GONE)
@ensureDeferred
async def test_a_pending_read_ends(scene: Any, end: End) -> None:
    """S8, reads: with what is buffered."""
    s = await scene()
    reading = outcome(s.reader.readexactly(100))
    await end(s)
    error = await ended(reading)
    assert isinstance(error, asyncio.IncompleteReadError)
    assert error.partial == b"before"


@ensureDeferred
async def test_after_readers_close_reads_are_an_error(scene: Any) -> None:
    """S8, reads, own reader.close(): RuntimeError, for a pending one too."""
    s = await scene()
    reading = outcome(s.reader.readexactly(100))
    s.reader.close()
    assert isinstance(reading[0], RuntimeError)
    with pytest.raises(RuntimeError):
        await s.reader.read()


@ensureDeferred
async def test_after_write_eof_reads_go_on(scene: Any) -> None:
    """S8, reads, own write_eof(): until the client's FIN."""
    s = await scene()
    s.writer.write(b"all")
    reading = outcome(s.reader.readexactly(10))
    s.writer.write_eof()
    assert await in_thread(s.client.read_all) == b"all"
    s.client.send(b"more")
    assert await ended(reading) == b"beforemore"
    s.client.send(b"still more")
    s.client.shut()
    assert await s.reader.read() == b"still more"


@ensureDeferred
@pytest.mark.parametrize("by", ["its own", "another"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_an_answer_and_write_eof_in_one_turn_leave_the_read_side_open(
    serve: Any, connect: Any, tmp_path: Path, kind: str, by: str
) -> None:
    """S8, own write_eof(): reads go on, whichever handler has said it."""
    writers: list[Any] = []
    rest: list[bytes] = []
    left: list[Any] = []

    async def handle(_: Any, reader: Any, writer: Any) -> None:
        writers.append(writer)
        first = writers[0]
        if by == "its own" or writer is not first:
            await reader.readline()
            left.append(outcome(first.consumer_left()))
            first.write(b"answer")
            first.write_eof()
        if writer is first:
            rest.append(await reader.read())

    server = await serve(handle, where=place(kind, tmp_path))
    client = connect(server)
    await until(lambda: writers)
    asking = client if by == "its own" else connect(server)
    await settle()  # The handler waits: it goes on in a turn of its own connection.
    asking.send(b"line\n")
    assert await in_thread(client.read_all) == b"answer"
    await settle()
    assert left == [[]]
    client.send(b"more")
    client.shut()
    await until(lambda: rest)
    assert rest == [b"more"]
    await until(lambda: not server.num_connections)
    assert Reason.RESET.value not in server.describe()["counters"]["ends"]


@ensureDeferred
async def test_what_a_client_sends_after_writers_close_is_discarded(
    scene: Any,
) -> None:
    """S8, reads, own writer.close(): EOF, whatever the client still sends."""
    s = await scene()
    s.writer.write(MUCH)
    s.writer.close()
    s.client.send(b"after")
    assert await in_thread(s.client.read_all) == MUCH
    assert await s.reader.read() == b"before"


@pytest.mark.parametrize("size", [1, 10_000, 1_000_000])
@ensureDeferred
async def test_bytes_that_came_before_a_reset_are_read(scene: Any, size: int) -> None:
    """S8, reads, client RST: though both come at once."""
    s = await scene(b"")
    sending = in_thread(s.client.send, b"y" * size)
    reading = outcome(s.reader.read())
    await sending
    await until(lambda: s.reader.bytes_read == size)
    s.client.send(b"z" * 1000)
    await arrived(s.client)
    s.client.reset()
    assert await ended(reading) == b"y" * size + b"z" * 1000


# write


@ends(own_close, own_eof)
@ensureDeferred
async def test_writing_after_ones_own_close_is_an_error(scene: Any, end: End) -> None:
    """S8, write: RuntimeError."""
    s = await scene()
    s.writer.write(b"all")
    await end(s)
    with pytest.raises(RuntimeError):
        s.writer.write(b"more")
    with pytest.raises(RuntimeError):
        s.writer.writelines([b"more"])
    assert await in_thread(s.client.read_all) == b"all"


@ends(reader_close, *GONE)
@ensureDeferred
async def test_writing_to_what_is_gone_is_dropped(scene: Any, end: End) -> None:
    """S8, write: without an error, and without being kept."""
    s = await scene()
    await end(s)
    written = s.writer.bytes_written
    for _ in range(3):
        s.writer.write(b"more")
    s.writer.writelines([b"more"])
    assert s.writer.bytes_to_write == 0
    assert s.writer.bytes_written == written
    assert s.writer.is_closed


@ensureDeferred
async def test_after_the_clients_fin_writing_goes_on(scene: Any) -> None:
    """S8, write, drain and socket, client FIN: half-close."""
    s = await scene()
    await client_fin(s)
    s.writer.write(MUCH)
    draining, flushing = outcome(s.writer.drain()), outcome(s.writer.flushed())
    await turn()
    assert (draining, flushing, s.writer.is_closed) == ([], [], False)
    reading = in_thread(s.client.read_all)
    assert await ended(flushing) is None
    assert await ended(draining) is None
    s.writer.write(b"end")
    s.end.callback(None)
    assert await reading == MUCH + b"end"


# drain, flushed


@ends(own_close, own_eof)
@ensureDeferred
async def test_pending_waiters_finish_the_flush_after_ones_own_close(
    scene: Any, end: End
) -> None:
    """S8, drain and flushed: finish the flush."""
    s = await scene()
    s.writer.write(MUCH)
    draining, flushing = outcome(s.writer.drain()), outcome(s.writer.flushed())
    await end(s)
    await turn()
    assert (draining, flushing) == ([], [])
    assert await in_thread(s.client.read_all) == MUCH
    assert (await ended(draining), await ended(flushing)) == (None, None)


@ensureDeferred
async def test_later_waiters_are_an_error_after_writers_close(scene: Any) -> None:
    """S8, drain and flushed, own writer.close(): later RuntimeError."""
    s = await scene()
    s.writer.write(MUCH)
    s.writer.close()
    for _ in range(2):
        assert isinstance(outcome(s.writer.drain())[0], RuntimeError)
        assert isinstance(outcome(s.writer.flushed())[0], RuntimeError)
        assert len(await in_thread(s.client.read, len(MUCH))) in (0, len(MUCH))


@ensureDeferred
async def test_waiters_that_come_after_write_eof_finish_the_flush_too(
    scene: Any,
) -> None:
    """S8, drain and flushed, own write_eof(): finish the flush."""
    s = await scene()
    s.writer.write(MUCH)
    s.writer.write_eof()
    draining, flushing = outcome(s.writer.drain()), outcome(s.writer.flushed())
    assert (draining, flushing) == ([], [])
    assert await in_thread(s.client.read_all) == MUCH
    assert (await ended(draining), await ended(flushing)) == (None, None)
    assert outcome(s.writer.drain()) == [None]
    assert outcome(s.writer.flushed()) == [None]


@ends(reader_close, *GONE)
@ensureDeferred
async def test_pending_waiters_fail_with_connection_gone(scene: Any, end: End) -> None:
    """S8, S4, drain and flushed: all of them, at once."""
    s = await scene()
    s.writer.write(MUCH)
    waiting = [
        outcome(s.writer.flushed()),
        outcome(s.writer.drain()),
        outcome(s.writer.flushed()),
    ]
    await turn()
    assert waiting == [[], [], []]
    await end(s)
    expected = GONE_ERROR.get(end, ConnectionGone)
    assert [[type(r) for r in w] for w in waiting] == [[expected]] * 3
    assert s.errors == ([waiting[0][0]] if end is age_limit else [])


@ends(reader_close, *GONE)
@ensureDeferred
async def test_later_waiters_fail_with_connection_gone(scene: Any, end: End) -> None:
    """S8, S4, drain and flushed: though nothing waits to be sent."""
    s = await scene()
    await end(s)
    expected = GONE_ERROR.get(end, ConnectionGone)
    for _ in range(2):
        assert [type(e) for e in outcome(s.writer.drain())] == [expected]
        assert [type(e) for e in outcome(s.writer.flushed())] == [expected]
    assert issubclass(expected, ConnectionError)


@ends(reader_close, x3, age_limit, own_abort)
@ensureDeferred
async def test_the_flush_of_an_own_close_may_be_overtaken(scene: Any, end: End) -> None:
    """S8, S4: pending waiters of writer.close() fail then."""
    s = await scene()
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    s.writer.close()
    if end is age_limit:
        # Before it is 5 s without progress, so that it is the age.
        for _ in range(3):
            await in_thread(s.client.read, 2_000_000)
            for _ in range(4):
                s.clock.advance(1)
                await turn(0.001)
    else:
        await end(s)
    assert isinstance(await ended(flushing), ConnectionGone)
    assert s.writer.is_closed


# consumer_left


@ends(client_rst)
@ensureDeferred
async def test_consumer_left_fires_at_the_clients_reset(scene: Any, end: End) -> None:
    """S8, S4, consumer_left: asked for before, or after."""
    s = await scene()
    left = outcome(s.writer.consumer_left())
    await end(s)
    assert left == [None]
    assert outcome(s.writer.consumer_left()) == [None]


@ensureDeferred
async def test_consumer_left_fires_when_sending_fails(scene: Any) -> None:
    """S4: the client has closed, and what is sent to it is answered with RST."""
    s = await scene()
    left = outcome(s.writer.consumer_left())
    s.client.close()
    await until(lambda: s.reader.has_eof)
    assert left == []
    while not s.writer.is_closed:
        s.writer.write(b"more")
        await turn()
    assert left == [None]


@ends(own_close, reader_close, own_eof, client_fin, x3, age_limit, own_abort)
@ensureDeferred
async def test_consumer_left_does_not_fire_otherwise(scene: Any, end: End) -> None:
    """S8, S4, consumer_left: never; not at FIN either."""
    s = await scene()
    left = s.writer.consumer_left()
    await end(s)
    for _ in range(5):
        await turn()
    assert not left.called


# socket


@ensureDeferred
async def test_after_writers_close_all_is_sent_then_eof_and_the_slot_is_kept(
    scene: Any,
) -> None:
    """S8, socket, own writer.close(): as H3; the handler has still to end."""
    s = await scene()
    s.writer.write(MUCH)
    finished = outcome(s.writer.close_finished())
    s.writer.close()
    s.writer.close()
    assert s.writer.is_closed
    assert await in_thread(s.client.read_all) == MUCH
    s.client.close()
    await ended(finished)
    assert s.server.num_connections == 1
    s.end.callback(None)
    assert s.server.num_connections == 0
    assert s.errors == []


@ends(reader_close, client_rst, x3, age_limit, own_abort)
@ensureDeferred
async def test_the_socket_is_closed_at_once_and_the_slot_is_kept(
    scene: Any, end: End
) -> None:
    """S8, socket: closed; not before the handler ends is its slot free."""
    s = await scene()
    s.writer.write(MUCH)
    finished = outcome(s.writer.close_finished())
    connection = s.server._factory.connections[0]
    await end(s)
    await until(lambda: finished)
    assert connection.describe()["socket"] == "closed"
    assert s.server.num_connections == 1
    s.end.callback(None)
    assert s.server.num_connections == 0


@ends(reader_close, x3)
@ensureDeferred
async def test_closed_at_once_the_client_reads_what_the_kernel_took_then_eof(
    scene: Any, end: End
) -> None:
    """S8, X3, socket: closed orderly, nothing being unread."""
    s = await scene()
    s.writer.write(b"in the kernel")
    await s.writer.flushed()
    await end(s)
    assert await in_thread(s.client.read_all) == b"in the kernel"


@ensureDeferred
async def test_abort_is_a_reset_at_the_client(scene: Any) -> None:
    """S5: abort()."""
    s = await scene()
    s.writer.abort()
    s.writer.abort()
    with pytest.raises(ConnectionResetError):
        await in_thread(s.client.read_all)


@ensureDeferred
async def test_after_write_eof_only_the_write_side_is_shut(scene: Any) -> None:
    """S8, socket, own write_eof(): till the handler ends."""
    s = await scene()
    finished = s.writer.close_finished()
    s.writer.write(b"all")
    assert s.writer.can_write_eof
    s.writer.write_eof()
    s.writer.write_eof()
    assert await in_thread(s.client.read_all) == b"all"
    assert not finished.called
    s.client.send(b"more")
    assert await s.reader.readexactly(10) == b"beforemore"
    assert not s.writer.is_closed
    s.end.callback(None)
    await until(lambda: s.server.num_connections == 0)
    assert finished.called


@ensureDeferred
async def test_after_the_clients_fin_the_socket_stays_open(scene: Any) -> None:
    """S8, socket, client FIN: open, for as long as the handler likes."""
    s = await scene()
    await client_fin(s)
    for _ in range(10):
        await turn()
    assert not s.writer.is_closed
    assert not s.writer.close_finished().called
    assert s.server.num_connections == 1
    s.end.callback(None)
    assert await in_thread(s.client.read_all) == b""


@ensureDeferred
async def test_close_finished_tells_of_a_writer_that_is_closed(scene: Any) -> None:
    """S4, S5: whoever hears that the socket is closed finds the streams so."""
    for end in (client_rst, x3, reader_close):
        s = await scene()
        found: list[Any] = []

        def look(_: Any, s: Any = s, found: Any = found) -> None:
            s.writer.write(b"dropped")
            found.append(
                (s.writer.is_closed, s.writer.bytes_to_write, outcome(s.writer.drain()))
            )

        s.writer.close_finished().addCallback(look)
        await end(s)
        await until(lambda found=found: found)
        is_closed, waiting, drained = found[0]
        assert (is_closed, waiting) == (True, 0), end.__doc__
        assert isinstance(drained[0], ConnectionGone), end.__doc__


# S9, and resets at bad moments


#: More than one receive takes, and less than a kernel takes.
SOME = 110_000


async def arrived(client: Any) -> None:
    """Wait until the server's kernel has all that a client sent."""
    unsent = array.array("i", [1])
    while unsent[0]:
        fcntl.ioctl(client.socket.fileno(), termios.TIOCOUTQ, unsent)
        await turn(0.001)


async def pause(s: Scene) -> None:
    """Let the client send so much that reading is paused, and all arrives."""
    s.client.send(b"y" * SOME)
    await arrived(s.client)
    await until(lambda: s.reader.bytes_read >= 1000)
    for _ in range(10):
        await turn()
    assert s.reader.bytes_read < SOME


@ensureDeferred
async def test_a_reset_while_reading_is_paused_is_noticed_at_the_next_read(
    scene: Any,
) -> None:
    """S9, S8: what came before it is read, then EOF."""
    s = await scene(b"", reader_buffer_size=1000)
    await pause(s)
    s.client.reset()
    assert len(await s.reader.read()) == SOME
    assert s.writer.is_closed
    assert isinstance(outcome(s.writer.drain())[0], ConnectionGone)
    assert outcome(s.writer.consumer_left()) == [None]


@ensureDeferred
async def test_a_reset_while_reading_is_paused_is_noticed_at_the_next_write(
    scene: Any,
) -> None:
    """S9, S8: and what came before it is still read, then EOF."""
    s = await scene(b"", reader_buffer_size=1000)
    await pause(s)
    s.client.reset()
    await turn()
    s.writer.write(b"to nobody")
    flushing = outcome(s.writer.flushed())
    await until(lambda: s.writer.is_closed)
    assert flushing == [None] or isinstance(flushing[0], ConnectionGone)
    assert outcome(s.writer.consumer_left()) == [None]
    assert len(await s.reader.read()) == SOME


@ensureDeferred
async def test_a_reset_under_a_pending_write_while_reading_is_paused(
    scene: Any,
) -> None:
    """S8, S9: the waiters fail; what came before the reset is read, then EOF."""
    s = await scene(b"", reader_buffer_size=1000)
    await pause(s)
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    for _ in range(10):
        await turn()
    s.client.reset()
    assert isinstance(await ended(flushing), ConnectionGone)
    assert len(await s.reader.read()) == SOME
    assert s.reader.at_eof()


@ensureDeferred
async def test_an_echo_that_meets_a_reset_reads_all_that_came_before_it(
    serve: Any, connect: Any
) -> None:
    """S8: though its writing fails before its reading does."""
    got: list[bytes] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await go
        async for line in reader:
            got.append(line)
            writer.write(line)

    go: Deferred[None] = Deferred()
    server = await serve(handler, on_handler_error="raise", reader_buffer_size=1000)
    client = connect(server)
    await until(lambda: server.num_connections)
    client.send(b"0123456789\n" * 10_000)
    await arrived(client)
    client.reset()
    go.callback(None)
    await until(lambda: server.num_connections == 0)
    assert len(got) == 10_000


@ensureDeferred
async def test_a_handler_that_ends_on_the_last_bytes_before_a_reset(
    serve: Any, connect: Any
) -> None:
    """S8, H4: it ends while its connection is being lost."""
    ended: list[bool] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await go
        async for line in reader:
            writer.write(line)
            if line == b"last\n":
                break
        ended.append(line == b"last\n")

    go: Deferred[None] = Deferred()
    server = await serve(handler, on_handler_error="raise", reader_buffer_size=1000)
    client = connect(server)
    await until(lambda: server.num_connections)
    client.send(b"0123456789\n" * 10_000 + b"last\nunread\n")
    await arrived(client)
    client.reset()
    go.callback(None)
    await until(lambda: server.num_connections == 0)
    assert ended == [True]


@ensureDeferred
async def test_a_reset_during_the_final_flush_ends_it(serve: Any, connect: Any) -> None:
    """H3: the slot is released, and nothing is reported."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(MUCH)

    server = await serve(handler, on_handler_error="raise")
    client = connect(server)
    await in_thread(client.read, 100_000)
    assert server.num_connections == 1
    client.reset()
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_garbage_then_a_reset_in_mid_line(serve: Any, connect: Any) -> None:
    """S2, S8: the handler reads what there was of it."""
    got: list[bytes] = []
    garbage = bytes(range(256)) * 100

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        got.extend([line async for line in reader])

    server = await serve(handler, on_handler_error="raise")
    client = connect(server)
    client.send(garbage)
    client.reset()
    await until(lambda: got and server.num_connections == 0)
    assert b"".join(got) == garbage


# Ends within ends: what a handler does as it hears of one.


@pytest.mark.parametrize("reaction", [reader_close, own_close, own_eof, own_abort])
@pytest.mark.parametrize("flushing", [False, True])
@ensureDeferred
async def test_a_read_that_ends_by_an_end_may_itself_end_the_connection(
    scene: Any, logs: Any, reaction: End, flushing: bool
) -> None:
    """S8: out of the read that writer.close() has woken."""
    s = await scene()
    reacted: list[Any] = []

    async def react() -> None:
        await s.reader.read()
        try:
            await reaction(s)
        except RuntimeError as error:
            reacted.append(error)
        reacted.append(True)

    outcome(react())
    if flushing:
        s.writer.write(MUCH)
    s.writer.close()
    assert reacted
    if reaction in (reader_close, own_abort):
        await s.closed()
    s.end.callback(None)
    await x3(s)
    await until(lambda: s.server.num_connections == 0)
    assert logs.bad() == []


@pytest.mark.parametrize("second", [x3, own_abort, reader_close, own_close, client_rst])
@ends(
    own_close, own_eof, client_fin, x3, client_rst, age_limit, own_abort, reader_close
)
@ensureDeferred
async def test_one_end_after_another_leaves_nothing(
    scene: Any, end: End, second: End
) -> None:
    """S8: any two, then the handler's; no error of it, no slot, no socket."""
    s = await scene()
    await end(s)
    if second is client_rst:
        if end is not client_rst:
            s.client.reset()
    else:
        await second(s)
    await turn()
    s.end.callback(None)
    s.client.close()
    for _ in range(3):
        s.clock.advance(1)
        await turn()
    await until(lambda: s.server.num_connections == 0)
    assert s.clock.getDelayedCalls() == []


@ends(own_close, client_rst, x3, age_limit, own_abort, reader_close)
@ensureDeferred
async def test_a_handler_that_ends_from_within_a_waiters_failure(
    scene: Any, end: End
) -> None:
    """S4, H4: its slot is released once, and everything with it."""
    s = await scene()
    s.writer.write(MUCH)
    s.writer.flushed().addBoth(lambda _: s.end.callback(None))
    await end(s)
    s.client.close()
    await until(lambda: s.server.num_connections == 0)
    assert s.clock.getDelayedCalls() == []


# Leaks


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("policy", ["ignore", lambda *_: None], ids=["ignore", "f"])
@ensureDeferred
async def test_nothing_is_left_of_connections_however_they_ended(
    serve: Any, connect: Any, tmp_path: Any, logs: Any, policy: Any, kind: str
) -> None:
    """
    A5, S8: no object, no slot; descriptors are counted by the fixture. Nor in
    what Twisted keeps of the log of a program that has not begun to log.
    """

    def living() -> int:
        # What this test itself keeps.
        logs.events.clear()
        gc.collect()
        return sum(type(o) is StreamConnection for o in gc.get_objects())

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        how = await reader.readline()
        writer.write(b"x" * 1000)
        if how == b"raise\n":
            raise LookupError
        if how == b"close\n":
            writer.close()
        if how == b"abort\n":
            writer.abort()
        if how == b"reader\n":
            reader.close()
        if how == b"drain\n":
            while True:
                writer.write(b"x" * 100_000)
                await writer.drain()
        if how == b"eof\n":
            writer.write_eof()
            await reader.read()

    before = living()
    where = {} if kind == "tcp" else {"where": WhereToListen.of_file(tmp_path / "s")}
    server = await serve(handler, on_handler_error=policy, **where)
    for _ in range(10):
        for how in ("raise", "close", "abort", "reader", "drain", "eof", ""):
            client = connect(server)
            client.send(f"{how}\n".encode())
            if how == "drain":
                await in_thread(client.read, 100_000)
            if how == "eof":
                await in_thread(client.read_all)
            if how == "":
                client.reset()
            client.close()
    counters = server._factory.counters
    await until(lambda: counters.accepted == 70 and server.num_connections == 0)
    await turn()
    assert living() == before


@pytest.mark.parametrize("option", [socket.SO_KEEPALIVE])
@ensureDeferred
async def test_the_streams_reach_the_socket(scene: Any, option: int) -> None:
    """S7: addresses, transport, socket."""
    s = await scene(keepalive=True)
    port = s.client.socket.getsockname()[1]
    assert s.writer.peer.port == s.reader.peer.port == port
    assert s.writer.host.port == s.reader.host.port == s.server.listening_on
    assert s.writer.transport.getPeer().port == port
    assert s.reader.transport is s.writer.transport
    handle = s.writer.transport.getHandle()
    assert handle.getsockopt(socket.SOL_SOCKET, option)
