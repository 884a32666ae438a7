"""What lines of the log say of clients, and how often of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent
from twisted.protocols.policies import WrappingFactory
from twisted.python.failure import Failure

import tcpsvc
from tcpsvc import LOCALHOST, Observer, Server, WhereToListen
from tcpsvc.address_text import address_text
from tcpsvc.error_log import MOST_KINDS, ErrorLog
from tcpsvc.log_fields import of_client
from tcpsvc.testing import MemoryServer
from tests.kinds import OtherEndpoint, end_of
from tests.support import in_thread, the_reactor, until

# Clients


async def raises(address: Any, reader: Any, writer: Any) -> None:
    """A handler that fails."""
    raise LookupError("oh dear")


async def leaves(address: Any, reader: Any, writer: Any) -> None:
    """A handler that ends because its client has."""
    await writer.close_finished()
    await writer.flushed()


async def waits(address: Any, reader: Any, writer: Any) -> None:
    """A handler that is never done by itself."""
    await Deferred()


def exits(address: Any, reader: Any, writer: Any) -> None:
    """A handler that ends the process."""
    raise SystemExit(1)


def cannot_be_cancelled(address: Any, reader: Any, writer: Any) -> Deferred[None]:
    """A handler whose canceller fails."""

    def cancel(_: Any) -> None:
        raise LookupError("not me")

    return Deferred(cancel)


def cancel_all(server: MemoryServer) -> None:
    """As a close may do."""
    server.factory.cancel_handlers()


def pass_time(server: MemoryServer) -> None:
    """Until a timeout is over."""
    server.clock.advance(10)


def reset(server: MemoryServer) -> None:
    """The client goes away."""
    server.factory.connections[0].close()


#: What a line says: the handler, its options, and what else is to be done.
LINES: dict[str, tuple[Any, dict[str, Any], Callable[[MemoryServer], None] | None]] = {
    "handler of {client} failed": (
        raises,
        {"on_handler_error": tcpsvc.log_error},
        None,
    ),
    "handler of {client} failed, ignored": (
        raises,
        {"on_handler_error": "ignore"},
        None,
    ),
    "handler of {client} left with": (leaves, {}, reset),
    "ending {client}: lifetime": (waits, {"lifetime": 5.0}, pass_time),
    "dry run: {client} would have been": (
        waits,
        {"lifetime": 5.0, "dry_run": ["lifetime"]},
        pass_time,
    ),
    "handler of {client} raised SystemExit": (exits, {}, None),
    "cancelling the handler of {client} failed": (cannot_be_cancelled, {}, cancel_all),
}


@pytest.mark.parametrize("line", LINES)
def test_a_client_is_named_as_people_write_it(line: str, logs: Any) -> None:
    """And its address is a field of the event."""
    handler, options, then = LINES[line]
    server = MemoryServer(handler, **options)
    client = server.connect()
    if then is not None:
        client.send(b"x")
        then(server)
    name = f"{client.address.host}:{client.address.port}"
    (event,) = [
        e for e in logs.events if line.format(client=name) in (formatEvent(e) or "")
    ]
    assert event["peer"] == client.address
    logs.take(LogLevel.critical)
    assert logs.unreadable() == []


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (IPv4Address("TCP", "192.0.2.1", 80), "192.0.2.1:80"),
        (IPv6Address("TCP", "2001:db8::1", 80), "[2001:db8::1]:80"),
        (UNIXAddress(b"/run/a\nb"), r"unix:/run/a\nb"),
        (None, "None"),
    ],
)
def test_the_text_of_an_address_is_made_where_it_is_written(
    address: Any, text: str
) -> None:
    """A line that nobody reads costs no text."""
    fields = of_client(address)
    assert fields["peer"] is address
    assert not isinstance(fields["client"], str)
    event = {"log_format": "{client} came", **fields}
    assert formatEvent(event) == f"{text} came"


# Limits


def warnings(logs: Any, words: str) -> list[str]:
    """The warnings that hold some words."""
    return [text for text in logs.texts(LogLevel.warn) if words in text]


@ensureDeferred
async def test_evictions_have_a_line_a_minute(
    serve: Any, connect: Any, logs: Any
) -> None:
    """With how many there were so far."""
    clock = Clock()
    server = await serve(waits, overflow="evict", max_connections=2, clock=clock)
    port = server.listening_on

    async def come(evicted: int) -> None:
        connect(server)
        ends = server._factory.counters.ends
        await until(lambda: ends.get("evicted", 0) == evicted)
        await until(lambda: len([c for c in server.connections if c.handler]) == 2)
        await until(lambda: {c.handler for c in server.connections} == {"running"})

    for _ in range(2):
        connect(server)
    await until(lambda: len(server.connections) == 2)
    assert warnings(logs, "evict") == []
    for evicted in (1, 2, 3):
        await come(evicted)
    line = (
        f"127.0.0.1:{port}: all 2 connections are in use; for each further client the "
        "one that was idle for longest goes: evicted, {} so far"
    )
    assert warnings(logs, "evict") == [line.format(1)]
    clock.advance(60)
    await come(4)
    assert warnings(logs, "evict") == [line.format(1), line.format(4)]


@pytest.mark.parametrize("gated", [True, False])
@ensureDeferred
async def test_clients_that_wait_for_the_rate_have_a_line_a_minute(
    gated: bool, serve: Any, connect: Any, logs: Any
) -> None:
    """Once one has waited, not when the bucket is empty and nobody comes."""
    clock = Clock()
    where = None if gated else WhereToListen.of_endpoint(OtherEndpoint())
    options = {} if where is None else {"where": where}
    server = await serve(waits, accept_rate="1/s:1", clock=clock, **options)
    accepted = server._factory.counters
    listening = server.listening_on_address

    async def come(number: int) -> None:
        connect(listening)
        await until(lambda: accepted.accepted == number)

    await come(1)
    clock.advance(1)
    await come(2)
    clock.advance(1)
    assert warnings(logs, "accept_rate") == []
    await come(3)
    for number in (4, 5):
        connect(listening)
        # It is there by then: in the backlog, or held.
        await until(lambda: gated or server.describe()["held"] == 1)
        clock.advance(1)
        await until(lambda number=number: accepted.accepted == number)
    (line,) = warnings(logs, "accept_rate")
    assert line == (
        f"{address_text(listening)}: clients come more often than accept_rate=1/s:1; "
        "they wait"
    )
    clock.advance(60)
    await come(6)
    connect(listening)
    await until(lambda: gated or server.describe()["held"] == 1)
    clock.advance(1)
    await until(lambda: accepted.accepted == 7)
    assert warnings(logs, "accept_rate") == [line] * 2


@ensureDeferred
async def test_who_waits_for_another_limit_does_not_wait_for_the_rate(
    serve: Any, connect: Any, logs: Any
) -> None:
    """All slots are taken: that is what has a line."""
    clock = Clock()
    server = await serve(waits, accept_rate="1/s:1", max_connections=1, clock=clock)
    connect(server)
    await until(lambda: server.num_connections == 1)
    connect(server)
    clock.advance(5)
    assert warnings(logs, "accept_rate") == []
    assert len(warnings(logs, "in use")) == 1


# Errors


def tracebacks(logs: Any) -> list[Any]:
    """The events that have one."""
    return [e for e in logs.events if e.get("log_failure") is not None]


def lines(logs: Any) -> list[str]:
    """What is critical and has no traceback."""
    return [
        formatEvent(e)
        for e in logs.events
        if e.get("log_level") is LogLevel.critical and e.get("log_failure") is None
    ]


async def fails_as_told(address: Any, reader: Any, writer: Any) -> None:
    """A handler that fails in many ways."""
    how = (await reader.readline()).decode().strip()
    if how == "value":
        raise ValueError(f"of {address.port}")
    if how == "lookup":
        raise LookupError("a")
    if how == "elsewhere":
        raise LookupError("a")
    if how == "deep":
        helper("deep")
    helper(how)


def helper(how: str) -> None:
    """Raised here, by way of two places."""
    raise LookupError(how)


def fail(server: MemoryServer, how: str = "value") -> str:
    """One more client whose handler fails; returns its name."""
    client = server.connect()
    client.send(how.encode() + b"\n")
    assert client.is_closed
    return f"127.0.0.1:{client.address.port}"


def test_errors_of_one_kind_have_one_traceback_a_minute_and_a_line_each(
    logs: Any,
) -> None:
    """E1: each failure is logged with its peer; a flood of them fills no disk."""
    server = MemoryServer(fails_as_told, on_handler_error=tcpsvc.log_error)
    names = [fail(server) for _ in range(5)]
    (event,) = tracebacks(logs)
    assert formatEvent(event) == f"handler of {names[0]} failed"
    assert lines(logs) == [
        f"handler of {name} failed: ValueError: of {name[10:]}, raised at "
        f"{__file__}:{fails_as_told.__code__.co_firstlineno + 4}"
        for name in names[1:]
    ]
    assert server.factory.counters.failed == 5
    server.clock.advance(59.9)
    fail(server)
    assert len(tracebacks(logs)) == 1
    server.clock.advance(0.1)
    last = fail(server)
    _, event = tracebacks(logs)
    assert formatEvent(event) == (
        f"handler of {last} failed; 5 more like it since the last traceback"
    )
    server.clock.advance(60)
    last = fail(server)
    assert formatEvent(tracebacks(logs)[2]) == f"handler of {last} failed"
    assert server.factory.counters.failed == 8
    logs.take(LogLevel.critical)


def test_errors_of_each_kind_have_a_traceback(logs: Any) -> None:
    """Another type, another place, another way to the place."""
    server = MemoryServer(fails_as_told, on_handler_error=tcpsvc.log_error)
    for _ in range(2):
        for how in ("value", "lookup", "elsewhere", "deep", "shallow"):
            fail(server, how)
    raised = [str(e["log_failure"].value) for e in tracebacks(logs)]
    assert raised[1:] == ["a", "a", "deep", "shallow"]
    assert len(raised) == len(lines(logs)) == 5
    logs.take(LogLevel.critical)


def test_each_server_has_tracebacks_of_its_own(logs: Any) -> None:
    """What one has said hides nothing of another."""
    for _ in range(2):
        fail(MemoryServer(fails_as_told, on_handler_error=tcpsvc.log_error))
    assert len(tracebacks(logs)) == 2
    logs.take(LogLevel.critical)


def test_log_error_called_by_a_callable_of_ones_own_logs_each(logs: Any) -> None:
    """E1: whoever calls it has decided that."""

    def report(address: Any, failure: Failure) -> None:
        tcpsvc.log_error(address, failure)

    server = MemoryServer(fails_as_told, on_handler_error=report)
    for _ in range(3):
        fail(server)
    assert len(tracebacks(logs)) == 3
    logs.take(LogLevel.critical)


def test_a_line_of_an_error_is_short_and_one_line(logs: Any) -> None:
    """A client may have a say in the message."""
    server = MemoryServer(fails_as_told, on_handler_error=tcpsvc.log_error)
    fail(server, "x")
    fail(server, "A" * 100_000)
    fail(server, "\x1b[2J\r")
    long, odd = lines(logs)
    assert "A" * 200 + "..., raised at" in long
    assert len(long) < 400 + len(__file__)
    assert r"LookupError: \x1b[2J, raised at" in odd
    logs.take(LogLevel.critical)


def test_kinds_without_number_have_lines_and_no_tracebacks(logs: Any) -> None:
    """Whoever can make them is not to fill memory or disk."""
    clock = Clock()
    log = ErrorLog(clock)
    for number in range(MOST_KINDS + 5):
        log.failure("it failed", Failure(type(f"Odd{number}", (Exception,), {})("x")))
    assert len(tracebacks(logs)) == MOST_KINDS
    assert len(lines(logs)) == 5
    assert lines(logs)[0] == (
        f"it failed: Odd{MOST_KINDS}: x, raised at an unknown place"
    )
    clock.advance(60)
    log.failure("it failed", Failure(KeyError("y")))
    assert tracebacks(logs)[-1]["log_failure"].type is KeyError
    assert len(log._said) == 1
    logs.take(LogLevel.critical)


def test_a_clock_that_was_set_back_silences_nothing(logs: Any) -> None:
    """A traceback of the future says nothing."""
    clock = Clock()
    clock.advance(1000)
    log = ErrorLog(clock)
    log.failure("it failed", Failure(KeyError("y")))
    clock.rightNow = 10.0
    log.failure("it failed", Failure(KeyError("y")))
    assert len(tracebacks(logs)) == 2
    logs.take(LogLevel.critical)


def test_later_errors_have_one_traceback_a_minute(logs: Any) -> None:
    """E3, E4: those after the one that closed the server; counted, and a line each."""
    server = MemoryServer(fails_as_told, on_handler_error="raise")
    clients = [server.connect() for _ in range(5)]
    for client in clients:
        client.send(b"value\n")
    first, later = tracebacks(logs)
    assert "closed the server: of" in formatEvent(first)
    assert formatEvent(later) == (
        f"a further handler error, of 127.0.0.1:{clients[1].address.port}, after the "
        "one that closed the server"
    )
    assert len(lines(logs)) == 3
    assert all("ValueError: of" in line for line in lines(logs))
    assert server.factory.counters.failed == 5
    logs.take(LogLevel.critical)


def test_cancellers_that_fail_have_one_traceback_a_minute(logs: Any) -> None:
    """A flood of clients may evict as many."""
    server = MemoryServer(cannot_be_cancelled, lifetime=1.0)
    names = [server.connect().address.port for _ in range(4)]
    server.clock.advance(2)
    (event,) = tracebacks(logs)
    assert event["peer"].port == names[0]
    assert [line.partition(" failed: ")[0] for line in lines(logs)] == [
        f"cancelling the handler of 127.0.0.1:{name}" for name in names[1:]
    ]
    logs.take(LogLevel.critical)


class Broken(Observer):
    """Fails at two events."""

    def connection_accepted(self, connection: Any) -> None:
        raise LookupError("accepted")

    def handler_started(self, connection: Any) -> None:
        raise LookupError("started")


def test_a_broken_observer_has_one_traceback_a_minute_for_each_event(
    logs: Any,
) -> None:
    """C4: what is in between is counted, and said at debug."""
    server = MemoryServer(waits, observer=Broken(), max_connections=100)
    for _ in range(10):
        server.connect()
    server.factory.add_observer(Observer())  # It makes no difference.
    server.connect()
    assert [formatEvent(e) for e in tracebacks(logs)] == [
        "an observer failed at connection_accepted",
        "an observer failed at handler_started",
    ]
    assert lines(logs) == []
    debug = [t for t in logs.texts(LogLevel.debug) if "an observer failed" in t]
    assert len(debug) == 20
    assert "handler_started: LookupError: started, raised at" in debug[1]
    assert server.factory.counters.observer_errors == 22
    server.clock.advance(60)
    server.connect()
    assert [formatEvent(e) for e in tracebacks(logs)][2:] == [
        f"an observer failed at {event}; 10 more like it since the last traceback"
        for event in ("connection_accepted", "handler_started")
    ]
    logs.take(LogLevel.critical)


class _Broken:
    """A producer that fails at the end of its connection."""

    def resumeProducing(self) -> None:
        """It has nothing."""

    pauseProducing = resumeProducing

    def stopProducing(self) -> None:
        raise LookupError("still busy")


@ensureDeferred
async def test_what_fails_below_a_handler_has_one_traceback_a_minute(
    serve: Any, connect: Any, logs: Any
) -> None:
    """Of each client there is a line; and the connection ends, and its slot."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.transport.registerProducer(_Broken(), True)
        await reader.read()

    server = await serve(handler, on_handler_error="raise")
    names = []
    for _ in range(3):
        client = connect(server)
        names.append(f"127.0.0.1:{client.socket.getsockname()[1]}")
        client.shut()
        await in_thread(end_of, client.socket)
        await until(lambda: server.num_connections == 0)
    (event,) = tracebacks(logs)
    assert formatEvent(event) == f"an error in the connection of {names[0]}"
    assert [line.partition(": LookupError")[0] for line in lines(logs)] == [
        f"an error in the connection of {name}" for name in names[1:]
    ]
    assert not server.is_closed
    logs.take(LogLevel.critical)


@ensureDeferred
async def test_a_wrapping_factory_that_fails_has_one_traceback_a_minute(
    connect: Any, logs: Any
) -> None:
    """Of each client there is a line."""

    class Wrapping(WrappingFactory):
        def buildProtocol(self, addr: Any) -> Any:
            raise LookupError("no protocol today")

    class Endpoint(TCP4ServerEndpoint):
        def listen(self, factory: Any) -> Any:
            return super().listen(Wrapping(factory))

    where = WhereToListen.of_endpoint(Endpoint(the_reactor(), 0, interface=LOCALHOST))
    server: Any = await Server.create(where, waits, on_handler_error="raise")
    names = []
    for _ in range(3):
        client = connect(server)
        names.append(f"127.0.0.1:{client.socket.getsockname()[1]}")
        await in_thread(end_of, client.socket)
    (event,) = tracebacks(logs)
    assert formatEvent(event) == f"could not serve {names[0]}"
    assert [line.partition(": LookupError")[0] for line in lines(logs)] == [
        f"could not serve {name}" for name in names[1:]
    ]
    await server.close()
    logs.take(LogLevel.critical)
