"""The reading half of a connection (spec S1 to S3, and the reader in S8)."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import IncompleteReadError, LimitOverrunError
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.internet.defer import TimeoutError as TwistedTimeoutError
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from tcpsvc import IReader, Reader
from tests.support import in_thread, turn, until

#: What one receive of Twisted's takes at most.
ONE_RECEIVE = 65536


class Wire:
    """
    The connection below a reader, with a kernel: bytes that are sent while
    reading is paused wait.
    """

    peer = "the peer"
    host = "the host"
    transport = None

    def __init__(self, limit: int = 100) -> None:
        self.reader: Any = Reader(self, limit)
        self.is_paused = False
        self.is_closed = False
        self.waiting: list[bytes | None] = []
        self.most_buffered = 0
        self.first_reads = 0
        self.times_asked = 0
        self._is_delivering = False

    def send(self, *pieces: bytes) -> Wire:
        """The client sends; each piece is one receive."""
        self.waiting += pieces
        return self._deliver()

    def shut(self) -> Wire:
        """The client sends FIN."""
        self.waiting.append(None)
        return self._deliver()

    def _deliver(self) -> Wire:
        if not self._is_delivering:
            self._is_delivering = True
            while self.waiting and not self.is_paused:
                data = self.waiting.pop(0)
                if data is None:
                    self.reader.feed_eof()
                else:
                    self.reader.data_received(data)
                    self.most_buffered = max(
                        self.most_buffered, self.reader.bytes_buffered
                    )
            self._is_delivering = False
        return self

    draining = False
    gives_eof = False

    def gives_eof_for_drain(self, asked: bool | None) -> bool:
        return self.gives_eof if asked is None else asked

    def read_first(self) -> None:
        self.first_reads += 1

    def go_on_reading(self) -> None:
        self.times_asked += 1

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        # A reactor delivers in a later turn; flush() is that turn.
        self.is_paused = False

    def close_by_reader(self) -> None:
        self.is_closed = True
        self.reader.feed_eof()

    flush = _deliver


def asked(read: Coroutine[Any, Any, Any]) -> list[Any]:
    """Begin a read; the list holds its result or its error once it has one."""
    results: list[Any] = []
    Deferred.fromCoroutine(read).addCallbacks(
        results.append, lambda failure: results.append(failure.value)
    )
    return results


def now(read: Coroutine[Any, Any, Any]) -> Any:
    """The result of a read that need not wait."""
    (result,) = asked(read)
    if isinstance(result, BaseException):
        raise result
    return result


READS: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {
    "read(n)": lambda r: r.read(10),
    "read()": lambda r: r.read(),
    "readline": lambda r: r.readline(),
    "readuntil": lambda r: r.readuntil(b"--"),
    "readexactly": lambda r: r.readexactly(20),
    "peek": lambda r: r.peek(20),
    "anext": lambda r: r.__anext__(),
    "drain_to_eof": lambda r: r.drain_to_eof(),
}

reads = pytest.mark.parametrize("read", READS.values(), ids=READS)


def test_it_provides_its_interface() -> None:
    """S2."""
    assert verifyObject(IReader, Wire().reader)


# S1


@pytest.mark.parametrize("second", READS.values(), ids=READS)
@reads
def test_a_second_read_is_an_error_and_leaves_the_first_alone(
    read: Any, second: Any
) -> None:
    """S1: one outstanding read at a time."""
    wire = Wire()
    first = asked(read(wire.reader))
    with pytest.raises(RuntimeError, match="outstanding"):
        now(second(wire.reader))
    assert first == []
    wire.send(b"0123456789\n--0123456789\n--").shut()
    assert len(first) == 1
    assert not isinstance(first[0], BaseException)


@reads
def test_a_cancelled_read_loses_no_byte_and_frees_the_reader(read: Any) -> None:
    """S1: whether bytes had come already or not."""
    for before in (b"", b"some"):
        if before and read is READS["read(n)"]:
            continue  # It has what it waits for.
        if before and read is READS["drain_to_eof"]:
            continue  # It has discarded them: that is what was asked for.
        wire = Wire()
        wire.send(before)
        reading = Deferred.fromCoroutine(read(wire.reader))
        reading.cancel()
        errors: list[Any] = []
        reading.addErrback(lambda failure: errors.append(failure.value))  # noqa: B023
        assert [type(e) for e in errors] == [CancelledError]
        wire.send(b" bytes\n").shut()
        assert now(wire.reader.read()) == before + b" bytes\n"


@pytest.mark.parametrize("name", ["readline", "readuntil", "readexactly", "read()"])
def test_a_timed_out_read_loses_no_byte(name: str) -> None:
    """S1: also by addTimeout, again and again, each time with a byte more."""
    wire, clock = Wire(), Clock()
    for byte in (b"a", b"b", b"c"):
        reading = Deferred.fromCoroutine(READS[name](wire.reader))
        reading.addTimeout(5, clock)
        wire.send(byte)
        clock.advance(6)
        errors: list[Any] = []
        reading.addErrback(lambda failure: errors.append(failure.value))  # noqa: B023
        assert [type(e) for e in errors] == [TwistedTimeoutError]
    wire.shut()
    assert now(wire.reader.read()) == b"abc"


def test_a_read_that_is_cancelled_above_the_limit_pauses_again() -> None:
    """S1, S3: it had asked for more than the buffer holds; nobody does now."""
    wire = Wire(limit=100)
    reading = Deferred.fromCoroutine(wire.reader.readexactly(1000))
    wire.send(b"x" * 500)
    assert not wire.is_paused
    reading.cancel()
    reading.addErrback(lambda _: None)
    assert wire.is_paused
    assert now(wire.reader.readexactly(500)) == b"x" * 500
    assert not wire.is_paused


def test_a_read_may_be_cancelled_out_of_another_reads_callback() -> None:
    """S1: by whoever read before it."""
    wire = Wire()
    results: list[bytes] = []
    reading = Deferred.fromCoroutine(wire.reader.readline())

    def read_on(line: bytes) -> None:
        results.append(line)
        again = Deferred.fromCoroutine(wire.reader.readline())
        again.addErrback(lambda _: None)
        again.cancel()

    reading.addCallback(read_on)
    wire.send(b"one\ntw").send(b"o\n").shut()
    assert (results, now(wire.reader.readline())) == ([b"one\n"], b"two\n")


@ensureDeferred
async def test_every_read_may_be_awaited_yielded_or_made_a_deferred(
    serve: Any, connect: Any
) -> None:
    """S1: and a read that waits, over a real socket."""

    @inlineCallbacks
    def yielding(reader: Any) -> Any:
        peeked = yield reader.peek(3)
        line = yield reader.readline()
        exact = yield reader.readexactly(4)
        until_ = yield reader.readuntil(b"--")
        rest = yield reader.read(100)
        yield reader.drain_to_eof()
        return [peeked, line, exact, until_, rest]

    async def awaiting(reader: Any) -> list[bytes]:
        got = [await reader.peek(3), await reader.readline()]
        got += [await reader.readexactly(4), await reader.readuntil(b"--")]
        got.append(await reader.read(100))
        await reader.drain_to_eof()
        return got

    def chaining(reader: Any) -> Deferred[list[bytes]]:
        got: list[bytes] = []

        def then(read: Callable[[], Any]) -> Callable[[Any], Deferred[Any]]:
            def begin(result: Any) -> Deferred[Any]:
                got.append(result)
                return Deferred.fromCoroutine(read())

            return begin

        chain: Deferred[Any] = Deferred.fromCoroutine(reader.peek(3))
        chain.addCallback(then(reader.readline))
        chain.addCallback(then(lambda: reader.readexactly(4)))
        chain.addCallback(then(lambda: reader.readuntil(b"--")))
        chain.addCallback(then(lambda: reader.read(100)))
        chain.addCallback(then(reader.drain_to_eof))
        return chain.addCallback(lambda _: got)

    results: list[Any] = []
    ways = [yielding, awaiting, chaining]

    def handler(address: Any, reader: Any, writer: Any) -> Any:
        result = ways[len(results)](reader)
        if asyncio.iscoroutine(result):
            result = Deferred.fromCoroutine(result)
        return result.addCallback(results.append)

    server = await serve(handler, on_handler_error="raise")
    for count in (1, 2, 3):
        client = connect(server)
        for piece in (b"lin", b"e\nex", b"actun", b"til--", b"rest"):
            client.send(piece)
            await turn()
        client.shut()
        await until(lambda count=count: len(results) == count)
    expected = [b"lin", b"line\n", b"exac", b"tuntil--", b"rest"]
    assert results == [expected] * 3


# S2


class NoLoop:
    """What asyncio's reader wants to know of a loop, when it never waits."""

    def get_debug(self) -> bool:
        return False


def oracle(data: bytes, limit: int) -> asyncio.StreamReader:
    """asyncio's reader, with everything there already, so that none waits."""
    reader = asyncio.StreamReader(limit=limit, loop=NoLoop())  # type: ignore[arg-type]
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def step(read: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that need not wait."""
    try:
        read.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def shown(result: Any) -> Any:
    """A result, or an error, to compare."""
    if isinstance(result, IncompleteReadError):
        return ("incomplete", result.partial, result.expected)
    if isinstance(result, LimitOverrunError):
        return "overrun"
    if isinstance(result, BaseException):
        return type(result)
    return result


def of_oracle(reader: asyncio.StreamReader, method: str, *args: Any) -> Any:
    """What asyncio's reader returns; readline by readuntil, as the spec says."""
    try:
        if method == "readline":
            try:
                return step(reader.readuntil(b"\n"))
            except IncompleteReadError as error:
                return error.partial
        return shown(step(getattr(reader, method)(*args)))
    except Exception as error:
        return shown(error)


ALPHABET = st.sampled_from(b"ab\n\r")
DATA = st.lists(ALPHABET, max_size=60).map(bytes)
CALLS = st.lists(
    st.one_of(
        st.just(("readline",)),
        st.tuples(
            st.just("readuntil"), st.sampled_from([b"\n", b"\r\n", b"ab", b"aab", b""])
        ),
        st.tuples(st.just("readexactly"), st.integers(-1, 30)),
        st.tuples(st.just("at_eof")),
    ),
    max_size=15,
)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut into pieces of these sizes, and the rest."""
    pieces, start = [], 0
    for size in sizes:
        if start < len(data):
            pieces.append(data[start : start + size])
            start += size
    return [*pieces, data[start:]] if start < len(data) else pieces


def run(wire: Wire, read: Coroutine[Any, Any, Any]) -> Any:
    """The result of a read, the reactor's turns included."""
    results = asked(read)
    while not results:
        assert wire.waiting, "it waits for ever"
        wire.flush()
    return shown(results[0])


@settings(max_examples=400, deadline=None)
@given(
    data=DATA,
    sizes=st.lists(st.integers(1, 9), max_size=60),
    calls=CALLS,
    limit=st.integers(1, 25),
    arriving_first=st.booleans(),
)
def test_segmentation_changes_no_result_and_results_are_asyncios(
    data: bytes,
    sizes: list[int],
    calls: list[Any],
    limit: int,
    arriving_first: bool,
) -> None:
    """S2: readline, readuntil, readexactly; errors included."""
    expected, got = [], []
    theirs = oracle(data, limit)
    wire = Wire(limit)
    if arriving_first:
        wire.send(*cut(data, sizes)).shut()
    else:
        wire.waiting = [*cut(data, sizes), None]
    for method, *args in calls:
        if method == "at_eof":
            continue  # Whether the FIN is here is a matter of time.
        expected.append(of_oracle(theirs, method, *args))
        got.append(run(wire, getattr(wire.reader, method)(*args)))
    assert got == expected
    rest = b"".join(run(wire, wire.reader.read(7)) for _ in range(20))
    assert rest == step(theirs.read())
    assert wire.reader.at_eof() and theirs.at_eof()
    assert wire.reader.bytes_read == len(data)


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=200),
    sizes=st.lists(st.integers(1, 30), max_size=30),
    ns=st.lists(st.integers(0, 50), max_size=30),
    limit=st.integers(1, 60),
)
def test_segmentation_does_not_change_what_reads_add_up_to(
    data: bytes, sizes: list[int], ns: list[int], limit: int
) -> None:
    """S2: the concatenation of read(n); each at most n, and empty only at EOF."""
    wire = Wire(limit)
    wire.waiting = [*cut(data, sizes), None]
    total = b""
    for n in ns:
        got = run(wire, wire.reader.read(n))
        assert len(got) <= n
        assert got or n == 0 or len(total) == len(data)
        total += got
    total += run(wire, wire.reader.read())
    assert total == data
    # S3: nobody asked for more than there was.
    assert wire.reader.at_eof()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=DATA,
    sizes=st.lists(st.integers(1, 9), max_size=60),
    cancels=st.lists(st.integers(0, 3), max_size=40),
    names=st.lists(
        st.sampled_from(["readline", "readuntil", "readexactly", "read()", "peek"]),
        min_size=1,
        max_size=10,
    ),
)
def test_cancelling_at_any_point_loses_no_byte(
    data: bytes, sizes: list[int], cancels: list[int], names: list[str]
) -> None:
    """S1: whatever is cancelled, between any two segments."""
    wire = Wire(limit=200)
    pieces = cut(data, sizes)
    got = b""
    for number, pause in enumerate(cancels):
        name = names[number % len(names)]
        reading = Deferred.fromCoroutine(READS[name](wire.reader))
        results: list[Any] = []
        reading.addCallbacks(results.append, lambda _: None)
        for _ in range(pause):
            if pieces and not results:
                wire.send(pieces.pop(0))
        reading.cancel()
        if results and name != "peek":
            got += results[0]
    wire.send(*pieces).shut()
    assert got + run(wire, wire.reader.read()) == data


def test_read_returns_what_has_arrived_up_to_n() -> None:
    """S2: as asyncio's."""
    wire = Wire().send(b"hello", b"world")
    assert now(wire.reader.read(3)) == b"hel"
    assert now(wire.reader.read(100)) == b"loworld"
    assert now(wire.reader.read(0)) == b""
    waiting = asked(wire.reader.read(100))
    assert waiting == []
    wire.send(b"!")
    assert waiting == [b"!"]
    wire.shut()
    assert now(wire.reader.read(5)) == b""
    assert now(wire.reader.read()) == b""


@pytest.mark.parametrize("extra", [-1, 0, 1, 2])
@pytest.mark.parametrize("separator", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_line_of_exactly_the_limit_passes(
    extra: int, separator: bytes, size: int
) -> None:
    """S2: its end not counted; a longer one does not, and stays in the buffer."""
    line = b"x" * (50 + extra) + separator
    wire = Wire(limit=50)
    wire.waiting = [*cut(line + b"next\n", [size] * len(line)), None]
    result = run(wire, wire.reader.readuntil(separator))
    if extra <= 0:
        assert result == line
        return
    assert result == "overrun"
    error = asked(wire.reader.readuntil(separator))[0]
    assert isinstance(error, LimitOverrunError)
    assert run(wire, wire.reader.readexactly(error.consumed)) == b"x" * error.consumed
    assert run(wire, wire.reader.read()) == line[error.consumed :] + b"next\n"


def test_an_over_long_line_is_limit_overrun_from_readline_too() -> None:
    """S2: asyncio raises ValueError and discards it."""
    wire = Wire(limit=10).send(b"x" * 11)
    for _ in range(2):
        with pytest.raises(LimitOverrunError):
            now(wire.reader.readline())
    with pytest.raises(LimitOverrunError):
        now(wire.reader.__anext__())
    assert now(wire.reader.readexactly(11)) == b"x" * 11


def test_more_than_the_limit_may_be_asked_for_by_number() -> None:
    """S2, S3: readexactly and read() are not bounded by the buffer's size."""
    data = bytes(range(256)) * 10
    wire = Wire(limit=10)
    wire.waiting = [*cut(data, [7] * 200)]
    assert run(wire, wire.reader.readexactly(2000)) == data[:2000]
    wire.waiting.append(None)
    assert run(wire, wire.reader.read()) == data[2000:]


@pytest.mark.parametrize("n", [-1, 101])
def test_a_peek_beyond_the_buffer_is_a_value_error(n: int) -> None:
    """S2: it could never be answered."""
    with pytest.raises(ValueError, match=str(n)):
        now(Wire(limit=100).reader.peek(n))


def test_what_was_peeked_at_stays() -> None:
    """S2: at EOF there may be less."""
    wire = Wire(limit=10)
    peeking = asked(wire.reader.peek(10))
    wire.send(b"01234")
    assert peeking == []
    wire.send(b"56789", b"more")
    assert peeking == [b"0123456789"]
    assert now(wire.reader.peek(2)) == b"01"
    assert run(wire, wire.reader.readexactly(12)) == b"0123456789mo"
    wire.flush().shut()
    assert run(wire, wire.reader.peek(10)) == b"re"
    assert not wire.reader.at_eof()
    assert now(wire.reader.peek(0)) == b""
    assert now(wire.reader.read()) == b"re"
    assert wire.reader.at_eof()


def test_lines_may_be_iterated() -> None:
    """S2: async for; the last without its end."""

    async def lines() -> list[bytes]:
        return [line async for line in wire.reader]

    wire = Wire()
    got = asked(lines())
    wire.send(b"one\nt", b"wo\n", b"\nthr", b"ee").shut()
    assert got == [[b"one\n", b"two\n", b"\n", b"three"]]


def test_bytes_read_counts_what_has_arrived() -> None:
    """S2."""
    wire = Wire().send(b"12345", b"678")
    assert wire.reader.bytes_read == 8
    now(wire.reader.read(4))
    assert wire.reader.bytes_read == 8


def test_drain_to_eof_discards_everything_and_holds_little() -> None:
    """S2, S3."""
    wire = Wire(limit=10)
    draining = asked(wire.reader.drain_to_eof())
    for _ in range(1000):
        wire.send(b"x" * 50).flush()
    assert draining == []
    wire.shut().flush()
    assert draining == [None]
    assert wire.reader.bytes_read == 50_000
    assert wire.most_buffered <= 60


@pytest.mark.parametrize("separator", [b"\r\n", b"a"])
def test_eof_before_the_separator_is_incomplete_with_what_there_was(
    separator: bytes,
) -> None:
    """S2: and the buffer is empty then."""
    wire = Wire().send(b"hello\r").shut()
    with pytest.raises(IncompleteReadError) as caught:
        now(wire.reader.readuntil(separator))
    assert (caught.value.partial, caught.value.expected) == (b"hello\r", None)
    assert wire.reader.at_eof()
    assert now(wire.reader.readline()) == b""


def test_eof_before_n_bytes_is_incomplete_with_what_there_was() -> None:
    """S2."""
    wire = Wire().send(b"hello").shut()
    with pytest.raises(IncompleteReadError) as caught:
        now(wire.reader.readexactly(6))
    assert (caught.value.partial, caught.value.expected) == (b"hello", 6)
    with pytest.raises(IncompleteReadError):
        now(wire.reader.readexactly(1))
    assert now(wire.reader.readexactly(0)) == b""


@ensureDeferred
async def test_one_byte_segments_over_a_socket(serve: Any, connect: Any) -> None:
    """S2: each in its own turn."""
    got: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        got.append(await reader.readuntil(b"\r\n\r\n"))
        got.append(await reader.readexactly(5))
        got.append(await reader.readline())

    server = await serve(handler, on_handler_error="raise")
    client = connect(server)
    for byte in b"GET / HTTP/1.0\r\nHost: h\r\n\r\n12345tail":
        client.send(bytes([byte]))
        await turn()
    assert await in_thread(client.finish) == b""
    assert got == [b"GET / HTTP/1.0\r\nHost: h\r\n\r\n", b"12345", b"tail"]


@ensureDeferred
async def test_an_over_long_line_of_a_client_can_be_skipped(
    serve: Any, connect: Any
) -> None:
    """S2, S3: over a socket; and the next line is read."""
    got: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        while True:
            try:
                line = await reader.readline()
            except LimitOverrunError as error:
                await reader.readexactly(error.consumed)
                got.append(error.consumed)
                continue
            if not line:
                break
            got.append(line)

    server = await serve(handler, on_handler_error="raise", reader_buffer_size=1000)
    client = connect(server)
    client.send(b"first\n" + b"x" * 3500 + b"\n" + b"y" * 1000 + b"\n")
    assert await in_thread(client.finish) == b""
    assert got == [
        b"first\n",
        1000,
        1000,
        1000,
        b"x" * 500 + b"\n",
        b"y" * 1000 + b"\n",
    ]


def test_what_came_before_the_first_wait_is_asked_for_once() -> None:
    """And not by reads that find their bytes."""
    wire = Wire().send(b"one\n")
    assert now(wire.reader.readline()) == b"one\n"
    assert wire.first_reads == 0
    for line in (b"two\n", b"three\n"):
        reading = asked(wire.reader.readline())
        wire.send(line)
        assert reading == [line]
        assert wire.first_reads == 1


# S3


def test_reading_stops_at_the_limit_and_goes_on_when_it_is_drained() -> None:
    """S3: and not before; again and again."""
    wire = Wire(limit=100)
    for _ in range(3):
        wire.send(b"x" * 99)
        assert not wire.is_paused
        wire.send(b"y")
        assert wire.is_paused
        assert now(wire.reader.read(1)) == b"x"
        assert not wire.is_paused
        assert now(wire.reader.read(1000)) == b"x" * 98 + b"y"


@pytest.mark.parametrize("size", [99, 100, 101])
@pytest.mark.parametrize("read", ["readline", "readuntil"])
def test_a_line_that_fills_the_buffer_is_read_and_reading_goes_on(
    size: int, read: str
) -> None:
    """S3: with its end it may be one byte more than the buffer holds."""
    wire = Wire(limit=100)
    line = b"x" * (size - 1) + b"\n"
    for _ in range(2):
        wire.send(line)
        assert wire.is_paused == (size >= 100)
        assert now(getattr(wire.reader, read)()) == line
        assert not wire.is_paused


def test_a_read_that_needs_more_than_the_limit_is_not_starved() -> None:
    """S3: the buffer was full of too little when it came."""
    wire = Wire(limit=10)
    wire.send(b"x" * 10, b"y" * 10)
    assert wire.is_paused
    reading = asked(wire.reader.readexactly(20))
    wire.flush()
    assert reading == [b"x" * 10 + b"y" * 10]


@ensureDeferred
async def test_a_blasting_client_is_held_back_by_the_kernel(
    serve: Any, connect: Any
) -> None:
    """S3: the buffer's size and one receive, while nobody reads; none is lost."""
    size, total = 10_000, 30_000_000
    go_on: Deferred[None] = Deferred()
    readers: list[Any] = []
    sums: list[int] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        readers.append(reader)
        await go_on
        while data := await reader.read(100_000):
            sums.append(len(data))

    server = await serve(handler, reader_buffer_size=size, on_handler_error="raise")
    client = connect(server)
    client.socket.setblocking(False)
    sent = 0
    idle = 0
    while idle < 20:
        # Until the kernel has taken nothing for some turns.
        idle += 1
        with contextlib.suppress(BlockingIOError):
            while sent < total:
                sent += client.socket.send(bytes(min(1_000_000, total - sent)))
                idle = 0
        await turn(0.001)
    assert size <= readers[0].bytes_read <= size + ONE_RECEIVE
    assert sent < total
    client.socket.settimeout(10)
    go_on.callback(None)
    await in_thread(client.send, bytes(total - sent))
    assert await in_thread(client.finish) == b""
    assert sum(sums) == total
    assert max(sums) <= size + ONE_RECEIVE


@ensureDeferred
async def test_a_client_that_blasts_before_its_handler_starts_is_bounded_too(
    serve: Any, connect: Any
) -> None:
    """S3: bytes that were there at the accept."""
    readers: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        readers.append(reader)
        await Deferred()

    server = await serve(handler, reader_buffer_size=1)
    client = connect(server)
    client.socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.socket.send(bytes(100_000))
    await until(lambda: readers and readers[0].bytes_read)
    for _ in range(20):
        await turn()
    assert readers[0].bytes_read <= 1 + ONE_RECEIVE


# S8, the reader's side


@reads
def test_reading_after_its_own_close_is_an_error(read: Any) -> None:
    """S8: reader.close(): RuntimeError, also for a read that waits."""
    wire = Wire()
    waiting = asked(read(wire.reader))
    wire.reader.close()
    assert wire.is_closed
    assert [type(result) for result in waiting] == [RuntimeError]
    with pytest.raises(RuntimeError, match="close"):
        now(read(wire.reader))
    wire.reader.close()


def test_bytes_that_come_after_its_own_close_are_nobodys() -> None:
    """S8: and do no harm."""
    wire = Wire(limit=10)
    wire.reader.close()
    wire.send(b"x" * 100)
    with pytest.raises(RuntimeError):
        now(wire.reader.read())


@reads
def test_after_eof_every_read_ends(read: Any) -> None:
    """S8: what is buffered, then EOF, for ever."""
    wire = Wire().send(b"0123456789\n--0123456789").shut()
    for _ in range(8):
        results = asked(read(wire.reader))
        assert len(results) == 1
    assert len(asked(wire.reader.read())) == 1
    assert wire.reader.at_eof()


def test_it_says_in_one_line_what_it_is() -> None:
    """I3."""
    wire = Wire().send(b"123")
    assert "3 bytes" in repr(wire.reader) and "\n" not in repr(wire.reader)
    wire.shut()
    assert "eof" in repr(wire.reader)
    wire.reader.close()
    assert "closed" in repr(wire.reader)
