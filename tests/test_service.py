"""TcpService: a server as an ``IService`` (issue 2, section 4)."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.application.service import IService, MultiService
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent
from zope.interface import implementer
from zope.interface.verify import verifyObject

import tcpsvc
from tcpsvc import LOCALHOST, TcpService, WhereToListen, daemon
from tcpsvc.gate import Gate
from tcpsvc.log import log
from tests.daemons import refused, stop, twistd
from tests.support import (
    LOOPBACK,
    Fired,
    Logs,
    in_thread,
    settle,
    the_reactor,
    turn,
    until,
)


async def greet(address: Any, reader: Any, writer: Any) -> None:
    """Says hello, then answers each line with itself, and goodbye at the end."""
    writer.write(b"hello\n")
    async for line in reader:
        writer.write(line)
    writer.write(b"goodbye\n")


@pytest.fixture
def service(clock: Clock) -> Any:
    """``service(where, handler, **options)``: a TcpService on the clock."""

    def service(
        where: Any = LOOPBACK,
        handler: Any = greet,
        make: Any = TcpService,
        **options: Any,
    ) -> TcpService:
        made: TcpService = make(
            where, handler, on_handler_error="ignore", clock=clock, **options
        )
        return made

    return service


def fixed_port() -> WhereToListen[Any, Any]:
    """A port that is free now, to be listened on again and again."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        return WhereToListen.bind_to(LOCALHOST, chosen.getsockname()[1])


@implementer(IStreamServerEndpoint)
class SlowEndpoint:
    """An endpoint that listens, or fails, when the test says so."""

    def __init__(self) -> None:
        self.go: Deferred[None] = Deferred()
        self.address: Any = None

    def listen(self, factory: Any) -> Deferred[Any]:
        """Not before ``go`` has fired."""
        endpoint = TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1")
        listening: Deferred[Any] = Deferred()
        self.go.addCallback(lambda _: endpoint.listen(factory))
        self.go.addCallback(self._remember)
        self.go.addCallbacks(listening.callback, listening.errback)
        return listening

    def _remember(self, port: Any) -> Any:
        self.address = port.getHost()
        return port


# What is wrong is said when it is made.


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"drain_timeout": -1}, ValueError, "drain_timeout=-1"),
        ({"drain_timeout": float("nan")}, ValueError, "drain_timeout=nan"),
        ({"drain_timeout": "5"}, TypeError, "drain_timeout='5'"),
        ({"drain_announce": -1}, ValueError, "drain_announce=-1"),
        ({"drain_announce": None}, TypeError, "drain_announce=None"),
        ({"drain_spread": float("inf")}, ValueError, "drain_spread=inf"),
        ({"max_connections": 0}, ValueError, "max_connections=0"),
        ({"socket": None}, TypeError, "socket="),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
        ({"handler": 3}, TypeError, "not callable"),
    ],
)
def test_bad_options_are_refused_before_anything_is_opened(
    service: Any, options: Any, error: Any, said: str
) -> None:
    """As Server.create refuses them; not at the start of the application."""
    with pytest.raises(error, match=said):
        service(**options)


def test_the_policy_is_looked_at_too() -> None:
    """E6: there is no default, and no nonsense."""
    with pytest.raises(ValueError, match="on_handler_error='panic'"):
        TcpService(LOOPBACK, greet, on_handler_error="panic")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_handler_error"):
        TcpService(LOOPBACK, greet)  # type: ignore[call-arg]


def test_it_is_a_service(service: Any) -> None:
    """Of Twisted's interface."""
    verifyObject(IService, service())


# Binding, starting, stopping.


@ensureDeferred
async def test_it_binds_in_privileged_start_and_lets_in_at_start(
    service: Any, connect: Any
) -> None:
    """Clients that come in between wait in the backlog, and lose nothing."""
    one = service()
    assert one.server is None
    one.privilegedStartService()
    client = connect(one.server)
    client.send(b"early\n")
    client.shut()
    await settle()
    assert one.server.num_connections == 0
    one.startService()
    assert await in_thread(client.read_all) == b"hello\nearly\ngoodbye\n"
    await one.stopService()
    assert one.server is None


@ensureDeferred
async def test_what_was_bound_before_is_adopted(service: Any, connect: Any) -> None:
    """bind, twice, then both starts: one and the same port."""
    one = service()
    assert Fired(one.bind())
    assert Fired(one.bind())
    server = one.server
    client = connect(server)
    one.privilegedStartService()
    one.startService()
    assert one.server is server
    assert await in_thread(client.read, 6) == b"hello\n"
    assert await in_thread(client.finish) == b"goodbye\n"
    await one.stopService()


@ensureDeferred
async def test_start_alone_binds(service: Any, connect: Any) -> None:
    """A parent that runs already calls startService only."""
    one = service()
    one.startService()
    assert one.running
    client = connect(one.server)
    assert await in_thread(client.read, 6) == b"hello\n"
    client.close()
    await one.stopService()
    assert not one.running


@ensureDeferred
async def test_stopping_what_was_never_started_or_only_bound(service: Any) -> None:
    """Fires, and the port is free."""
    one = service()
    assert Fired(one.stopService())
    assert Fired(one.bind())
    address = one.server.listening_on_address
    await one.stopService()
    assert await in_thread(refused, address)
    assert Fired(one.stopService())


@ensureDeferred
async def test_a_port_in_use_is_raised_by_each_of_them(service: Any) -> None:
    """And once it is free, the same service starts."""
    with socket.create_server(("127.0.0.1", 0)) as used:
        one = service(WhereToListen.bind_to(LOCALHOST, used.getsockname()[1]))
        with pytest.raises(CannotListenError):
            await one.bind()
        with pytest.raises(CannotListenError):
            one.privilegedStartService()
        with pytest.raises(CannotListenError):
            one.startService()
        assert Fired(one.stopService())
    one.startService()
    assert one.server is not None
    await one.stopService()


@ensureDeferred
async def test_its_address_is_logged_when_it_lets_clients_in(
    service: Any, logs: Logs
) -> None:
    """One line each time."""
    one = service()
    one.privilegedStartService()
    assert not [t for t in logs.texts() if "listening on" in t]
    one.startService()
    line = f"listening on 127.0.0.1:{one.server.listening_on}"
    assert logs.texts(LogLevel.info) == [line]
    await one.stopService()


@ensureDeferred
async def test_a_stop_fires_when_the_last_handler_has_ended(
    service: Any, connect: Any
) -> None:
    """Any number of calls, each with a Deferred of its own."""
    one = service()
    one.startService()
    address = one.server.listening_on_address
    client = connect(address)
    assert await in_thread(client.read, 6) == b"hello\n"
    first, second, third = (one.stopService() for _ in range(3))
    second.addErrback(lambda _: None)
    second.cancel()
    over, also = Fired(first), Fired(third)
    assert await in_thread(refused, address)
    assert not over
    client.send(b"more\n")
    assert await in_thread(client.finish) == b"more\ngoodbye\n"
    await until(lambda: over and also)
    assert one.server is None


@ensureDeferred
async def test_a_stop_closes_what_is_left_when_the_time_is_up(
    service: Any, connect: Any, clock: Clock
) -> None:
    """drain_timeout, 30 seconds by default; nothing stays on the clock."""
    for options, seconds in (({}, 30.0), ({"drain_timeout": 2.5}, 2.5)):
        one = service(**options)
        one.startService()
        client = connect(one.server)
        assert await in_thread(client.read, 6) == b"hello\n"
        over = Fired(one.stopService())
        clock.pump([0.5] * int(seconds * 2 - 1))
        await turn()
        assert not over
        clock.advance(0.5)
        assert await in_thread(client.read_all) == b""
        await until(lambda over=over: over)
        assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_a_stop_announces_and_spreads_as_asked_and_logs_its_report(
    service: Any, connect: Any, clock: Clock, logs: Logs
) -> None:
    """drain_announce, drain_spread, and eof_on_drain; of every kind of handler."""

    async def waits(*_: Any) -> None:
        await Deferred()

    for make, handler, options in (
        (TcpService, greet, {"eof_on_drain": True}),
        (TcpService.of_socks, waits, {}),
        (TcpService.of_protocols, Factory.forProtocol(Protocol), {}),
    ):
        one = service(
            make=make,
            handler=handler,
            drain_announce=2.0,
            drain_timeout=3.0,
            drain_spread=4.0,
            **options,
        )
        one.startService()
        over = Fired(one.stopService())
        assert one.server.is_draining
        clock.advance(1.999)
        clients = [connect(one.server) for _ in range(2)]
        server = one.server
        await until(lambda server=server: server.num_connections == 2)
        await turn()
        clock.advance(0.001)
        assert server.is_closed
        if make is TcpService:
            for client in clients:
                assert await in_thread(client.read_all) == b"hello\ngoodbye\n"
                client.close()
            said = "2 closed idle; longest wait 0.0 s"
        else:
            clock.pump([3.0, 2.0])
            open_ones = [not c.is_socket_closed for c in server._factory.connections]
            assert sum(open_ones) == 1
            clock.pump([2.0, 1.0])
            is_cancelled = make == TcpService.of_socks
            waited = 8.0 if is_cancelled else 7.0
            said = (
                f"2 {'cancelled' if is_cancelled else 'closed'}; "
                f"longest wait {waited} s"
            )
        await until(lambda over=over: over)
        report = logs.texts(LogLevel.info)[-1]
        assert "drained in" in report
        assert report.endswith(f" s: {said}")
        logs.events.clear()
        assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_a_stop_shortens_a_drain_of_ones_own(
    service: Any, connect: Any, clock: Clock
) -> None:
    """It is the same one."""
    one = service(drain_timeout=5.0)
    one.startService()
    client = connect(one.server)
    assert await in_thread(client.read, 6) == b"hello\n"
    own = Fired(one.server.drain(timeout=None))
    clock.advance(100.0)
    over = Fired(one.stopService())
    clock.advance(5.0)
    assert await in_thread(client.read_all) == b""
    await until(lambda: over and own)
    assert one.server is None


@ensureDeferred
async def test_force_stop_closes_what_is_left_now(
    service: Any, connect: Any, clock: Clock
) -> None:
    """While it drains; at any other time it does nothing."""
    one = service(drain_timeout=None, drain_announce=60.0)
    one.force_stop()
    one.startService()
    one.force_stop()
    client = connect(one.server)
    assert await in_thread(client.read, 6) == b"hello\n"
    over = Fired(one.stopService())
    one.force_stop()
    clock.advance(0)
    assert await in_thread(client.read_all) == b""
    await until(lambda: over)
    one.force_stop()
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_stopped_and_started_again_on_the_same_port(
    service: Any, connect: Any
) -> None:
    """As often as wanted; nothing of the last time is left."""
    one = service(fixed_port())
    for _ in range(3):
        one.privilegedStartService()
        one.startService()
        client = connect(one.server)
        assert await in_thread(client.finish) == b"hello\ngoodbye\n"
        client.close()
        await one.stopService()


@ensureDeferred
async def test_stopped_and_started_again_on_the_same_path(
    service: Any, connect: Any, tmp_path: Path
) -> None:
    """W6: the path is there while it runs."""
    path = tmp_path / "a.sock"
    one = service(WhereToListen.of_file(path))
    for _ in range(2):
        one.startService()
        client = connect(one.server)
        assert await in_thread(client.finish) == b"hello\ngoodbye\n"
        await one.stopService()
        assert not path.exists()


@ensureDeferred
async def test_started_while_the_old_one_still_drains(
    service: Any, connect: Any, clock: Clock
) -> None:
    """The old client is served to its end, and new ones are let in meanwhile."""
    one = service(fixed_port())
    one.startService()
    old_server = one.server
    old = connect(old_server)
    assert await in_thread(old.read, 6) == b"hello\n"
    over = Fired(one.stopService())
    one.startService()
    await until(lambda: one.server is not old_server)
    new = connect(one.server)
    assert await in_thread(new.read, 6) == b"hello\n"
    assert not over
    old.send(b"still\n")
    assert await in_thread(old.finish) == b"still\ngoodbye\n"
    await until(lambda: over)
    # The end of the old one is not the end of the new one.
    assert one.running
    new.send(b"here\n")
    assert await in_thread(new.finish) == b"here\ngoodbye\n"
    await one.stopService()
    assert clock.getDelayedCalls() == []


@ensureDeferred
async def test_stopped_again_while_the_first_one_still_drains(
    service: Any, connect: Any, clock: Clock
) -> None:
    """stop, start, stop: the second server stops too, and both are waited for."""
    one = service(fixed_port())
    one.startService()
    first = one.server
    old = connect(first)
    assert await in_thread(old.read, 6) == b"hello\n"
    one.stopService()
    one.startService()
    await until(lambda: one.server is not first)
    second = one.server
    new = connect(second)
    assert await in_thread(new.read, 6) == b"hello\n"
    over = Fired(one.stopService())
    try:
        assert second.is_closed
        assert await in_thread(old.finish) == b"goodbye\n"
        await until(lambda: first.num_connections == 0)
        await turn()
        assert not over
        assert await in_thread(new.finish) == b"goodbye\n"
        await until(lambda: over)
        assert clock.getDelayedCalls() == []
    finally:
        await second.close(close_existing_connections=True)


@ensureDeferred
async def test_stopped_and_started_and_stopped_in_one_turn(
    service: Any, connect: Any
) -> None:
    """A start that has not even bound yet is taken back: nothing listens."""
    one = service(fixed_port())
    one.startService()
    first = one.server
    client = connect(first)
    assert await in_thread(client.read, 6) == b"hello\n"
    one.stopService()
    one.startService()
    over = Fired(one.stopService())
    assert await in_thread(client.finish) == b"goodbye\n"
    await until(lambda: over)
    await settle()
    try:
        assert await in_thread(refused, first.listening_on_address)
    finally:
        if one.server is not None:
            await one.server.close(close_existing_connections=True)


@ensureDeferred
async def test_forced_while_two_drain(service: Any, connect: Any, clock: Clock) -> None:
    """The second signal spares none of them."""
    one = service(fixed_port())
    clients, servers, over = [], [], []
    for _ in range(2):
        one.startService()
        await until(lambda: one.server is not None and one.server not in servers)
        servers.append(one.server)
        clients.append(connect(one.server))
        assert await in_thread(clients[-1].read, 6) == b"hello\n"
        over.append(Fired(one.stopService()))
    try:
        one.force_stop()
        clock.advance(0)
        for client in clients:
            client.socket.settimeout(2)
            assert await in_thread(client.read_all) == b""
        await until(lambda: all(over))
    finally:
        for server in servers:
            await server.close(close_existing_connections=True)


# The other kinds of handlers.


@ensureDeferred
async def test_services_of_sockets_and_of_protocols(service: Any, connect: Any) -> None:
    """of_socks and of_protocols."""

    class Once(Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            self.transport.write(b"protocol\n")
            self.transport.loseConnection()

    async def sock(address: Any, client: socket.socket) -> None:
        client.send(b"socket\n")

    for make, handler, said in (
        (TcpService.of_socks, sock, b"socket\n"),
        (TcpService.of_protocols, Factory.forProtocol(Once), b"protocol\n"),
    ):
        one = service(make=make, handler=handler, drain_timeout=1.0)
        one.startService()
        assert await in_thread(connect(one.server).read_all) == said
        await one.stopService()


# Endpoints that take their time.


@ensureDeferred
async def test_an_endpoint_that_takes_its_time(service: Any, connect: Any) -> None:
    """It lets clients in once it listens."""
    endpoint = SlowEndpoint()
    one = service(WhereToListen.of_endpoint(endpoint))
    bound = Fired(one.bind())
    one.privilegedStartService()
    one.startService()
    assert not bound
    assert one.server is None
    endpoint.go.callback(None)
    assert bound
    client = connect(one.server)
    assert await in_thread(client.finish) == b"hello\ngoodbye\n"
    client.close()
    await one.stopService()


@ensureDeferred
async def test_stopped_before_the_endpoint_listens(service: Any) -> None:
    """Whatever it opens afterwards is closed at once."""
    endpoint = SlowEndpoint()
    one = service(WhereToListen.of_endpoint(endpoint))
    one.startService()
    assert Fired(one.stopService())
    endpoint.go.callback(None)
    assert await in_thread(refused, endpoint.address)
    assert one.server is None


@ensureDeferred
async def test_bound_late_by_an_endpoint_but_not_started(
    service: Any, connect: Any
) -> None:
    """Clients wait until the start, as always."""
    endpoint = SlowEndpoint()
    one = service(WhereToListen.of_endpoint(endpoint))
    one.privilegedStartService()
    endpoint.go.callback(None)
    client = connect(one.server)
    client.shut()
    await settle()
    assert one.server.num_connections == 0
    one.startService()
    assert await in_thread(client.read_all) == b"hello\ngoodbye\n"
    await one.stopService()


@ensureDeferred
async def test_an_endpoint_that_fails_late_is_logged_once(
    service: Any, logs: Logs
) -> None:
    """Nobody is left to raise it to; and the service can be stopped."""
    endpoint = SlowEndpoint()
    one = service(WhereToListen.of_endpoint(endpoint))
    one.privilegedStartService()
    one.startService()
    endpoint.go.errback(CannotListenError("127.0.0.1", 1, OSError("not today")))
    (line,) = logs.take(LogLevel.critical)
    assert "not today" in formatEvent(line)
    assert Fired(one.stopService())


@pytest.fixture
def no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server can be bound, and there is none left to serve with."""

    def fails(gate: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Gate, "open", fails)


@ensureDeferred
async def test_an_abandoned_service_leaves_nobody_waiting(
    service: Any, tmp_path: Path
) -> None:
    """X4: for a server that has never served."""
    one = service([LOOPBACK, WhereToListen.of_file(tmp_path / "s")])
    await one.bind()
    server = one.server
    waits = [Fired(server.close_finished()), Fired(server.failed())]
    one.abandon()
    one.abandon()
    assert os.listdir(tmp_path) == []
    assert server.is_closed
    await server.close()
    await server.close_finished_and_handlers_determined()
    await until(lambda: all(waits))
    server.invariant()


@ensureDeferred
@pytest.mark.usefixtures("no_descriptor")
async def test_a_start_without_descriptors_fails_and_may_be_tried_again(
    service: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W8: it does not run and serve nobody, nor does a stop wait for ever."""
    one = service(fixed_port())
    await one.bind()
    with pytest.raises(CannotListenError, match=r"127\.0\.0\.1:\d+: .*Too many open"):
        one.startService()
    assert one.server is None
    await one.stopService()
    monkeypatch.undo()
    one.startService()
    client = connect(one.server)
    assert await in_thread(client.read, 6) == b"hello\n"
    client.close()
    await one.stopService()


@ensureDeferred
@pytest.mark.usefixtures("no_descriptor")
async def test_a_late_start_without_descriptors_is_logged_once(
    service: Any, logs: Logs
) -> None:
    """As an endpoint that fails late."""
    endpoint = SlowEndpoint()
    one = service(WhereToListen.of_endpoint(endpoint))
    one.startService()
    endpoint.go.callback(None)
    (line,) = logs.take(LogLevel.critical)
    assert "Too many open files" in formatEvent(line)
    await one.stopService()


@ensureDeferred
@pytest.mark.usefixtures("no_descriptor")
async def test_a_daemon_that_cannot_begin_late_ends(
    service: Any, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a status that tells."""
    statuses: list[int] = []
    monkeypatch.setattr(daemon, "_exit_status", statuses)
    stops: list[bool] = []
    process = daemon.Daemon(SimpleNamespace(stop=lambda: stops.append(True)))
    endpoint = SlowEndpoint()
    service(WhereToListen.of_endpoint(endpoint)).setServiceParent(process)
    monkeypatch.setattr(log, "says_debug", True)  # A daemon says less.
    process.startService()
    assert stops == []
    endpoint.go.callback(None)
    assert (stops, statuses) == ([True], [1])
    logs.take(LogLevel.critical)
    await process.stopService()


# In company.


@ensureDeferred
async def test_in_a_multi_service(service: Any, connect: Any) -> None:
    """Started together; stopped together, when the last drain is over."""
    parent = MultiService()
    one, two = service(), service()
    one.setServiceParent(parent)
    parent.privilegedStartService()
    parent.startService()
    two.setServiceParent(parent)
    assert one.running
    assert two.running
    clients = [connect(s.server) for s in (one, two)]
    for client in clients:
        assert await in_thread(client.read, 6) == b"hello\n"
    over = Fired(parent.stopService())
    for client in clients:
        await turn()
        assert not over
        assert await in_thread(client.finish) == b"goodbye\n"
    await until(lambda: len(over.results) == 1)


@ensureDeferred
async def test_taken_out_of_its_parent_it_stops(service: Any) -> None:
    """disownServiceParent waits for the drain."""
    parent = MultiService()
    one = service()
    one.setServiceParent(parent)
    parent.startService()
    address = one.server.listening_on_address
    await one.disownServiceParent()
    assert await in_thread(refused, address)
    await parent.stopService()


TAC = """
import os, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from twisted.application.service import Application
import tcpsvc.handlers
from hands import obey

application = Application("mine", uid=65534, gid=65534)
tcpsvc.TcpService(
    tcpsvc.WhereToListen.of_file("a.sock", mode=0o666),
    obey,
    on_handler_error=tcpsvc.log_error,
    drain_timeout=20,
).setServiceParent(application)
tcpsvc.TcpService(
    tcpsvc.WhereToListen.bind_to(tcpsvc.LOCALHOST, 0),
    tcpsvc.handlers.echo,
    on_handler_error="raise",
).setServiceParent(application)
"""


@pytest.mark.whatever("engine")
def test_a_tac_file_run_by_twistd(start: Any, connect: Any) -> None:
    """Bound as root in a directory of root's, served as nobody, and drained."""
    made = start(*twistd("--version"))
    assert made.wait() == 0
    is_root = os.getuid() == 0
    text = TAC if is_root else TAC.replace(", uid=65534, gid=65534", "")
    (made.directory / "mine.tac").write_text(text)
    child = start(
        *twistd("--pidfile=", "-n", "-y", "mine.tac"), directory=made.directory
    )
    address = child.address()
    (path,) = child.expect(r"listening on unix:(\S+)\n")
    echo = connect(address)
    echo.send(b"abc")
    assert echo.read(3) == b"abc"
    echo.close()
    client = connect(tcpsvc.where.UNIXAddress(path))
    client.send(b"uid\n")
    uid = 65534 if is_root else os.getuid()
    assert client.read(12) == b"hello\n%d\n" % uid
    child.signal(signal.SIGTERM)
    child.expect("draining, 1 connection remains")
    client.send(b"answer\n")
    assert len(client.read_all()) == 1_000_000
    assert stop(child) == [-signal.SIGTERM]
    assert "Unhandled" not in child.out
