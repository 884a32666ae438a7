"""Who is let in, by address, by number and by rate; and dry runs of that."""

from __future__ import annotations

import json
import random
import socket
from ipaddress import ip_network
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel

from tcpsvc import (
    LOCALHOST,
    Observer,
    Rate,
    Reason,
    Reply,
    ServerFactory,
    WhereToListen,
)
from tcpsvc.testing import MemoryServer
from tests.kinds import (
    KINDS,
    Raising,
    Seen,
    Staying,
    connect_from,
    echoes,
    end_of,
    is_refused,
    place,
)
from tests.support import PATIENCE, in_thread, settle, the_reactor, until

BUSY = Reply(b"too many\n")
LIMITS = {
    "max_connections": 1,
    "max_connections_per_peer": 1,
    "accept_rate_per_peer": "1/m:1",
    "accept_rate": "1/m:1",
    "allow": ["10.0.0.0/8"],
    "deny": ["127.0.0.0/8"],
}
REASONS = {
    "max_connections": "overflow",
    "max_connections_per_peer": "peer_connections",
    "accept_rate_per_peer": "peer_rate",
    "accept_rate": "accept_rate",
    "allow": "denied",
    "deny": "denied",
}


def counters(server: Any) -> Any:
    """What was counted."""
    return server.describe()["counters"]


def peers(server: Any) -> Any:
    """How many connections each peer has."""
    return server.describe()["peers"].get("most_connections", {})


def v4(host: str, port: int = 4000) -> IPv4Address:
    """A client's address."""
    return IPv4Address("TCP", host, port)


# allow and deny


@pytest.mark.parametrize(
    ("options", "let_in", "kept_out"),
    [
        (
            {"allow": ["10.0.0.0/8", "::1"]},
            ["10.1.2.3", "::ffff:10.1.2.3", "::1"],
            ["11.0.0.1", "::ffff:11.0.0.1", "::2", "127.0.0.1"],
        ),
        (
            {"deny": ["10.0.0.0/8", "2001:db8::/32"]},
            ["11.0.0.1", "2001:db9::1", "::1"],
            ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8:1::1", "2001:db8::1%eth0"],
        ),
        (
            {"allow": ["10.0.0.0/8"], "deny": [ip_network("10.1.0.0/16")]},
            ["10.2.0.1"],
            ["10.1.0.1", "11.0.0.1"],
        ),
        ({"allow": []}, [], ["10.0.0.1", "::1"]),
        ({"allow": None, "deny": ()}, ["10.0.0.1", "::1"], []),
        ({"deny": ["::/0"]}, ["10.0.0.1"], ["::1"]),
        ({"deny": ["::ffff:10.0.0.0/104"]}, ["11.0.0.1"], ["10.0.0.1"]),
    ],
)
def test_networks_that_are_allowed_and_denied(
    options: Any, let_in: list[str], kept_out: list[str], staying: Staying
) -> None:
    """``deny`` has the last word; mapped addresses are IPv4."""
    server = MemoryServer(staying.stream, **options)
    for number, host in enumerate(let_in + kept_out):
        kind = IPv6Address if ":" in host else IPv4Address
        client = server.connect(kind("TCP", host, 1))
        assert client.is_closed is (number >= len(let_in)), host
        assert client.was_reset is client.is_closed
    expected = {"denied": len(kept_out)} if kept_out else {}
    assert server.factory.counters.refusals == expected
    assert server.factory.num_connections == len(let_in)


@ensureDeferred
@pytest.mark.parametrize("where", ["tcp", "endpoint", "tls", "ungated", "bare"])
@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ("reset", (b"", "reset")),
        ("drop", (b"", "eof")),
        (BUSY, (BUSY.data, "eof")),
    ],
)
async def test_refused_clients_are_sent_away_as_was_chosen(
    refusal: Any,
    expected: Any,
    where: str,
    serve: Any,
    staying: Staying,
    tmp_path: Any,
    logs: Any,
) -> None:
    """Wherever it listens; the others are served meanwhile."""
    seen = Seen()
    options = {"deny": ["127.0.0.2"], "refusal": refusal, "observer": seen}
    if where == "bare":
        factory = ServerFactory.of_streams(
            staying.stream, on_handler_error="ignore", **options
        )
        server: Any = factory
        port = await TCP4ServerEndpoint(the_reactor(), 0, interface=LOCALHOST).listen(
            factory
        )
        address = port.getHost()
    else:
        server = await serve(staying.stream, where=place(where, tmp_path), **options)
        address = server.listening_on_address

    def refused() -> Any:
        try:
            with connect_from(address, "127.0.0.2") as client:
                client.settimeout(PATIENCE)
                if where == "tls" and refusal is BUSY:
                    from tests.tls import client_context

                    with client_context().wrap_socket(client) as speaking:
                        return end_of(speaking)
                return end_of(client)
        except ConnectionResetError:
            return b"", "reset"

    good = connect_from(address, "127.0.0.3")
    try:
        await until(lambda: staying.started)
        for number in range(1, 4):
            assert await in_thread(refused) == expected
            assert counters(server)["refusals"] == {"denied": number}
        assert [r for _, r in seen.of("connection_refused")] == [Reason.DENIED] * 3
        assert {a.host for a, _ in seen.of("connection_refused")} == {"127.0.0.2"}
        assert server.num_connections == 1
    finally:
        good.close()
    if where == "bare":
        await port.stopListening()
        factory.close()
        await until(lambda: not factory.num_connections)


@ensureDeferred
async def test_unix_clients_are_never_limited(
    serve: Any, connect: Any, staying: Staying, tmp_path: Any
) -> None:
    """They have no address; the server-wide limits are theirs, too."""
    server = await serve(
        staying.stream,
        where=place("unix", tmp_path),
        allow=["10.0.0.0/8"],
        deny=["0.0.0.0/0"],
        max_connections_per_peer=1,
        accept_rate_per_peer="1/h:1",
    )
    clients = [connect(server) for _ in range(5)]
    await until(lambda: len(staying.started) == 5)
    assert len(clients) == server.num_connections == 5
    assert counters(server)["refusals"] == {}


# Per peer


@ensureDeferred
@pytest.mark.parametrize("kind", KINDS)
async def test_a_peer_has_so_many_connections(
    kind: str, serve: Any, staying: Staying
) -> None:
    """Others are served; when one of its ends it may come again."""
    server = await serve(
        KINDS[kind].make(staying),
        create=KINDS[kind].create,
        max_connections_per_peer=2,
        refusal="drop",
    )
    clients = [connect_from(server, "127.0.0.2") for _ in range(2)]
    await until(lambda: len(staying.started) == 2)
    with connect_from(server, "127.0.0.2") as third:
        assert await in_thread(end_of, third) == (b"", "eof")
    clients.append(connect_from(server, "127.0.0.3"))
    await until(lambda: len(staying.started) == 3)
    assert peers(server) == {"127.0.0.2/32": 2, "127.0.0.3/32": 1}
    server.connection(1).close()
    if kind == "sock":
        server.connection(1).cancel_handler()
    await until(lambda: server.num_connections == 2)
    assert peers(server) == {"127.0.0.2/32": 1, "127.0.0.3/32": 1}
    clients.append(connect_from(server, "127.0.0.2"))
    await until(lambda: len(staying.started) == 4)
    assert counters(server)["refusals"] == {"peer_connections": 1}
    for client in clients:
        client.close()
    server.invariant()


@ensureDeferred
async def test_a_prefix_is_one_peer(serve: Any, staying: Staying) -> None:
    """As ``peer_prefixes`` says."""
    server = await serve(
        staying.stream,
        max_connections_per_peer=1,
        peer_prefixes=(16, 64),
        refusal="drop",
    )
    with (
        connect_from(server, "127.1.0.1"),
        connect_from(server, "127.2.0.1"),
        connect_from(server, "127.1.9.9") as third,
    ):
        assert await in_thread(end_of, third) == (b"", "eof")
        await until(lambda: len(staying.started) == 2)
        assert peers(server) == {"127.1.0.0/16": 1, "127.2.0.0/16": 1}


def test_an_ipv6_peer_is_a_64(staying: Staying) -> None:
    """What one household has; a mapped IPv4 address is that address."""
    server = MemoryServer(staying.stream, max_connections_per_peer=1)

    def is_let_in(host: str) -> bool:
        return not server.connect(IPv6Address("TCP", host, 1)).is_closed

    assert is_let_in("2001:db8::1")
    assert not is_let_in("2001:db8::2")
    assert is_let_in("2001:db8:0:1::1")
    assert is_let_in("::ffff:10.0.0.1")
    assert is_let_in("::ffff:10.0.0.2")
    assert server.connect(v4("10.0.0.1")).is_closed


@ensureDeferred
async def test_an_ipv4_client_of_a_dual_stack_server_counts_as_such(
    serve: Any, staying: Staying
) -> None:
    """Before and after its accept, when it is shown as IPv4."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no dual stack")
    seen = Seen()
    listening = socket.create_server(
        ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
    )
    server = await serve(
        staying.stream,
        where=WhereToListen.of_fd(listening.detach(), own=True),
        max_connections_per_peer=1,
        refusal="drop",
        observer=seen,
    )
    with connect_from(server, "127.0.0.2"), connect_from(server, "127.0.0.3"):
        await until(lambda: len(staying.started) == 2)
        with connect_from(server, "127.0.0.2") as third:
            assert await in_thread(end_of, third) == (b"", "eof")
        assert peers(server) == {"127.0.0.2/32": 1, "127.0.0.3/32": 1}
        assert seen.of("connection_refused")[0][0].host == "127.0.0.2"
    await until(lambda: not server.num_connections)
    assert peers(server) == {}


def test_a_peer_may_come_so_often(staying: Staying) -> None:
    """Refused ones use nothing up; others have buckets of their own."""
    clock = Clock()
    server = MemoryServer(
        staying.stream, accept_rate_per_peer=Rate(1, 3), refusal="drop", clock=clock
    )

    def let_in(host: str, tries: int) -> int:
        clients = [server.connect(v4(host)) for _ in range(tries)]
        return sum(not client.is_closed for client in clients)

    assert let_in("10.0.0.1", 5) == 3
    assert let_in("10.0.0.2", 5) == 3
    clock.advance(0.9)
    assert let_in("10.0.0.1", 5) == 0
    clock.advance(0.1)
    assert let_in("10.0.0.1", 5) == 1
    clock.advance(2)
    assert let_in("10.0.0.1", 5) == 2
    assert server.factory.counters.refusals == {"peer_rate": 2 + 2 + 5 + 4 + 3}
    server.factory.invariant()


class Boom(Exception):
    """What handlers raise here."""


class Failing(Protocol):
    def connectionMade(self) -> None:
        raise Boom


class Refusing:
    """A factory that builds no protocol, or fails to."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def buildProtocol(self, addr: Any) -> Any:
        if self._error:
            raise self._error

    def doStart(self) -> None:
        """A port."""

    def doStop(self) -> None:
        """No port."""


class FailingProtocols(Refusing):
    def buildProtocol(self, addr: Any) -> Any:
        return Failing()


async def raises(*args: Any) -> None:
    """A handler."""
    raise Boom


async def ends(*args: Any) -> None:
    """A handler."""


def dies(*args: Any) -> None:
    """A handler."""
    raise Boom


async def closes(address: Any, reader: Any, writer: Any) -> None:
    """A handler."""
    writer.close()
    await reader.read()


async def aborts(address: Any, reader: Any, writer: Any) -> None:
    """A handler."""
    writer.abort()


@ensureDeferred
@pytest.mark.parametrize(
    ("kind", "handler"),
    [
        ("stream", ends),
        ("stream", raises),
        ("stream", dies),
        ("stream", closes),
        ("stream", aborts),
        ("sock", ends),
        ("sock", raises),
        ("protocol", Refusing()),
        ("protocol", Refusing(Boom())),
        ("protocol", FailingProtocols()),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
async def test_counts_of_peers_go_down_at_every_end(
    kind: str, handler: Any, serve: Any
) -> None:
    """Whoever has left may come again, as often as it likes."""
    server = await serve(handler, create=KINDS[kind].create, max_connections_per_peer=1)
    for number in range(1, 6):
        with connect_from(server, "127.0.0.2") as client:
            await in_thread(end_of, client)
        await until(
            lambda number=number: (
                server._factory._last_id == number and not server.num_connections
            )
        )
        assert peers(server) == {}
        assert server._factory.entrance.admission._keys == {}
    assert counters(server)["refusals"].get("peer_connections") is None
    server.invariant()


@ensureDeferred
@pytest.mark.parametrize("end", ["close", "reset", "abort", "server", "lifetime"])
async def test_counts_go_down_when_clients_or_the_server_end_it(
    end: str, serve: Any, connect: Any, staying: Staying
) -> None:
    """However it was."""
    clock = Clock()
    server = await serve(
        staying.stream, max_connections_per_peer=2, lifetime=5.0, clock=clock
    )
    client = connect(server)
    await until(lambda: server.num_connections == 1)
    assert peers(server) == {"127.0.0.1/32": 1}
    if end == "close":
        client.close()
    elif end == "reset":
        client.reset()
    elif end == "abort":
        server.connection(1).abort()
    elif end == "server":
        await server.close(close_existing_connections=True)
    else:
        await until(lambda: server.connections[0].handler == "running")
        clock.pump([1.0] * 7)
    await until(lambda: not server.num_connections)
    assert peers(server) == {}
    server.invariant()


@ensureDeferred
async def test_a_wrapping_factory_that_fails_leaves_no_count(
    serve: Any, staying: Staying, logs: Any
) -> None:
    """Before or after it has asked ours; or it refuses after it has."""
    from twisted.internet.interfaces import IStreamServerEndpoint
    from twisted.protocols.policies import WrappingFactory
    from zope.interface import implementer

    moods: list[str] = []

    class Moody(WrappingFactory):
        def buildProtocol(self, addr: Any) -> Any:
            mood = moods.pop(0)
            if mood == "fails":
                raise Boom
            built = super().buildProtocol(addr)
            if mood == "fails later":
                raise Boom
            return None if mood == "refuses later" else built

    @implementer(IStreamServerEndpoint)
    class Endpoint:
        def listen(self, factory: Any) -> Any:
            return TCP4ServerEndpoint(the_reactor(), 0, interface=LOCALHOST).listen(
                Moody(factory)
            )

    server = await serve(
        staying.stream,
        where=WhereToListen.of_endpoint(Endpoint()),
        max_connections=1,
        max_connections_per_peer=1,
    )
    for mood in ("fails", "fails later", "refuses later"):
        moods.append(mood)
        with connect_from(server, "127.0.0.2") as client:
            assert (await in_thread(end_of, client))[0] == b""
        assert server.num_connections == 0
        assert peers(server) == {}
    moods.append("")
    with connect_from(server, "127.0.0.2") as client:
        await until(lambda: staying.started)
        assert peers(server) == {"127.0.0.2/32": 1}
    await until(lambda: not server.num_connections)
    logs.take(LogLevel.critical)
    server.invariant()


def test_held_ones_count_for_their_peer(staying: Staying) -> None:
    """On a port that cannot be gated: else all of one peer that were held would be
    let in together. Those that are dropped or closed count no more."""
    server = MemoryServer(
        staying.stream, max_connections=1, max_connections_per_peer=2, refusal="drop"
    )
    first = server.connect(v4("10.0.0.9"))
    held = [server.connect(v4("10.0.0.1")) for _ in range(3)]
    assert [c.is_closed for c in held] == [False, False, True]
    assert server.factory.entrance.admission._peers.connections(b"\x0a\0\0\x01") == 2
    server.factory.set_drop_incoming_connections(True)
    assert all(c.is_closed for c in held)
    assert server.factory.entrance.admission._peers.connections(b"\x0a\0\0\x01") == 0
    server.factory.set_drop_incoming_connections(False)
    held = [server.connect(v4("10.0.0.1")) for _ in range(2)]
    first.reset()
    assert server.factory.num_connections == 1
    held[0].reset()
    assert server.factory.num_connections == 1
    assert server.factory.entrance.admission._peers.connections(b"\x0a\0\0\x01") == 1
    server.connect(v4("10.0.0.1"))
    server.factory.close()
    held[1].reset()
    assert server.factory.entrance.admission._keys == {}
    assert server.factory.entrance.admission._peers.describe()["live_peers"] == 0
    server.factory.invariant()


@ensureDeferred
async def test_those_who_wait_for_an_eviction_count_for_their_peer(
    serve: Any, staying: Staying
) -> None:
    """One peer cannot have more of them than it may have connections, and so not
    evict more."""
    ending: Deferred[None] = Deferred()
    cancelled = []

    async def stubborn(address: Any, reader: Any, writer: Any) -> None:
        staying.started.append(address)
        try:
            await Deferred()
        finally:
            cancelled.append(address)
            await ending

    server = await serve(
        stubborn,
        max_connections=4,
        overflow="evict",
        max_connections_per_peer=2,
        refusal="drop",
    )
    clients = [connect_from(server, f"127.0.0.{n}") for n in (2, 3, 4, 5)]
    await until(lambda: len(staying.started) == 4)
    clients += [connect_from(server, "127.0.1.1") for _ in range(4)]
    for client in clients[-2:]:
        assert await in_thread(end_of, client) == (b"", "eof")
    assert counters(server)["refusals"] == {"peer_connections": 2}
    assert len(cancelled) == server.describe()["held"] == 2
    ending.callback(None)
    await until(lambda: len(staying.started) == 6)
    assert peers(server)["127.0.1.1/32"] == 2
    server.invariant()
    for client in clients:
        client.close()


# Server-wide


@ensureDeferred
@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("kind", KINDS)
async def test_clients_wait_in_the_backlog_until_the_rate_allows_them(
    kind: str, batch: int, serve: Any, connect: Any, staying: Staying
) -> None:
    """Exactly the rate, with its burst; in their order."""
    clock = Clock()
    server = await serve(
        KINDS[kind].make(staying),
        create=KINDS[kind].create,
        accept_rate="2/s:3",
        max_accepts_per_batch=batch,
        clock=clock,
    )
    clients = [connect(server) for _ in range(8)]
    await until(lambda: len(staying.started) == 3)
    await settle()
    assert server.num_connections == 3
    assert not server._listeners.ports[0]._gate._is_accepting
    assert len(clock.getDelayedCalls()) == 1
    for expected in (4, 5, 6, 7):
        clock.advance(0.499)
        await settle()
        assert len(staying.started) == expected - 1
        clock.advance(0.001)
        await until(lambda expected=expected: len(staying.started) == expected)
        await settle()
        assert len(staying.started) == expected
    clock.advance(10)
    await until(lambda: len(staying.started) == 8)
    assert [a.port for a in staying.started] == [
        c.socket.getsockname()[1] for c in clients
    ]
    # The bucket is not empty: nobody needs a timer.
    assert clock.getDelayedCalls() == []
    assert counters(server)["refusals"] == {}
    server.invariant()


@ensureDeferred
async def test_a_close_while_clients_wait_for_the_rate_leaves_no_timer(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """Nor does a change after it set one."""
    clock = Clock()
    server = await serve(staying.stream, accept_rate="1/m:1", clock=clock)
    first, waiting = connect(server), connect(server)
    await until(lambda: staying.started)
    assert len(clock.getDelayedCalls()) == 1
    await server.close()
    assert clock.getDelayedCalls() == []
    server.change(accept_rate="1/h:1")
    assert clock.getDelayedCalls() == []
    first.close()
    await server.close_finished_and_handlers_determined()
    assert (await in_thread(end_of, waiting))[0] == b""


@ensureDeferred
async def test_unix_clients_wait_for_the_servers_rate(
    serve: Any, connect: Any, staying: Staying, tmp_path: Any
) -> None:
    """It is the server's."""
    clock = Clock()
    server = await serve(
        staying.stream, where=place("unix", tmp_path), accept_rate="1/s:1", clock=clock
    )
    clients = [connect(server) for _ in range(2)]
    await until(lambda: staying.started)
    await settle()
    assert len(staying.started) == 1
    clock.advance(1)
    await until(lambda: len(staying.started) == len(clients))


@ensureDeferred
async def test_dropped_and_refused_clients_use_up_no_rate(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """It protects handlers; who is sent away has none. While it drops, nobody waits."""
    clock = Clock()
    server = await serve(
        staying.stream,
        accept_rate="1/m:2",
        deny=["127.0.0.2"],
        refusal="drop",
        clock=clock,
    )
    for _ in range(3):
        with connect_from(server, "127.0.0.2") as client:
            assert await in_thread(end_of, client) == (b"", "eof")
    clients = [connect(server) for _ in range(3)]
    await until(lambda: len(staying.started) == 2)
    server.set_drop_incoming_connections(True)
    assert await in_thread(end_of, clients[2]) == (b"", "eof")
    server.set_drop_incoming_connections(False)
    late = connect(server)
    await settle()
    assert len(staying.started) == 2
    clock.advance(60)
    assert await echoes(late)


def test_a_port_that_cannot_be_gated_holds_clients_for_the_rate(
    staying: Staying,
) -> None:
    """Accepted, unstarted, in order."""
    clock = Clock()
    server = MemoryServer(staying.stream, accept_rate="1/s:2", clock=clock)
    clients = [server.connect() for _ in range(5)]
    assert len(staying.started) == 2
    for expected in (3, 4, 5):
        clock.advance(0.999)
        assert len(staying.started) == expected - 1
        clock.advance(0.001)
        clock.advance(0)
        assert len(staying.started) == expected
    assert [a.port for a in staying.started] == [c.address.port for c in clients]
    server.factory.invariant()


@pytest.mark.parametrize("dry", [False, True])
def test_rate_and_slots_together_where_there_is_no_gate(
    staying: Staying, dry: bool
) -> None:
    """Each client waits for both; in a dry run of slots only for the rate."""
    clock = Clock()
    server = MemoryServer(
        staying.stream,
        max_connections=1,
        accept_rate="1/s:1",
        clock=clock,
        dry_run=["max_connections"] if dry else (),
    )
    clients = [server.connect() for _ in range(3)]
    assert len(staying.started) == 1
    clock.pump([1.0, 0])
    assert len(staying.started) == (2 if dry else 1)
    clock.pump([1.0, 0])
    assert len(staying.started) == (3 if dry else 1)
    for client in clients:
        client.reset()
    clock.pump([1.0, 0, 1.0, 0])
    assert len(staying.started) == 3
    server.factory.invariant()


def test_one_that_waits_for_the_rate_evicts_nobody_before(staying: Staying) -> None:
    """Else the rate would not keep a flood from evicting all at once."""
    clock = Clock()
    server = MemoryServer(
        staying.stream,
        max_connections=3,
        overflow="evict",
        accept_rate="1/s:3",
        clock=clock,
    )
    for _ in range(3):
        server.connect()
    for _ in range(5):
        server.connect()
    assert server.factory.counters.ends == {}
    for number in range(1, 4):
        clock.pump([1.0, 0])
        assert server.factory.counters.ends == {"evicted": number}
        assert len(staying.started) == 3 + number
        assert server.factory.num_connections == 3
    server.factory.invariant()


@ensureDeferred
async def test_the_rate_bounds_evictions(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """Also with a gate, and handlers that do not end at once: a newcomer uses up the
    rate when it is accepted, not when its slot is free."""
    clock = Clock()
    cancelled = []
    ending: Deferred[None] = Deferred()

    async def stubborn(address: Any, reader: Any, writer: Any) -> None:
        staying.started.append(address)
        try:
            await Deferred()
        finally:
            cancelled.append(address)
            await ending

    server = await serve(
        stubborn, max_connections=4, overflow="evict", accept_rate="1/s:4", clock=clock
    )
    for _ in range(8):
        connect(server)
    await until(lambda: len(staying.started) == 4)
    await settle()
    assert cancelled == []
    clock.advance(1)
    await until(lambda: len(cancelled) == 1)
    await settle()
    assert len(cancelled) == 1
    ending.callback(None)
    await until(lambda: len(staying.started) == 5)


# Changed


@ensureDeferred
@pytest.mark.parametrize("limit", ["max_connections_per_peer", "accept_rate_per_peer"])
async def test_a_limit_per_peer_can_be_given_while_it_has_connections(
    limit: str, serve: Any, connect: Any, staying: Staying
) -> None:
    """They stay, and count as what they are; coming has cost them nothing."""
    value = {"max_connections_per_peer": 3, "accept_rate_per_peer": "1/h:2"}[limit]
    clock = Clock()
    server = await serve(staying.stream, refusal="drop", clock=clock)
    clients = [connect(server) for _ in range(2)]
    await until(lambda: len(staying.started) == 2)
    server.change(**{limit: value})
    assert server.num_connections == 2
    assert peers(server) == {"127.0.0.1/32": 2}
    allowed = 1 if limit == "max_connections_per_peer" else 2
    for number in range(allowed):
        clients.append(connect(server))
        await until(lambda number=number: len(staying.started) == 3 + number)
    refused = connect(server)
    assert await in_thread(end_of, refused) == (b"", "eof")
    server.change(**{limit: None})
    clients.append(connect(server))
    await until(lambda: len(staying.started) == 3 + allowed)
    for client in clients:
        assert await echoes(client)
    server.invariant()


@ensureDeferred
async def test_a_limit_taken_away_and_given_back_counts_nobody_twice(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """Again and again."""
    server = await serve(staying.stream, max_connections_per_peer=2, refusal="drop")
    clients = [connect(server)]
    await until(lambda: len(staying.started) == 1)
    for _ in range(3):
        server.change(max_connections_per_peer=None)
        server.change(max_connections_per_peer=2)
        assert peers(server) == {"127.0.0.1/32": 1}
    server.change(max_connections_per_peer=None)
    clients.append(connect(server))
    await until(lambda: len(staying.started) == 2)
    server.change(max_connections_per_peer=2)
    assert peers(server) == {"127.0.0.1/32": 2}
    for client in clients:
        client.close()
    await until(lambda: not server.num_connections)
    assert peers(server) == {}
    server.invariant()


@ensureDeferred
async def test_other_prefixes_count_those_who_are_there(
    serve: Any, staying: Staying
) -> None:
    """As if it had always been so; and back."""
    server = await serve(staying.stream, max_connections_per_peer=2, refusal="drop")
    with connect_from(server, "127.1.0.1"), connect_from(server, "127.1.0.2"):
        await until(lambda: len(staying.started) == 2)
        server.change(peer_prefixes=(16, 64))
        assert peers(server) == {"127.1.0.0/16": 2}
        with connect_from(server, "127.1.0.3") as third:
            assert await in_thread(end_of, third) == (b"", "eof")
        server.change(peer_prefixes=(32, 64))
        assert peers(server) == {"127.1.0.1/32": 1, "127.1.0.2/32": 1}
    await until(lambda: not server.num_connections)
    assert peers(server) == {}
    server.invariant()


def test_a_limit_given_while_some_are_held_counts_them(staying: Staying) -> None:
    """They have a peer, too."""
    server = MemoryServer(staying.stream, max_connections=1, refusal="drop")
    clients = [server.connect(v4("10.0.0.1")) for _ in range(2)]
    server.factory.change({"max_connections_per_peer": 2})
    assert server.connect(v4("10.0.0.1")).is_closed
    for client in clients:
        client.reset()
    assert server.factory.entrance.admission._keys == {}
    server.factory.invariant()


@ensureDeferred
async def test_networks_can_be_changed(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """For the next client; who is there stays, be it denied now."""
    server = await serve(staying.stream, refusal="drop")
    first = connect(server)
    await until(lambda: len(staying.started) == 1)
    server.change(deny=["127.0.0.0/8"])
    assert await in_thread(end_of, connect(server)) == (b"", "eof")
    server.change(deny=(), allow=["127.0.0.2"])
    assert await in_thread(end_of, connect(server)) == (b"", "eof")
    server.change(refusal="reset")
    assert await in_thread(end_of, connect(server)) == (b"", "reset")
    server.change(allow=None)
    second = connect(server)
    for client in (first, second):
        assert await echoes(client)
    assert counters(server)["refusals"] == {"denied": 3}


@ensureDeferred
async def test_the_servers_rate_can_be_changed(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """While clients wait: a faster one lets them in sooner, at its rate, not all at
    once; none lets all in."""
    clock = Clock()
    server = await serve(staying.stream, accept_rate="1/h:1", clock=clock)
    for _ in range(6):
        connect(server)
    await until(lambda: len(staying.started) == 1)
    server.change(accept_rate="1/s:3")
    await settle()
    assert len(staying.started) == 1
    clock.advance(1)
    await until(lambda: len(staying.started) == 2)
    await settle()
    assert len(staying.started) == 2
    # Another option is none of the rate's business.
    server.change(dry_run=["deny"], max_accepts_per_batch=5)
    server.change(max_connections=50)
    await settle()
    assert len(staying.started) == 2
    server.change(accept_rate=None)
    await until(lambda: len(staying.started) == 6)
    assert clock.getDelayedCalls() == []
    server.change(accept_rate="1/s:1")
    connect(server)
    await until(lambda: len(staying.started) == 7)
    connect(server)
    await settle()
    assert len(staying.started) == 7
    server.change(dry_run=["accept_rate"])
    await until(lambda: len(staying.started) == 8)
    assert clock.getDelayedCalls() == []
    server.change(dry_run=())
    assert len(clock.getDelayedCalls()) == 1
    server.invariant()


WRONG: list[tuple[str, Any, type[Exception]]] = [
    ("max_connections_per_peer", 0, ValueError),
    ("max_connections_per_peer", 1.5, TypeError),
    ("max_connections_per_peer", True, TypeError),
    ("accept_rate_per_peer", "often", ValueError),
    ("accept_rate_per_peer", 5, TypeError),
    ("accept_rate", "0/s", ValueError),
    ("accept_rate", b"1/s", TypeError),
    ("peer_prefixes", (33, 64), ValueError),
    ("peer_prefixes", (-1, 64), ValueError),
    ("peer_prefixes", 24, TypeError),
    ("peer_prefixes", (True, 64), TypeError),
    ("allow", "10.0.0.0/8", TypeError),
    ("allow", ["10.0.0.1/8"], ValueError),
    ("allow", 5, TypeError),
    ("deny", ["nonsense"], ValueError),
    ("deny", [None], TypeError),
    ("dry_run", "deny", TypeError),
    ("dry_run", ["nonsense"], ValueError),
    ("dry_run", [["deny"]], TypeError),
    ("dry_run", 5, TypeError),
    ("dry_run", None, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
@ensureDeferred
async def test_a_wrong_value_is_named(
    name: str, value: Any, error: type[Exception], serve: Any
) -> None:
    """Before anything is bound; and a change of which one is wrong changes nothing."""
    options = {"deny": ["10.0.0.0/8"], "accept_rate": "5/s"}
    changes = {"accept_rate": "1/s"}
    await is_refused(serve, error, name, value, changes, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("engine", "reactor"),
        ("socket", None),
        ("reactor", None),
        ("clock", None),
        ("observer", None),
        ("drop_incoming_connections", True),
        ("on_handler_error", "raise"),
        ("nonsense", 1),
    ],
)
@ensureDeferred
async def test_what_cannot_be_changed_is_named(
    name: str, value: Any, serve: Any, staying: Staying
) -> None:
    """And nothing else is."""
    server = await serve(staying.stream)
    before = server.describe()
    with pytest.raises(TypeError, match=name):
        server.change(**{"max_connections": 5, name: value})
    assert server.describe() == before


@ensureDeferred
async def test_a_description_has_the_limits(serve: Any, staying: Staying) -> None:
    """As JSON has them."""
    server = await serve(
        staying.stream,
        overflow=BUSY,
        allow=["10.0.0.0/8", "127.0.0.0/8"],
        accept_rate=Rate(5),
        dry_run=True,
        max_connections_per_peer=7,
    )
    described = json.loads(json.dumps(server.describe()))
    options = described["options"]
    assert options["allow"] == ["10.0.0.0/8", "127.0.0.0/8"]
    assert options["accept_rate"] == "5/s:5"
    assert "too many" in options["overflow"]
    assert "accept_rate" in options["dry_run"]
    limits = {name: v for name, v in described["peers"].items() if name in options}
    assert limits == {
        "max_connections_per_peer": 7,
        "accept_rate_per_peer": None,
        "peer_prefixes": [32, 64],
    }
    assert all(options[name] == limit for name, limit in limits.items())


# Dry runs


def client_of(server: Any) -> socket.socket:
    """One more of 127.0.0.2."""
    return connect_from(server, "127.0.0.2")


@ensureDeferred
@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize(
    ("limit", "overflow"),
    [
        *[(limit, "hold") for limit in LIMITS],
        ("max_connections", "drop"),
        ("max_connections", "evict"),
    ],
)
async def test_a_limit_in_a_dry_run_lets_pass_and_counts(
    limit: str,
    overflow: str,
    all_of_them: bool,
    serve: Any,
    staying: Staying,
    logs: Any,
) -> None:
    """And is logged once a minute. Nothing else changes."""
    clock = Clock()
    seen = Seen()
    server = await serve(
        staying.stream,
        overflow=overflow,
        clock=clock,
        observer=seen,
        dry_run=True if all_of_them else [limit],
        **{limit: LIMITS[limit]},
    )
    clients = []
    # Those who are in any network are refused from the first one on.
    within = 0 if limit in ("allow", "deny") else 1
    for number in range(1, 5):
        clients.append(client_of(server))
        await until(lambda number=number: len(staying.started) == number)
        server.invariant()
    assert server.num_connections == 4
    reason = REASONS[limit]
    assert counters(server)["would_refuse"] == {reason: 4 - within}
    assert counters(server)["refusals"] == counters(server)["ends"] == {}
    told = seen.of("refused_in_dry_run")
    assert [r for _, r in told] == [Reason(reason)] * (4 - within)
    assert [a.port for a, _ in told] == [c.getsockname()[1] for c in clients][within:]
    assert "connection_refused" not in seen.names()
    lines = [t for t in logs.texts(LogLevel.warn) if "dry run" in t]
    assert len(lines) == 1 and "127.0.0.2" in lines[0]
    assert f"{reason}, 1 so far" in lines[0]
    clock.advance(60.001)
    clients.append(client_of(server))
    await until(lambda: len(staying.started) == 5)
    if limit not in ("accept_rate", "accept_rate_per_peer"):  # It may come again.
        lines = [t for t in logs.texts(LogLevel.warn) if "dry run" in t]
        assert len(lines) == 2 and f"{reason}, {5 - within} so far" in lines[1]
    for client in clients:
        client.sendall(b"x")
        assert await in_thread(client.recv, 1) == b"x"
        client.close()
    await until(lambda: not server.num_connections)
    assert clock.getDelayedCalls() == []
    server.invariant()


@ensureDeferred
async def test_a_dry_run_of_slots_that_ends_closes_nobody(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """Who is beyond the limit stays; nobody comes before there is a slot again."""
    server = await serve(staying.stream, max_connections=1, dry_run=["max_connections"])
    clients = [connect(server) for _ in range(3)]
    await until(lambda: len(staying.started) == 3)
    server.change(dry_run=())
    server.invariant()
    waiting = connect(server)
    for expected in (2, 1):
        clients.pop().close()
        await until(lambda expected=expected: server.num_connections == expected)
        await settle()
        assert server.num_connections == expected
        server.invariant()
    clients.pop().close()
    assert await echoes(waiting)
    assert len(staying.started) == 4


@ensureDeferred
async def test_a_dry_run_that_begins_lets_those_in_who_wait(
    serve: Any, connect: Any, staying: Staying
) -> None:
    """From the backlog, and those that are held."""
    server = await serve(staying.stream, max_connections=1)
    for _ in range(3):
        connect(server)
    await until(lambda: len(staying.started) == 1)
    await settle()
    server.change(dry_run=["max_connections"])
    await until(lambda: len(staying.started) == 3)
    memory = MemoryServer(staying.stream, max_connections=1)
    for _ in range(3):
        memory.connect()
    memory.factory.change({"dry_run": ["max_connections"]})
    assert memory.factory.num_connections == 3
    memory.factory.invariant()


def test_a_dry_run_of_one_limit_of_a_peer_leaves_the_other(staying: Staying) -> None:
    """Each by itself."""
    clock = Clock()
    server = MemoryServer(
        staying.stream,
        max_connections_per_peer=1,
        accept_rate_per_peer="1/h:3",
        dry_run=["max_connections_per_peer"],
        clock=clock,
    )
    clients = [server.connect(v4("10.0.0.1")) for _ in range(5)]
    assert [c.is_closed for c in clients] == [False] * 3 + [True] * 2
    assert server.factory.counters.refusals == {"peer_rate": 2}
    server.factory.change({"dry_run": ["accept_rate_per_peer"]})
    assert server.connect(v4("10.0.0.1")).is_closed
    assert server.factory.counters.refusals["peer_connections"] == 1
    for client in clients:
        client.reset()
    assert not server.connect(v4("10.0.0.1")).is_closed
    assert server.factory.counters.would_refuse["peer_rate"] == 1
    server.factory.invariant()


def test_a_client_is_counted_once_as_denied_in_a_dry_run(staying: Staying) -> None:
    """Though it is in none of ``allow``, and in ``deny``."""
    server = MemoryServer(
        staying.stream,
        allow=["10.0.0.0/8"],
        deny=["11.0.0.0/8"],
        dry_run=["allow", "deny"],
    )
    assert not server.connect(v4("11.0.0.1")).is_closed
    assert server.factory.counters.would_refuse == {"denied": 1}
    server.factory.change({"dry_run": ["allow"]})
    assert server.connect(v4("11.0.0.1")).is_closed
    assert server.factory.counters.would_refuse == {"denied": 1}
    assert server.factory.counters.refusals == {"denied": 1}


# Observers


@ensureDeferred
async def test_an_observer_sees_each_event_in_order(
    full: Any, connect: Any, staying: Staying
) -> None:
    """Of a connection, of a full server, of a refusal."""
    seen = Seen()
    server, client = await full(overflow="drop", observer=seen)
    await in_thread(end_of, connect(server))
    client.shut()
    await until(lambda: not server.num_connections)
    assert seen.names() == [
        "limit_reached",
        "connection_accepted",
        "handler_started",
        "connection_refused",
        "handler_ended",
        "connection_finished",
    ]
    (finished,) = seen.of("connection_finished")
    assert finished[0].reason is Reason.EOF
    server.remove_observer(seen)
    connect(server)
    await until(lambda: len(staying.started) == 2)
    assert len(seen.events) == 6


@ensureDeferred
async def test_an_observer_that_raises_changes_no_count(
    serve: Any, staying: Staying, logs: Any
) -> None:
    """Beside it others are told, and limits hold."""
    seen = Seen()
    server = await serve(
        staying.stream,
        max_connections_per_peer=1,
        refusal="drop",
        observer=Raising(),
        dry_run=["accept_rate_per_peer"],
        accept_rate_per_peer="1/h:1",
    )
    server.add_observer(seen)
    for _ in range(3):
        with client_of(server) as first:
            await until(lambda: server.num_connections == 1)
            with client_of(server) as second:
                assert await in_thread(end_of, second) == (b"", "eof")
            del first
        await until(lambda: not server.num_connections)
    assert peers(server) == {}
    assert counters(server)["refusals"] == {"peer_connections": 3}
    assert counters(server)["would_refuse"] == {"peer_rate": 2}
    assert len(seen.of("connection_finished")) == 3
    assert {e["log_failure"].type.__name__ for e in logs.take(LogLevel.critical)} == {
        "ObserverError"
    }
    server.invariant()


@ensureDeferred
async def test_an_observer_may_change_the_server_it_observes(
    serve: Any, staying: Staying
) -> None:
    """One that bans whoever has been refused: at once, in the middle of that."""

    class Bans(Observer):
        banned: list[str] = []
        server: Any = None

        def connection_refused(self, address: Any, reason: Reason) -> None:
            if reason is Reason.PEER_CONNECTIONS:
                self.banned.append(address.host)
                self.server.change(deny=self.banned)

    observer = Bans()
    server = await serve(
        staying.stream, max_connections_per_peer=1, refusal="drop", observer=observer
    )
    observer.server = server
    with client_of(server):
        for _ in range(3):
            with client_of(server) as refused:
                assert await in_thread(end_of, refused) == (b"", "eof")
    assert counters(server)["refusals"] == {"peer_connections": 1, "denied": 2}
    assert observer.banned == ["127.0.0.2"]


def test_addresses_that_are_none_pass(staying: Staying) -> None:
    """A bare factory may be given any."""
    server = MemoryServer(
        staying.stream, deny=["0.0.0.0/0"], max_connections_per_peer=1
    )
    for address in (UNIXAddress(None), UNIXAddress("/x"), UNIXAddress("")):
        assert not server.connect(address).is_closed
    server.factory.invariant()


@ensureDeferred
async def test_many_peers_at_once(serve: Any, staying: Staying) -> None:
    """Two hundred addresses, two connections each, of which one is let in."""
    server = await serve(
        staying.stream,
        max_connections=1000,
        backlog=500,
        max_accepts_per_batch=50,
        max_connections_per_peer=1,
        refusal="drop",
    )

    def come(part: int) -> list[socket.socket]:
        hosts = [f"127.3.{part}.{n}" for n in range(1, 51)]
        return [connect_from(server, host) for host in hosts * 2]

    found = await gatherResults([in_thread(come, part) for part in range(4)])
    clients = [client for part in found for client in part]
    await until(lambda: counters(server)["refusals"] == {"peer_connections": 200})
    await until(lambda: len(staying.started) == 200)
    assert server.describe()["peers"]["live_peers"] == 200
    for client in clients:
        client.close()
    await until(lambda: not server.num_connections)
    assert server.describe()["peers"]["live_peers"] == 0
    server.invariant()


class Walk:
    """A server in memory to which anything happens, by chance."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.endings: list[Deferred[None]] = []
        self.server = MemoryServer(
            self.handler, max_connections=4, observer=Checking(self)
        )
        self.clients: list[Any] = []

    async def handler(self, address: Any, reader: Any, writer: Any) -> None:
        """Some end at once when they are cancelled, some do not end for a while."""
        try:
            await reader.read()
        finally:
            if self.random.random() < 0.5:
                ending: Deferred[None] = Deferred()
                self.endings.append(ending)
                await ending

    def step(self) -> None:
        """Something happens."""
        what = self.random.choice(self.STEPS)
        what(self)
        self.server.factory.invariant()

    def connect(self) -> None:
        host = f"10.0.{self.random.randrange(2)}.{self.random.randrange(3)}"
        self.clients.append(self.server.connect(v4(host)))

    def leave(self) -> None:
        if self.clients:
            client = self.clients.pop(self.random.randrange(len(self.clients)))
            if not client.is_closed:
                client.reset()

    def say(self) -> None:
        if self.clients:
            client = self.random.choice(self.clients)
            if not client.is_closed:
                client.send(b"x")

    def end(self) -> None:
        if self.endings:
            self.endings.pop(self.random.randrange(len(self.endings))).callback(None)

    def uncount(self) -> None:
        live = self.server.factory.connections
        if live:
            self.random.choice(live).uncount()

    def wait(self) -> None:
        self.server.clock.advance(self.random.choice([0, 0.1, 0.5, 2]))

    def drop(self) -> None:
        self.server.factory.set_drop_incoming_connections(self.random.random() < 0.3)

    def change(self) -> None:
        name, values = self.random.choice(self.CHANGES)
        self.server.factory.change({name: self.random.choice(values)})

    CHANGES: Any = [
        ("max_connections", [1, 2, 4, 8]),
        ("overflow", ["hold", "drop", "evict", "evict", BUSY]),
        ("max_connections_per_peer", [None, 1, 3]),
        ("accept_rate_per_peer", [None, "1/s:2", "5/s"]),
        ("accept_rate", [None, "2/s:2", "10/s:1"]),
        ("peer_prefixes", [(32, 64), (24, 64)]),
        ("deny", [(), ["10.0.1.1"]]),
        ("dry_run", [(), ["max_connections"], ["accept_rate"], True]),
    ]
    STEPS: Any = (
        *[connect] * 6,
        *[leave] * 2,
        say,
        *[end] * 2,
        uncount,
        *[wait] * 2,
        drop,
        *[change] * 2,
    )


class Checking(Observer):
    """Looks at the state in the middle of each event, too."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def connection_accepted(self, connection: Any) -> None:
        self.walk.server.factory.invariant()

    def connection_refused(self, address: Any, reason: Reason) -> None:
        self.walk.server.factory.invariant()

    def refused_in_dry_run(self, address: Any, reason: Reason) -> None:
        self.walk.server.factory.invariant()


@pytest.mark.whatever("engine", "reactor")
@pytest.mark.parametrize("seed", range(40))
def test_in_any_order(seed: int, logs: Any) -> None:
    """Whatever happens: the invariants hold, who could be let in does not wait, and
    at the end nothing is left."""
    walk = Walk(seed)
    factory = walk.server.factory
    for _ in range(200):
        walk.step()
        waits = factory.describe()["held"] and not factory.entrance.rate_wait.timer
        assert not waits or factory.slots.is_full
    factory.close()
    factory.close_connections()
    while walk.endings:
        walk.end()
    walk.server.clock.pump([1.0] * 8)
    assert factory.num_connections == 0
    factory.invariant()
    assert factory.entrance.admission._keys == {}
    assert not factory.replies._connections
    assert walk.server.clock.getDelayedCalls() == []
    assert not factory.entrance.held.too_early and not factory.entrance.held.unconnected
    assert all(client.is_closed for client in walk.clients)
    assert not [e for e in logs.take(LogLevel.critical) if "observer" in str(e)]
