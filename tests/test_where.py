"""Where a server listens, and what creating it leaves behind (spec W)."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import LogLevel
from twisted.protocols.policies import TimeoutFactory
from zope.interface import implementer

import tcpsvc.sockets
import tcpsvc.unix_paths
from tcpsvc import ALL_ADDRESSES, CHOSEN_BY_OS, LOCALHOST, Server, WhereToListen
from tests.scripts import Script
from tests.support import (
    LOOPBACK,
    PATIENCE,
    Client,
    in_thread,
    open_descriptors,
    the_reactor,
    turn,
    until,
)


async def hello(address: Any, reader: Any, writer: Any) -> None:
    """Say hello, and what the client's address is."""
    writer.write(f"hello {address.host}".encode())


async def greet(address: Any, reader: Any, writer: Any) -> None:
    """Say hello to a client that may have no host."""
    writer.write(b"hello")


def option(listening: socket.socket, level: int, name: int) -> int:
    """A socket's option."""
    return listening.getsockopt(level, name)


def sockets_open() -> int:
    """How many sockets this process has open."""
    return sum(what.startswith("socket:") for what in open_descriptors().values())


class Making:
    """Stands in for what opens listening sockets: counts them, and may fail."""

    def __init__(self, kind: type[socket.socket] = socket.socket) -> None:
        self.kind = kind
        self.made: list[socket.socket] = []

    def __call__(self, family: int) -> socket.socket:
        made = self.kind(family, socket.SOCK_STREAM)
        made.setblocking(False)
        self.made.append(made)
        return made


def failing(method: str, *numbers: int) -> type[socket.socket]:
    """A kind of socket whose method fails with each errno in turn, then works."""
    left = list(numbers)

    class Failing(socket.socket):
        pass

    def fail_or_work(self: socket.socket, *args: Any) -> Any:
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return getattr(socket.socket, method)(self, *args)

    setattr(Failing, method, fail_or_work)
    return Failing


def make_with(monkeypatch: pytest.MonkeyPatch, kind: type[socket.socket]) -> Making:
    """Have listening sockets be of a kind."""
    making = Making(kind)
    monkeypatch.setattr(tcpsvc.sockets, "make_socket", making)
    return making


@pytest.fixture
def never_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No listening socket may be made during the test."""
    making = make_with(monkeypatch, socket.socket)
    yield
    assert making.made == []


# W1


@ensureDeferred
async def test_listening_on_is_the_port_that_the_kernel_chose(
    serve: Any, connect: Any
) -> None:
    """W1: port 0 becomes the real port."""
    server = await serve(greet)
    assert isinstance(server.listening_on, int)
    assert 0 < server.listening_on <= 65535
    assert server.listening_on == server.listening_socket.getsockname()[1]
    assert server.listening_on_address == IPv4Address(
        "TCP", "127.0.0.1", server.listening_on
    )
    assert await in_thread(connect(server).read_all) == b"hello"


@ensureDeferred
@pytest.mark.parametrize("as_given", [str, Path])
async def test_listening_on_is_the_path_as_given(
    as_given: Any, serve: Any, connect: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """W1: a relative path stays relative in listening_on, and a str."""
    monkeypatch.chdir(tmp_path)
    server = await serve(greet, where=WhereToListen.of_file(as_given("s")))
    assert server.listening_on == "s"
    assert type(server.listening_on) is str
    assert server.listening_on_address == UNIXAddress(str(tmp_path / "s"))
    assert await in_thread(connect(server).read_all) == b"hello"


@ensureDeferred
async def test_the_named_places_listen_on_every_ipv4_address(serve: Any) -> None:
    """W1, Names: of_port, of_port_chosen_by_os and its kin."""
    chosen = await serve(greet, where=WhereToListen.of_port_chosen_by_os())
    assert chosen.listening_on_address.host == "0.0.0.0"
    port = chosen.listening_on
    await chosen.close()
    fixed = await serve(greet, where=WhereToListen.of_port(port))
    assert fixed.listening_on_address == IPv4Address("TCP", "0.0.0.0", port)


# W2


@ensureDeferred
@pytest.mark.parametrize("reuseaddr", [True, False])
@pytest.mark.parametrize("reuseport", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_reuse_options_are_what_was_asked_for(
    host: str, reuseport: bool, reuseaddr: bool, serve: Any
) -> None:
    """W2: SO_REUSEADDR and SO_REUSEPORT by request."""
    where = WhereToListen.bind_to(host, 0, reuseaddr=reuseaddr, reuseport=reuseport)
    listening = (await serve(greet, where=where)).listening_socket
    assert bool(option(listening, socket.SOL_SOCKET, socket.SO_REUSEADDR)) is reuseaddr
    assert bool(option(listening, socket.SOL_SOCKET, socket.SO_REUSEPORT)) is reuseport


@ensureDeferred
async def test_reuse_defaults_and_close_on_exec(serve: Any, tmp_path: Path) -> None:
    """W2: REUSEADDR on, REUSEPORT off, close-on-exec set, TCP and UNIX."""
    inet = (await serve(greet)).listening_socket
    assert option(inet, socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert not option(inet, socket.SOL_SOCKET, socket.SO_REUSEPORT)
    assert not inet.get_inheritable()
    where = WhereToListen.of_file(tmp_path / "s")
    assert not (await serve(greet, where=where)).listening_socket.get_inheritable()
    no_reuse = WhereToListen.of_port_chosen_by_os_no_reuseaddr()
    listening = (await serve(greet, where=no_reuse)).listening_socket
    assert not option(listening, socket.SOL_SOCKET, socket.SO_REUSEADDR)


@ensureDeferred
async def test_accepted_sockets_are_close_on_exec(serve: Any, connect: Any) -> None:
    """W2: nor do clients' sockets leak into children."""
    seen: list[bool] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        seen.append(writer.transport.getHandle().get_inheritable())

    async def with_sock(address: Any, client: socket.socket) -> None:
        seen.append(client.get_inheritable())

    connect(await serve(handler))
    connect(await serve(with_sock, create=Server.create_sock))
    await until(lambda: len(seen) == 2)
    assert seen == [False, False]


@ensureDeferred
async def test_two_servers_share_a_port_by_request(serve: Any, connect: Any) -> None:
    """W2: reuseport=True on both is what it takes."""
    first = await serve(
        greet, where=WhereToListen.bind_to(LOCALHOST, 0, reuseport=True)
    )
    where = WhereToListen.bind_to(LOCALHOST, first.listening_on, reuseport=True)
    second = await serve(greet, where=where)
    assert second.listening_on == first.listening_on
    with pytest.raises(CannotListenError):
        await serve(greet, where=WhereToListen.bind_to(LOCALHOST, first.listening_on))


@ensureDeferred
async def test_a_port_in_time_wait_is_free_for_a_restart(
    serve: Any, connect: Any
) -> None:
    """W2: that is what SO_REUSEADDR is for; without it the port is taken."""

    async def leave_first(address: Any, reader: Any, writer: Any) -> None:
        writer.close()

    server = await serve(leave_first)
    port = server.listening_on
    client = connect(server)
    assert await in_thread(client.read_all) == b""
    client.close()
    await until(lambda: server.num_connections == 0)
    await server.close()
    with pytest.raises(CannotListenError):
        await serve(
            greet, where=WhereToListen.bind_to(LOCALHOST, port, reuseaddr=False)
        )
    again = await serve(greet, where=WhereToListen.bind_to(LOCALHOST, port))
    assert again.listening_on == port


# W3


@ensureDeferred
@pytest.mark.parametrize("method", ["bind", "listen"])
async def test_a_chosen_port_is_tried_ten_times_more(
    method: str, serve: Any, monkeypatch: Any
) -> None:
    """W3: EADDRINUSE ten times, then it works: eleven sockets, ten closed."""
    making = make_with(monkeypatch, failing(method, *[errno.EADDRINUSE] * 10))
    server = await serve(greet)
    assert len(making.made) == 11
    assert [s.fileno() for s in making.made[:-1]] == [-1] * 10
    assert server.listening_socket is making.made[-1]


@ensureDeferred
@pytest.mark.parametrize("method", ["bind", "listen"])
async def test_the_eleventh_refusal_is_the_error_and_says_how_many(
    method: str, monkeypatch: Any
) -> None:
    """W3: no further try; the error counts them. Nothing stays open."""
    making = make_with(monkeypatch, failing(method, *[errno.EADDRINUSE] * 99))
    before = sockets_open()
    with pytest.raises(CannotListenError) as caught:
        await Server.create(LOOPBACK, greet, on_handler_error="ignore")
    assert len(making.made) == 11
    assert "10" in str(caught.value)
    assert caught.value.socketError.errno == errno.EADDRINUSE
    assert sockets_open() == before


@pytest.mark.parametrize("method", ["bind", "listen"])
def test_create_inet_retries_too(method: str, monkeypatch: Any) -> None:
    """W3: and raises at once."""
    making = make_with(monkeypatch, failing(method, *[errno.EADDRINUSE] * 99))
    with pytest.raises(CannotListenError, match="10 retries"):
        Server.create_inet(LOOPBACK, greet, on_handler_error="ignore")
    assert len(making.made) == 11


def test_another_error_after_retries_says_how_many_there_were(
    monkeypatch: Any,
) -> None:
    """W3: after a retry the error says how many, whatever the error is."""
    kind = failing("bind", errno.EADDRINUSE, errno.EADDRINUSE, errno.EACCES)
    making = make_with(monkeypatch, kind)
    with pytest.raises(CannotListenError, match="2 retries") as caught:
        Server.create_inet(LOOPBACK, greet, on_handler_error="ignore")
    assert caught.value.socketError.errno == errno.EACCES
    assert len(making.made) == 3


@pytest.mark.parametrize("method", ["bind", "listen"])
def test_a_fixed_port_is_not_tried_again(method: str, monkeypatch: Any) -> None:
    """W3: EADDRINUSE at a fixed port is the error, at once, unadorned."""
    making = make_with(monkeypatch, failing(method, errno.EADDRINUSE))
    where = WhereToListen.bind_to(LOCALHOST, 4711)
    with pytest.raises(CannotListenError) as caught:
        Server.create_inet(where, greet, on_handler_error="ignore")
    assert len(making.made) == 1
    assert "retr" not in str(caught.value)


def test_another_error_at_a_chosen_port_is_not_tried_again(monkeypatch: Any) -> None:
    """W3: only EADDRINUSE is."""
    making = make_with(monkeypatch, failing("bind", errno.EACCES))
    with pytest.raises(CannotListenError) as caught:
        Server.create_inet(LOOPBACK, greet, on_handler_error="ignore")
    assert len(making.made) == 1
    assert "retr" not in str(caught.value)


# W4


@ensureDeferred
async def test_an_ipv6_literal_serves_ipv6_only(serve: Any, connect: Any) -> None:
    """W4: IPV6_V6ONLY is set explicitly, also where the system's default is not."""
    server = await serve(hello, where=WhereToListen.bind_to("::", 0))
    listening = server.listening_socket
    assert option(listening, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    assert isinstance(server.listening_on_address, IPv6Address)
    assert await in_thread(connect(server).read_all) == b"hello ::1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.listening_on), PATIENCE)
    # So the same port is free for IPv4.
    where = WhereToListen.bind_to(LOCALHOST, server.listening_on)
    assert (await serve(hello, where=where)).listening_on == server.listening_on


@ensureDeferred
async def test_all_addresses_is_ipv4(serve: Any, connect: Any) -> None:
    """W4: as the original's."""
    server = await serve(hello, where=WhereToListen.bind_to(ALL_ADDRESSES, 0))
    assert server.listening_socket.family == socket.AF_INET
    assert await in_thread(connect(server).read_all) == b"hello 127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", server.listening_on), PATIENCE)


def connect_to(connect: Any, host: str, port: int) -> Client:
    """A client of a host's port, of whichever family."""
    kind = IPv6Address if ":" in host else IPv4Address
    client: Client = connect(kind("TCP", host, port))
    return client


@ensureDeferred
@pytest.mark.parametrize("address", [ALL_ADDRESSES, "::"])
async def test_dual_stack_shows_ipv4_clients_as_ipv4(
    address: str, serve: Any, connect: Any
) -> None:
    """W4: in the handler's address, the writer's peer and host, and at the
    transport."""
    seen: list[Any] = []

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        seen.append(
            (
                address,
                writer.peer,
                writer.transport.getPeer(),
                writer.host,
                writer.transport.getHost(),
            )
        )

    where = WhereToListen.bind_to(address, 0, dual_stack=True)
    server = await serve(handler, where=where)
    port = server.listening_on
    assert not option(server.listening_socket, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    four = connect_to(connect, "127.0.0.1", port)
    await until(lambda: len(seen) == 1)
    peer = IPv4Address("TCP", *four.socket.getsockname())
    host = IPv4Address("TCP", "127.0.0.1", port)
    assert seen == [(peer, peer, peer, host, host)]
    six = connect_to(connect, "::1", port)
    await until(lambda: len(seen) == 2)
    peer6 = IPv6Address("TCP", *six.socket.getsockname())
    host6 = IPv6Address("TCP", "::1", port)
    assert seen[1] == (peer6, peer6, peer6, host6, host6)


@ensureDeferred
async def test_dual_stack_shows_ipv4_to_protocols_and_sock_handlers(
    serve: Any, connect: Any
) -> None:
    """W4: also where there are no streams, and in describe()."""
    seen: list[Any] = []

    class Tell(Protocol):
        def connectionMade(self) -> None:
            seen.append(self.transport.getPeer())
            seen.append(self.transport.getHost())

    class Telling(Factory):
        def buildProtocol(self, addr: Any) -> Protocol:
            seen.append(addr)
            return Tell()

    where = WhereToListen.bind_to("::", 0, dual_stack=True)
    server = await serve(Telling(), create=Server.create_protocol, where=where)
    client = connect_to(connect, "127.0.0.1", server.listening_on)
    peer = IPv4Address("TCP", *client.socket.getsockname())
    await until(lambda: len(seen) == 3)
    assert seen == [peer, peer, IPv4Address("TCP", "127.0.0.1", server.listening_on)]
    assert server.describe()["connections"][0]["peer"] == str(peer)

    async def with_sock(address: Any, client: socket.socket) -> None:
        seen.append(address)

    server = await serve(with_sock, create=Server.create_sock, where=where)
    client = connect_to(connect, "127.0.0.1", server.listening_on)
    await until(lambda: len(seen) == 4)
    assert seen[3] == IPv4Address("TCP", *client.socket.getsockname())


@ensureDeferred
async def test_on_handler_error_gets_the_ipv4_address_of_a_mapped_peer(
    serve: Any, connect: Any
) -> None:
    """W4: shown as IPv4 wherever it is shown."""
    blamed: list[Any] = []

    def handler(address: Any, reader: Any, writer: Any) -> None:
        raise ValueError("no")

    where = WhereToListen.bind_to("::", 0, dual_stack=True)
    server = await serve(
        handler, where=where, on_handler_error=lambda a, f: blamed.append(a)
    )
    client = connect_to(connect, "127.0.0.1", server.listening_on)
    await until(lambda: blamed)
    assert blamed == [IPv4Address("TCP", *client.socket.getsockname())]


@pytest.mark.parametrize("name", ["localhost", "example.org", "", "127.0.0.1.", "*"])
def test_a_host_name_is_sent_to_of_endpoint(name: str) -> None:
    """W4: names are not looked up."""
    with pytest.raises(ValueError, match="of_endpoint") as caught:
        WhereToListen.bind_to(name, 0)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_dual_stack_of_one_family_is_a_mistake(address: str) -> None:
    """W4: only the wildcard addresses have two families."""
    with pytest.raises(ValueError, match="dual_stack"):
        WhereToListen.bind_to(address, 0, dual_stack=True)


# W5


@pytest.mark.parametrize("port", [-1, 65536, 1 << 40])
def test_a_bad_port_is_named(port: int, never_made: None) -> None:
    """W5: with its option, wherever it is given."""
    with pytest.raises(ValueError, match=f"port={port}"):
        WhereToListen.of_port(port)
    with pytest.raises(ValueError, match=f"port={port}"):
        WhereToListen.bind_to(LOCALHOST, port)


@pytest.mark.parametrize("port", ["80", 80.0, None, True])
def test_a_port_that_is_no_int_is_a_type_error(port: Any, never_made: None) -> None:
    """W5: caught before a socket exists."""
    with pytest.raises(TypeError, match="port="):
        WhereToListen.bind_to(LOCALHOST, port)


@pytest.mark.parametrize("backlog", [0, -1, 1 << 40])
@ensureDeferred
async def test_a_bad_backlog_is_named_before_a_socket_exists(
    backlog: int, never_made: None
) -> None:
    """W5: by create and by create_inet; what the kernel cannot take is bad too."""
    with pytest.raises(ValueError, match=f"backlog={backlog}"):
        Server.create_inet(LOOPBACK, greet, on_handler_error="ignore", backlog=backlog)
    with pytest.raises(ValueError, match=f"backlog={backlog}"):
        await Server.create(LOOPBACK, greet, on_handler_error="ignore", backlog=backlog)


@ensureDeferred
async def test_a_path_that_is_too_long_is_named(
    tmp_path: Path, monkeypatch: Any, never_made: None
) -> None:
    """W5: as given, or once made absolute; 107 bytes pass, not characters."""
    with pytest.raises(ValueError, match="path="):
        WhereToListen.of_file("/" + "x" * 107)
    with pytest.raises(ValueError, match="path="):
        WhereToListen.of_file("/" + "ä" * 54)
    for bad in ("", "a\0b", "\0abstract"):
        with pytest.raises(ValueError, match="path="):
            WhereToListen.of_file(bad)
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.chdir(deep)
    where = WhereToListen.of_file("x" * 60)
    with pytest.raises(ValueError, match="path="):
        await Server.create(where, greet, on_handler_error="ignore")
    assert list(deep.iterdir()) == []


@ensureDeferred
async def test_a_path_of_107_bytes_is_served(serve: Any, connect: Any) -> None:
    """W5: the longest that the kernel takes."""
    path = "/tmp/" + "x" * 102
    assert len(path) == 107
    server = await serve(greet, where=WhereToListen.of_file(path))
    assert await in_thread(connect(server).read_all) == b"hello"
    await server.close()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("mode", [-1, 0o10000])
def test_a_bad_mode_is_named(mode: int, never_made: None) -> None:
    """W5: of_file(mode=)."""
    with pytest.raises(ValueError, match="mode="):
        WhereToListen.of_file("s", mode=mode)


def test_places_are_values() -> None:
    """Names: comparable, printable, with an address."""
    where = WhereToListen.bind_to(LOCALHOST, 80)
    assert where == WhereToListen.bind_to("127.0.0.1", 80)
    assert where != WhereToListen.bind_to(LOCALHOST, 81)
    assert where != WhereToListen.bind_to(LOCALHOST, 80, reuseport=True)
    assert len({where, WhereToListen.bind_to(LOCALHOST, 80)}) == 1
    assert where.address == IPv4Address("TCP", "127.0.0.1", 80)
    assert WhereToListen.bind_to("::1", 80).address == IPv6Address("TCP", "::1", 80)
    assert WhereToListen.of_file("s").address == UNIXAddress("s")
    assert WhereToListen.of_file("s") != WhereToListen.of_file("s", mode=0o600)
    assert WhereToListen.of_port(CHOSEN_BY_OS) == WhereToListen.of_port_chosen_by_os()
    assert (
        WhereToListen.of_port_chosen_by_os()
        != WhereToListen.of_port_chosen_by_os_no_reuseaddr()
    )
    assert "127.0.0.1:80" in str(where)
    assert "[::1]:80" in str(WhereToListen.bind_to("::1", 80))


# W6


def leave_stale(path: Path) -> None:
    """A UNIX socket's path whose server is gone."""
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(path))
    left.listen(1)
    left.close()
    assert stat.S_ISSOCK(path.lstat().st_mode)


@ensureDeferred
async def test_a_stale_socket_is_replaced(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """W6: the original fails on it."""
    path = tmp_path / "s"
    leave_stale(path)
    server = await serve(greet, where=WhereToListen.of_file(path))
    assert await in_thread(connect(server).read_all) == b"hello"


@ensureDeferred
async def test_a_live_server_with_a_full_backlog_is_left_alone(
    tmp_path: Path,
) -> None:
    """W6: an error, and the live one hears nothing of it."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as live:
        live.bind(str(path))
        live.listen(0)
        live.setblocking(False)
        waiting = []
        try:
            while True:  # Until the backlog is full.
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                waiting.append(client)
                client.setblocking(False)
                try:
                    client.connect(str(path))
                except BlockingIOError:
                    break
            inode = path.lstat().st_ino
            with pytest.raises(CannotListenError) as caught:
                await Server.create(
                    WhereToListen.of_file(path), greet, on_handler_error="ignore"
                )
            assert caught.value.socketError.errno == errno.EADDRINUSE
            assert path.lstat().st_ino == inode
            for _ in waiting[:-1]:
                live.accept()[0].close()
            with pytest.raises(BlockingIOError):
                live.accept()  # Nobody else has knocked.
        finally:
            for client in waiting:
                client.close()


@ensureDeferred
async def test_a_server_that_is_bound_but_not_yet_listening_is_left_alone(
    tmp_path: Path,
) -> None:
    """W6: it is alive, though connecting to it is refused."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as live:
        live.bind(str(path))
        with pytest.raises(CannotListenError):
            await Server.create(
                WhereToListen.of_file(path), greet, on_handler_error="ignore"
            )
        live.listen(1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))


@ensureDeferred
async def test_a_datagram_server_is_left_alone(tmp_path: Path) -> None:
    """W6: it is no stream server, but it is alive."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as live:
        live.bind(str(path))
        with pytest.raises(CannotListenError):
            await Server.create(
                WhereToListen.of_file(path), greet, on_handler_error="ignore"
            )
        assert path.exists()


@ensureDeferred
async def test_a_second_server_of_ours_does_not_take_the_path(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """W6: the first goes on."""
    where = WhereToListen.of_file(tmp_path / "s")
    first = await serve(greet, where=where)
    with pytest.raises(CannotListenError) as caught:
        await serve(greet, where=where)
    assert str(tmp_path / "s") in str(caught.value)
    assert await in_thread(connect(first).read_all) == b"hello"


@ensureDeferred
@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "dangling", "link"])
async def test_a_file_that_is_no_socket_is_left_alone(
    kind: str, tmp_path: Path
) -> None:
    """W6: an error, and the file is untouched. A link is no socket."""
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    else:
        leave_stale(tmp_path / "stale")
        path.symlink_to(tmp_path / "stale")
    before = path.lstat()
    with pytest.raises(CannotListenError) as caught:
        await Server.create(
            WhereToListen.of_file(path), greet, on_handler_error="ignore"
        )
    assert caught.value.socketError.errno == errno.EADDRINUSE
    after = path.lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    if kind == "file":
        assert path.read_text() == "precious"


RACER = """
import sys
from twisted.internet import defer, reactor, stdio
from twisted.internet.error import CannotListenError
from twisted.protocols.basic import LineReceiver
from tcpsvc import Server, WhereToListen

servers = []

async def start(path):
    try:
        servers.append(
            await Server.create(
                WhereToListen.of_file(path),
                lambda address, reader, writer: writer.write(sys.argv[1].encode()),
                on_handler_error="raise",
            )
        )
    except CannotListenError:
        print("lost", flush=True)
    else:
        print("won", flush=True)

class Starter(LineReceiver):
    delimiter = b"\\n"

    def connectionMade(self):
        print("ready", flush=True)

    def lineReceived(self, path):
        defer.ensureDeferred(start(path.decode()))

    def connectionLost(self, reason):
        closing = defer.gatherResults([server.close() for server in servers])
        closing.addCallback(lambda _: reactor.stop())

stdio.StandardIO(Starter())
reactor.run()
"""


@pytest.mark.whatever("engine")
@ensureDeferred
async def test_of_two_starters_one_wins_a_stale_path(tmp_path: Path) -> None:
    """W6: two processes; the winner serves, the loser says so, none is removed."""
    paths = [tmp_path / f"s{attempt}" for attempt in range(10)]
    for path in paths:
        leave_stale(path)

    def race() -> None:
        with Script(RACER, "a") as one, Script(RACER, "b") as other:
            racers = one, other
            assert [racer.line() for racer in racers] == ["ready", "ready"]
            for path in paths:
                for racer in racers:
                    racer.tell(str(path))
                ends = [racer.line() for racer in racers]
                assert sorted(ends) == ["lost", "won"]
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                    client.settimeout(PATIENCE)
                    client.connect(str(path))
                    assert client.recv(1).decode() == "ab"[ends.index("won")]
            assert [racer.end() for racer in racers] == [0, 0]

    await in_thread(race)
    assert not [path for path in paths if path.exists()]


def open_or_lose(path: Path) -> Any:
    """The socket and its path; ``None`` when somebody else has the path."""
    try:
        return tcpsvc.sockets.open_unix(str(path), backlog=1, mode=None)
    except CannotListenError:
        return None


@ensureDeferred
async def test_a_starter_waits_until_another_has_replaced_a_stale_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W6: else both find it stale, and the first removes the new path of the second."""
    path = tmp_path / "s"
    leave_stale(path)
    is_found, goes_on = threading.Event(), threading.Event()
    unlink, flock = os.unlink, fcntl.flock

    def unlinks(name: Any, **kwargs: Any) -> None:
        if name == str(path) and not is_found.is_set():
            is_found.set()
            assert goes_on.wait(PATIENCE)
        unlink(name, **kwargs)

    def locks(*args: Any) -> None:
        try:
            flock(*args)
        except BlockingIOError:
            goes_on.set()
            raise

    def has_ended(made: Any) -> Any:
        goes_on.set()
        return made

    monkeypatch.setattr(os, "unlink", unlinks)
    monkeypatch.setattr(fcntl, "flock", locks)
    monkeypatch.setattr(tcpsvc.unix_paths, "LOCK_SECONDS", PATIENCE)
    first = in_thread(open_or_lose, path)
    assert await in_thread(is_found.wait, PATIENCE)
    second = in_thread(open_or_lose, path).addBoth(has_ended)
    made = [m for m in (await first, await second) if m is not None]
    try:
        assert len(made) == 1
        assert path.lstat().st_ino == made[0][1].inode
    finally:
        for opened, bound in made:
            bound.unlink()
            opened.close()


@ensureDeferred
async def test_many_starters_in_one_process_leave_one_server(
    tmp_path: Path, connect: Any
) -> None:
    """W6: threads that bind the same stale path at once."""
    path = tmp_path / "s"
    leave_stale(path)

    starting = [in_thread(open_or_lose, path) for _ in range(8)]
    made = [m for m in [await d for d in starting] if m is not None]
    try:
        assert len(made) == 1
        assert path.lstat().st_ino == made[0][1].inode
        connect(UNIXAddress(str(path)))
    finally:
        for opened, bound in made:
            bound.unlink()
            opened.close()


@ensureDeferred
async def test_a_held_lock_is_given_up_on_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """W6, W8: a lock that nobody gives up is an error, not a hang."""
    monkeypatch.setattr(tcpsvc.unix_paths, "LOCK_SECONDS", 0.01)
    holder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        before = len(open_descriptors())
        with pytest.raises(CannotListenError, match="lock"):
            await Server.create(
                WhereToListen.of_file(tmp_path / "s"), greet, on_handler_error="ignore"
            )
        assert len(open_descriptors()) == before
    finally:
        os.close(holder)
    assert list(tmp_path.iterdir()) == []


@ensureDeferred
async def test_a_relative_path_survives_a_change_of_directory(
    serve: Any, connect: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """W6: made absolute at bind, so that close unlinks it from anywhere; and a
    namesake in the new directory is not touched."""
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)
    server = await serve(greet, where=WhereToListen.of_file("s"))
    monkeypatch.chdir(second)
    (second / "s").write_text("a namesake")
    assert await in_thread(connect(server).read_all) == b"hello"
    await server.close()
    assert list(first.iterdir()) == []
    assert (second / "s").read_text() == "a namesake"
    assert server.listening_on == "s"


@ensureDeferred
async def test_the_path_is_unlinked_before_the_descriptor_is_closed(
    serve: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """W6: a freed inode's number is used again at once."""
    path = tmp_path / "s"
    server = await serve(greet, where=WhereToListen.of_file(path))
    listening = server.listening_socket
    unlink = os.unlink
    seen: list[tuple[Any, int]] = []

    def watched(name: Any, **kwargs: Any) -> None:
        seen.append((name, listening.fileno()))
        unlink(name, **kwargs)

    monkeypatch.setattr(os, "unlink", watched)
    await server.close()
    monkeypatch.undo()
    assert [name for name, _ in seen] == [str(path)]
    assert seen[0][1] != -1
    assert listening.fileno() == -1
    assert not path.exists()


@ensureDeferred
@pytest.mark.parametrize("by", ["socket", "file", "nothing", "no directory"])
async def test_a_path_that_was_replaced_is_not_unlinked(
    by: str, serve: Any, tmp_path: Path, logs: Any
) -> None:
    """W6: only what is still this server's is removed; no error is logged."""
    directory = tmp_path / "d"
    directory.mkdir()
    path = directory / "s"
    server = await serve(greet, where=WhereToListen.of_file(path))
    path.unlink()
    other = None
    if by == "socket":
        other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        other.bind(str(path))
    elif by == "file":
        path.write_text("precious")
    elif by == "no directory":
        directory.rmdir()
    before = path.lstat().st_ino if path.exists() else None
    try:
        await server.close()
        assert (path.lstat().st_ino if path.exists() else None) == before
    finally:
        if other is not None:
            other.close()
    assert logs.texts(LogLevel.error) == []


@ensureDeferred
async def test_failing_to_unlink_is_logged_and_the_close_goes_on(
    serve: Any, tmp_path: Path, monkeypatch: Any, logs: Any
) -> None:
    """W6: the descriptor is closed all the same, and close() fires."""
    path = tmp_path / "s"
    server = await serve(greet, where=WhereToListen.of_file(path))
    listening = server.listening_socket

    def refuse(name: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "no", name)

    monkeypatch.setattr(os, "unlink", refuse)
    await server.close()
    monkeypatch.undo()
    assert listening.fileno() == -1
    lines = [t for t in logs.texts() if str(path) in t and "unlink" in t]
    assert len(lines) == 1
    assert path.exists()


# W7


@ensureDeferred
@pytest.mark.parametrize("create", ["create", "create_inet"])
async def test_a_given_socket_is_bound_and_served_as_it_is(
    create: str, serve: Any, connect: Any
) -> None:
    """W7: that very object; no option is set on it; it is closed in the end."""
    given = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    given.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
    size = given.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    if create == "create":
        server = await serve(greet, socket=given)
    else:
        server = Server.create_inet(
            LOOPBACK, greet, on_handler_error="ignore", socket=given
        )
    assert server.listening_socket is given
    assert not option(given, socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert not option(given, socket.SOL_SOCKET, socket.SO_REUSEPORT)
    assert given.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == size
    assert server.listening_on == given.getsockname()[1]
    assert await in_thread(connect(server).read_all) == b"hello"
    await server.close()
    assert given.fileno() == -1


@ensureDeferred
async def test_a_given_socket_listens_with_the_backlog_asked_for(serve: Any) -> None:
    """W7: the kernel says so in TCP_INFO of a listening socket."""
    given = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    await serve(greet, socket=given, backlog=7)
    info = given.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert int.from_bytes(info[28:32], sys.byteorder) == 7


@ensureDeferred
async def test_a_given_unix_socket_is_served_and_its_path_unlinked(
    serve: Any, connect: Any, tmp_path: Path
) -> None:
    """W7, W6: also over a stale path."""
    path = tmp_path / "s"
    leave_stale(path)
    given = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    where = WhereToListen.of_file(path, mode=0o640)
    server = await serve(greet, where=where, socket=given)
    assert server.listening_socket is given
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert await in_thread(connect(server).read_all) == b"hello"
    await server.close()
    assert not path.exists()


@ensureDeferred
async def test_a_given_dual_stack_socket_shows_ipv4_clients_as_ipv4(
    serve: Any, connect: Any
) -> None:
    """W7, W4: it is looked at, not set."""
    given = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    given.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    where = WhereToListen.bind_to("::", 0)
    server = await serve(hello, where=where, socket=given)
    client = connect_to(connect, "127.0.0.1", server.listening_on)
    assert await in_thread(client.read_all) == b"hello 127.0.0.1"


async def must_refuse(where: Any, given: socket.socket, kind: type) -> None:
    """A given socket is refused, and closed."""
    before = sockets_open()
    number = given.fileno()
    with pytest.raises(kind):
        await Server.create(where, greet, on_handler_error="ignore", socket=given)
    assert given.fileno() == -1, "it must be closed"
    assert sockets_open() == before - 1
    assert number not in open_descriptors()


@ensureDeferred
async def test_a_given_socket_that_does_not_fit_is_refused_and_closed(
    tmp_path: Path,
) -> None:
    """W7: bound already, of another family, or no stream."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.bind(("127.0.0.1", 0))
    await must_refuse(LOOPBACK, bound, ValueError)
    listening = socket.create_server(("127.0.0.1", 0))
    await must_refuse(LOOPBACK, listening, ValueError)
    six = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    await must_refuse(LOOPBACK, six, ValueError)
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    await must_refuse(LOOPBACK, datagram, ValueError)
    inet = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    await must_refuse(WhereToListen.of_file(tmp_path / "s"), inet, ValueError)
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await must_refuse(LOOPBACK, unix, ValueError)
    bound_unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound_unix.bind(str(tmp_path / "other"))
    await must_refuse(WhereToListen.of_file(tmp_path / "s"), bound_unix, ValueError)
    assert (tmp_path / "other").exists()
    assert not (tmp_path / "s").exists()


@ensureDeferred
async def test_a_given_socket_is_closed_whatever_fails(tmp_path: Path) -> None:
    """W7: bad options, a place that has a socket of its own, a refusing kernel."""

    def fresh() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    for where in (
        WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1"),
        WhereToListen.of_fd(0),
    ):
        await must_refuse(where, fresh(), ValueError)
    for options, kind in [
        ({"max_connections": 0}, ValueError),
        ({"backlog": 0}, ValueError),
        ({"nonsense": 1}, TypeError),
    ]:
        given = fresh()
        with pytest.raises(kind):
            await Server.create(
                LOOPBACK, greet, on_handler_error="ignore", socket=given, **options
            )
        assert given.fileno() == -1
        given = fresh()
        with pytest.raises(kind):
            Server.create_inet(
                LOOPBACK, greet, on_handler_error="ignore", socket=given, **options
            )
        assert given.fileno() == -1
    given = fresh()
    with pytest.raises(ValueError, match="inet"):
        Server.create_inet(
            WhereToListen.of_file(tmp_path / "s"),  # type: ignore[arg-type]
            greet,
            on_handler_error="ignore",
            socket=given,
        )
    assert given.fileno() == -1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = WhereToListen.bind_to(LOCALHOST, taken.getsockname()[1])
        await must_refuse(where, fresh(), CannotListenError)


@ensureDeferred
async def test_nothing_is_retried_on_a_given_socket() -> None:
    """W7: EADDRINUSE at port 0 is the error at once."""
    kind = failing("listen", errno.EADDRINUSE)
    given = kind(socket.AF_INET, socket.SOCK_STREAM)
    await must_refuse(LOOPBACK, given, CannotListenError)


@ensureDeferred
async def test_a_descriptor_is_duplicated_and_the_callers_stays_open(
    serve: Any, connect: Any
) -> None:
    """W7: of_fd; after close the port still belongs to the caller."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = await serve(greet, where=WhereToListen.of_fd(listening.fileno()))
        assert server.listening_socket.fileno() != listening.fileno()
        assert not server.listening_socket.get_inheritable()
        assert server.listening_on_address == IPv4Address(
            "TCP", *listening.getsockname()
        )
        assert await in_thread(connect(server).read_all) == b"hello"
        await server.close()
        # Not shut down: clients still come, and the caller can accept them.
        client = connect(server.listening_on_address)
        listening.settimeout(PATIENCE)
        accepted, _ = listening.accept()
        with accepted:
            accepted.sendall(b"mine")
        assert await in_thread(client.read_all) == b"mine"


@ensureDeferred
async def test_an_owned_descriptor_is_taken_over_and_closed(
    serve: Any, connect: Any
) -> None:
    """W7: of_fd(own=True)."""
    fd = socket.create_server(("127.0.0.1", 0)).detach()
    server = await serve(greet, where=WhereToListen.of_fd(fd, own=True))
    assert server.listening_socket.fileno() == fd
    assert await in_thread(connect(server).read_all) == b"hello"
    await server.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@ensureDeferred
@pytest.mark.parametrize("own", [True, False])
async def test_an_inherited_unix_listener_is_neither_unlinked_nor_shut_down(
    own: bool, serve: Any, connect: Any, tmp_path: Path
) -> None:
    """W7: others may share it. Twisted does both."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(5)
        fd = os.dup(listening.fileno()) if own else listening.fileno()
        server = await serve(greet, where=WhereToListen.of_fd(fd, own=own))
        assert server.listening_on_address == UNIXAddress(str(path))
        assert await in_thread(connect(server).read_all) == b"hello"
        await server.close()
        assert path.exists()
        connect(UNIXAddress(str(path)))
        listening.setblocking(True)
        listening.settimeout(PATIENCE)
        listening.accept()[0].close()


@ensureDeferred
async def test_a_dual_stack_descriptor_shows_ipv4_clients_as_ipv4(
    serve: Any, connect: Any
) -> None:
    """W7, W4."""
    with socket.create_server(
        ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
    ) as listening:
        server = await serve(hello, where=WhereToListen.of_fd(listening.fileno()))
        client = connect_to(connect, "127.0.0.1", listening.getsockname()[1])
        assert await in_thread(client.read_all) == b"hello 127.0.0.1"
        await server.close()


@ensureDeferred
@pytest.mark.parametrize("what", ["file", "closed", "unbound", "datagram", "connected"])
async def test_a_descriptor_that_does_not_listen_is_refused(
    what: str, tmp_path: Path
) -> None:
    """W7, W8: a ValueError that names it; the caller's stays, no duplicate does."""
    one, other = socket.socketpair()
    (tmp_path / "f").touch()
    made: Any = {
        "file": (tmp_path / "f").open,
        "closed": (tmp_path / "f").open,
        "unbound": socket.socket,
        "datagram": lambda: socket.socket(type=socket.SOCK_DGRAM),
        "connected": lambda: one,
    }[what]()
    fd = made.fileno()
    if what == "closed":
        made.close()
    try:
        before = open_descriptors()
        with pytest.raises(ValueError, match=f"fd={fd}"):
            await Server.create(
                WhereToListen.of_fd(fd), greet, on_handler_error="ignore"
            )
        assert open_descriptors() == before
    finally:
        made.close()
        one.close()
        other.close()


def test_a_number_that_is_no_descriptor_is_refused() -> None:
    """W5, W7."""
    with pytest.raises(ValueError, match="fd=-1"):
        WhereToListen.of_fd(-1)
    for bad in (True, "3", None):
        with pytest.raises(TypeError, match="fd="):
            WhereToListen.of_fd(bad)  # type: ignore[arg-type]


# W8


@ensureDeferred
async def test_a_port_that_is_taken_is_an_error_with_address_and_errno() -> None:
    """W8: create fails its Deferred, create_inet raises; nothing stays open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = WhereToListen.bind_to(LOCALHOST, port)
        before = open_descriptors()
        result = Server.create(where, greet, on_handler_error="ignore")
        assert isinstance(result, Deferred)
        with pytest.raises(CannotListenError) as caught:
            await result
        with pytest.raises(CannotListenError) as raised:
            Server.create_inet(where, greet, on_handler_error="ignore")
        for error in (caught.value, raised.value):
            assert (error.interface, error.port) == ("127.0.0.1", port)
            assert error.socketError.errno == errno.EADDRINUSE
        assert open_descriptors() == before


@ensureDeferred
async def test_create_fails_its_deferred_where_create_inet_raises(
    never_made: None,
) -> None:
    """W8: also for mistakes; create itself never raises them."""
    for create, options in [
        (Server.create, {"max_connections": 0}),
        (Server.create, {"nonsense": 0}),
        (Server.create_sock, {"buffer_age_limit": 1.0}),
        (Server.create_protocol, {"flush_timeout": 1.0}),
    ]:
        result = create(LOOPBACK, greet, on_handler_error="ignore", **options)
        with pytest.raises((ValueError, TypeError)):
            await result
    result = Server.create(LOOPBACK, greet, on_handler_error="never mind")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_handler_error"):
        await result
    with pytest.raises(TypeError):
        await Server.create("127.0.0.1:80", greet, on_handler_error="raise")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Server.create_inet(LOOPBACK, None, on_handler_error="raise")  # type: ignore[arg-type]


@ensureDeferred
@pytest.mark.parametrize("method", ["bind", "listen"])
async def test_a_failed_unix_server_leaves_nothing_on_disk(
    method: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """W8: neither the path nor a lock beside it, nor a descriptor."""
    make_with(monkeypatch, failing(method, errno.ENOBUFS))
    before = open_descriptors()
    with pytest.raises(CannotListenError) as caught:
        await Server.create(
            WhereToListen.of_file(tmp_path / "s"), greet, on_handler_error="ignore"
        )
    assert caught.value.socketError.errno == errno.ENOBUFS
    assert str(tmp_path / "s") in str(caught.value)
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []


@ensureDeferred
async def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """W8: with the path and the errno."""
    path = tmp_path / "no" / "s"
    before = open_descriptors()
    with pytest.raises(CannotListenError) as caught:
        await Server.create(
            WhereToListen.of_file(path), greet, on_handler_error="ignore"
        )
    assert caught.value.socketError.errno == errno.ENOENT
    assert str(path) in str(caught.value)
    assert open_descriptors() == before


@ensureDeferred
async def test_no_socket_at_all_is_an_error_with_its_errno(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """W8: EMFILE from the very first call."""

    def refuse(family: int) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(tcpsvc.sockets, "make_socket", refuse)
    for where in (LOOPBACK, WhereToListen.of_file(tmp_path / "s")):
        with pytest.raises(CannotListenError) as caught:
            await Server.create(where, greet, on_handler_error="ignore")
        assert caught.value.socketError.errno == errno.EMFILE
    assert list(tmp_path.iterdir()) == []


@ensureDeferred
@pytest.mark.parametrize("unix", [True, False])
async def test_a_factory_that_will_not_start_leaves_nothing(
    unix: bool, tmp_path: Path
) -> None:
    """W8: it raises out of doStart, when the socket listens already."""

    class Unwilling(Factory):
        protocol = Protocol

        def startFactory(self) -> None:
            raise RuntimeError("not today")

    where: Any = WhereToListen.of_file(tmp_path / "s") if unix else LOOPBACK
    before = open_descriptors()
    with pytest.raises(RuntimeError, match="not today"):
        await Server.create_protocol(where, Unwilling(), on_handler_error="ignore")
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []


@implementer(IStreamServerEndpoint)
class SlowEndpoint:
    """An endpoint that listens when told to, and knows nothing of cancelling."""

    def __init__(self) -> None:
        self.result: Deferred[Any] = Deferred()
        self.port: Any = None
        self.factory: Any = None

    def listen(self, factory: Any) -> Deferred[Any]:
        self.factory = factory
        return self.result

    def do_listen(self) -> None:
        self.port = the_reactor().listenTCP(0, self.factory, interface="127.0.0.1")
        self.address = self.port.getHost()
        self.result.callback(self.port)


async def cancelled_while_it_waits() -> SlowEndpoint:
    """What a create was waiting for when it was cancelled."""
    endpoint = SlowEndpoint()
    creating = Server.create(
        WhereToListen.of_endpoint(endpoint), greet, on_handler_error="ignore"
    )
    creating.cancel()
    with pytest.raises(CancelledError):
        await creating
    return endpoint


@ensureDeferred
async def test_a_cancelled_create_whose_endpoint_never_fires() -> None:
    """W8: it fails with CancelledError at once."""
    await cancelled_while_it_waits()


@ensureDeferred
async def test_a_cancelled_create_closes_a_port_that_comes_late() -> None:
    """W8: nothing is left open, and nobody is served meanwhile."""
    endpoint = await cancelled_while_it_waits()
    endpoint.do_listen()
    await until(lambda: not endpoint.port.connected)
    with pytest.raises(ConnectionRefusedError):
        Client(endpoint.address)


@ensureDeferred
async def test_a_cancelled_create_whose_endpoint_fails_late() -> None:
    """W8: the late failure is nobody's unhandled error."""
    endpoint = await cancelled_while_it_waits()
    endpoint.result.errback(CannotListenError("", 0, OSError(1, "late")))


@ensureDeferred
async def test_a_late_endpoint_serves_when_it_is_there(connect: Any) -> None:
    """W8, H1: no handler starts before create has fired."""
    endpoint = SlowEndpoint()
    creating = Server.create(
        WhereToListen.of_endpoint(endpoint), greet, on_handler_error="ignore"
    )
    await turn()
    endpoint.do_listen()
    server = await creating
    assert await in_thread(connect(server).read_all) == b"hello"
    await server.close()


@implementer(IStreamServerEndpoint)
class WrappingEndpoint:
    """An endpoint that wraps the factory it is given."""

    def listen(self, factory: Any) -> Deferred[Any]:
        inner = TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1")
        result: Deferred[Any] = inner.listen(TimeoutFactory(factory, None))
        return result


@ensureDeferred
async def test_create_sock_refuses_an_endpoint_without_plain_sockets() -> None:
    """Names, W8: a ValueError, and the port is closed again."""
    before = sockets_open()
    with pytest.raises(ValueError, match="plain socket"):
        await Server.create_sock(
            WhereToListen.of_endpoint(WrappingEndpoint()),
            lambda address, client: None,
            on_handler_error="ignore",
        )
    assert sockets_open() == before


@ensureDeferred
async def test_create_sock_cancelled_while_it_closes_an_unfit_port() -> None:
    """W8: nothing is left open, and no error is logged."""
    before = sockets_open()
    creating = Server.create_sock(
        WhereToListen.of_endpoint(WrappingEndpoint()),
        lambda address, client: None,
        on_handler_error="ignore",
    )
    creating.cancel()
    with pytest.raises((CancelledError, ValueError)):
        await creating
    await until(lambda: sockets_open() == before)


@ensureDeferred
async def test_create_sock_serves_a_plain_endpoint(serve: Any, connect: Any) -> None:
    """Names: the connected, non-blocking socket of an endpoint's client."""
    seen: list[Any] = []

    async def handler(address: Any, client: socket.socket) -> None:
        seen.append((address, client.getblocking()))
        client.sendall(b"hello")

    where = WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    server = await serve(handler, create=Server.create_sock, where=where)
    client = connect(server)
    assert await in_thread(client.read_all) == b"hello"
    assert seen == [(IPv4Address("TCP", *client.socket.getsockname()), False)]


@ensureDeferred
@pytest.mark.parametrize(
    "description", ["nonsense:1", "tcp:port", "tcp:0:unknown=1", "ssl:0:privateKey=/no"]
)
async def test_an_endpoint_that_cannot_be_used_is_named(description: str) -> None:
    """W5, W8: the description in a ValueError, from create's Deferred."""
    before = open_descriptors()
    creating = Server.create(
        WhereToListen.of_endpoint(description), greet, on_handler_error="ignore"
    )
    with pytest.raises(ValueError, match="endpoint=") as caught:
        await creating
    assert description in str(caught.value)
    assert open_descriptors() == before


@ensureDeferred
async def test_an_endpoint_whose_port_is_taken_is_a_cannot_listen_error() -> None:
    """W8."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = WhereToListen.of_endpoint(f"tcp:{port}:interface=127.0.0.1")
        before = open_descriptors()
        with pytest.raises(CannotListenError):
            await Server.create(where, greet, on_handler_error="ignore")
        # Twisted's own port leaves the socket to the collector before 26.4.
        gc.collect()
        assert open_descriptors() == before


@ensureDeferred
async def test_an_endpoint_is_served(serve: Any, connect: Any) -> None:
    """Names: of_endpoint, and its listening_on is the IAddress."""
    where = WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    server = await serve(greet, where=where)
    assert isinstance(server.listening_on, IPv4Address)
    assert server.listening_on == server.listening_on_address
    assert await in_thread(connect(server).read_all) == b"hello"
    with pytest.raises(TypeError):
        WhereToListen.of_endpoint(8000)  # type: ignore[arg-type]


def test_create_inet_is_for_inet_only(tmp_path: Path) -> None:
    """Names, W8: anything else is a ValueError; nothing is bound."""
    for where in (
        WhereToListen.of_file(tmp_path / "s"),
        WhereToListen.of_endpoint("tcp:0"),
        WhereToListen.of_fd(0),
    ):
        for create, handler in [
            (Server.create_inet, greet),
            (Server.create_sock_inet, lambda address, client: None),
            (Server.create_protocol_inet, Factory.forProtocol(Protocol)),
        ]:
            with pytest.raises(ValueError, match="inet"):
                create(where, handler, on_handler_error="ignore")  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


@ensureDeferred
async def test_create_inet_serves_at_once(connect: Any) -> None:
    """Names: create_inet returns the server itself."""
    server = Server.create_inet(LOOPBACK, greet, on_handler_error="raise")
    client = connect(server)
    assert await in_thread(client.read_all) == b"hello"
    await server.close()


# W9


@ensureDeferred
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000])
async def test_the_umask_decides_by_default(
    umask: int, serve: Any, tmp_path: Path
) -> None:
    """W9: Twisted's own default is 0666."""
    path = tmp_path / "s"
    before = os.umask(umask)
    try:
        await serve(greet, where=WhereToListen.of_file(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


@ensureDeferred
@pytest.mark.parametrize("mode", [0o600, 0o666, 0o660, 0])
async def test_the_mode_is_there_before_anyone_can_connect(
    mode: int, serve: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """W9: at the moment of listen, whatever the umask."""
    path = tmp_path / "s"
    seen: list[int] = []

    class Watching(socket.socket):
        def listen(self, *args: Any) -> None:
            seen.append(stat.S_IMODE(path.stat().st_mode))
            super().listen(*args)

    make_with(monkeypatch, Watching)
    before = os.umask(0o027)
    try:
        await serve(greet, where=WhereToListen.of_file(path, mode=mode))
    finally:
        os.umask(before)
    assert seen == [mode]
    assert stat.S_IMODE(path.stat().st_mode) == mode
