"""Running a handler's coroutine, and what it may wait for."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from traceback import extract_tb
from types import coroutine
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks, succeed
from twisted.internet.defer import TimeoutError as TwistedTimeoutError
from twisted.python.failure import Failure

from tcpsvc.driver import Driver, Suspension
from tcpsvc.testing import MemoryServer

pytestmark = pytest.mark.whatever("engine", "reactor")


@coroutine
def suspended(suspension: Suspension) -> Generator[Suspension, None, None]:
    """Wait in a coroutine until a suspension is woken."""
    yield suspension


class Boom(Exception):
    """Out of a user's code."""


class Run:
    """A coroutine that is driven, and its end."""

    def __init__(self, running: Any) -> None:
        self.ends: list[Failure | None] = []
        self.driver = Driver(running, self.ends.append)
        self.driver.resume(None)

    @property
    def error(self) -> Any:
        """What it raised."""
        (failure,) = self.ends
        return None if failure is None else failure.value


# The end.


def test_a_coroutine_that_returns_ends_without_a_failure() -> None:
    """Whatever it returns."""

    async def handler() -> int:
        return 3

    assert Run(handler()).ends == [None]


def test_a_coroutine_that_raises_ends_with_its_own_frames() -> None:
    """The traceback shows where, also after a wait."""
    suspension = Suspension()

    async def inner() -> None:
        await suspended(suspension)
        raise Boom("here")

    async def handler() -> None:
        await inner()

    run = Run(handler())
    assert run.ends == []
    suspension.wake()
    assert isinstance(run.error, Boom)
    names = [frame.name for frame in extract_tb(run.error.__traceback__)]
    assert names[-2:] == ["handler", "inner"]
    assert "in inner" in run.ends[0].getTraceback()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
def test_what_is_no_exception_is_an_end_too(error: type[BaseException]) -> None:
    """The driver passes everything on; it raises nothing itself."""

    async def handler() -> None:
        raise error

    assert type(Run(handler()).error) is error


# Suspensions.


def test_a_suspension_may_be_waited_for_again() -> None:
    """As long as it is woken each time."""
    suspension = Suspension()
    wakes: list[int] = []

    async def handler() -> None:
        for n in range(3):
            await suspended(suspension)
            wakes.append(n)

    run = Run(handler())
    for n in range(3):
        assert len(wakes) == n
        suspension.wake()
    assert run.ends == [None]
    assert not suspension.called


def test_a_suspension_is_a_deferred_to_everybody_else() -> None:
    """Without a driver it fires, once."""
    suspension = Suspension()

    async def waiting() -> str:
        await suspended(suspension)
        return "done"

    results: list[str] = []
    Deferred.fromCoroutine(waiting()).addCallback(results.append)
    assert results == []
    suspension.wake()
    assert results == ["done"]
    assert suspension.called


# Deferreds.


def test_a_deferred_that_has_fired_is_no_wait() -> None:
    """Its result is there at once."""
    got: list[Any] = []

    async def handler() -> None:
        got.append(await succeed("at once"))
        got.append(await succeed(None))

    assert Run(handler()).ends == [None]
    assert got == ["at once", None]


def test_a_deferred_that_has_not_is_waited_for() -> None:
    """Its result is that of the await."""
    wait: Deferred[str] = Deferred()
    got: list[str] = []

    async def handler() -> None:
        got.append(await wait)

    run = Run(handler())
    assert run.ends == []
    wait.callback("later")
    assert (run.ends, got) == ([None], ["later"])


@pytest.mark.parametrize("is_late", [False, True])
def test_a_deferred_that_fails_raises_in_the_handler(is_late: bool) -> None:
    """Caught there it is dealt with; else it is the end."""
    waits: list[Deferred[None]] = [Deferred(), Deferred()]
    caught: list[BaseException] = []

    async def handler() -> None:
        try:
            await waits[0]
        except Boom as error:
            caught.append(error)
        await waits[1]

    def fire() -> None:
        for n, wait in enumerate(waits):
            wait.errback(Boom(n))

    if not is_late:
        fire()
    run = Run(handler())
    if is_late:
        fire()
    assert [e.args for e in caught] == [(0,)]
    assert run.error.args == (1,)


def test_thousands_of_fired_deferreds_are_no_recursion() -> None:
    """Awaited in a row."""
    many = 10 * sys.getrecursionlimit()
    got: list[int] = []

    async def handler() -> None:
        for n in range(many):
            got.append(await succeed(n))  # noqa: PERF401

    assert Run(handler()).ends == [None]
    assert got == list(range(many))


def test_what_is_no_deferred_complains_in_the_handler() -> None:
    """An asyncio future wants its own loop; the handler may go on without it."""
    loop = asyncio.new_event_loop()
    complaints: list[str] = []

    async def handler() -> None:
        future = loop.create_future()
        try:
            await future
        except RuntimeError as error:
            complaints.append(str(error))
        await future

    run = Run(handler())
    loop.close()
    assert complaints == ["await wasn't used with future"]
    assert isinstance(run.error, RuntimeError)


def test_what_is_no_deferred_is_handed_back() -> None:
    """As by Twisted: whatever yielded it may deal with it."""
    got: list[Any] = []

    @coroutine
    def odd() -> Any:
        got.append((yield 3))
        got.append((yield None))

    async def handler() -> None:
        await odd()

    assert Run(handler()).ends == [None]
    assert got == [3, None]


# Context.


def test_context_variables_are_the_handlers_own() -> None:
    """They stay over a wait, whoever ends it, and do not leak out."""
    variable: ContextVar[str] = ContextVar("variable", default="none")
    suspension = Suspension()
    wait: Deferred[None] = Deferred()
    seen: list[str] = []

    async def handler() -> None:
        seen.append(variable.get())
        variable.set("handler's")
        await suspended(suspension)
        seen.append(variable.get())
        await wait
        seen.append(variable.get())

    token = variable.set("outside")
    run = Run(handler())
    assert variable.get() == "outside"
    variable.set("changed")
    suspension.wake()
    wait.callback(None)
    assert variable.get() == "changed"
    variable.reset(token)
    assert run.ends == [None]
    assert seen == ["outside", "handler's", "handler's"]


# Cancelling.


def test_cancelling_raises_where_it_waits() -> None:
    """At a suspension; which may be woken afterwards, and nobody hears it."""
    suspension = Suspension()

    async def handler() -> None:
        await suspended(suspension)

    run = Run(handler())
    run.driver.cancel()
    assert isinstance(run.error, CancelledError)
    suspension.wake()
    run.driver.cancel()
    assert len(run.ends) == 1


def test_cancelling_cancels_the_deferred_it_waits_for() -> None:
    """Whose canceller may do with it what it likes."""
    cancelled: list[Any] = []
    waits: list[Deferred[Any]] = [
        Deferred(cancelled.append),
        Deferred(lambda d: d.callback("unmoved")),
    ]
    got: list[Any] = []

    async def handler() -> None:
        try:
            await waits[0]
        except CancelledError:
            got.append("cancelled")
        got.append(await waits[1])

    run = Run(handler())
    run.driver.cancel()
    assert cancelled == [waits[0]]
    assert (run.ends, got) == ([], ["cancelled"])
    run.driver.cancel()
    assert (run.ends, got) == ([None], ["cancelled", "unmoved"])


@pytest.mark.parametrize("kind", ["suspension", "deferred"])
def test_cancelled_while_it_runs_it_ends_at_its_next_wait(kind: str) -> None:
    """From within the handler itself."""
    reached: list[str] = []
    driver: Any = None

    async def handler() -> None:
        driver.cancel()
        reached.append("on")
        await (suspended(Suspension()) if kind == "suspension" else Deferred())
        reached.append("never")

    ends: list[Any] = []
    driver = Driver(handler(), ends.append)
    driver.resume(None)
    assert reached == ["on"]
    (failure,) = ends
    assert failure.type is CancelledError


def test_cancelled_while_it_runs_it_may_end_without_a_wait() -> None:
    """Then there is nothing to cancel."""
    driver: Any = None

    async def handler() -> None:
        driver.cancel()

    ends: list[Any] = []
    driver = Driver(handler(), ends.append)
    driver.resume(None)
    assert ends == [None]


def test_cancelled_while_it_runs_it_is_cancelled_once() -> None:
    """Who swallows that waits in peace afterwards."""
    suspension = Suspension()
    swallowed: list[BaseException] = []
    driver: Any = None

    async def handler() -> None:
        driver.cancel()
        try:
            await Deferred()
        except CancelledError as error:
            swallowed.append(error)
        await suspended(suspension)

    ends: list[Any] = []
    driver = Driver(handler(), ends.append)
    driver.resume(None)
    assert (len(swallowed), ends) == (1, [])
    suspension.wake()
    assert ends == [None]


def test_a_cancellation_may_be_swallowed() -> None:
    """The handler goes on, and the next cancellation is another one."""
    suspensions = [Suspension(), Suspension(), Suspension()]
    swallowed: list[int] = []

    async def handler() -> None:
        for n in range(2):
            try:
                await suspended(suspensions[n])
            except CancelledError:
                swallowed.append(n)
        await suspended(suspensions[2])

    run = Run(handler())
    run.driver.cancel()
    run.driver.cancel()
    assert (run.ends, swallowed) == ([], [0, 1])
    suspensions[2].wake()
    assert run.ends == [None]


# Handlers, over a connection in memory.


def cancel(server: MemoryServer) -> None:
    """Cancel the handlers of all connections."""
    for connection in list(server.factory.connections):
        connection.cancel_handler()
    server.clock.advance(0)


def test_a_read_that_is_cancelled_ends_the_handler() -> None:
    """Which is an ordinary end, no error."""
    ends: list[type[BaseException]] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        try:
            await reader.readline()
        except BaseException as error:
            ends.append(type(error))
            raise

    server = MemoryServer(handler)
    client = server.connect()
    cancel(server)
    assert ends == [CancelledError]
    assert client.is_closed
    assert server.errors == []


def test_a_read_that_was_cancelled_loses_no_byte() -> None:
    """The handler that swallows it reads on, through the same reader."""

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        try:
            await reader.readline()
        except CancelledError:
            writer.write(b"swallowed ")
        writer.write(await reader.readline())

    server = MemoryServer(handler)
    client = server.connect()
    client.send(b"begun")
    cancel(server)
    client.send(b" and ended\n")
    assert client.received == b"swallowed begun and ended\n"


def test_a_read_with_a_timeout_loses_no_byte() -> None:
    """Deferred.fromCoroutine within a handler, and reading on afterwards."""

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        for _ in range(2):
            read = Deferred.fromCoroutine(reader.readline())
            try:
                writer.write(await read.addTimeout(5, server.clock))
            except TwistedTimeoutError:
                writer.write(b"timeout ")
        writer.write(await reader.readline())

    server = MemoryServer(handler)
    client = server.connect()
    client.send(b"beg")
    server.clock.advance(5)
    assert client.received == b"timeout "
    client.send(b"un\nsecond\n")
    assert client.received == b"timeout begun\nsecond\n"
    assert client.is_closed
    assert server.errors == []
    assert server.clock.getDelayedCalls() == []


def test_reads_may_be_yielded_in_inline_callbacks() -> None:
    """Those that wait, and those that do not."""

    @inlineCallbacks
    def handler(_: Any, reader: Any, writer: Any) -> Any:
        for _ in range(3):
            writer.write((yield reader.readline()))

    server = MemoryServer(handler)
    client = server.connect()
    client.send(b"one\ntw")
    client.send(b"o\nthree\n")
    assert client.received == b"one\ntwo\nthree\n"
    assert client.is_closed


def test_reads_of_all_kinds_may_follow_each_other() -> None:
    """Awaited directly, as a Deferred, and within inlineCallbacks."""

    @inlineCallbacks
    def two(reader: Any) -> Any:
        one = yield reader.readline()
        other = yield Deferred.fromCoroutine(reader.readline())
        return one + other

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        while True:
            lines = await reader.readline()
            lines += await Deferred.fromCoroutine(reader.readline())
            lines += await two(reader)
            lines += await reader.readline()
            writer.write(lines.replace(b"\n", b","))

    server = MemoryServer(handler)
    client = server.connect()
    for n in range(10):
        client.send(b"%d" % n)
        client.send(b"\n")
    assert client.received == b"0,1,2,3,4,5,6,7,8,9,"
    cancel(server)


def test_a_reader_can_be_iterated() -> None:
    """Line by line, until EOF."""

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            writer.write(b"<" + line.rstrip() + b">")
        writer.write(b"end")

    client = MemoryServer(handler).connect()
    client.send(b"one\ntwo\nth")
    client.send(b"ree\nlast")
    client.send_eof()
    assert client.received == b"<one><two><three><last>end"


@pytest.mark.parametrize("how", ["returns", "raises", "is cancelled"])
def test_asynchronous_contexts_are_left_at_the_end(how: str) -> None:
    """A context manager, and a generator that is closed by one."""
    left: list[str] = []

    @asynccontextmanager
    async def context(reader: Any) -> AsyncIterator[bytes]:
        try:
            yield await reader.readline()
        finally:
            left.append("context")

    async def lines(reader: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield await reader.readline()
        finally:
            left.append("generator")

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        async with context(reader) as name:
            generator: Any = lines(reader)
            try:
                async for line in generator:
                    writer.write(name + line)
                    if how == "returns":
                        return
                    if how == "raises":
                        raise Boom
            finally:
                await generator.aclose()

    server = MemoryServer(handler)
    client = server.connect()
    client.send(b"name\n")
    client.send(b"line\n")
    assert client.received == b"name\nline\n"
    if how == "is cancelled":
        assert left == []
        cancel(server)
    assert left == ["generator", "context"]
    assert client.is_closed
    assert [type(e) for e in server.errors] == [Boom] * (how == "raises")


def test_a_handler_may_read_from_another_connection() -> None:
    """A proxy: the bytes of the one resume the handler of the other."""
    connections: list[Any] = []
    end: Deferred[None] = Deferred()

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        connections.append((reader, writer))
        if len(connections) == 1:
            await end
            return
        (other_reader, other_writer) = connections[0]
        while line := await other_reader.readline():
            writer.write(b"from first: " + line)
            other_writer.write(b"to first: " + await reader.readline())

    server = MemoryServer(handler)
    first, second = server.connect(), server.connect()
    for _ in range(2):
        first.send(b"question\n")
        second.send(b"answer\n")
    assert first.take() == b"to first: answer\n" * 2
    assert second.take() == b"from first: question\n" * 2
    first.send_eof()
    assert second.is_closed
    assert not first.is_closed
    end.callback(None)
    assert first.is_closed
    assert server.errors == []


def test_the_end_of_another_connection_wakes_who_reads_from_it() -> None:
    """With what was there, and EOF."""
    readers: list[Any] = []
    got: list[bytes] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        readers.append(reader)
        if len(readers) == 1:
            await Deferred()
        got.append(await readers[0].readline())

    server = MemoryServer(handler)
    first, second = server.connect(), server.connect()
    first.send(b"half")
    first.reset()
    assert got == [b"half"]
    assert second.is_closed
    cancel(server)
    assert server.factory.num_connections == 0


def test_a_handler_that_awaits_a_foreign_future_fails_alone() -> None:
    """The error reaches on_handler_error, and its client is closed."""
    loop = asyncio.new_event_loop()

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        if await reader.readline() == b"bad\n":
            await loop.create_future()
        writer.write(b"good")

    server = MemoryServer(handler)
    bad, good = server.connect(), server.connect()
    bad.send(b"bad\n")
    good.send(b"good\n")
    loop.close()
    assert good.received == b"good"
    assert bad.is_closed
    assert [type(e) for e in server.errors] == [RuntimeError]


def test_thousands_of_buffered_lines_are_no_recursion() -> None:
    """They come at once, and are read without a wait."""

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            writer.write(line)

    server = MemoryServer(handler)
    client = server.connect()
    client.send(b"x\n" * 10_000)
    assert client.received == b"x\n" * 10_000
