"""The fast path: the sub-reactor, and transports that send at once."""

from __future__ import annotations

import errno
import os
import resource
import socket
from io import BytesIO
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import tcp
from twisted.internet.defer import Deferred
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import CannotListenError, ConnectionLost
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IReactorFDSet,
    IReadDescriptor,
    ITCPTransport,
    IUNIXTransport,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import LogLevel
from twisted.protocols.basic import FileSender
from twisted.python import log
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tcpsvc import LOCALHOST, Server, WhereToListen
from tcpsvc.engine import subreactor, transports
from tcpsvc.engine.subreactor import SubReactor
from tests.middle import CountsSends
from tests.support import Logs, in_thread, the_reactor, turn, until


@pytest.fixture(autouse=True)
def with_the_engine(request: pytest.FixtureRequest) -> None:
    """These tests are of the engine, and say themselves where they are not."""
    if request.config.getoption("--engine") == "reactor":
        pytest.skip("of the engine, which is switched off")


class Boom(Exception):
    """Out of a user's code."""


async def echo_lines(_: Any, reader: Any, writer: Any) -> None:
    """Send each line back."""
    async for line in reader:
        writer.write(line)


def group() -> SubReactor:
    """The sub-reactor of the reactor."""
    return SubReactor.of(the_reactor())


async def all_wait(server: Any, n: int) -> None:
    """Wait until so many handlers have started and wait for their first bytes."""
    await until(lambda: server.num_connections == n)
    await turn()


# Where connections stand.


@ensureDeferred
async def test_connections_stand_in_the_sub_reactor(serve: Any, connect: Any) -> None:
    """The reactor sees one descriptor for all of them, and can say whose it is."""
    server = await serve(echo_lines)
    for _ in range(3):
        connect(server)
    await all_wait(server, 3)
    readers = the_reactor().getReaders()
    assert group() in readers
    assert not [r for r in readers if isinstance(r, tcp.Server)]
    watched = group().getReaders()
    assert [type(t) for t in watched] == [transports.TCPServerTransport] * 3
    assert all(repr(t) in repr(group()) for t in watched)
    assert repr(group()).startswith("<SubReactor of 3 connections")


@ensureDeferred
async def test_the_reactor_itself_can_be_asked_to_serve(
    serve: Any, connect: Any
) -> None:
    """engine="reactor": then the transports are Twisted's, and stand there."""
    server = await serve(echo_lines, engine="reactor")
    client = connect(server)
    await all_wait(server, 1)
    readers = the_reactor().getReaders()
    assert group() not in readers
    (transport,) = [r for r in readers if isinstance(r, tcp.Server)]
    assert not isinstance(transport, transports.TCPServerTransport)
    client.send(b"x\n")
    assert await in_thread(client.read, 2) == b"x\n"


@ensureDeferred
async def test_the_sub_reactor_leaves_with_the_last_connection(
    serve: Any, connect: Any
) -> None:
    """Not with the port, while there is a client; then its descriptor is closed."""
    server = await serve(echo_lines)
    client = connect(server)
    await all_wait(server, 1)
    server.close()
    await turn()
    assert group() in the_reactor().getReaders()
    client.send(b"still there\n")
    assert await in_thread(client.read, 12) == b"still there\n"
    client.close()
    await until(lambda: server.num_connections == 0)
    await turn()
    assert group() not in the_reactor().getReaders()
    assert group().fileno() == -1


@ensureDeferred
async def test_the_sub_reactor_stays_with_an_idle_server(
    serve: Any, connect: Any
) -> None:
    """It does not come and go with each client."""
    server = await serve(echo_lines)
    fd = group().fileno()
    assert fd >= 0
    for _ in range(2):
        client = connect(server)
        await all_wait(server, 1)
        client.close()
        await until(lambda: server.num_connections == 0)
        assert group().fileno() == fd
    await server.close()
    await turn()
    assert group().fileno() == -1


@ensureDeferred
async def test_two_servers_share_the_sub_reactor(serve: Any, connect: Any) -> None:
    """The end of the one is not the end of the other's."""
    one, two = await serve(echo_lines), await serve(echo_lines)
    client = connect(two)
    await all_wait(two, 1)
    await one.close()
    client.send(b"x\n")
    assert await in_thread(client.read, 2) == b"x\n"


# Sending.


class Counting(CountsSends):
    """Notes in which turn it was, too."""

    def __init__(self, transport: Any) -> None:
        super().__init__(transport)
        self.turns: list[int] = []

    def send(self, data: Any) -> int:
        self.turns.append(group().turn)
        return super().send(data)


@ensureDeferred
async def test_many_small_writes_leave_in_one_send(serve: Any, connect: Any) -> None:
    """What a handler writes while its connection is served goes together."""
    counting: list[Counting] = []
    turns: list[int] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        turns.append(group().turn)
        counting.append(Counting(writer.transport))
        for _ in range(100):
            writer.write(b"piece")
        await reader.readline()

    server = await serve(handler)
    client = connect(server)
    await all_wait(server, 1)
    client.send(b"go\n")
    assert await in_thread(client.read, 500) == b"piece" * 100
    assert counting[0].sends == [500]
    assert counting[0].turns == turns


@ensureDeferred
async def test_a_write_to_another_connection_leaves_in_the_same_turn(
    serve: Any, connect: Any
) -> None:
    """The one that is served may write to all the others."""
    writers: list[Any] = []
    turns: list[int] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        Counting(writer.transport)
        writers.append(writer)
        async for line in reader:
            turns.append(group().turn)
            for other in writers:
                other.write(line)

    server = await serve(handler)
    clients = [connect(server) for _ in range(3)]
    await all_wait(server, 3)
    sockets = [writer.transport.socket for writer in writers]
    clients[0].send(b"to all\n")
    await until(lambda: all(s.sends for s in sockets))
    assert [s.turns for s in sockets] == [turns] * 3
    for client in clients:
        assert await in_thread(client.read, 7) == b"to all\n"


@ensureDeferred
async def test_a_write_outside_any_turn_reaches_the_client(
    serve: Any, connect: Any
) -> None:
    """From a timer, although nothing else happens; and what follows it."""
    writers: list[Any] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        writers.append(writer)
        await reader.readline()

    server = await serve(handler)
    client = connect(server)
    await all_wait(server, 1)
    counting = Counting(writers[0].transport)

    def write() -> None:
        assert not group().is_serving
        for piece in (b"one ", b"two ", b"three"):
            writers[0].write(piece)

    the_reactor().callLater(0, write)
    assert await in_thread(client.read, 13) == b"one two three"
    assert counting.sends == [4, 9]  # At once, and what followed it.
    assert group().getWriters() == []


@ensureDeferred
@pytest.mark.parametrize("end", ["loseConnection", "loseWriteConnection"])
async def test_what_a_flush_has_said_last_is_sent_before_the_transport_is_closed(
    serve: Any, connect: Any, end: str
) -> None:
    """As by Twisted's: whoever waits for a flush may write more, and then close it."""

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        writer.write(b"one ")
        await writer.flushed()
        writer.write(b"two")
        getattr(writer.transport, end)()
        await reader.read()

    server = await serve(handler)
    client = connect(server)
    await all_wait(server, 1)
    client.send(b"line\n")
    assert await in_thread(client.read_all) == b"one two"


@ensureDeferred
async def test_a_handler_that_a_deferred_resumes_reaches_its_client(
    serve: Any, connect: Any
) -> None:
    """Its writes are outside any turn, and may be large."""
    wait: Deferred[None] = Deferred()
    much = b"x" * 5_000_000

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        await wait
        writer.write(b"small")
        writer.write(much)

    server = await serve(handler)
    client = connect(server)
    await all_wait(server, 1)
    wait.callback(None)
    assert await in_thread(client.read_all) == b"small" + much


@ensureDeferred
async def test_a_write_to_a_reset_client_is_lost_in_a_later_turn(
    serve: Any, connect: Any
) -> None:
    """No protocol hears of the loss of its connection from within its write."""
    made: list[Any] = []

    class Noting(Protocol):
        transport: Any
        is_writing = False
        lost: bool | None = None

        def connectionMade(self) -> None:
            made.append(self)

        def write(self) -> None:
            self.is_writing = True
            for _ in range(3):
                self.transport.write(b"x")
            self.is_writing = False

        def connectionLost(self, reason: Any = None) -> None:
            self.lost = self.is_writing

    server = await serve(Factory.forProtocol(Noting), create=Server.create_protocol)
    client = connect(server)
    await all_wait(server, 1)
    client.reset()
    made[0].write()
    assert made[0].lost is None
    await until(lambda: made[0].lost is not None)
    assert made[0].lost is False
    await until(lambda: server.num_connections == 0)


@ensureDeferred
@pytest.mark.parametrize(
    "engine",
    [
        "auto",
        "reactor",
    ],
)
async def test_what_is_written_after_an_abort_is_not_sent(
    serve: Any, connect: Any, engine: str
) -> None:
    """As Twisted's transports have it: the client sees the reset, and no byte."""

    class Aborting(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            self.transport.abortConnection()
            self.transport.write(b"after")

    server = await serve(
        Factory.forProtocol(Aborting), create=Server.create_protocol, engine=engine
    )
    client = connect(server)
    client.send(b"x")
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read, 1)


@implementer(IHalfCloseableProtocol)
class HalfCloseable(Protocol):
    """Notes what it hears of ends."""

    transport: Any

    def __init__(self) -> None:
        self.heard: list[str] = []

    def readConnectionLost(self) -> None:
        self.heard.append("read side")

    def writeConnectionLost(self) -> None:
        self.heard.append("write side")

    def connectionLost(self, reason: Any = None) -> None:
        self.heard.append(reason.type.__name__)


@ensureDeferred
@pytest.mark.parametrize("engine", ["auto", "reactor"])
async def test_a_half_closeable_protocol_that_answers_and_closes_is_closed(
    serve: Any, connect: Any, engine: str
) -> None:
    """Its own close is no end of the client's side."""
    made: list[HalfCloseable] = []

    class Once(HalfCloseable):
        def dataReceived(self, data: bytes) -> None:
            made.append(self)
            self.transport.write(data)
            self.transport.loseConnection()

    server = await serve(
        Factory.forProtocol(Once), create=Server.create_protocol, engine=engine
    )
    client = connect(server)
    client.send(b"hello")
    assert await in_thread(client.read_all) == b"hello"
    await until(lambda: server.num_connections == 0)
    assert made[0].heard == ["ConnectionDone"]


@ensureDeferred
@pytest.mark.parametrize("engine", ["auto", "reactor"])
async def test_what_a_producer_of_the_transport_still_writes_is_part_of_the_flush(
    serve: Any, connect: Any, engine: str
) -> None:
    """H3: the handler has returned in the middle of a file, which is sent."""
    size = 1_000_000

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        await reader.read(1)
        FileSender().beginFileTransfer(BytesIO(bytes(size)), writer.transport)

    server = await serve(handler, engine=engine, flush_timeout=2)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    await turn()
    client.send(b"x")
    assert len(await in_thread(client.read_all)) == size
    await until(lambda: server.num_connections == 0)


@ensureDeferred
@pytest.mark.parametrize("engine", ["auto", "reactor"])
async def test_who_hears_of_a_flush_may_end_what_was_to_be_half_closed(
    serve: Any, connect: Any, engine: str
) -> None:
    """S8: ``reader.close()`` comes before the write side is shut, and is all."""

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        writer.write(await reader.read(5))
        flushed = writer.flushed()
        writer.transport.loseWriteConnection()
        await flushed
        reader.close()

    server = await serve(handler, engine=engine)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    await turn()
    client.send(b"hello")
    assert await in_thread(client.read_all) == b"hello"
    await until(lambda: server.num_connections == 0)


# A batch of connections that are ready.


@ensureDeferred
async def test_who_is_aborted_in_a_batch_is_not_served_in_it(
    serve: Any, connect: Any
) -> None:
    """Two are ready at once; the handler that is first aborts the other."""
    writers: list[Any] = []
    served: list[Any] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        writers.append(writer)
        if await reader.read(1):
            served.append(writer)
            for other in writers:
                if other is not writer:
                    other.abort()

    server = await serve(handler)
    clients = [connect(server), connect(server)]
    await all_wait(server, 2)
    for client in clients:
        client.send(b"x")
    await until(lambda: server.num_connections == 0)
    assert len(served) == 1


@ensureDeferred
@pytest.mark.parametrize("how", ["abortConnection", "loseConnection", "connectionLost"])
async def test_a_protocol_that_another_ends_in_a_batch_is_not_served_in_it(
    serve: Any, connect: Any, how: str
) -> None:
    """In whichever way; it hears of its end once."""
    made: list[Any] = []
    served: list[Any] = []
    lost: list[Any] = []

    class Rival(Protocol):
        transport: Any

        def connectionMade(self) -> None:
            made.append(self)

        def dataReceived(self, data: bytes) -> None:
            served.append(self)
            (other,) = (p for p in made if p is not self)
            end = getattr(other.transport, how)
            end(*[Failure(CONNECTION_DONE)] * (how == "connectionLost"))

        def connectionLost(self, reason: Any = None) -> None:
            lost.append(self)

    server = await serve(Factory.forProtocol(Rival), create=Server.create_protocol)
    clients = [connect(server), connect(server)]
    await all_wait(server, 2)
    for client in clients:
        client.send(b"x")
    await until(lambda: lost)
    assert len(served) == 1
    assert [p for p in made if p not in served] == lost


@ensureDeferred
async def test_the_server_may_be_closed_in_the_middle_of_a_batch(
    serve: Any, connect: Any
) -> None:
    """Nothing is left, whoever was ready too."""
    served: list[Any] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        if await reader.read(1):
            served.append(writer)
            if len(served) == 2:
                server.close(close_existing_connections=True)
            await reader.read(1)

    server = await serve(handler)
    clients = [connect(server) for _ in range(6)]
    await all_wait(server, 6)
    for client in clients:
        client.send(b"x")
    await until(lambda: server.num_connections == 0)
    await server.close_finished_and_handlers_determined()
    await turn()
    assert len(served) == 2
    assert group().fileno() == -1


@ensureDeferred
async def test_a_thousand_that_are_ready_at_once_are_answered(
    serve: Any, connect: Any
) -> None:
    """More than the kernel is asked for at a time."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    many = min(1000, (files - 100) // 2)
    server = await serve(echo_lines, max_connections=many)
    clients = []
    for n in range(many):
        clients.append(connect(server))
        if n % 50 == 49:
            await all_wait(server, n + 1)
    await all_wait(server, many)
    for n, client in enumerate(clients):
        client.send(b"%d\n" % n)
    before = group().turn

    def answers() -> list[bytes]:
        return [c.read(len(b"%d\n" % n)) for n, c in enumerate(clients)]

    assert await in_thread(answers) == [b"%d\n" % n for n in range(many)]
    assert group().turn > before


@ensureDeferred
async def test_who_ends_while_others_are_flushed_has_all_sent(
    serve: Any, connect: Any
) -> None:
    """
    One's flush resumes the handler of another, which was to be flushed next and ends:
    what the kernel has not taken of it waits, and then it is closed.
    """
    size = 8_000_000
    writers: dict[bytes, Any] = {}
    goes_on: Deferred[None] = Deferred()
    ends: Deferred[None] = Deferred()

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        name = await reader.read(1)
        writers[name] = writer
        if name == b"1":
            await goes_on
            await writer.flushed()
            ends.callback(None)
        elif name == b"2":
            await ends
            writer.transport.loseConnection()
        else:
            writers[b"1"].write(b"x")
            goes_on.callback(None)
            writers[b"2"].write(bytes(size))

    server = await serve(handler)
    clients = [connect(server) for _ in range(3)]
    await all_wait(server, 3)
    for n, client in enumerate(clients):
        client.send(b"%d" % (n + 1))
        await until(lambda n=n: len(writers) == n + 1)
    assert len(await in_thread(clients[1].read_all)) == size


@ensureDeferred
async def test_a_handler_that_ends_its_transport_has_not_lost_its_client(
    serve: Any, connect: Any
) -> None:
    """S4: ``consumer_left`` is of resets, and of sends that fail."""
    left: list[None] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        writer.consumer_left().addCallback(left.append)
        writer.write(await reader.read(5))
        writer.transport.loseConnection()

    server = await serve(handler)
    client = connect(server)
    await all_wait(server, 1)
    client.send(b"hello")
    assert await in_thread(client.read_all) == b"hello"
    await until(lambda: server.num_connections == 0)
    assert left == []


@ensureDeferred
@pytest.mark.parametrize("method", ["loseWriteConnection", "sendFileDescriptor"])
async def test_who_is_used_after_its_end_costs_nobody_theirs(
    serve: Any, connect: Any, tmp_path: Any, method: str
) -> None:
    """One is found to be gone when it is flushed in another's turn."""
    made: list[Any] = []

    class Clumsy(Protocol):
        transport: Any

        def connectionMade(self) -> None:
            made.append(self)
            if self is made[0]:
                self.transport.pauseProducing()

        def dataReceived(self, data: bytes) -> None:
            made[0].transport.write(data)
            self.transport.write(data)

        def connectionLost(self, reason: Any = None) -> None:
            if self is made[0]:
                getattr(self.transport, method)(*[0] * (method[0] == "s"))

    server = await serve(
        Factory.forProtocol(Clumsy),
        create=Server.create_protocol,
        where=WhereToListen.of_file(tmp_path / "s"),
    )
    clients = []
    for n in range(3):
        clients.append(connect(server))
        await until(lambda n=n: len(made) == n + 1)
    clients[0].socket.close()
    for client in clients[1:]:
        client.send(b"x")
        assert await in_thread(client.read, 1) == b"x"
    assert server.num_connections == 2


# The sub-reactor on its own, with what it needs of a reactor and of transports.


class MainReactor:
    """It is told who is to be watched; the test makes the turns."""

    def __init__(self) -> None:
        self.readers: list[Any] = []

    def addReader(self, reader: Any) -> None:
        self.readers.append(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.remove(reader)


class StandIn:
    """A connection that notes that it is served."""

    watcher: Any = None
    connected = True
    is_flush_due = False
    plain_socket = None

    def __init__(self, name: str, served: list[str], pair: Any = None) -> None:
        self.name = name
        self.served = served
        self.near: Any
        self.far: Any
        self.near, self.far = pair or socket.socketpair()
        self.near.setblocking(False)
        self.fileno = self.near.fileno
        self.then: Any = lambda: None
        self.lost: list[Failure] = []

    def doRead(self) -> Any:
        self.served.append(self.name)
        try:
            self.near.recv(1000)
        except BlockingIOError:
            pass
        return self.then()

    def readConnectionLost(self, reason: Failure) -> None:
        self.connectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)

    def logPrefix(self) -> str:
        return self.name

    def close(self) -> None:
        self.near.close()
        self.far.close()

    def successor(self) -> Any:
        """Close it; a socket pair whose first has the same descriptor."""
        fd = self.near.detach()
        near, far = socket.socketpair()
        os.dup2(near.fileno(), fd)
        near.close()
        self.far.close()
        return socket.socket(fileno=fd), far


@pytest.fixture
def stage(monkeypatch: Any) -> Any:
    """
    ``sub, make, served``: ``make(name)`` is a watched stand-in that is ready. No turn
    takes long, on a busy machine neither, unless the test says so.
    """
    monkeypatch.setattr(subreactor, "monotonic", lambda: 0.0)
    main = MainReactor()
    sub = SubReactor(main)
    served: list[str] = []
    made: list[StandIn] = []

    def make(name: str, pair: Any = None, *, ready: bool = True) -> StandIn:
        one = StandIn(name, served, pair)
        made.append(one)
        if ready:
            one.far.send(b"x")
        sub.addReader(one)
        return one

    yield sub, make, served
    for one in made:
        sub.remove(one)
        one.close()
    assert sub.fileno() == -1
    assert main.readers == []


def test_a_descriptor_that_is_opened_anew_is_not_served_by_old_news(
    stage: Any,
) -> None:
    """What the kernel said of a closed connection is not said of its successor."""
    sub, make, served = stage
    one, two = make("one"), make("two")

    def replace(other: StandIn, name: str) -> None:
        if served.count("one") + served.count("two") > 1:
            return
        sub.remove(other)
        make(name, other.successor())

    one.then = lambda: replace(two, "new")
    two.then = lambda: replace(one, "new")
    sub.doRead()
    assert len(served) == 1
    sub.doRead()
    assert served[1:] == ["new"]


def test_a_long_turn_is_ended_and_its_rest_served_first(
    stage: Any, monkeypatch: Any
) -> None:
    """In its order, and before whoever has become ready meanwhile."""
    sub, make, served = stage
    now = [0.0]
    monkeypatch.setattr(subreactor, "monotonic", lambda: now[0])

    def take_long() -> None:
        now[0] += subreactor.TURN

    ones = [make(str(n)) for n in range(12)]
    for one in ones:
        one.then = take_long
    sub.doRead()
    first = len(served)
    assert 0 < first < 12
    make("late")
    for one in ones[:first]:
        one.far.send(b"again")
    while len(set(served)) < 12:
        assert "late" not in served
        sub.doRead()
    assert sorted(served, key=int) == [str(n) for n in range(12)]
    for _ in range(6):
        sub.doRead()
    assert "late" in served


def test_turns_that_are_too_long_read_less(stage: Any, monkeypatch: Any) -> None:
    """And more again when they are not: always between the bounds."""
    sub, make, _ = stage
    now = [0.0]
    monkeypatch.setattr(subreactor, "monotonic", lambda: now[0])
    ones = [make(str(n)) for n in range(8)]

    def take(seconds: float) -> None:
        now[0] += seconds

    for one in ones:
        one.then = lambda: take(1)
    sizes = []
    for _ in range(12):
        for one in ones:
            one.far.send(b"x")
        sub.doRead()
        sizes.append(sub.receive_size)
    assert sizes[0] < subreactor.MOST_RECEIVED
    assert sizes[-1] <= min(sizes)
    for one in ones:
        one.then = lambda: None
    for _ in range(12):
        sub.doRead()
    assert sub.receive_size == subreactor.MOST_RECEIVED


def test_a_few_busy_connections_are_read_less_too(stage: Any, monkeypatch: Any) -> None:
    """A turn that takes too long is one, however few are served in it."""
    sub, make, served = stage
    now = [0.0]
    monkeypatch.setattr(subreactor, "monotonic", lambda: now[0])

    def take_long() -> None:
        now[0] += 1

    for n in range(3):
        make(str(n)).then = take_long
    sub.doRead()
    assert served
    assert sub.receive_size < subreactor.MOST_RECEIVED


def twelve_that_take_long(make: Any, monkeypatch: Any) -> dict[str, Any]:
    """So that a turn is over before all have been served."""
    now = [0.0]
    monkeypatch.setattr(subreactor, "monotonic", lambda: now[0])

    def take_long() -> None:
        now[0] += 1

    ones = {str(n): make(str(n)) for n in range(12)}
    for one in ones.values():
        one.then = take_long
    return ones


def test_who_is_left_for_the_next_turn_and_stops_reading_is_not_served(
    stage: Any, monkeypatch: Any
) -> None:
    """It does not want any more what it was ready for."""
    sub, make, served = stage
    ones = twelve_that_take_long(make, monkeypatch)
    sub.doRead()
    stopped = next(name for name in ones if name not in served)
    sub.removeReader(ones[stopped])
    for _ in range(12):
        sub.doRead()
    assert stopped not in served
    assert set(served) == set(ones) - {stopped}


def test_who_is_left_for_the_next_turn_has_no_heir(
    stage: Any, monkeypatch: Any
) -> None:
    """One that is closed between two turns, and whose descriptor is opened anew."""
    sub, make, served = stage
    ones = twelve_that_take_long(make, monkeypatch)
    sub.doRead()
    closed = next(name for name in ones if name not in served)
    sub.remove(ones[closed])
    heir = make("heir", ones[closed].successor(), ready=False)
    for _ in ones:
        sub.doRead()
    assert set(served) == set(ones) - {closed}
    heir.far.send(b"x")
    sub.doRead()
    assert served[-1] == "heir"


def test_who_is_closed_in_a_turn_that_does_not_reach_it_has_no_heir(
    stage: Any, monkeypatch: Any
) -> None:
    """As one that is closed after it."""
    sub, make, served = stage
    ones = twelve_that_take_long(make, monkeypatch)
    take_long = ones["0"].then

    def close() -> None:
        take_long()
        sub.remove(ones["11"])

    ones["0"].then = close
    sub.doRead()
    assert "0" in served
    assert "11" not in served
    ones["0"].then = take_long
    heir = make("heir", ones["11"].successor(), ready=False)
    for _ in ones:
        sub.doRead()
    assert set(served) == set(ones) - {"11"}
    heir.far.send(b"x")
    sub.doRead()
    assert served[-1] == "heir"


def test_who_comes_in_a_turn_can_leave_in_it(stage: Any) -> None:
    """And leaves nothing behind."""
    sub, make, served = stage
    one = make("one")

    def come_and_go() -> None:
        late = make("late")
        assert late in sub.getReaders()
        sub.addWriter(late)
        assert late in sub.getWriters()
        sub.remove(late)
        assert late not in sub.getReaders()

    one.then = come_and_go
    sub.doRead()
    one.then = lambda: None
    sub.doRead()
    assert served == ["one"]
    assert sub.getReaders() == [one]


def test_a_turn_within_a_turn_serves_whoever_is_ready(stage: Any) -> None:
    """
    A handler that calls ``reactor.iterate()`` until others were served: those who have
    come since its own turn began too, and each once.
    """
    sub, make, served = stage
    one, two = make("one"), make("two")

    def iterate() -> None:
        one.then = two.then = lambda: None
        make("late")
        sub.doRead()
        assert sorted(served) == ["late", "one", "two"]

    one.then = two.then = iterate
    for _ in range(3):
        sub.doRead()
    assert sorted(served) == ["late", "one", "two"]


def test_a_turn_within_a_turn_may_be_too_long(stage: Any, monkeypatch: Any) -> None:
    """Who is left for the next turn is served there, whichever that is."""
    sub, make, served = stage
    ones = twelve_that_take_long(make, monkeypatch)
    take_long = ones["0"].then

    def iterate() -> None:
        take_long()
        sub.doRead()

    for one in ones.values():
        one.then = iterate
    for _ in ones:
        sub.doRead()
    assert sorted(served, key=int) == list(ones)


def test_one_that_raises_is_lost_alone(
    stage: Any, logs: Logs, monkeypatch: Any
) -> None:
    """The others of the batch are served; the error is logged."""
    sub, make, served = stage
    # To log takes longer than a turn on a loaded machine.
    monkeypatch.setattr(subreactor, "monotonic", lambda: 0.0)
    bad, good = make("bad"), make("good")

    def fail() -> None:
        raise Boom("in doRead")

    bad.then = fail
    sub.doRead()
    assert sorted(served) == ["bad", "good"]
    assert [f.type for f in bad.lost] == [Boom]
    assert good.lost == []
    (event,) = logs.take(LogLevel.critical)
    assert event["log_failure"].type is Boom


def test_who_cannot_be_watched_for_room_is_lost_alone(stage: Any, logs: Logs) -> None:
    """The kernel may refuse to watch one more: there is a limit per user."""
    sub, make, served = stage
    bad, good = make("bad"), make("good")

    def flush() -> None:
        bad.is_flush_due = True
        sub.due.append(bad)

    def wait_for_room() -> None:
        raise OSError(errno.ENOSPC, "no watch")

    bad.then, bad.flush, bad.wait_for_room = flush, flush, wait_for_room  # type: ignore[attr-defined]
    bad.dataBuffer = b""  # type: ignore[attr-defined]
    for _ in range(3):
        sub.doRead()
    assert {"bad", "good"} == set(served)
    assert [reason.type for reason in bad.lost] == [OSError]
    assert good.lost == []
    assert len(logs.take(LogLevel.critical)) == 1


@pytest.mark.parametrize("at", ["doRead", "readConnectionLost", "connectionLost"])
def test_a_watcher_logs_what_nobody_deals_with(
    at: str, stage: Any, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is let go of meanwhile: a client can bring it about."""
    sub, make, _ = stage
    told: list[Failure] = []

    class Watching:
        def failed(self, failure: Failure) -> bool:
            return False

        unhandled = told.append

    one = make("one")
    one.watcher = Watching()

    def fail(*_: object) -> None:
        one.watcher = None if at != "doRead" else one.watcher
        raise Boom(at)

    if at == "connectionLost":
        one.then = lambda: CONNECTION_LOST
    elif at == "readConnectionLost":
        one.then = lambda: CONNECTION_DONE
    monkeypatch.setattr(one, at, fail)
    sub.doRead()
    assert [str(failure.value) for failure in told] == [at]
    assert logs.texts(LogLevel.critical) == []


def test_remove_all_returns_whoever_was_watched(stage: Any) -> None:
    """And watches nobody any more."""
    sub, make, served = stage
    ones = [make("one"), make("two")]
    assert sub.removeAll() == ones
    assert sub.getReaders() == []
    assert sub.reactor.readers == []
    assert served == []


def test_adding_twice_is_adding_once(stage: Any) -> None:
    """As in any reactor; removing too."""
    sub, make, served = stage
    one = make("one")
    sub.addReader(one)
    sub.removeWriter(one)
    sub.doRead()
    assert served == ["one"]
    sub.removeReader(one)
    sub.removeReader(one)
    assert sub.getReaders() == []


# Fairness.


@ensureDeferred
async def test_pipelining_clients_hold_up_nobody(serve: Any, connect: Any) -> None:
    """
    Neither a timer nor another client, while many small requests are waiting: the
    timer is not late by all of them, and who is ready last is answered.
    """
    lines, many = 10_000, 40
    counts = [0]

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            if line == b"ping\n":
                writer.write(b"pong\n")
            counts[0] += 1

    server = await serve(handler)
    clients = [connect(server) for _ in range(many)]
    modest = connect(server)
    await all_wait(server, many + 1)
    for client in clients:
        client.socket.setblocking(False)
        assert client.socket.send(b"x\n" * lines) == 2 * lines
    modest.send(b"ping\n")
    await turn()
    assert counts[0] < lines * many / 2
    assert await in_thread(modest.read, 5) == b"pong\n"
    await until(lambda: counts[0] == lines * many + 1)


# The end of the reactor.


@ensureDeferred
async def test_the_reactors_end_is_the_end_of_the_connections(
    serve: Any, connect: Any
) -> None:
    """Whoever is watched hears why, as each of the reactor's own descriptors."""
    reasons: list[Any] = []

    class Noting(Protocol):
        transport: Any

        def connectionLost(self, reason: Any = None) -> None:
            reasons.append(reason.type)

    server = await serve(Factory.forProtocol(Noting), create=Server.create_protocol)
    for _ in range(3):
        connect(server)
    await all_wait(server, 3)
    group().connectionLost(Failure(ConnectionLost()))
    assert reasons == [ConnectionLost] * 3
    assert group().getReaders() == []
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_a_server_after_the_reactor_was_emptied_is_served(
    serve: Any, connect: Any
) -> None:
    """As trial does after a test that left its server open: the next ones go on."""
    await serve(echo_lines)
    group_readers = [r for r in the_reactor().getReaders() if r is group()]
    for reader in group_readers:
        the_reactor().removeReader(reader)  # What removeAll does to each.
        reader.connectionLost(Failure(ConnectionLost()))
    server = await serve(echo_lines)
    client = connect(server)
    await all_wait(server, 1)
    assert group() in the_reactor().getReaders()
    client.send(b"x\n")
    assert await in_thread(client.read, 2) == b"x\n"


@ensureDeferred
async def test_who_is_written_to_while_the_reactor_is_emptied_is_lost_too(
    serve: Any, connect: Any
) -> None:
    """A connection that was not watched, and now is, by what another does last."""
    made: list[Any] = []
    lost: list[Any] = []

    class Farewell(Protocol):
        transport: Any

        def connectionMade(self) -> None:
            made.append(self)
            if self is made[0]:
                self.transport.pauseProducing()

        def connectionLost(self, reason: Any = None) -> None:
            lost.append(self)
            for _ in range(2):  # The second write of a turn waits.
                made[0].transport.write(b"farewell")

    server = await serve(Factory.forProtocol(Farewell), create=Server.create_protocol)
    for n in range(2):
        connect(server)
        await until(lambda n=n: len(made) == n + 1)
    group().connectionLost(Failure(ConnectionLost()))
    assert lost == [made[1], made[0]]
    assert server.num_connections == 0


def test_who_stayed_when_the_reactor_was_emptied_keeps_nothing_there() -> None:
    """
    trial calls ``removeAll`` after a test that left its server open, and tells nobody:
    tests after it that close theirs leave a clean reactor.
    """
    reactor = EPollReactor()
    sub = SubReactor.of(reactor)
    try:
        sub.stay()
        assert sub in reactor.removeAll()
        sub.stay()
        assert sub in reactor.getReaders()
        sub.may_leave()
        assert sub not in reactor.getReaders()
        assert sub.fileno() == -1
    finally:
        sub.connectionLost(Failure(ConnectionLost()))
        for reader in list(reactor._internalReaders):
            reader.connectionLost(Failure(ConnectionLost()))
        reactor._poller.close()


@ensureDeferred
async def test_legacy_log_lines_are_marked_with_whoever_is_served(
    serve: Any, connect: Any, logs: Logs
) -> None:
    """Each with its own connection, in one batch too; outside with none."""
    marks: list[str] = []

    class Logging(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            marks.append(self.transport.logPrefix())
            log.msg("a line of a protocol")
            self.transport.write(data)

    server = await serve(Factory.forProtocol(Logging), create=Server.create_protocol)
    clients = [connect(server) for _ in range(3)]
    await all_wait(server, 3)
    for client in clients:
        client.send(b"x")
    for client in clients:
        assert await in_thread(client.read, 1) == b"x"
    log.msg("a line of nobody")
    lines = [e for e in logs.events if "a line of a protocol" in str(e)]
    assert [e["log_system"] for e in lines] == marks
    assert len(set(marks)) == 3
    (line,) = [e for e in logs.events if "a line of nobody" in str(e)]
    assert line["log_system"] == "-"


# Interfaces.


def test_the_sub_reactor_is_a_reactor_of_descriptors() -> None:
    """And one of the main reactor's descriptors."""
    assert verifyObject(IReactorFDSet, group())
    assert verifyObject(IReadDescriptor, group())
    assert SubReactor.of(the_reactor()) is group()
    main = MainReactor()
    assert SubReactor.of(main) is not group()


@ensureDeferred
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_the_transports_are_twisted_transports(
    serve: Any, connect: Any, tmp_path: Any, kind: str
) -> None:
    """Whatever a transport of the kind has is there, and answers."""
    seen: list[Any] = []

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        seen.append(writer.transport)
        await reader.readline()

    options: dict[str, Any] = {}
    if kind == "unix":
        options["where"] = WhereToListen.of_file(tmp_path / "socket")
    server = await serve(handler, **options)
    connect(server)
    await all_wait(server, 1)
    (transport,) = seen
    assert verifyObject(ITCPTransport if kind == "tcp" else IUNIXTransport, transport)
    assert transport.reactor is the_reactor()
    assert transport.fileno() == transport.getHandle().fileno()
    assert transport.logPrefix() in str(transport.logstr)
    if kind == "tcp":
        assert transport.hostname == transport.getPeer().host
        transport.setTcpNoDelay(True)
        assert transport.getTcpNoDelay()
    assert repr(transport).startswith("<")


@ensureDeferred
async def test_what_waits_after_an_early_flush_is_not_overtaken(
    serve: Any, connect: Any
) -> None:
    """Nor lost: a close sends before its turn is over, and more may be written then."""
    much = b"x" * 20_000_000
    written = Deferred[None]()

    async def handler(_: Any, reader: Any, writer: Any) -> None:
        await reader.read()
        writer.write(much)
        writer.close()
        writer.transport.write(b"tail")
        written.callback(None)

    client = connect(await serve(handler))
    client.shut()
    await written  # Before anything is read: else the kernel may take all at once.
    assert await in_thread(client.read_all) == much + b"tail"


@ensureDeferred
async def test_the_write_side_is_closed_once(serve: Any, connect: Any) -> None:
    """Also when the kernel has been asked for room before that was flushed."""
    closed: list[str] = []

    @implementer(IHalfCloseableProtocol)
    class Halves(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)
            self.transport.loseWriteConnection()
            group().serves(group().serves(None))  # As a turn within this one does.

        def readConnectionLost(self) -> None:
            closed.append("read")
            self.transport.loseConnection()

        def writeConnectionLost(self) -> None:
            closed.append("write")

    server = await serve(Factory.forProtocol(Halves), create=Server.create_protocol)
    client = connect(server)
    client.send(b"hello")
    assert await in_thread(client.read_all) == b"hello"
    client.close()
    await until(lambda: server.num_connections == 0)
    assert closed == ["write", "read"]


# Protocols that the transport serves directly.


@ensureDeferred
async def test_a_protocol_that_raises_loses_its_own_connection(
    serve: Any, connect: Any
) -> None:
    """It is a handler error; the others that are ready too go on."""
    errors: list[Any] = []

    class Brittle(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            if data == b"bad":
                raise Boom(data)
            self.transport.write(data)

    server = await serve(
        Factory.forProtocol(Brittle),
        create=Server.create_protocol,
        on_handler_error=lambda address, failure: errors.append(
            (address.port, failure.type)
        ),
    )
    clients = [connect(server) for _ in range(4)]
    await all_wait(server, 4)
    bad, *good = clients
    port = bad.socket.getsockname()[1]
    bad.send(b"bad")
    for client in good:
        client.send(b"good")
    for client in good:
        assert await in_thread(client.read, 4) == b"good"
    await until(lambda: server.num_connections == 3)
    assert errors == [(port, Boom)]
    good[0].send(b"more")
    assert await in_thread(good[0].read, 4) == b"more"


@ensureDeferred
async def test_a_protocol_may_put_another_in_its_place(
    serve: Any, connect: Any
) -> None:
    """That one is served, hears of the end, and its error counts."""
    ends: list[str] = []

    class Second(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            self.transport.write(b"second:" + data)

        def connectionLost(self, reason: Any = None) -> None:
            ends.append("second")

    class First(Protocol):
        transport: Any

        def dataReceived(self, data: bytes) -> None:
            self.transport.write(b"first:" + data)
            second: Any = Second()
            self.transport.protocol = second
            second.makeConnection(self.transport)

        def connectionLost(self, reason: Any = None) -> None:
            ends.append("first")

    server = await serve(Factory.forProtocol(First), create=Server.create_protocol)
    client = connect(server)
    await all_wait(server, 1)
    client.send(b"a")
    assert await in_thread(client.read, 7) == b"first:a"
    client.send(b"b")
    assert await in_thread(client.read, 8) == b"second:b"
    client.close()
    await until(lambda: server.num_connections == 0)
    assert ends == ["second"]


# The option.


@ensureDeferred
async def test_an_unknown_engine_is_a_value_error(serve: Any) -> None:
    """It is named, with what there is."""
    with pytest.raises(ValueError, match=r"engine='nonsense'.*'auto'.*'reactor'"):
        await serve(echo_lines, engine="nonsense")


@pytest.mark.parametrize("create", ["create", "create_inet"])
@ensureDeferred
async def test_no_descriptor_for_the_engine_is_an_error_at_creation(
    create: str, monkeypatch: Any
) -> None:
    """W8: and nothing is left open, which the fixture looks at."""

    def none_left() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(subreactor.select, "epoll", none_left)
    with pytest.raises(CannotListenError) as raised:
        made = getattr(Server, create)(
            WhereToListen.bind_to(LOCALHOST, 0), echo_lines, on_handler_error="ignore"
        )
        if create == "create":
            await made
    assert raised.value.socketError.errno == errno.EMFILE
    assert group().fileno() == -1
