"""How long a connection may take: the timeouts, and the one sweep that sees to them."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.interfaces import IPullProducer, IReactorTime
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tcpsvc import Observer, Reason, Server, TcpService, WhereToListen, kernel
from tcpsvc.clock import clock_of
from tcpsvc.testing import MemoryServer
from tests.anywhere import CREATE, Handlers, everywhere
from tests.support import LOOPBACK, in_thread, settle, the_reactor, turn, until

#: More than the kernel takes of a client that does not read.
MUCH = b"x" * 20_000_000

TIMEOUTS = {
    "first_byte_timeout": Reason.FIRST_BYTE,
    "idle_timeout": Reason.IDLE,
    "handler_timeout": Reason.HANDLER_TIMEOUT,
    "lifetime": Reason.LIFETIME,
}
KNOWN_OF_UNIX_SOCKETS = ("handler_timeout", "lifetime")


def knows(kind: str, place: str, option: str) -> bool:
    """Whether anybody knows what a connection moves, if the option is about that."""
    return not (kind == "sock" and place.startswith("unix")) or (
        option in KNOWN_OF_UNIX_SOCKETS
    )


def allowed(seconds: float) -> float:
    """How much later than its time a timeout may be over."""
    return min(1.0, seconds / 4)


# Each timeout, in its time


@pytest.mark.parametrize("option", TIMEOUTS)
@everywhere()
@ensureDeferred
async def test_ends_not_before_its_time_and_soon_after(
    scene: Any, kind: str, place: str, option: str
) -> None:
    """The client reads EOF, nothing is reported, and no timer is left."""
    if not knows(kind, place, option):
        pytest.skip("nobody knows what a socket handler's UNIX socket moves")
    s = await scene(kind, place, **{option: 8.0})
    if option == "idle_timeout":
        await s.send(b"x")
    assert s.passes(7.99) == pytest.approx(7.99)
    assert not s.is_over
    assert 7.99 + s.passes(60.0) <= 8.0 + allowed(8.0) + 0.01
    assert s.is_over
    assert s.counters.ends == {TIMEOUTS[option].value: 1}
    assert s.connection.reason is TIMEOUTS[option]
    assert s.errors == []
    assert (
        s.handlers.heard
        == {
            "stream": ["eof"],
            "protocol": ["lost"],
            "sock": ["cancelled"],
        }[kind]
    )
    assert s.timers == []
    assert await in_thread(s.client.read_all) == b""


OF_TRAFFIC = ("first_byte_timeout", "idle_timeout", "min_throughput")


@pytest.mark.parametrize("option", OF_TRAFFIC)
@pytest.mark.parametrize("how", ["alone", "twice", "endpoint", "service", "change"])
@ensureDeferred
async def test_what_nobody_knows_has_no_limit(
    serve: Any, tmp_path: Any, how: str, option: str
) -> None:
    """T1: a ValueError that says so, and nothing is bound, or changed."""
    path = tmp_path / "s"
    where: Any = WhereToListen.of_file(path)
    handler = Handlers().sock
    create = Server.create_sock
    refused = pytest.raises(ValueError, match=f"^{option}=8.0 at unix:{path}: nobody")
    if how == "twice":
        where = [where, WhereToListen.of_file(tmp_path / "other")]
    elif how == "endpoint":
        where = WhereToListen.of_endpoint(UNIXServerEndpoint(the_reactor(), str(path)))
    if how == "service":
        with refused:
            TcpService.of_socks(
                where, handler, on_handler_error="ignore", **{option: 8.0}
            )
    elif how == "change":
        server = await serve(handler, where=where, create=create, lifetime=9.0)
        with refused:
            server.change(lifetime=1.0, **{option: 8.0})
        assert server._factory.settings.lifetime == 9.0
        server.change(lifetime=1.0, **{option: None})
        return
    else:
        with refused:
            await serve(handler, where=where, create=create, **{option: 8.0})
    assert not path.exists()


@ensureDeferred
async def test_what_is_known_has_one_on_unix_sockets(serve: Any, tmp_path: Any) -> None:
    """T1: streams and protocols count; so does the kernel, of TCP beside it."""
    limits = dict.fromkeys(OF_TRAFFIC, 8.0)
    where = WhereToListen.of_file(tmp_path / "s")
    for kind in ("stream", "protocol"):
        handler = Handlers().of(kind)
        server = await serve(handler, where=where, create=CREATE[kind], **limits)
        await server.close()
    both = [where, LOOPBACK]
    await serve(Handlers().sock, where=both, create=CREATE["sock"], **limits)


@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.0, 4.5, 100.0])
@pytest.mark.parametrize("phase", [0.0, 0.04, 0.3])
@pytest.mark.parametrize("option", TIMEOUTS)
def test_however_long_and_whenever_it_begins(
    option: str, phase: float, seconds: float
) -> None:
    """A quarter of it, a second at most, with other timeouts beside it too."""
    handlers = Handlers()
    server = MemoryServer(handlers.stream, **{"lifetime": 1000.0, option: seconds})
    other = server.connect()  # The sweep has begun before.
    server.clock.advance(phase)
    client = server.connect()
    if option == "idle_timeout":
        client.send(b"x")
    begun = server.clock.seconds()
    while not client.is_closed:
        server.clock.advance(0.01)
    took = server.clock.seconds() - begun
    assert seconds - 0.0001 <= took <= seconds + allowed(seconds) + 0.03
    assert other.is_closed or other.address


@pytest.mark.parametrize("policy", ["raise", "ignore", lambda *_: None])
@pytest.mark.parametrize("reads", [True, False])
@everywhere(places=("tcp", "memory"))
@ensureDeferred
async def test_an_end_by_a_timeout_is_an_ordinary_one(
    scene: Any, kind: str, place: str, reads: bool, policy: Any
) -> None:
    """Whether the handler reads EOF or is cancelled; and the server goes on."""
    s = await scene(
        kind,
        place,
        handlers=Handlers(reads=reads),
        on_handler_error=policy,
        lifetime=2.0,
    )
    s.passes(3.0)
    assert s.is_over
    assert s.counters.failed == 0
    assert not s.factory.is_closed
    assert s.counters.ends == {"lifetime": 1}
    if kind != "protocol":
        assert s.handlers.heard == [
            "eof" if reads and kind == "stream" else "cancelled"
        ]


@ensureDeferred
async def test_a_handler_in_the_middle_of_a_message_ends_ordinarily(
    scene: Any,
) -> None:
    """The IncompleteReadError of a connection that the server ends is none."""

    class InAMessage(Handlers):
        async def stream(self, address: Any, reader: Any, writer: Any) -> None:
            self.started.append(writer)
            await reader.readexactly(100)

    s = await scene("stream", handlers=InAMessage(), idle_timeout=2.0)
    await s.send(b"x")
    s.passes(4.0)
    assert (s.counters.ends, s.errors) == ({"idle": 1}, [])


@pytest.mark.parametrize("option", TIMEOUTS)
@pytest.mark.parametrize("kind", ["stream", "protocol", "sock"])
@ensureDeferred
async def test_by_the_reactors_own_clock(
    serve: Any, connect: Any, kind: str, option: str
) -> None:
    """As by any other."""
    ended: list[float] = []

    class Ends(Observer):
        def connection_finished(self, connection: Any) -> None:
            ended.append(connection.age)

    handlers = Handlers()
    server = await serve(
        handlers.of(kind), create=CREATE[kind], observer=Ends(), **{option: 0.2}
    )
    connect(server)
    await until(lambda: ended)
    # At most 0.05 s, and what a busy machine takes.
    assert 0.2 <= ended[0] <= 0.6
    assert server._factory.counters.ends == {TIMEOUTS[option].value: 1}


# Who moves bytes is spared


@everywhere(places=("tcp", "tcp-reactor", "unix", "unix-reactor", "tls", "memory"))
@ensureDeferred
async def test_a_client_that_only_sends_is_not_idle(
    scene: Any, kind: str, place: str
) -> None:
    """A byte in each timeout is enough."""
    if not knows(kind, place, "idle_timeout"):
        pytest.skip("nobody knows")
    s = await scene(kind, place, idle_timeout=4.0, first_byte_timeout=2.0)
    for _ in range(4):
        await s.send(b"x")
        s.passes(3.0)
    assert not s.is_over
    s.passes(6.0)
    assert s.counters.ends == {"idle": 1}


@everywhere(places=("tcp", "tcp-reactor", "unix", "unix-reactor", "tls", "memory"))
@ensureDeferred
async def test_a_handler_that_only_writes_is_not_idle(
    scene: Any, kind: str, place: str
) -> None:
    """A server that pushes."""
    if not knows(kind, place, "idle_timeout"):
        pytest.skip("nobody knows")
    s = await scene(kind, place, idle_timeout=4.0)
    for _ in range(4):
        await s.push(b"x")
        s.passes(3.0)
    assert not s.is_over
    s.passes(6.0)
    assert s.counters.ends == {"idle": 1}


@everywhere(places=("tcp", "tcp-reactor", "unix", "tls", "memory"))
@ensureDeferred
async def test_who_has_sent_a_byte_is_not_ended_by_the_first_byte_timeout(
    scene: Any, kind: str, place: str
) -> None:
    """However long it is silent after."""
    if not knows(kind, place, "first_byte_timeout"):
        pytest.skip("nobody knows")
    s = await scene(kind, place, first_byte_timeout=2.0)
    if knows(kind, place, "first_byte_timeout"):
        await s.send(b"x")
    s.passes(20.0)
    assert not s.is_over


@everywhere("stream", "protocol", places=("tls", "tls-reactor"))
@ensureDeferred
async def test_a_handshake_is_no_first_byte(scene: Any, kind: str, place: str) -> None:
    """Under TLS it is the client's own bytes that count, for every kind."""
    s = await scene(kind, place, first_byte_timeout=2.0)
    s.passes(3.0)
    assert s.counters.ends == {"first_byte": 1}


# Minimum throughput


@everywhere(places=("tcp", "tcp-reactor", "unix", "tls", "memory"))
@ensureDeferred
async def test_a_client_that_sends_a_byte_a_second_is_slow(
    scene: Any, kind: str, place: str
) -> None:
    """It is seen at the end of a whole window, not before."""
    if not knows(kind, place, "min_throughput"):
        pytest.skip("nobody knows")
    s = await scene(kind, place, min_throughput=100, throughput_window=4)
    passed = 0
    while not s.is_over:
        await s.send(b"x")
        s.passes(1.0)
        passed += 1
    assert 4 <= passed <= 6
    assert s.counters.ends == {"slow": 1}
    assert s.errors == []


@everywhere(places=("tcp", "tcp-reactor", "unix", "tls", "memory"))
@ensureDeferred
async def test_one_that_is_silent_is_idle_not_slow(
    scene: Any, kind: str, place: str
) -> None:
    """min_throughput alone ends none that moves nothing."""
    if not knows(kind, place, "min_throughput"):
        pytest.skip("nobody knows")
    s = await scene(kind, place, min_throughput=100, throughput_window=4)
    await s.send(b"x" * 1000)
    s.passes(30.0)
    assert not s.is_over


@everywhere(places=("tcp", "tcp-reactor", "unix", "tls", "memory"))
@ensureDeferred
async def test_one_that_is_fast_enough_is_spared(
    scene: Any, kind: str, place: str
) -> None:
    """On average of each window: a burst in each will do."""
    if not knows(kind, place, "min_throughput"):
        pytest.skip("nobody knows")
    s = await scene(kind, place, min_throughput=100, throughput_window=4)
    for _ in range(4):
        await s.send(b"x" * 700)
        s.passes(4.0)
    assert not s.is_over


@everywhere("stream", "protocol", places=("tcp", "tcp-reactor", "unix", "tls"))
@ensureDeferred
async def test_a_client_that_does_not_read_is_slow(
    scene: Any, kind: str, place: str
) -> None:
    """Bytes wait for it, and none of them goes."""
    s = await scene(
        kind,
        place,
        handlers=Handlers(reads=False),
        min_throughput=100,
        throughput_window=4,
    )
    s.write(MUCH)
    await s.stuck()
    s.passes(12.0)
    assert s.counters.ends == {"slow": 1}


@pytest.mark.parametrize("kind", ["stream", "protocol"])
def test_a_client_in_memory_that_does_not_read_is_slow(kind: str) -> None:
    """As on a socket."""
    handlers = Handlers(reads=False)
    make = {"stream": MemoryServer, "protocol": MemoryServer.of_protocols}[kind]
    server = make(handlers.of(kind), min_throughput=100, throughput_window=4)
    client = server.connect(is_reading=False)
    (given,) = handlers.started
    (given if kind == "stream" else given.transport).write(b"x" * 1000)
    for _ in range(12):
        server.clock.advance(1)
    assert client.is_closed
    assert server.factory.counters.ends == {"slow": 1}


@everywhere("stream", "protocol", places=("tcp", "tcp-reactor"))
@ensureDeferred
async def test_a_client_that_reads_fast_enough_is_spared_while_its_kernel_is_full(
    scene: Any, kind: str, place: str
) -> None:
    """
    What its kernel acknowledges counts, since ours takes more only when a third of
    what it holds is gone.
    """
    s = await scene(
        kind,
        place,
        handlers=Handlers(reads=False),
        min_throughput=1000,
        throughput_window=4,
    )
    s.client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    s.write(MUCH)
    await s.stuck()
    for _ in range(4):
        await in_thread(s.client.read, 200_000)
        await s.stuck()
        s.passes(4.0)
    assert not s.is_over
    s.passes(10.0)
    assert s.counters.ends == {"slow": 1}


def test_a_change_of_another_option_begins_no_new_window() -> None:
    """A limit that is set oftener than a window lasts spares nobody."""
    server = MemoryServer(Handlers().stream, min_throughput=100, throughput_window=4)
    client = server.connect()
    for n in range(8):
        client.send(b"x")
        server.factory.change({"max_connections": 10 + n})
        server.clock.advance(1)
    assert client.is_closed


# Changed while it runs


@pytest.mark.parametrize("option", TIMEOUTS)
def test_a_timeout_set_later_ends_those_that_are_there(option: str) -> None:
    """At the next look; and what is set to None ends nobody."""
    server = MemoryServer(Handlers().stream)
    clients = [server.connect() for _ in range(3)]
    server.clock.advance(100)
    assert server.clock.getDelayedCalls() == []
    server.factory.change({option: 1000})
    server.factory.change({option: 50})
    server.factory.change({option: None})
    server.clock.advance(10)
    assert not any(c.is_closed for c in clients)
    server.factory.change({option: 60})
    server.clock.advance(2)
    assert all(c.is_closed for c in clients)
    assert server.factory.counters.ends == {TIMEOUTS[option].value: 3}


def test_changes_do_not_put_off_the_sweep() -> None:
    """However often something is changed."""
    server = MemoryServer(Handlers().stream, lifetime=10)
    client = server.connect()
    for n in range(120):
        server.clock.advance(0.1)
        server.factory.change({"max_connections": 10 + n})
    assert client.is_closed


def test_nor_that_of_a_client_that_does_not_take_its_bytes() -> None:
    """With no timeout at all."""
    server = MemoryServer(Handlers(reads=False).stream, buffer_age_limit=10)
    client = server.connect(is_reading=False)
    server.factory.connections[0].writer.write(b"x")  # type: ignore[attr-defined]
    for n in range(130):
        server.clock.advance(0.1)
        server.factory.change({"max_connections": 10 + n})
    assert client.is_closed


# Dry run


class DryRuns(Observer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def refused_in_dry_run(self, address: Any, reason: Reason) -> None:
        self.seen.append((address.port, reason))


@pytest.mark.parametrize("option", TIMEOUTS)
def test_in_a_dry_run_it_is_counted_once_a_connection(option: str) -> None:
    """And the connection goes on, to its own end."""
    observer = DryRuns()
    server = MemoryServer(
        Handlers().stream, dry_run=[option], observer=observer, **{option: 2.0}
    )
    clients = [server.connect() for _ in range(2)]
    for _ in range(10):
        server.clock.advance(1)
    reason = TIMEOUTS[option]
    assert observer.seen == [(c.address.port, reason) for c in clients]
    assert server.factory.counters.would_refuse == {reason.value: 2}
    for client in clients:
        assert not client.is_closed
        client.send_eof()
    assert server.factory.counters.ends == {"eof": 2}
    assert server.factory._dry_run.told == {}


class Closes(Observer):
    """Ends whoever a dry run tells of."""

    def __init__(self) -> None:
        self.server: Any = None
        self.seen: list[Reason] = []

    def refused_in_dry_run(self, address: Any, reason: Reason) -> None:
        self.seen.append(reason)
        for connection in self.server.factory.connections:
            connection.end(Reason.CLOSED)


def test_whoever_hears_of_a_dry_run_may_close_the_connection() -> None:
    """Of what is over nothing more is told, and nothing remembered."""
    observer = Closes()
    for options, expected in (
        ({"lifetime": 2.0, "handler_timeout": 2.0}, Reason.LIFETIME),
        ({"buffer_age_limit": 2.0}, Reason.TOO_OLD),
    ):
        handlers = Handlers(reads=False)
        server = MemoryServer(
            handlers.stream, dry_run=True, observer=observer, **options
        )
        observer.server = server
        server.connect(is_reading=False)
        handlers.started[0].write(b"x")
        for _ in range(5):
            server.clock.advance(1)
        assert observer.seen == [expected]
        assert server.factory.connections == []
        assert server.factory._dry_run.told == {}
        assert server.clock.getDelayedCalls() == []
        observer.seen.clear()


@pytest.mark.parametrize("dry", TIMEOUTS)
@pytest.mark.parametrize("real", [*TIMEOUTS, "min_throughput"])
def test_a_dry_run_of_one_timeout_hides_no_other(dry: str, real: str) -> None:
    """Whichever is over first."""
    if dry == real:
        return
    options: dict[str, Any] = {dry: 2.0, real: 6.0}
    if real == "min_throughput":
        options = {dry: 2.0, real: 100, "throughput_window": 4}
    server = MemoryServer(Handlers().stream, dry_run=[dry], **options)
    client = server.connect()
    for n in range(12):
        if real in ("handler_timeout", "lifetime") or (
            real == "min_throughput" and n > 2
        ):
            client.send(b"x")
        if real == "idle_timeout" and not n:
            client.send(b"x")
        server.clock.advance(1)
    expected = TIMEOUTS.get(real, Reason.SLOW)
    assert server.factory.counters.ends == {expected.value: 1}


def test_min_throughput_in_a_dry_run() -> None:
    """Counted once, too."""
    server = MemoryServer(
        Handlers().stream, dry_run=True, min_throughput=100, throughput_window=2
    )
    client = server.connect()
    for _ in range(20):
        client.send(b"x")
        server.clock.advance(1)
    assert server.factory.counters.would_refuse == {"slow": 1}
    assert not client.is_closed


# The sweep


def test_there_is_one_timer_however_many_connections() -> None:
    """And none when there is nobody, or nothing to look for."""
    server = MemoryServer(
        Handlers().stream, lifetime=100, idle_timeout=50, max_connections=1000
    )
    timers = server.clock.getDelayedCalls
    assert timers() == []
    clients = [server.connect() for _ in range(1000)]
    assert len(timers()) == 1
    server.clock.advance(3)
    assert len(timers()) == 1
    server.factory.change({"lifetime": None, "idle_timeout": None})
    assert timers() == []
    server.clock.advance(100)
    server.factory.change({"lifetime": 1000})
    assert len(timers()) == 1
    for client in clients[1:]:
        client.send_eof()
    assert len(timers()) == 1
    clients[0].send_eof()
    assert timers() == []


@ensureDeferred
async def test_without_timeouts_there_is_no_timer(scene: Any) -> None:
    """For none of the kinds."""
    for kind in ("stream", "protocol", "sock"):
        s = await scene(kind)
        assert s.timers == []


@ensureDeferred
async def test_a_handler_that_has_ended_and_is_flushing_is_left_alone(
    scene: Any,
) -> None:
    """flush_timeout is what sees to that."""

    class Writes(Handlers):
        async def stream(self, address: Any, reader: Any, writer: Any) -> None:
            self.started.append(writer)
            writer.write(MUCH)

    s = await scene(
        "stream",
        handlers=Writes(),
        flush_timeout=30.0,
        lifetime=2.0,
        handler_timeout=2.0,
        idle_timeout=2.0,
        first_byte_timeout=2.0,
        min_throughput=1000,
        throughput_window=2.0,
    )
    s.passes(20.0)
    assert not s.is_over
    assert s.connection.snapshot().handler == "finished"
    assert await in_thread(s.client.read_all) == MUCH
    s.client.close()
    await until(lambda: s.is_over)
    assert s.counters.ends == {"finished": 1}


@ensureDeferred
async def test_a_handler_that_has_closed_its_connection_has_only_its_own_timeout(
    scene: Any,
) -> None:
    """There is no byte to wait for; but what the handler still does takes long."""

    class Closes(Handlers):
        async def stream(self, address: Any, reader: Any, writer: Any) -> None:
            self.started.append(writer)
            reader.close()
            await self.wait()

    s = await scene(
        "stream",
        handlers=Closes(),
        lifetime=2.0,
        idle_timeout=2.0,
        first_byte_timeout=2.0,
        handler_timeout=10.0,
    )
    assert s.passes(60.0) == pytest.approx(10.5, abs=0.51)
    assert s.handlers.heard == ["cancelled"]
    assert s.counters.ends == {"handler_timeout": 1}


def test_a_handler_is_cancelled_once_and_may_clean_up() -> None:
    """What it does after that is not cancelled at each further look."""
    heard: list[str] = []
    cleaned: Deferred[None] = Deferred()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        try:
            await Deferred()
        except CancelledError:
            try:
                await cleaned
            except CancelledError:
                heard.append("again")
            heard.append("clean")

    server = MemoryServer(handler, lifetime=2)
    client = server.connect()
    for _ in range(10):
        server.clock.advance(1)
    assert client.is_closed
    assert server.factory.num_connections == 1
    assert heard == []
    cleaned.callback(None)
    assert heard == ["clean"]
    assert server.factory.counters.ends == {"lifetime": 1}


def test_a_connection_that_is_held_is_not_ended_for_it() -> None:
    """Its time begins with its slot."""
    options = dict.fromkeys(TIMEOUTS, 10.0)
    handlers = Handlers()
    server = MemoryServer(handlers.stream, max_connections=1, **options)
    first = server.connect()
    held = server.connect()
    for _ in range(6):
        server.clock.advance(1)
    first.send_eof()
    for _ in range(9):
        server.clock.advance(1)
    assert not held.is_closed
    for _ in range(3):
        server.clock.advance(1)
    assert held.is_closed


def test_the_end_of_one_may_be_the_end_of_others() -> None:
    """A handler that closes the server while it is swept."""
    ends: list[int] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await reader.drain_to_eof()
        ends.append(address.port)
        server.factory.close()
        server.factory.close_connections()

    server = MemoryServer(handler, lifetime=2)
    for _ in range(5):
        server.connect()
    server.clock.advance(3)
    assert len(ends) == 5
    assert server.factory.counters.ends == {"lifetime": 1, "closed": 4}
    assert server.clock.getDelayedCalls() == []


@implementer(IPullProducer)
class Pushes:
    """Writes a piece whenever there is room."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        self.transport.write(b"x" * 1000)

    def stopProducing(self) -> None:
        pass


@ensureDeferred
async def test_a_protocol_that_produces_is_not_idle_while_its_client_reads(
    serve: Any, connect: Any
) -> None:
    """And is when it does not."""
    from tcpsvc import Server

    class Producing(Protocol):
        def connectionMade(self) -> None:
            Pushes(self.transport)

    clock = Clock()
    server = await serve(
        Factory.forProtocol(Producing),
        create=Server.create_protocol,
        clock=clock,
        idle_timeout=3,
    )
    client = connect(server)
    for _ in range(5):
        await in_thread(client.read, 1_000_000)
        clock.advance(1)
        clock.advance(1)
    assert server.num_connections == 1
    before = -1
    while server.connections[0].bytes_out != before:
        before = server.connections[0].bytes_out
        await turn(0.02)
    for _ in range(5):
        clock.advance(1)
    assert server.num_connections == 0
    assert server._factory.counters.ends == {"idle": 1}


@pytest.mark.parametrize("shuts", [False, True])
@ensureDeferred
async def test_a_reset_is_no_byte(scene: Any, shuts: bool) -> None:
    """T, C: nor is there one less than none, as of a FIN that was no byte."""
    s = await scene("sock", "tcp", first_byte_timeout=2)
    if shuts:
        s.client.shut()
    s.client.reset()
    await settle()
    assert s.connection.bytes_in == 0
    assert s.connection.moved == 0
    assert not s.connection.has_received
    assert s.passes(3, step=0.1) < 2.6
    assert s.connection.reason is Reason.FIRST_BYTE


@ensureDeferred
async def test_a_first_byte_that_a_protocol_leaves_unread_has_come(
    serve: Any, connect: Any
) -> None:
    """It has paused its transport; its client is not to blame."""
    clock = Clock()

    class Paused(Protocol):
        def connectionMade(self) -> None:
            self.transport.pauseProducing()  # type: ignore[union-attr]

    server = await serve(
        Factory.forProtocol(Paused),
        create=Server.create_protocol,
        first_byte_timeout=1,
        clock=clock,
    )
    silent = connect(server)
    await until(lambda: server.num_connections == 1)
    speaker = connect(server)
    speaker.send(b"hello")
    await until(lambda: server.num_connections == 2)
    connected = server._factory._live[2]._connected_socket()
    await until(lambda: kernel.has_input(connected))
    clock.pump([0.25] * 8)
    await until(lambda: server.num_connections == 1)
    assert await in_thread(silent.read_all) == b""
    assert [c.id for c in server.connections] == [2]


def test_a_server_goes_by_a_clock_that_nobody_sets() -> None:
    """Most reactors have the wall clock's time."""
    clock = clock_of(the_reactor())
    assert verifyObject(IReactorTime, clock)
    before, now, after = time.monotonic(), clock.seconds(), time.monotonic()
    assert before <= now <= after
    call = clock.callLater(1000, lambda: None)
    assert call in clock.getDelayedCalls()
    call.cancel()


def test_a_reactor_of_a_test_is_its_own_clock() -> None:
    """Which the test sets."""
    for reactor in (Clock(), MemoryReactorClock()):
        assert clock_of(reactor) is reactor
