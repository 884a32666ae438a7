"""One server that listens in several places (spec L)."""

from __future__ import annotations

import errno
import os
import select
import socket
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import LogLevel

from tcpsvc import LOCALHOST, Server, TcpService, WhereToListen
from tests.daemons import stop, twistd
from tests.kinds import OtherEndpoint
from tests.support import (
    LOOPBACK,
    Client,
    in_thread,
    open_descriptors,
    settle,
    turn,
    until,
)
from tests.test_accepting import Handlers, handlers
from tests.test_service import SlowEndpoint
from tests.test_where import make_with

__all__ = ["handlers"]

LOOPBACK6 = WhereToListen.bind_to("::1", 0)


async def greet(address: Any, reader: Any, writer: Any) -> None:
    """Say hello."""
    writer.write(b"hello")


async def stay(address: Any, reader: Any, writer: Any) -> None:
    """Greet, and end with the client."""
    writer.write(b"hello")
    await reader.drain_to_eof()


def sock_greet(address: Any, client: socket.socket) -> None:
    """Say hello on a socket."""
    client.send(b"hello")


class Greeting(Protocol):
    """Says hello and goes."""

    def connectionMade(self) -> None:
        self.transport.write(b"hello")
        self.transport.loseConnection()


class Noted(Factory):
    """Notes when Twisted says that it starts and stops."""

    protocol = Greeting
    noisy = False

    def __init__(self) -> None:
        self.heard: list[str] = []

    def startFactory(self) -> None:
        self.heard.append("start")

    def stopFactory(self) -> None:
        self.heard.append("stop")


def sockets() -> dict[int, str]:
    """The open sockets of this process."""
    found = open_descriptors()
    return {fd: what for fd, what in found.items() if what.startswith("socket:")}


# L1: one server.


@ensureDeferred
async def test_it_serves_in_all_of_its_places(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """L1: IPv4, IPv6, UNIX and an endpoint; each has its listener."""
    places = [
        LOOPBACK,
        LOOPBACK6,
        WhereToListen.of_file(tmp_path / "s"),
        WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1"),
    ]
    server = await serve(greet, where=places)
    assert [x.where for x in server.listeners] == places
    kinds = [type(x.address) for x in server.listeners]
    assert kinds == [IPv4Address, IPv6Address, UNIXAddress, IPv4Address]
    assert all(x.is_listening for x in server.listeners)
    for listener in server.listeners:
        assert await in_thread(connect(listener.address).read_all) == b"hello"
    first = server.listeners[0]
    assert server.listening_on == first.listening_on == first.address.port
    assert server.listening_on_address is first.address
    assert server.listening_socket.getsockname() == ("127.0.0.1", server.listening_on)
    assert server.listeners[2].listening_on == str(tmp_path / "s")
    assert server.listeners[3].listening_on == server.listeners[3].address
    assert server.describe()["counters"]["accepted"] == 4
    await server.close()
    assert not any(x.is_listening for x in server.listeners)
    assert server.listeners[1].listening_on == first.listening_on
    assert os.listdir(tmp_path) == []
    for listener in server.listeners:
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            connect(listener.address)


@ensureDeferred
@pytest.mark.parametrize(
    ("create", "handler"),
    [
        (Server.create, greet),
        (Server.create_sock, sock_greet),
        (Server.create_protocol, Factory.forProtocol(Greeting)),
    ],
)
@pytest.mark.parametrize("inet", [False, True])
async def test_every_creator_takes_several(
    create: Any, handler: Any, inet: bool, serve: Any, connect: Any, tmp_path: Path
) -> None:
    """L1: create, create_sock, create_protocol, and their inet forms."""
    places = (LOOPBACK, LOOPBACK6)
    if inet:
        now = getattr(Server, create.__name__ + "_inet")

        async def create(*args: Any, **options: Any) -> Any:
            return now(*args, **options)
    else:
        places += (WhereToListen.of_file(tmp_path / "s"),)  # type: ignore[assignment]
    server = await serve(handler, where=places, create=create)
    assert len(server.listeners) == len(places)
    for listener in server.listeners:
        assert await in_thread(connect(listener.address).read_all) == b"hello"


@ensureDeferred
async def test_one_place_in_a_sequence_is_one_place(serve: Any, connect: Any) -> None:
    """L1: as without the sequence."""
    server = await serve(greet, where=[LOOPBACK])
    [listener] = server.listeners
    assert await in_thread(connect(listener.address).read_all) == b"hello"
    [listener] = (await serve(greet)).listeners
    assert listener.where is LOOPBACK


@ensureDeferred
@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ([], ValueError, r"where=\[\] is empty"),
        ((), ValueError, r"where=\(\) is empty"),
        ("127.0.0.1:80", TypeError, "where='127.0.0.1:80' is not a WhereToListen"),
        ([LOOPBACK, 80], TypeError, "where=80 is not a WhereToListen"),
        (80, TypeError, r"where=80 is not .*; a port is WhereToListen.of_port\(80\)"),
        (
            "tcp:80",
            TypeError,
            r"where='tcp:80' .* WhereToListen.of_endpoint",
        ),
    ],
)
async def test_what_is_no_place_is_refused(where: Any, error: Any, said: str) -> None:
    """L1: before anything is opened, and a socket that was given is closed."""
    for create in (Server.create, Server.create_inet):
        given = socket.socket()
        with pytest.raises(error, match=said):
            await create(where, greet, on_handler_error="ignore", socket=given)
        assert given.fileno() == -1
    with pytest.raises(error, match=said):
        TcpService(where, greet, on_handler_error="ignore")


@ensureDeferred
async def test_a_given_socket_is_for_one_place(serve: Any, tmp_path: Path) -> None:
    """L1, W7: with several it is an error, and closed."""
    given = socket.socket()
    with pytest.raises(ValueError, match=r"socket=.* with 2 places"):
        await serve(greet, where=[LOOPBACK, LOOPBACK6], socket=given)
    assert given.fileno() == -1
    given = socket.socket()
    server = await serve(greet, where=[LOOPBACK], socket=given)
    assert server.listening_socket is given


def test_the_inet_forms_name_the_place_that_is_none(tmp_path: Path) -> None:
    """L1: nothing is opened."""
    where: Any = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    with pytest.raises(ValueError, match=r"unix:.*/s> is no inet address"):
        Server.create_inet(where, greet, on_handler_error="ignore")
    assert os.listdir(tmp_path) == []


# L1: all or none.


@ensureDeferred
@pytest.mark.parametrize("kind", ["port", "path", "fd", "endpoint", "description"])
@pytest.mark.parametrize("position", [0, 1, 3])
async def test_when_one_fails_nothing_is_left(
    kind: str, position: int, tmp_path: Path
) -> None:
    """L1, W8: whichever it is; the error is its own, the factory was not misled."""
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        bad, error, said = {
            "port": (WhereToListen.bind_to(LOCALHOST, port), CannotListenError, port),
            "path": (
                WhereToListen.of_file(tmp_path / "none" / "s"),
                CannotListenError,
                "none/s",
            ),
            "fd": (WhereToListen.of_fd(9999), ValueError, "fd=9999"),
            "endpoint": (
                WhereToListen.of_endpoint(f"tcp:{port}:interface=127.0.0.1"),
                CannotListenError,
                port,
            ),
            "description": (WhereToListen.of_endpoint("x:1"), ValueError, "x:1"),
        }[kind]
        places: list[Any] = [
            LOOPBACK,
            WhereToListen.of_file(tmp_path / "s"),
            WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1"),
        ]
        places.insert(position, bad)
        factory = Noted()
        before = sockets()
        with pytest.raises(error, match=str(said)):
            await Server.create_protocol(places, factory, on_handler_error="ignore")
        assert sockets() == before
        assert os.listdir(tmp_path) == []
        assert factory.heard in ([], ["start", "stop"])


@ensureDeferred
async def test_an_endpoint_that_fails_takes_the_slow_ones_with_it(
    tmp_path: Path,
) -> None:
    """L1: it is not waited for them; what they open afterwards is closed."""
    slow, slower = SlowEndpoint(), SlowEndpoint()
    path = tmp_path / "s"
    creating = Server.create(
        [
            WhereToListen.of_endpoint(slow),
            WhereToListen.of_file(path),
            WhereToListen.of_endpoint(slower),
        ],
        greet,
        on_handler_error="ignore",
    )
    assert path.exists()
    slower.go.errback(CannotListenError("", 3, OSError("not today")))
    with pytest.raises(CannotListenError, match="not today"):
        await creating
    assert not path.exists()
    slow.go.callback(None)
    assert slow.address is not None
    with pytest.raises(ConnectionRefusedError):
        Client(slow.address)


@ensureDeferred
async def test_a_create_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """L1, W8: while an endpoint takes its time, and another has its port."""
    slow = SlowEndpoint()
    before = sockets()
    creating = Server.create(
        [
            WhereToListen.of_file(tmp_path / "s"),
            LOOPBACK,
            WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1"),
            WhereToListen.of_endpoint(slow),
        ],
        greet,
        on_handler_error="ignore",
    )
    assert len(sockets()) == len(before) + 3
    creating.cancel()
    with pytest.raises(CancelledError):
        await creating
    assert sockets() == before
    assert os.listdir(tmp_path) == []
    slow.go.callback(None)
    with pytest.raises(ConnectionRefusedError):
        Client(slow.address)


@ensureDeferred
async def test_nobody_is_let_in_before_all_are_bound(
    serve: Any, connect: Any, tmp_path: Path, handlers: Handlers
) -> None:
    """L1: early clients wait in the backlog, and are not lost."""
    slow = SlowEndpoint()
    path = tmp_path / "s"
    places = [WhereToListen.of_file(path), WhereToListen.of_endpoint(slow)]
    serving = Deferred.fromCoroutine(serve(handlers, where=places))
    client = connect(UNIXAddress(str(path)))
    client.send(b"early\n")
    await settle()
    assert handlers.addresses == []
    slow.go.callback(None)
    handlers.watch(await serving)
    await until(lambda: handlers.lines == [b"early\n"])
    handlers.end_all()
    assert await in_thread(client.read_all) == b"done early\n"


# L2: one port.


@ensureDeferred
async def test_the_chosen_port_is_the_same_on_all_addresses(serve: Any) -> None:
    """L2: of the first, for every address that asks for a free one."""
    other = WhereToListen.bind_to("127.0.0.2", 0, reuseport=True)
    server = await serve(greet, where=[LOOPBACK, LOOPBACK6, other])
    assert {x.listening_on for x in server.listeners} == {server.listening_on}
    hosts = [x.address.host for x in server.listeners]
    assert hosts == ["127.0.0.1", "::1", "127.0.0.2"]
    everywhere = [
        WhereToListen.of_port_chosen_by_os(),
        WhereToListen.bind_to("::", 0),
    ]
    both = await serve(greet, where=everywhere)
    assert both.listeners[1].listening_on == both.listening_on


@ensureDeferred
async def test_an_address_that_comes_again_has_a_port_of_its_own(serve: Any) -> None:
    """L2: whoever asks twice for a free port of one address wants two."""
    again = WhereToListen.bind_to("0::1", 0)
    fixed = await serve(greet)
    await fixed.close()
    server = await serve(
        greet,
        where=[
            LOOPBACK,
            LOOPBACK6,
            WhereToListen.bind_to(LOCALHOST, fixed.listening_on),
            LOOPBACK,
            again,
        ],
    )
    ports = [x.listening_on for x in server.listeners]
    assert ports[0] == ports[1]
    assert ports[3] == ports[4]
    assert ports[2] == fixed.listening_on
    assert len(set(ports)) == 3


def choosing(*ports: int) -> type[socket.socket]:
    """A kind of socket that is given these ports when it asks for a free one."""
    left = list(ports)

    class Choosing(socket.socket):
        def bind(self, address: Any) -> None:
            if address[1] == 0 and left:
                address = (address[0], left.pop(0), *address[2:])
            super().bind(address)

    return Choosing


@pytest.fixture
def taken6() -> Any:
    """A port that is taken on ::1, and free on 127.0.0.1."""
    while True:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as used:
            port = used.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port)).close()
            except OSError:
                continue
            yield port
            return


@ensureDeferred
async def test_a_port_that_is_taken_elsewhere_is_given_up(
    serve: Any, connect: Any, taken6: int, monkeypatch: Any, tmp_path: Path
) -> None:
    """L2: it starts over with another one; the other places are not disturbed."""
    making = make_with(monkeypatch, choosing(taken6, taken6))
    path = WhereToListen.of_file(tmp_path / "s")
    server = await serve(greet, where=[path, LOOPBACK, LOOPBACK6])
    assert server.listeners[1].listening_on == server.listeners[2].listening_on
    assert server.listeners[1].listening_on != taken6
    assert len(making.made) == 1 + 3 * 2
    assert sum(made.fileno() != -1 for made in making.made) == 3
    for listener in server.listeners:
        assert await in_thread(connect(listener.address).read_all) == b"hello"


@ensureDeferred
async def test_it_starts_over_a_bounded_number_of_times(
    serve: Any, taken6: int, monkeypatch: Any, tmp_path: Path
) -> None:
    """L2: then it is an error that says how often, and nothing is left."""
    making = make_with(monkeypatch, choosing(*[taken6] * 100))
    path = WhereToListen.of_file(tmp_path / "s")
    said = r"::1:\d+: .*after 10 retries: .* 127.0.0.1:0, \[::1\]:0 alike"
    with pytest.raises(CannotListenError, match=said) as failed:
        await serve(greet, where=[path, LOOPBACK, LOOPBACK6])
    assert failed.value.socketError.errno == errno.EADDRINUSE
    assert len(making.made) == 1 + 11 * 2
    assert all(made.fileno() == -1 for made in making.made)
    assert os.listdir(tmp_path) == []


@ensureDeferred
async def test_another_error_is_not_tried_again(serve: Any, monkeypatch: Any) -> None:
    """L2: an address that is not there will not be the next time."""
    making = make_with(monkeypatch, socket.socket)
    not_here = WhereToListen.bind_to("192.0.2.1", 0)
    with pytest.raises(CannotListenError, match=r"192\.0\.2\.1") as failed:
        await serve(greet, where=[LOOPBACK, not_here])
    assert failed.value.socketError.errno == errno.EADDRNOTAVAIL
    assert len(making.made) == 2


# L3: one limit.


@ensureDeferred
@pytest.mark.parametrize("batch", [1, 3])
async def test_the_limit_is_exact_over_all_listeners(
    batch: int, serve: Any, connect: Any, tmp_path: Path, handlers: Handlers
) -> None:
    """L3, A1: whoever is beyond it waits, wherever it has connected."""
    places = [LOOPBACK, LOOPBACK6, WhereToListen.of_file(tmp_path / "s")]
    server = handlers.watch(
        await serve(
            handlers, where=places, max_connections=2, max_accepts_per_batch=batch
        )
    )
    clients = []
    for number in range(9):
        client = connect(server.listeners[number % 3].address)
        client.send(b"%d\n" % number)
        clients.append(client)
    for ended in range(9):
        await until(lambda: handlers.running == min(2, 9 - ended))  # noqa: B023
        await settle()
        assert server.num_connections == min(2, 9 - ended)
        server.invariant()
        handlers.end_oldest()
    for number, client in enumerate(clients):
        assert await in_thread(client.read_all) == b"done %d\n" % number
    assert handlers.peak == 2


@ensureDeferred
async def test_a_place_that_one_frees_is_anothers(
    serve: Any, connect: Any, tmp_path: Path, handlers: Handlers
) -> None:
    """L3: and a limit that is raised, and dropping, hold for all."""
    places = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    server = await serve(handlers, where=places, max_connections=1)
    connect(server.listeners[0].address).send(b"tcp\n")
    await until(lambda: handlers.lines)
    connect(server.listeners[1].address).send(b"unix\n")
    connect(server.listeners[0].address).send(b"more\n")
    await settle()
    assert handlers.lines == [b"tcp\n"]
    handlers.end_oldest()
    await until(lambda: len(handlers.lines) == 2)
    await settle()
    assert handlers.running == 1
    server.max_connections = 2
    await until(lambda: len(handlers.lines) == 3)
    waiting = [connect(x.address) for x in server.listeners]
    await settle()
    server.set_drop_incoming_connections(True)
    for client in waiting:
        assert await in_thread(client.read_all) == b""
    handlers.end_all()


@ensureDeferred
@pytest.mark.parametrize("busy", [0, 1])
async def test_a_busy_listener_does_not_starve_another(
    busy: int, serve: Any, connect: Any, tmp_path: Path
) -> None:
    """L3: when places are found one by one, they have their turns."""
    places = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    served: list[bool] = []
    ends: list[Deferred[None]] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        served.append(isinstance(address, UNIXAddress) == bool(busy))
        ends.append(Deferred())
        await ends[-1]

    server = await serve(handler, where=places, max_connections=1)
    for _ in range(12):
        connect(server.listeners[busy].address)
    for _ in range(4):
        connect(server.listeners[1 - busy].address)
    for number in range(16):
        await until(lambda: len(served) == number + 1)  # noqa: B023
        ends[number].callback(None)
    assert served.count(False) == 4
    assert served[:9].count(False) == 4, served


@ensureDeferred
async def test_three_listeners_have_their_turns(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """L3: round and round."""
    places = [LOOPBACK, LOOPBACK6, WhereToListen.of_file(tmp_path / "s")]
    served: list[str] = []
    ends: list[Deferred[None]] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        served.append(type(address).__name__)
        ends.append(Deferred())
        await ends[-1]

    server = await serve(handler, where=places, max_connections=1)
    for listener in server.listeners:
        for _ in range(4):
            connect(listener.address)
    for number in range(12):
        await until(lambda: len(served) == number + 1)  # noqa: B023
        ends[number].callback(None)
    for begin in range(1, 8):
        assert len(set(served[begin : begin + 3])) == 3, served


@ensureDeferred
async def test_the_warning_at_the_limit_names_all_addresses(
    serve: Any, connect: Any, tmp_path: Path, logs: Any
) -> None:
    """L3, A3: the limit is of all of them."""
    places = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    server = await serve(stay, where=places, max_connections=1)
    connect(server.listeners[1].address)
    await until(lambda: server.num_connections == 1)
    [warning] = logs.texts(LogLevel.warn)
    assert warning == (
        f"127.0.0.1:{server.listening_on}, unix:{tmp_path}/s: all 1 connections are "
        "in use; further clients wait"
    )


# L4: a connection is of its listener.


@ensureDeferred
async def test_a_connection_has_its_own_listeners_address(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """L4: while it lives, and when asked for after all has ended."""
    writers: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writers.append(writer)
        writer.write(b"hello")

    places = [LOOPBACK, LOOPBACK6, WhereToListen.of_file(tmp_path / "s")]
    server = await serve(handler, where=places)
    for number, listener in enumerate(server.listeners):
        assert await in_thread(connect(listener.address).read_all) == b"hello"
        await until(lambda: server.num_connections == 0)
        host = writers[number].host
        if number < 2:
            assert (host.host, host.port) == (
                listener.address.host,
                listener.address.port,
            )
        else:
            assert host == listener.address


@ensureDeferred
@pytest.mark.parametrize("position", [0, 1])
async def test_every_connection_has_nodelay_whoever_opened_its_listener(
    position: int, serve: Any, connect: Any
) -> None:
    """L4, A7: one listener's sockets inherit it, another's do not."""
    seen: list[int] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        client = writer.transport.getHandle()
        seen.append(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    with socket.create_server(("127.0.0.1", 0)) as inherited:
        places = [LOOPBACK]
        places.insert(position, WhereToListen.of_fd(inherited.fileno()))  # type: ignore[arg-type]
        server = await serve(handler, where=places)
        for listener in server.listeners:
            connect(listener.address)
        await until(lambda: len(seen) == 2)
        assert all(seen)
        await server.close()


@ensureDeferred
async def test_a_port_that_cannot_be_gated_beside_one_that_can(
    serve: Any, connect: Any, handlers: Handlers, logs: Any
) -> None:
    """L3, A1: no more handlers than the limit, wherever the clients come from."""
    places = [LOOPBACK, WhereToListen.of_endpoint(OtherEndpoint())]
    server = handlers.watch(await serve(handlers, where=places, max_connections=1))
    assert len([x for x in logs.texts(LogLevel.warn) if "cannot be gated" in x]) == 1
    for number in range(4):
        connect(server.listeners[number % 2].address).send(b"%d\n" % number)
    for number in range(4):
        await until(lambda: len(handlers.lines) == number + 1)  # noqa: B023
        handlers.end_oldest()
    assert handlers.peak == 1
    await server.close()


# Its end, and how it looks.


@ensureDeferred
async def test_the_applications_factory_starts_and_stops_once(
    serve: Any, connect: Any
) -> None:
    """L1, P2: with the first listener and the last."""
    factory = Noted()
    places = [LOOPBACK, LOOPBACK6]
    server = await serve(factory, where=places, create=Server.create_protocol)
    assert await in_thread(connect(server).read_all) == b"hello"
    assert factory.heard == ["start"]
    await server.close()
    assert factory.heard == ["start", "stop"]


@ensureDeferred
async def test_an_error_closes_all_listeners(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """L1, E2: with on_handler_error="raise"."""

    async def fail(address: Any, reader: Any, writer: Any) -> None:
        raise ValueError("oh dear")

    places = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    server = await serve(fail, where=places, on_handler_error="raise")
    failed = server.failed()
    connect(server.listeners[1].address)
    with pytest.raises(ValueError, match="oh dear"):
        await failed
    await server.close_finished_and_handlers_determined()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConnectionRefusedError):
        connect(server)


@ensureDeferred
async def test_how_a_server_and_its_listeners_look(serve: Any, tmp_path: Path) -> None:
    """L1, I3, I4: repr and describe tell all places."""
    places = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    server = await serve(greet, where=places, max_connections=5)
    port, path = server.listening_on, tmp_path / "s"
    assert repr(server) == (
        f"<Server on 127.0.0.1:0, unix:{path} listening, 0/5 connections>"
    )
    assert [repr(x) for x in server.listeners] == [
        f"<Listener on 127.0.0.1:0 at 127.0.0.1:{port}, listening>",
        f"<Listener on unix:{path} at unix:{path}, listening>",
    ]
    described = server.describe()
    assert described["where"] == "127.0.0.1:0"
    assert described["listening_on"] == port
    assert [x["where"] for x in described["listeners"]] == [
        "127.0.0.1:0",
        f"unix:{path}",
    ]
    assert [x["listening_on"] for x in described["listeners"]] == [port, str(path)]
    assert all(x["is_listening"] for x in described["listeners"])
    await server.close()
    assert repr(server.listeners[0]).endswith("not listening>")
    assert not any(x["is_listening"] for x in server.describe()["listeners"])


# As a service, and under twistd.


@ensureDeferred
async def test_a_service_with_several_listeners(
    connect: Any, tmp_path: Path, logs: Any
) -> None:
    """One server, a line for each address; stopped and started again."""
    places = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    service = TcpService(places, greet, on_handler_error="ignore", max_connections=3)
    assert service.where == tuple(places)
    assert repr(service) == (f"<TcpService on 127.0.0.1:0, unix:{tmp_path}/s stopped>")
    for _ in range(2):
        logs.events.clear()
        service.startService()
        server = service.server
        assert server is not None
        lines = [x for x in logs.texts(LogLevel.info) if "listening on" in x]
        assert lines == [
            f"listening on 127.0.0.1:{server.listening_on}",
            f"listening on unix:{tmp_path}/s",
        ]
        for listener in server.listeners:
            assert await in_thread(connect(listener.address).read_all) == b"hello"
        await service.stopService()
        assert os.listdir(tmp_path) == []


def test_a_service_names_the_descriptor_that_it_cannot_have() -> None:
    """own=True is looked for in each place."""
    where = [LOOPBACK, WhereToListen.of_fd(3, own=True)]
    with pytest.raises(ValueError, match="fd:3> with own=True"):
        TcpService(where, greet, on_handler_error="ignore")


@ensureDeferred
async def test_a_service_that_is_abandoned_while_an_endpoint_is_slow(
    tmp_path: Path,
) -> None:
    """What was open by then is closed."""
    slow = SlowEndpoint()
    places = [WhereToListen.of_file(tmp_path / "s"), WhereToListen.of_endpoint(slow)]
    service = TcpService(places, greet, on_handler_error="ignore")
    binding = service.bind()
    assert os.listdir(tmp_path) == ["s"]
    service.abandon()
    with pytest.raises(CancelledError):
        await binding
    assert os.listdir(tmp_path) == []


@ensureDeferred
async def test_without_a_descriptor_for_the_engine_nothing_is_left(
    monkeypatch: Any, tmp_path: Path
) -> None:
    """L1, W8: the second gate fails to open; the first is closed again."""
    from tcpsvc.gate import Gate

    opened = Gate.open
    count = 0

    def fail_at_second(gate: Gate) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.EMFILE, "too many open files")
        opened(gate)

    monkeypatch.setattr(Gate, "open", fail_at_second)
    places = [LOOPBACK, WhereToListen.of_file(tmp_path / "s")]
    with pytest.raises(CannotListenError, match="too many open files"):
        await Server.create(places, greet, on_handler_error="ignore")
    assert os.listdir(tmp_path) == []
    await turn()


@pytest.mark.whatever("engine")
def test_twistd_has_one_limit_and_one_drain_over_all(start: Any, connect: Any) -> None:
    """--max-connections is for all places together."""
    child = start(
        *twistd(
            "-n", "tcpsvc", "--handler=hands.obey", "--max-connections=1",
            "--port=0", "--socket=a.sock", "--listen=tcp:0:interface=127.0.0.1",
        )
    )  # fmt: skip
    child.expect("listening on", count=3)
    [port] = child.expect(r"listening on 0\.0\.0\.0:(\d+)\n")
    first = connect(UNIXAddress(str(child.directory / "a.sock")))
    assert first.read(6) == b"hello\n"
    second = connect(IPv4Address("TCP", "127.0.0.1", int(port)))
    first.send(b"uid\n")
    assert int(first.socket.recv(100)) == os.getuid()
    assert select.select([second.socket], [], [], 0)[0] == []
    first.close()
    assert second.read(6) == b"hello\n"
    second.close()
    stop(child)
