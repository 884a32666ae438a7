"""Pausing a server, and going on (spec Z)."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import LogLevel

from tcpsvc import (
    LOCALHOST,
    Observer,
    Server,
    ServerClosed,
    TcpService,
    WhereToListen,
)
from tests.kinds import KINDS, OtherEndpoint, Seen, Staying, place
from tests.support import (
    LOOPBACK,
    Client,
    Fired,
    in_thread,
    open_descriptors,
    settle,
    turn,
    until,
)
from tests.test_accepting import queued
from tests.test_listeners import LOOPBACK6, Noted
from tests.test_where import failing, make_with

WAYS = ["hold", "refuse"]


async def answer(address: Any, reader: Any, writer: Any) -> None:
    """Answers each line with itself, and goodbye at the end."""
    async for line in reader:
        writer.write(line)
    writer.write(b"goodbye")


def everywhere(tmp_path: Path) -> list[Any]:
    """IPv4, IPv6 and UNIX."""
    return [LOOPBACK, LOOPBACK6, WhereToListen.of_file(tmp_path / "s")]


async def served(client: Client, line: bytes = b"line\n") -> None:
    """A client's line is answered, and it is said goodbye."""
    client.send(line)
    assert await in_thread(client.finish) == line + b"goodbye"


def is_refused(address: Any) -> bool:
    """Whether a client cannot connect."""
    try:
        Client(address).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    return False


def accepted(server: Any) -> int:
    """How many were accepted so far."""
    count: int = server.describe()["counters"]["accepted"]
    return count


def state(server: Any) -> dict[str, Any]:
    """What a change that is refused must leave as it was."""
    described: dict[str, Any] = server.describe()
    return {k: described[k] for k in ("is_paused", "is_closed", "listeners")}


# Z2: hold.


@ensureDeferred
async def test_hold_lets_clients_wait_in_the_backlog(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """Z2: they connect, wait with their early bytes, and are served after resume."""
    server = await serve(answer, where=everywhere(tmp_path))
    live = connect(server)
    await until(lambda: server.num_connections == 1)
    assert server.is_paused is None
    paused = server.pause("hold")
    assert Fired(paused)
    assert server.is_paused == "hold"
    assert server.describe()["is_paused"] == "hold"
    assert "paused (hold), 1/" in repr(server)
    assert not server.is_closed
    assert all(x.is_listening for x in server.listeners)
    assert server.listening_socket.getsockname()[1] == server.listening_on
    waiting = [connect(x.address) for x in server.listeners]
    for client in waiting:
        client.send(b"early\n")
    await until(lambda: queued(server) == 1)
    await settle()
    assert accepted(server) == server.num_connections == 1
    server.invariant()
    await served(live)
    await until(lambda: server.num_connections == 0)
    await settle()
    assert accepted(server) == 1
    assert Fired(server.resume())
    assert server.is_paused is None
    assert server.describe()["is_paused"] is None
    assert "paused (" not in repr(server)
    for client in waiting:
        assert await in_thread(client.finish) == b"early\ngoodbye"


@ensureDeferred
async def test_observers_are_told_of_pauses(serve: Any, tmp_path: Path) -> None:
    """V, Z: when they are there; not of what is so already, nor of what fails."""
    seen = Seen()
    server = await serve(answer, where=everywhere(tmp_path), observer=seen)
    for how in ("hold", "hold", "refuse", "refuse", "hold", None, None, "refuse"):
        await (server.pause(how) if how else server.resume())
    with pytest.raises(ValueError, match="nap"):
        await server.pause("nap")
    await server.resume()
    assert seen.events == [
        ("server_paused", "hold"),
        ("server_paused", "refuse"),
        ("server_paused", "hold"),
        ("server_resumed",),
        ("server_paused", "refuse"),
        ("server_resumed",),
    ]


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_who_comes_in_after_a_pause_comes_after_its_end(
    how: Any, serve: Any, connect: Any
) -> None:
    """V: as told: who is accepted, is so while the server is not paused."""
    seen = Seen()
    server = await serve(answer, observer=seen, max_connections=1)
    await server.pause(how)
    if how == "hold":
        connect(server)
    await server.resume()
    if how == "refuse":
        connect(server)
    await until(lambda: "handler_started" in seen.names())
    assert [name for name in seen.names() if name != "limit_reached"][:3] == [
        "server_paused",
        "server_resumed",
        "connection_accepted",
    ]


class Closing(Observer):
    """Closes the server in the middle of what it is told."""

    server: Any = None

    def server_paused(self, how: str) -> None:
        self.server.close()

    def server_resumed(self) -> None:
        self.server.close()


@ensureDeferred
@pytest.mark.parametrize("how", [*WAYS, None])
async def test_an_observer_may_close_the_server_then(how: Any, serve: Any) -> None:
    """Z, X: the pause is over with the server."""
    server = await serve(answer)
    if how is None:
        await server.pause("refuse")
    observer = Closing()
    observer.server = server
    server.add_observer(observer)
    await (server.pause(how) if how else server.resume())
    assert server.is_closed
    assert server.is_paused is None
    server.invariant()
    await server.close_finished_and_handlers_determined()
    assert is_refused(server.listening_on_address)


@ensureDeferred
async def test_nothing_but_resume_ends_a_hold(serve: Any, connect: Any) -> None:
    """Z2: no higher limit, no free slot, no dropping."""
    server = await serve(answer, max_connections=1)
    first, second = connect(server), connect(server)
    await until(lambda: server.num_connections == 1)
    await server.pause("hold")
    server.max_connections = 5
    await served(first)
    server.set_drop_incoming_connections(True)
    await settle()
    assert accepted(server) == 1
    assert server.describe()["counters"]["dropped"] == 0
    server.set_drop_incoming_connections(False)
    await server.resume()
    await served(second)


@ensureDeferred
async def test_a_port_that_cannot_be_gated_holds_whom_it_accepts(
    serve: Any, connect: Any, logs: Any
) -> None:
    """Z2, A1: unread and unstarted, until resume."""
    server = await serve(answer, where=WhereToListen.of_endpoint(OtherEndpoint()))
    await server.pause("hold")
    client = connect(server)
    client.send(b"early\n")
    await until(lambda: server.describe()["held"] == 1)
    assert server.num_connections == 0
    await server.resume()
    assert await in_thread(client.finish) == b"early\ngoodbye"


# Z3: refuse.


@ensureDeferred
async def test_refuse_closes_the_sockets_and_resume_opens_them_again(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """Z3, Z4: on the same addresses, also where the system chose the port."""
    server = await serve(answer, where=everywhere(tmp_path))
    live = connect(server.listeners[2].address)
    await until(lambda: server.num_connections == 1)
    addresses = [x.address for x in server.listeners]
    before = server.listening_socket
    paused = server.pause("refuse")
    assert server.is_paused == "refuse"
    assert not Fired(paused)
    await paused
    assert before.fileno() == -1
    assert all(is_refused(x) for x in addresses)
    assert os.listdir(tmp_path) == []
    assert not server.is_closed
    assert not any(x.is_listening for x in server.listeners)
    assert [x.address for x in server.listeners] == addresses
    assert server.listening_on_address == addresses[0]
    assert server.listening_on == addresses[0].port
    with pytest.raises(ServerClosed, match=r"paused \(refuse\).*until it is resumed"):
        _ = server.listening_socket
    assert server.describe()["is_paused"] == "refuse"
    assert server.num_connections == 1
    await served(live)
    await until(lambda: server.num_connections == 0)
    server.invariant()
    assert Fired(server.resume())
    assert server.is_paused is None
    assert all(x.is_listening for x in server.listeners)
    assert [x.address for x in server.listeners] == addresses
    for address in addresses:
        await served(connect(address))
    for one in server._listeners.ports:
        assert one.port.getHost() == one.address
    assert server.listening_socket.getsockname()[1] == server.listening_on


@ensureDeferred
async def test_who_waits_in_the_backlog_is_reset_by_refuse(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """Z3: the kernel had connected them; nobody had accepted them."""
    server = await serve(answer, where=everywhere(tmp_path), max_connections=1)
    live = connect(server)
    await until(lambda: server.num_connections == 1)
    waiting = [connect(x.address) for x in server.listeners]
    await until(lambda: queued(server) == 1)
    await server.pause("refuse")
    for client in waiting:
        with pytest.raises(ConnectionResetError):
            await in_thread(client.read_all)
    await served(live)
    await server.resume()
    for listener in server.listeners:
        await served(connect(listener.address))


@ensureDeferred
async def test_the_limit_holds_after_a_resume(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """Z4, A1: those of before still have their slots."""
    server = await serve(answer, where=everywhere(tmp_path), max_connections=1)
    live = connect(server)
    await until(lambda: server.num_connections == 1)
    await server.pause("refuse")
    await server.resume()
    waiting = [connect(x.address) for x in server.listeners]
    await settle()
    assert accepted(server) == 1
    await served(live)
    for client in waiting:
        await served(client)


@ensureDeferred
async def test_the_path_is_the_same_wherever_the_process_is(
    serve: Any, connect: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Z4: also after chdir, and with the permissions that it had."""
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o027)
    try:
        server = await serve(answer, where=WhereToListen.of_file("s"))
        mode = stat.S_IMODE(os.stat("s").st_mode)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        os.umask(0o077)
        await server.pause("refuse")
        assert not (tmp_path / "s").exists()
        await server.resume()
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode == 0o750
    assert server.listening_on == "s"
    await served(connect(UNIXAddress(str(tmp_path / "s"))))


@ensureDeferred
async def test_again_and_again(serve: Any, connect: Any, tmp_path: Path) -> None:
    """Z3, Z4: any number of times, with clients that are served and that wait."""
    server = await serve(answer, where=everywhere(tmp_path))
    for how in WAYS * 3:
        await server.pause(how)
        await server.resume()
        for listener in server.listeners:
            await served(connect(listener.address))
    assert accepted(server) == 18


# Z4: what was taken meanwhile.


@ensureDeferred
@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_an_address_that_was_taken_leaves_it_paused(
    taken: int, serve: Any, connect: Any, tmp_path: Path
) -> None:
    """Z4: an error, nothing half-open; and once it is free, resume works."""
    server = await serve(answer, where=everywhere(tmp_path))
    addresses = [x.address for x in server.listeners]
    await server.pause("refuse")
    before = open_descriptors()
    if taken < 2:
        thief = socket.create_server(
            (addresses[taken].host, addresses[taken].port),
            family=socket.AF_INET6 if taken else socket.AF_INET,
        )
    else:
        thief = socket.socket(socket.AF_UNIX)
        thief.bind(addresses[2].name)
        thief.listen()
    with thief:
        for change in (server.resume, lambda: server.pause("hold"), server.resume):
            with pytest.raises(CannotListenError) as failed:
                await change()
            assert failed.value.socketError.errno == errno.EADDRINUSE
            assert server.is_paused == "refuse"
            assert "paused (refuse)" in repr(server)
            assert not server.is_closed
            assert not any(x.is_listening for x in server.listeners)
            for number, address in enumerate(addresses):
                assert is_refused(address) is (number != taken)
        await server.pause("refuse")
    if taken == 2:
        os.unlink(addresses[2].name)
    assert open_descriptors() == before
    await server.resume()
    for address in addresses:
        await served(connect(address))


@ensureDeferred
async def test_without_descriptors_a_resume_leaves_it_paused(
    serve: Any, connect: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Z4: for a socket, or for the engine."""
    from tcpsvc.gate import Gate

    server = await serve(answer, where=everywhere(tmp_path))
    await server.pause("refuse")
    making = make_with(monkeypatch, failing("listen", errno.EMFILE))
    with pytest.raises(CannotListenError):
        await server.resume()
    opened = Gate.open

    def fail_for_unix(gate: Gate) -> None:
        opened(gate)
        if isinstance(gate._port.getHost(), UNIXAddress):
            monkeypatch.setattr(Gate, "open", opened)
            gate.close()
            raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Gate, "open", fail_for_unix)
    with pytest.raises(CannotListenError, match="too many open files"):
        await server.resume()
    assert server.is_paused == "refuse"
    assert not any(x.is_listening for x in server.listeners)
    assert all(made.fileno() == -1 for made in making.made)
    assert os.listdir(tmp_path) == []
    await turn()
    await server.resume()
    for listener in server.listeners:
        await served(connect(listener.address))


@pytest.fixture
def inherited() -> Iterator[socket.socket]:
    """A socket that listens already."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@ensureDeferred
@pytest.mark.parametrize("kind", ["fd", "given", "endpoint", "no_reuseaddr"])
@pytest.mark.parametrize("before", [None, "hold"])
async def test_what_could_not_be_opened_again_is_not_closed(
    kind: str,
    before: Any,
    serve: Any,
    connect: Any,
    tmp_path: Path,
    inherited: socket.socket,
) -> None:
    """Z4: pause("refuse") says so, and why, and changes nothing; hold works."""
    options: dict[str, Any] = {}
    bad, said = {
        "fd": (WhereToListen.of_fd(inherited.fileno()), "descriptor may hold it too"),
        "given": (LOOPBACK, "socket of one's own"),
        "endpoint": (
            WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1"),
            "an endpoint does not promise",
        ),
        "no_reuseaddr": (
            WhereToListen.bind_to(LOCALHOST, 0, reuseaddr=False),
            "without reuseaddr",
        ),
    }[kind]
    where: Any = [WhereToListen.of_file(tmp_path / "s"), bad]
    if kind == "given":
        where, options = bad, {"socket": socket.socket()}
    factory = Noted()
    server = await serve(factory, where=where, create=Server.create_protocol, **options)
    if before:
        await server.pause(before)
    was = state(server)
    named = r"pause\('refuse'\) closes .*{}.*Use pause\('hold'\)"
    with pytest.raises(ValueError, match=named.format(said)):
        await server.pause("refuse")
    assert state(server) == was
    await server.pause("hold")
    client = connect(server.listeners[-1].address)
    await settle()
    assert accepted(server) == 0
    await server.resume()
    assert await in_thread(client.read_all) == b"hello"
    assert factory.heard == ["start"]
    await server.close()
    assert factory.heard == ["start", "stop"]


@ensureDeferred
@pytest.mark.parametrize("how", ["stop", "", None, True])
async def test_another_word_is_an_error(how: Any, serve: Any, connect: Any) -> None:
    """Z1: it is named, and nothing changes."""
    server = await serve(answer)
    with pytest.raises(ValueError, match=rf"pause\({how!r}\): .*'hold' nor 'refuse'"):
        await server.pause(how)
    assert server.is_paused is None
    await served(connect(server))


# Z1: any order, any number of times.


@ensureDeferred
async def test_what_is_there_already_is_done_once(serve: Any, connect: Any) -> None:
    """Z1: each caller has a Deferred of their own."""
    server = await serve(answer)
    assert Fired(server.resume())
    await served(connect(server))
    first, second = server.pause("refuse"), server.pause("refuse")
    assert first is not second
    await second
    assert Fired(first)
    assert Fired(server.pause("refuse"))
    assert Fired(server.resume())
    assert Fired(server.resume())
    assert Fired(server.pause("hold"))
    assert Fired(server.pause("hold"))
    await server.resume()
    await served(connect(server))


@ensureDeferred
async def test_from_hold_to_refuse(serve: Any, connect: Any) -> None:
    """Z1: those who waited are reset."""
    server = await serve(answer)
    await server.pause("hold")
    client = connect(server)
    await until(lambda: queued(server) == 1)
    await server.pause("refuse")
    assert server.is_paused == "refuse"
    with pytest.raises(ConnectionResetError):
        await in_thread(client.read_all)
    assert is_refused(server)
    await server.resume()
    await served(connect(server))


@ensureDeferred
async def test_from_refuse_to_hold(serve: Any, connect: Any) -> None:
    """Z1: it listens again, and lets clients wait."""
    server = await serve(answer)
    await server.pause("refuse")
    await server.pause("hold")
    assert server.is_paused == "hold"
    assert server.listening_socket.getsockname()[1] == server.listening_on
    client = connect(server)
    client.send(b"early\n")
    await settle()
    assert accepted(server) == 0
    await server.resume()
    assert await in_thread(client.finish) == b"early\ngoodbye"


@ensureDeferred
async def test_changes_of_one_turn_take_effect_in_their_order(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """Z1: each waits for the one before."""
    server = await serve(answer, where=everywhere(tmp_path))
    order: list[str] = []
    changes = [
        server.pause("refuse"),
        server.resume(),
        server.pause("hold"),
        server.pause("refuse"),
        server.pause("hold"),
        server.resume(),
    ]
    for number, change in enumerate(changes):
        change.addCallback(
            lambda _, number=number: order.append(f"{number} {server.is_paused}")
        )
    assert order == []
    assert server.is_paused == "refuse"
    await changes[1]
    assert order[:2] == ["0 refuse", "1 None"]
    await changes[-1]
    assert order == [
        "0 refuse",
        "1 None",
        "2 hold",
        "3 refuse",
        "4 hold",
        "5 None",
    ]
    for listener in server.listeners:
        await served(connect(listener.address))


@ensureDeferred
async def test_cancelling_ends_the_waiting_only(serve: Any, logs: Any) -> None:
    """Z1: the change goes on; a failure that nobody hears of is logged."""
    server = await serve(answer)
    pausing, resuming = server.pause("refuse"), server.resume()
    for change in (pausing, resuming):
        change.cancel()
        with pytest.raises(CancelledError):
            await change
    await until(lambda: server.is_paused is None)
    assert server.listeners[0].is_listening
    pausing, resuming = server.pause("refuse"), server.resume()
    resuming.cancel()
    with pytest.raises(CancelledError):
        await resuming
    await server.close()
    await pausing
    [line] = logs.texts(LogLevel.error)
    assert "resume() on a server that is closed" in line


# Z5: with close.


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_closing_while_paused(
    how: Any, serve: Any, connect: Any, tmp_path: Path
) -> None:
    """Z5: it is closed as ever; nobody is left behind, nothing can be resumed."""
    factory = Noted()
    server = await serve(
        factory, where=everywhere(tmp_path), create=Server.create_protocol
    )
    await server.pause(how)
    closing = server.close()
    assert not Fired(closing)
    assert server.is_closed
    assert server.is_paused is None
    await closing
    await server.close_finished_and_handlers_determined()
    await server.failed()
    assert factory.heard == ["start", "stop"]
    assert os.listdir(tmp_path) == []
    assert " closed, 0/" in repr(server)
    assert "paused (" not in repr(server)
    with pytest.raises(ServerClosed, match="any more"):
        _ = server.listening_socket
    for change, said in (
        (lambda: server.pause("hold"), r"pause\('hold'\) on a server that is closed"),
        (lambda: server.pause("refuse"), r"pause\('refuse'\) on a server that is"),
        (server.resume, r"resume\(\) on a server that is closed"),
    ):
        with pytest.raises(ServerClosed, match=said):
            await change()


@ensureDeferred
async def test_closing_while_a_change_is_under_way(serve: Any, tmp_path: Path) -> None:
    """Z5: the sockets close, so the pause fires; what was to come after fails."""
    factory = Noted()
    server = await serve(
        factory, where=everywhere(tmp_path), create=Server.create_protocol
    )
    pausing, resuming = server.pause("refuse"), server.resume()
    closing = server.close()
    assert server.is_closed
    assert not Fired(closing)
    with pytest.raises(ServerClosed):
        await resuming
    await pausing
    await closing
    assert os.listdir(tmp_path) == []
    assert factory.heard == ["start", "stop"]
    await server.close_finished_and_handlers_determined()


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_the_end_waits_for_live_connections_of_before_the_pause(
    how: Any, serve: Any, connect: Any
) -> None:
    """Z5, X4: also of a server that was paused when it was closed."""
    server = await serve(answer)
    client = connect(server)
    client.send(b"started\n")
    assert await in_thread(client.read, 8) == b"started\n"
    await server.pause(how)
    over = Fired(server.close_finished_and_handlers_determined())
    failed = Fired(server.failed())
    await server.close()
    await settle()
    assert not over
    await served(client)
    await until(lambda: over)
    assert failed
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_connections_are_closed_while_paused(
    how: Any, serve: Any, connect: Any
) -> None:
    """Z5, X3."""
    server = await serve(answer)
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    await server.pause(how)
    await server.close(close_existing_connections=True)
    assert await in_thread(client.read_all) == b""
    await server.close_finished_and_handlers_determined()


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_an_error_closes_a_paused_server(
    how: Any, serve: Any, connect: Any
) -> None:
    """Z5, E2: on_handler_error="raise"."""

    async def fail(address: Any, reader: Any, writer: Any) -> None:
        await reader.readline()
        raise ValueError("oh dear")

    server = await serve(fail, on_handler_error="raise")
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    await server.pause(how)
    failed = server.failed()
    client.send(b"now\n")
    with pytest.raises(ValueError, match="oh dear"):
        await failed
    assert server.is_closed
    assert server.is_paused is None
    await server.close_finished_and_handlers_determined()
    with pytest.raises(ServerClosed):
        await server.resume()


# Z1: from anywhere.


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_a_handler_pauses_its_own_server(
    how: Any, serve: Any, connect: Any
) -> None:
    """Z1: and goes on itself."""
    servers: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        async for line in reader:
            if line == b"pause\n":
                await servers[0].pause(how)
            else:
                await servers[0].resume()
            writer.write(line)

    servers.append(await serve(handler))
    client = connect(servers[0])
    for _ in range(2):
        client.send(b"pause\n")
        assert await in_thread(client.read, 6) == b"pause\n"
        assert servers[0].is_paused == how
        client.send(b"resume\n")
        assert await in_thread(client.read, 7) == b"resume\n"
        assert servers[0].is_paused is None
    other = connect(servers[0])
    other.send(b"resume\n")
    assert await in_thread(other.read, 7) == b"resume\n"


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_a_pause_from_within_an_accept_ends_the_batch(
    how: Any, serve: Any, connect: Any
) -> None:
    """Z1: a protocol's connectionMade runs while the port is being read from."""
    made: list[Any] = []
    pausing: list[Deferred[None]] = []

    class Pausing(Protocol):
        def connectionMade(self) -> None:
            made.append(self)
            if len(made) == 2:
                pausing.append(server.pause(how))
            self.transport.write(b"hello")

    server = await serve(
        Factory.forProtocol(Pausing),
        create=Server.create_protocol,
        max_accepts_per_batch=10,
    )
    await server.pause("hold")
    clients = [connect(server) for _ in range(4)]
    await until(lambda: queued(server) == 4)
    await server.resume()
    await until(lambda: len(made) == 2)
    await pausing[0]
    await settle()
    assert len(made) == server.num_connections == 2
    for client in clients[:2]:
        assert await in_thread(client.read, 5) == b"hello"
    await server.resume()
    if how == "hold":
        await until(lambda: len(made) == 4)
    else:
        for client in clients[2:]:
            with pytest.raises(ConnectionResetError):
                await in_thread(client.read_all)
        connect(server)
        await until(lambda: len(made) == 3)


@ensureDeferred
@pytest.mark.parametrize(
    ("kind", "at", "how"),
    [
        ("stream", "tcp", "hold"),
        ("stream", "tcp", "refuse"),
        ("stream", "ungated", "hold"),
        ("sock", "tcp", "hold"),
    ],
)
async def test_who_was_accepted_gets_the_slot_of_one_whose_eviction_pauses(
    serve: Any, connect: Any, tmp_path: Path, kind: str, at: str, how: str
) -> None:
    """Z1, N1: its accept is what the eviction was for, so it came before the pause."""
    started: list[Any] = []

    async def handle(address: Any, *_: Any) -> None:
        started.append(address)
        try:
            await Deferred()
        finally:
            if len(started) == 1:
                server.pause(how)

    server = await serve(
        handle,
        where=place(at, tmp_path),
        create=KINDS[kind].create,
        max_connections=1,
        overflow="evict",
    )
    connect(server)
    await until(lambda: started)
    connect(server)
    await until(lambda: len(started) == 2)
    assert server.is_paused == how
    if how == "hold":
        connect(server)
        await settle()
        assert len(started) == 2
        assert server.num_connections == 1


@ensureDeferred
async def test_handlers_that_were_accepted_start(serve: Any, connect: Any) -> None:
    """Z1: a pause between the accept and the handler's turn does not concern them."""
    server = await serve(answer)
    port = server._listeners.ports[0].port
    accept_batch = port.doRead
    pausing: list[Deferred[None]] = []

    def accept_and_pause() -> None:
        accept_batch()
        pausing.append(server.pause("refuse"))

    port.doRead = accept_and_pause
    client = connect(server)
    await until(lambda: pausing)
    await pausing[0]
    await served(client)


@ensureDeferred
async def test_the_applications_factory_hears_nothing(serve: Any, connect: Any) -> None:
    """Z6: it is told of no stop while its connections go on and it is to come back."""
    factory = Noted()
    places = [LOOPBACK, LOOPBACK6]
    server = await serve(factory, where=places, create=Server.create_protocol)
    for _ in range(2):
        await server.pause("refuse")
        await server.pause("hold")
        await server.pause("refuse")
        await server.resume()
    assert factory.heard == ["start"]
    assert await in_thread(connect(server).read_all) == b"hello"
    await server.close()
    assert factory.heard == ["start", "stop"]


# With a service, and before the first client.


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_paused_before_it_has_begun(how: Any, connect: Any) -> None:
    """Z1: a server that is bound and not begun; resume alone lets nobody in."""
    service = TcpService(LOOPBACK, answer, on_handler_error="ignore")
    await service.bind()
    server = service.server
    assert server is not None
    await server.pause(how)
    if how == "refuse":
        await server.resume()
        client = connect(server)
        await settle()
        assert accepted(server) == 0
        client.close()
        await server.pause(how)
    service.startService()
    assert server.is_paused == how
    assert is_refused(server) is (how == "refuse")
    await settle()
    assert accepted(server) == 0
    await server.resume()
    await served(connect(server))
    await service.stopService()


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_a_service_stops_and_starts_while_paused(
    how: Any, connect: Any, tmp_path: Path
) -> None:
    """Z5: a new start is a new server, which is not paused."""
    service = TcpService(everywhere(tmp_path), answer, on_handler_error="ignore")
    service.startService()
    assert service.server is not None
    await service.server.pause(how)
    await service.stopService()
    assert os.listdir(tmp_path) == []
    service.startService()
    assert service.server is not None
    assert service.server.is_paused is None
    await served(connect(service.server.listeners[2].address))
    await service.stopService()


@ensureDeferred
@pytest.mark.parametrize("how", WAYS)
async def test_abandoned_while_paused(how: Any, tmp_path: Path) -> None:
    """Z5: a daemon that fails to start leaves nothing."""
    factory = Noted()
    service = TcpService.of_protocols(
        everywhere(tmp_path), factory, on_handler_error="ignore"
    )
    await service.bind()
    assert service.server is not None
    await service.server.pause(how)
    server = service.server
    service.abandon()
    assert os.listdir(tmp_path) == []
    assert factory.heard == ["start", "stop"]
    server.invariant()
    await server.close_finished()
    await server.close_finished_and_handlers_determined()
    await server.failed()


@ensureDeferred
async def test_observers_hear_of_it(serve: Any) -> None:
    """Of each change once, in order; of none that fails or changes nothing."""
    seen = Seen()
    server = await serve(answer, observer=seen)
    for change in ("hold", "hold", "refuse", "hold", None, None, "refuse"):
        await (server.pause(change) if change else server.resume())
    with pytest.raises(ValueError, match="wrong"):
        await server.pause("wrong")
    with socket.socket() as other:
        other.bind((LOCALHOST, server.listening_on))
        other.listen()
        with pytest.raises(CannotListenError):
            await server.resume()
    await server.resume()
    assert seen.events == [
        ("server_paused", "hold"),
        ("server_paused", "refuse"),
        ("server_paused", "hold"),
        ("server_resumed",),
        ("server_paused", "refuse"),
        ("server_resumed",),
    ]
    await server.pause("hold")
    await server.close()
    assert seen.events[-1] == ("server_paused", "hold")


@pytest.mark.parametrize("how", WAYS)
@ensureDeferred
async def test_whoever_hears_of_it_may_do_the_opposite_or_close(
    serve: Any, how: Any
) -> None:
    """What it asks for comes after what it hears of."""

    class Contrary(Observer):
        def server_paused(self, how: str) -> None:
            server.resume()

        def server_resumed(self) -> None:
            server.close()

    server = await serve(answer, observer=Contrary())
    await server.pause(how)
    await server.close_finished()
    assert server.is_paused is None
    server.invariant()


@ensureDeferred
async def test_nobody_is_evicted_for_who_has_to_wait_for_the_resume(
    serve: Any, connect: Any
) -> None:
    """On a port that cannot be gated, which accepts while paused."""
    staying = Staying()
    server = await serve(
        staying.stream,
        where=WhereToListen.of_endpoint(OtherEndpoint()),
        overflow="evict",
        max_connections=1,
    )
    connect(server)
    await until(lambda: len(staying.started) == 1)
    await server.pause("hold")
    connect(server)
    await until(lambda: server.describe()["held"])
    assert server.describe()["counters"]["ends"] == {}
    await server.resume()
    await until(lambda: len(staying.started) == 2)
    assert server.describe()["counters"]["ends"] == {"evicted": 1}


@pytest.mark.parametrize("how", WAYS)
@ensureDeferred
async def test_who_was_accepted_and_waits_for_a_slot_is_served_while_paused(
    serve: Any, connect: Any, how: Any
) -> None:
    """The newcomer that another one was evicted for has been accepted already."""
    let_go: Deferred[None] = Deferred()
    started: list[Any] = []

    async def takes_its_time(address: Any, reader: Any, writer: Any) -> None:
        started.append(address)
        try:
            await reader.drain_to_eof()
            await Deferred()
        except CancelledError:
            await let_go

    server = await serve(takes_its_time, overflow="evict", max_connections=1)
    connect(server)
    await until(lambda: len(started) == 1)
    connect(server)
    await until(lambda: server.describe()["held"] == 1)
    await server.pause(how)
    let_go.callback(None)
    await until(lambda: len(started) == 2)
    assert server.is_paused == how
    server.invariant()


@ensureDeferred
async def test_who_was_accepted_in_a_pause_waits_behind_who_was_before(
    serve: Any, connect: Any
) -> None:
    """On a port that cannot be gated, which accepts while paused; a further word of
    pause changes nothing about it."""
    staying = Staying()
    server = await serve(
        staying.stream,
        where=WhereToListen.of_endpoint(OtherEndpoint()),
        max_connections=1,
    )
    first = connect(server)
    await until(lambda: len(staying.started) == 1)
    connect(server)
    await until(lambda: server.describe()["held"] == 1)
    await server.pause("hold")
    connect(server)
    await until(lambda: server.describe()["held"] == 2)
    await server.pause("hold")
    server.max_connections = 3
    await until(lambda: len(staying.started) == 2)
    await settle()
    assert server.describe()["held"] == 1
    await server.resume()
    await until(lambda: len(staying.started) == 3)
    first.close()
