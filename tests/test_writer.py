"""The writing half of a connection (spec S4 to S7, S9, and the writer in S8)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.defer import TimeoutError as TwistedTimeoutError
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.logger import LogLevel
from zope.interface.verify import verifyObject

from tcpsvc import (
    BufferAgeLimitExceeded,
    ConnectionGone,
    IWriter,
    ServerFactory,
    WhereToListen,
    kernel,
)
from tests.middle import FailsSends
from tests.streams import Held, ended, outcome
from tests.support import in_thread, settle, turn, until

MUCH = b"x" * 20_000_000


class Scene(Held):
    """A connection whose streams the test holds."""

    async def seconds(self, n: int) -> None:
        """Let seconds pass, with turns between."""
        for _ in range(n):
            self.clock.advance(1)
            await turn()


@pytest.fixture
def scene(serve: Any, connect: Any, tmp_path: Any) -> Callable[..., Awaitable[Scene]]:
    """
    ``await scene(**options)``; ``narrow=True`` for a kernel that holds some
    kilobytes only. That is a UNIX socket: TCP is slow with a small window.
    """

    async def scene(narrow: bool = False, **options: Any) -> Scene:
        made = Scene()
        if narrow:
            options["where"] = WhereToListen.of_file(tmp_path / "socket")
        await made.begin(serve, connect, **options)
        await made.started()
        if narrow:
            made.writer.transport.getHandle().setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
            )
        return made

    return scene


def in_memory(**options: Any) -> tuple[Any, StringTransportWithDisconnection]:
    """A writer over a transport without a reactor."""
    scene, clock = Scene(), Clock()
    factory = ServerFactory.of_streams(
        scene.handler, on_handler_error="ignore", reactor=clock, clock=clock, **options
    )
    transport = StringTransportWithDisconnection()
    transport.protocol = factory.buildProtocol(transport.getPeer())
    transport.protocol.makeConnection(transport)
    clock.advance(0)
    return scene.writer, transport


# Writing itself.


def test_it_provides_its_interface() -> None:
    """S5."""
    assert verifyObject(IWriter, in_memory()[0])


@pytest.mark.parametrize(
    "data", [b"bytes", bytearray(b"bytes"), memoryview(b"bytes")], ids=type
)
def test_what_is_bytes_like_is_written(data: Any) -> None:
    """S5: and is the writer's own from then on."""
    writer, transport = in_memory()
    writer.write(data)
    if isinstance(data, bytearray):
        data[:] = b"wrong"
    assert transport.value() == b"bytes"


@pytest.mark.parametrize("data", ["text", 3, None, [b"x"]], ids=repr)
def test_what_is_not_bytes_is_a_type_error(data: Any) -> None:
    """S5: and nothing is written."""
    writer, transport = in_memory()
    with pytest.raises(TypeError):
        writer.write(data)
    assert (transport.value(), writer.bytes_written) == (b"", 0)


def test_lines_are_written_in_their_order() -> None:
    """S5: writelines, of anything that can be iterated."""
    writer, transport = in_memory()
    writer.writelines([b"one", b"two"])
    writer.writelines(line for line in (b"three", b""))
    writer.writelines([])
    assert transport.value() == b"onetwothree"
    assert writer.bytes_written == 11


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 300_000), max_size=12))
def test_whatever_the_pieces_their_bytes_are_sent_in_order(sizes: list[int]) -> None:
    """S5: across the size of what the transport is given at a time."""
    writer, transport = in_memory()
    pieces = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    for piece in pieces:
        writer.write(piece)
    assert transport.value() == b"".join(pieces)
    assert (writer.bytes_to_write, writer.bytes_written) == (0, sum(sizes))


@ensureDeferred
async def test_pieces_of_all_sizes_arrive_in_order(scene: Any) -> None:
    """S5: over a socket that is slow to take them."""
    s = await scene(narrow=True)
    pieces = [bytes([n % 251]) * (n * 977 % 150_000) for n in range(60)]
    reading = in_thread(s.client.read_all)
    for number, piece in enumerate(pieces):
        s.writer.write(piece)
        if number % 7 == 0:
            await turn()
        if number % 20 == 0:
            await s.writer.flushed()
    s.end.callback(None)
    assert await reading == b"".join(pieces)


@ensureDeferred
async def test_bytes_to_write_are_those_the_kernel_has_not_taken(scene: Any) -> None:
    """S5."""
    s = await scene()
    assert s.writer.bytes_to_write == 0
    s.writer.write(MUCH)
    assert 0 < s.writer.bytes_to_write <= len(MUCH)
    for _ in range(20):
        await turn()
    assert 0 < s.writer.bytes_to_write <= len(MUCH)
    assert s.writer.bytes_written == len(MUCH)
    flushing = s.writer.flushed()
    assert len(await in_thread(s.client.read, len(MUCH))) == len(MUCH)
    await flushing
    assert s.writer.bytes_to_write == 0


@ensureDeferred
async def test_a_kernel_without_buffers_is_asked_again(
    serve: Any, connect: Any
) -> None:
    """S5: ENOBUFS is no loss, as it is none to Twisted; whenever it is written."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        async for line in reader:  # In the turn that has read it.
            FailsSends(writer.transport, errno.ENOBUFS, errno.ENOBUFS)
            writer.write(line)
        FailsSends(writer.transport, errno.ENOBUFS)
        writer.write(b"end")

    client = connect(await serve(handler))
    for line in b"one\n", b"two\n":
        client.send(line)
        assert await in_thread(client.read, 4) == line
    client.shut()
    assert await in_thread(client.read_all) == b"end"


@ensureDeferred
async def test_a_send_that_fails_loses_the_connection(serve: Any, connect: Any) -> None:
    """S4: by any other error."""
    ends: list[str] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            FailsSends(writer.transport, errno.EHOSTUNREACH, errno.EHOSTUNREACH)
            writer.write(line)
        ends.append("of input")

    server = await serve(handler)
    client = connect(server)
    client.send(b"line\n")
    assert await in_thread(client.read_all) == b""
    await until(lambda: server.num_connections == 0)
    assert ends == ["of input"]


# What flushed waits for (S5)


@ensureDeferred
async def test_flushed_fires_at_once_when_nothing_waits(scene: Any) -> None:
    """S5: before anything was written, and after all of it was taken."""
    s = await scene()
    assert outcome(s.writer.flushed()) == [None]
    s.writer.write(b"x")
    await s.writer.flushed()
    assert outcome(s.writer.flushed()) == [None]


@ensureDeferred
async def test_flushed_fires_only_when_the_kernel_has_taken_all(scene: Any) -> None:
    """S5: not while the client leaves too much unread."""
    s = await scene(narrow=True)
    size = 1_000_000
    s.writer.write(b"x" * size)
    flushing = outcome(s.writer.flushed())
    # What is neither read nor in the kernel cannot have been taken.
    await in_thread(s.client.read, size // 2)
    for _ in range(50):
        await turn()
    assert flushing == []
    await in_thread(s.client.read, size // 2 - 1)
    assert await ended(flushing) is None


@ensureDeferred
async def test_flushed_is_of_what_was_written_before_it(scene: Any) -> None:
    """S5: all written so far; what is written later does not keep it waiting."""
    s = await scene(narrow=True)
    s.writer.write(b"x" * 100_000)
    flushing = outcome(s.writer.flushed())
    s.writer.write(b"y" * 1_000_000)
    later = outcome(s.writer.flushed())
    # The client has read all the first, so the kernel has taken it; of the rest
    # the kernel takes some tens of kilobytes.
    await in_thread(s.client.read, 100_000)
    assert await ended(flushing) is None
    await settle()
    assert later == []
    await in_thread(s.client.read, 1_000_000)
    assert await ended(later) is None


@ensureDeferred
async def test_flushed_deferreds_fire_in_their_order(scene: Any) -> None:
    """S5: each its own; asked for twice at one point, or at many."""
    s = await scene()
    fired: list[int] = []
    for number in range(10):
        s.writer.write(b"x" * 300_000)
        for _ in range(2):
            s.writer.flushed().addCallback(lambda _, n=number: fired.append(n))
    await in_thread(s.client.read, 3_000_000)
    await until(lambda: len(fired) == 20)
    assert fired == sorted(fired)


@ensureDeferred
async def test_cancelling_waiters_disturbs_nobody(scene: Any) -> None:
    """S1, S5: nor loses a byte."""
    s = await scene()
    s.writer.write(MUCH)
    kinds = [s.writer.flushed, lambda: Deferred.fromCoroutine(s.writer.drain())]
    kinds += [s.writer.close_finished, s.writer.consumer_left]
    for ask in kinds:
        first, second, third = ask(), ask(), ask()
        results = [outcome(d) for d in (first, second, third)]
        second.cancel()
        assert [type(r) for r in results[1]] == [CancelledError]
        assert (results[0], results[2]) == ([], [])
        first.cancel()
        third.cancel()
    timed = s.writer.flushed()
    timed.addTimeout(5, s.clock)
    left = outcome(timed)
    flushing, draining = outcome(s.writer.flushed()), outcome(s.writer.drain())
    s.clock.advance(5)
    assert [type(error) for error in left] == [TwistedTimeoutError]
    assert await in_thread(s.client.read, len(MUCH)) == MUCH
    assert (await ended(flushing), await ended(draining)) == (None, None)


@ensureDeferred
async def test_every_waiter_may_be_yielded(scene: Any) -> None:
    """S1: in inlineCallbacks."""
    s = await scene()

    @inlineCallbacks
    def waiting() -> Any:
        s.writer.write(b"x" * 300_000)
        yield s.writer.drain()
        yield s.writer.flushed()
        s.writer.close()
        yield s.writer.close_finished()
        return "done"

    done = outcome(waiting())
    assert len(await in_thread(s.client.read_all)) == 300_000
    s.client.close()
    assert await ended(done) == "done"


# What drain waits for (S5)


@ensureDeferred
async def test_drain_waits_while_more_than_the_buffers_size_waits(scene: Any) -> None:
    """S5: flow control against writer_buffer_size."""
    s = await scene(writer_buffer_size=500_000)
    s.writer.write(b"x" * 500_000)
    assert outcome(s.writer.drain()) == [None]
    s.writer.write(MUCH)
    draining = outcome(s.writer.drain())
    assert draining == []
    reading = in_thread(s.client.read, 500_000 + len(MUCH))
    await ended(draining)
    assert s.writer.bytes_to_write <= 500_000
    await reading


@ensureDeferred
async def test_a_handler_that_drains_is_not_far_ahead_of_its_client(
    serve: Any, connect: Any
) -> None:
    """S5: however much it would write."""
    most = 0

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        nonlocal most
        for _ in range(2000):
            writer.write(b"x" * 10_000)
            most = max(most, writer.bytes_to_write)
            await writer.drain()

    server = await serve(handler, writer_buffer_size=50_000, on_handler_error="raise")
    client = connect(server)
    assert len(await in_thread(client.read_all)) == 20_000_000
    # One write more, and what the transport tells only when it has sent it all.
    assert most <= 50_000 + 10_000


# S4


@ensureDeferred
async def test_a_handler_that_only_writes_hears_of_its_client_leaving(
    scene: Any,
) -> None:
    """S4: pending and later waiters, and what it writes is not kept."""
    s = await scene()
    s.writer.write(MUCH)
    flushing, draining = outcome(s.writer.flushed()), outcome(s.writer.drain())
    left = outcome(s.writer.consumer_left())
    await turn()
    s.client.reset()
    for results in (flushing, draining):
        error = await ended(results)
        assert type(error) is ConnectionGone
        assert isinstance(error, ConnectionError)
    assert left == [None]
    s.writer.write(MUCH)
    assert s.writer.bytes_to_write == 0
    with pytest.raises(ConnectionGone):
        await s.writer.drain()
    with pytest.raises(ConnectionGone):
        await s.writer.flushed()


@ensureDeferred
async def test_one_waiter_may_cancel_the_next_as_all_fail(scene: Any) -> None:
    """S4: each is told once."""
    s = await scene()
    s.writer.write(MUCH)
    waiters = [s.writer.flushed() for _ in range(3)]
    results = [outcome(w) for w in waiters[1:]]
    waiters[0].addErrback(lambda _: waiters[1].cancel())
    s.reader.close()
    assert [type(r[0]) for r in results] == [CancelledError, ConnectionGone]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@ensureDeferred
async def test_a_client_that_has_closed_is_noticed_by_sending(
    serve: Any, connect: Any, tmp_path: Any, kind: str
) -> None:
    """S4: EPIPE or a reset; the handler ends by ConnectionGone, unreported."""
    errors: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        while True:
            writer.write(b"tick")
            await writer.flushed()
            await turn()

    where = {} if kind == "tcp" else {"where": WhereToListen.of_file(tmp_path / "s")}
    server = await serve(
        handler, on_handler_error=lambda *args: errors.append(args), **where
    )
    client = connect(server)
    await in_thread(client.read, 4)
    client.close()
    await until(lambda: server.num_connections == 0)
    assert errors == []
    assert server.describe()["counters"]["left"] == 1


# S6


@ensureDeferred
async def test_a_client_that_does_not_read_is_closed_when_bytes_are_too_old(
    scene: Any,
) -> None:
    """S6: the error, its age, reported at once; the slot waits."""
    s = await scene(narrow=True, buffer_age_limit=20)
    s.writer.write(b"x" * 1_000_000)
    flushing, draining = outcome(s.writer.flushed()), outcome(s.writer.drain())
    await s.seconds(19)
    assert (flushing, s.errors) == ([], [])
    await s.seconds(3)
    error = await ended(flushing)
    assert isinstance(error, BufferAgeLimitExceeded)
    assert 20 < error.age <= 22
    assert error.limit == 20
    assert f"{error.age:.1f}" in str(error)
    assert await ended(draining) is error
    assert s.errors == [error]
    assert s.writer.is_closed
    assert outcome(s.writer.close_finished()) == [None]
    assert s.server.num_connections == 1
    for later in (s.writer.drain(), s.writer.flushed()):
        assert outcome(later) == [error]
    s.writer.write(b"dropped")
    s.end.errback(error)
    assert s.server.num_connections == 0
    assert s.errors == [error]
    assert s.server.describe()["counters"]["too_old"] == 1


@ensureDeferred
async def test_a_handler_that_ends_normally_after_the_age_limit_was_reported(
    scene: Any,
) -> None:
    """S6: it does not even hear of it, and the error is reported all the same."""
    s = await scene(buffer_age_limit=5)
    s.writer.write(MUCH)
    await s.seconds(8)
    assert [type(e) for e in s.errors] == [BufferAgeLimitExceeded]
    s.end.callback(None)
    assert s.server.num_connections == 0
    assert len(s.errors) == 1


@ensureDeferred
async def test_the_age_limit_with_raise_closes_the_listener_at_once(
    serve: Any, connect: Any
) -> None:
    """S6, E2: while the handler still runs."""
    clock = Clock()
    writers: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writers.append(writer)
        writer.write(MUCH)
        await Deferred()

    server = await serve(
        handler, clock=clock, buffer_age_limit=5, on_handler_error="raise"
    )
    failed = outcome(server.failed())
    connect(server)
    await until(lambda: writers)
    clock.pump([1] * 8)
    assert isinstance(await ended(failed), BufferAgeLimitExceeded)
    assert server.is_closed
    assert server.num_connections == 1


@ensureDeferred
async def test_the_age_limit_during_the_final_flush_is_logged_only(
    scene: Any, logs: Any
) -> None:
    """S6: the handler had returned normally: closed, no on_handler_error."""
    s = await scene(buffer_age_limit=5, flush_timeout=1000)
    s.writer.write(MUCH)
    s.end.callback(None)
    assert s.server.num_connections == 1
    await s.seconds(8)
    await until(lambda: s.server.num_connections == 0)
    assert s.errors == []
    assert any("final flush" in t for t in logs.texts(LogLevel.warn))


@pytest.mark.parametrize("dry_run", [["buffer_age_limit"], True])
@ensureDeferred
async def test_a_dry_run_of_the_age_limit_lets_pass_and_counts_once(
    scene: Any, logs: Any, dry_run: Any
) -> None:
    """N5, S6: nothing is closed nor raised; once a connection, and one warning."""
    s = await scene(narrow=True, buffer_age_limit=20, dry_run=dry_run)
    for _ in range(2):
        s.writer.write(b"x" * 1_000_000)
        flushing = s.writer.flushed()
        await s.seconds(60)
        assert not s.writer.is_closed
        assert not flushing.called
        assert await in_thread(s.client.read, 1_000_000) == b"x" * 1_000_000
        await flushing
        counters = s.server.describe()["counters"]
        assert counters["would_refuse"] == {"too_old": 1}
        assert counters["too_old"] == 0
    lines = [t for t in logs.texts(LogLevel.warn) if "dry run" in t]
    assert len(lines) == 1
    assert "too_old, 1 so far" in lines[0]
    assert s.errors == []
    s.end.callback(None)
    await until(lambda: s.server.num_connections == 0)
    assert s.server.describe()["counters"]["ends"] == {"finished": 1}
    assert s.server._factory._dry_run.told == {}
    s.server.invariant()


@ensureDeferred
async def test_a_dry_run_of_another_limit_leaves_the_age_limit(scene: Any) -> None:
    """N5: those that are named, no others; and what ends a dry run counts again."""
    s = await scene(narrow=True, buffer_age_limit=20, dry_run=["idle_timeout"])
    s.writer.write(b"x" * 1_000_000)
    await s.seconds(23)
    assert [type(e) for e in s.errors] == [BufferAgeLimitExceeded]


@ensureDeferred
async def test_a_dry_run_of_the_age_limit_that_ends_ends_whom_it_let_pass(
    scene: Any,
) -> None:
    """N5, N6: at the next look."""
    s = await scene(narrow=True, buffer_age_limit=20, dry_run=["buffer_age_limit"])
    s.writer.write(b"x" * 1_000_000)
    await s.seconds(60)
    assert s.errors == []
    s.server.change(dry_run=())
    await s.seconds(1)
    assert [type(e) for e in s.errors] == [BufferAgeLimitExceeded]
    s.end.callback(None)
    await until(lambda: s.server.num_connections == 0)
    assert s.server._factory._dry_run.told == {}


@ensureDeferred
async def test_a_dry_run_of_the_age_limit_leaves_the_flush_timeout(scene: Any) -> None:
    """N5, H3: that is a bound of a close, which has no dry run."""
    s = await scene(buffer_age_limit=5, flush_timeout=10, dry_run=True)
    s.writer.write(MUCH)
    s.end.callback(None)
    await s.seconds(8)
    assert s.server.num_connections == 1
    assert s.server.describe()["counters"]["would_refuse"] == {"too_old": 1}
    for _ in range(1000):  # For as long as the kernel takes more of them, and 10 s.
        if not s.server.num_connections:
            break
        await s.seconds(1)
    assert s.server.describe()["counters"]["ends"] == {"flush_timeout": 1}
    with pytest.raises(ValueError, match="flush_timeout"):
        s.server.change(dry_run=["flush_timeout"])


@ensureDeferred
async def test_unlimited_age_is_unlimited(scene: Any) -> None:
    """S6: None."""
    s = await scene(buffer_age_limit=None)
    s.writer.write(MUCH)
    flushing = outcome(s.writer.flushed())
    s.clock.pump([1000] * 100)
    await turn()
    assert (flushing, s.errors) == ([], [])


@ensureDeferred
async def test_a_slow_client_that_reads_in_time_is_not_closed(scene: Any) -> None:
    """S6: no byte of it waits for longer than the limit."""
    s = await scene(narrow=True, buffer_age_limit=20)
    for _ in range(10):
        s.writer.write(b"x" * 100_000)
        flushing = s.writer.flushed()
        await s.seconds(15)
        await in_thread(s.client.read, 100_000)
        await flushing
    assert s.errors == []
    assert not s.writer.is_closed


@ensureDeferred
async def test_only_bytes_that_still_wait_have_an_age(scene: Any) -> None:
    """S6: those that the kernel took are no longer in the write buffer."""
    s = await scene(narrow=True, buffer_age_limit=20)
    s.writer.write(b"x" * 60_000)
    await s.seconds(12)
    s.writer.write(b"y" * 60_000)
    await in_thread(s.client.read, 60_000)
    await until(lambda: s.writer.bytes_to_write <= 60_000)
    # Of the first, nothing waits now; the second is 14 s old at the end of this.
    await s.seconds(14)
    assert s.errors == []
    assert not s.writer.is_closed
    await s.seconds(8)
    assert [type(e) for e in s.errors] == [BufferAgeLimitExceeded]


@ensureDeferred
async def test_there_is_one_timer_for_all_and_none_when_nothing_waits(
    serve: Any, connect: Any
) -> None:
    """S6: no timer per connection."""
    clock = Clock()
    writers: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writers.append(writer)
        await reader.read()

    server = await serve(handler, clock=clock)
    clients = [connect(server) for _ in range(20)]
    await until(lambda: len(writers) == 20)
    assert clock.getDelayedCalls() == []
    for writer in writers:
        writer.write(MUCH[:5_000_000])
    await turn()
    assert len(clock.getDelayedCalls()) == 1
    for client, writer in zip(clients, writers, strict=True):
        await in_thread(client.read, 5_000_000)
        await writer.flushed()
    clock.pump([1] * 3)
    assert clock.getDelayedCalls() == []
    assert server.num_connections == 20


# S8, the writer's side; the table is in test_stream_ends.py


@ensureDeferred
async def test_write_eof_waits_for_what_was_written(scene: Any) -> None:
    """S8: the client reads all, then EOF; reading goes on."""
    s = await scene()
    s.writer.write(MUCH)
    s.writer.write_eof()
    assert await in_thread(s.client.read_all) == MUCH
    s.client.send(b"thanks\n")
    assert await s.reader.readline() == b"thanks\n"


@pytest.mark.parametrize("first", ["close", "write_eof"])
def test_the_error_names_what_ended_the_writer(first: str) -> None:
    """S8: RuntimeError."""
    writer, transport = in_memory()
    if first == "write_eof":
        assert not writer.can_write_eof
        with pytest.raises(RuntimeError, match="half-close"):
            writer.write_eof()
        writer.write(b"still open")
        assert transport.value() == b"still open"
    else:
        writer.close()
        for use in (lambda: writer.write(b"x"), writer.write_eof):
            with pytest.raises(RuntimeError, match="close"):
                use()
    assert writer.is_closed == (first == "close")


@ensureDeferred
async def test_write_eof_on_what_is_gone_does_nothing(scene: Any) -> None:
    """S8: closed already."""
    s = await scene()
    await s.server.close(close_existing_connections=True)
    s.writer.write_eof()
    assert outcome(s.writer.close_finished()) == [None]


@ensureDeferred
async def test_close_from_a_flushed_callback_closes_once(scene: Any) -> None:
    """S5, S8: from inside of the transport's write; the slot is kept."""
    s = await scene()
    s.writer.write(MUCH)
    flushing = [
        outcome(s.writer.flushed().addCallback(lambda _: s.writer.close()))
        for _ in range(3)
    ]
    assert await in_thread(s.client.read_all) == MUCH
    s.client.close()
    await ended(outcome(s.writer.close_finished()))
    # All had been taken before the first of them closed it.
    assert flushing == [[None]] * 3
    assert s.server.num_connections == 1


@pytest.mark.parametrize("engine", ["auto", "reactor"])
@pytest.mark.parametrize("kind", ["flushed", "drain"])
@ensureDeferred
async def test_what_a_handler_writes_last_when_it_is_told_is_sent(
    scene: Any, kind: str, engine: str, monkeypatch: Any
) -> None:
    """H3, S5: it is told that all is taken, writes more, and ends."""
    # The client has read all else by then, as a quick one has now and then.
    monkeypatch.setattr(kernel, "nothing_pending", lambda _: True)
    s = await scene(engine=engine)
    s.writer.write(MUCH)
    waiting = getattr(s.writer, kind)()
    if kind == "drain":
        waiting = Deferred.fromCoroutine(waiting)

    def last(_: None) -> None:
        s.writer.write(b"the last")
        s.end.callback(None)

    waiting.addCallback(last)
    assert await in_thread(s.client.read_all) == MUCH + b"the last"


@pytest.mark.parametrize("way", ["abort", "reader.close", "write_eof", "x3"])
@ensureDeferred
async def test_any_end_from_a_flushed_callback(scene: Any, logs: Any, way: str) -> None:
    """S5, S8: from inside of the transport's write."""
    s = await scene()
    s.writer.write(b"all")
    ways: dict[str, Callable[[], Any]] = {
        "abort": s.writer.abort,
        "reader.close": s.reader.close,
        "write_eof": s.writer.write_eof,
        "x3": lambda: s.server.close(close_existing_connections=True),
    }
    flushing = s.writer.flushed()
    flushing.addCallback(lambda _: ways[way]() and None)
    await flushing
    s.end.callback(None)
    await until(lambda: s.server.num_connections == 0)
    assert logs.bad() == []


@ensureDeferred
async def test_writing_on_from_a_flushed_callback(scene: Any) -> None:
    """S5: a chain of writes, each when the one before it is taken."""
    s = await scene(narrow=True)
    count = 0

    def again(_: Any) -> None:
        nonlocal count
        count += 1
        if count <= 50:
            s.writer.write(bytes([count]) * 5000)
            s.writer.flushed().addCallback(again)
        else:
            s.end.callback(None)

    again(None)
    got = await in_thread(s.client.read_all)
    assert got == b"".join(bytes([n]) * 5000 for n in range(1, 51))


def test_it_says_in_one_line_what_it_is() -> None:
    """I3."""
    writer, _ = in_memory()
    assert "open" in repr(writer) and "\n" not in repr(writer)
    writer.write_eof() if writer.can_write_eof else writer.close()
    assert "open" not in repr(writer)
