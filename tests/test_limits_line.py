"""The line that says which limits are in force: ``server.limits``, for a log."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from pytest_twisted import ensureDeferred

from tcpsvc import LOCALHOST, Rate, Reply, Server, ServerFactory, WhereToListen
from tcpsvc.handlers import echo
from tcpsvc.limits_line import limits_line
from tcpsvc.options import StreamOptions
from tcpsvc.settings import Settings

#: Options that limit nobody: how it is done, and by whom.
NO_LIMITS = {"socket", "engine", "observer", "keepalive", "reactor", "clock"}

#: The others: a value, and how the line says it.
SAID: dict[str, tuple[dict[str, Any], str]] = {
    "max_connections": ({"max_connections": 7}, "max_connections=7"),
    "max_accepts_per_batch": (
        {"max_accepts_per_batch": 3},
        "max_accepts_per_batch=3",
    ),
    "backlog": ({"backlog": 12}, "backlog=12"),
    "drop_incoming_connections": (
        {"drop_incoming_connections": True},
        "drop_incoming_connections",
    ),
    "overflow": ({"overflow": "evict"}, "overflow=evict"),
    "refusal": ({"refusal": "drop", "deny": ["::1"]}, "refusal=drop"),
    "max_connections_per_peer": (
        {"max_connections_per_peer": 4},
        "max_connections_per_peer=4",
    ),
    "accept_rate_per_peer": (
        {"accept_rate_per_peer": Rate(5)},
        "accept_rate_per_peer=5/s:5",
    ),
    "peer_prefixes": (
        {"peer_prefixes": (24, 56), "max_connections_per_peer": 4},
        "peer_prefixes=/24 and /56",
    ),
    "accept_rate": ({"accept_rate": "90/m:20"}, "accept_rate=90/m:20"),
    "allow": ({"allow": ["10.0.0.0/8", "::1"]}, "allow=10.0.0.0/8 ::1/128"),
    "deny": ({"deny": [f"10.0.{n}.0/24" for n in range(0, 12, 2)]}, "deny=6 networks"),
    "dry_run": (
        {"deny": ["::1"], "dry_run": ["deny", "accept_rate"]},
        "dry_run=accept_rate deny",
    ),
    "first_byte_timeout": ({"first_byte_timeout": 5}, "first_byte_timeout=5 s"),
    "idle_timeout": ({"idle_timeout": 0.25}, "idle_timeout=0.25 s"),
    "handler_timeout": ({"handler_timeout": 5}, "handler_timeout=5 s"),
    "lifetime": ({"lifetime": 86400.0}, "lifetime=86400 s"),
    "min_throughput": ({"min_throughput": 10}, "min_throughput=10 bytes/s"),
    "throughput_window": (
        {"min_throughput": 10, "throughput_window": 15},
        "throughput_window=15 s",
    ),
    "on_exhaustion": ({"on_exhaustion": "shed"}, "on_exhaustion=shed"),
    "on_accept_error": ({"on_accept_error": print}, "on_accept_error=print"),
    "buffer_age_limit": ({"buffer_age_limit": 20}, "buffer_age_limit=20 s"),
    "flush_timeout": ({"flush_timeout": 20}, "flush_timeout=20 s"),
    "reader_buffer_size": (
        {"reader_buffer_size": 1000},
        "reader_buffer_size=1000 bytes",
    ),
    "writer_buffer_size": (
        {"writer_buffer_size": 2000},
        "writer_buffer_size=2000 bytes",
    ),
    "eof_on_drain": ({"eof_on_drain": True}, "eof_on_drain"),
}


def line_of(factory: ServerFactory, *, with_defaults: bool = True) -> str:
    """The line of the server that listens with a factory."""
    return limits_line(
        factory.settings,
        of_streams=factory.takes_streams,
        is_dropping=factory.is_dropping_incoming_connections,
        has_backlog=True,
        with_defaults=with_defaults,
    )


def short(**options: Any) -> str:
    """What is said of it that is not as by default."""
    factory = ServerFactory.of_streams(echo, on_handler_error="raise", **options)
    return line_of(factory, with_defaults=False)


def line(**options: Any) -> str:
    """The line of a server of streams."""
    return line_of(ServerFactory.of_streams(echo, on_handler_error="raise", **options))


def test_every_option_that_limits_is_in_the_line() -> None:
    """One that is added later is to be thought of."""
    options = StreamOptions.__optional_keys__
    assert SAID.keys() | NO_LIMITS == options
    assert set(Settings.__slots__) <= options | {"on_handler_error"}


@pytest.mark.parametrize("option", SAID)
def test_what_is_in_force_is_said_with_its_unit(option: str) -> None:
    """Each option of its own."""
    options, said = SAID[option]
    assert said in line(**options).split(", ") or said in line(**options)
    assert "\n" not in line(**options)
    assert said in short(**options)


def test_what_is_in_force_by_default_is_said_too() -> None:
    """And nothing that is not."""
    assert line(max_connections=100) == (
        "max_connections=100, overflow=hold, on_exhaustion=back-off, "
        "buffer_age_limit=120 s, flush_timeout=30 s, "
        "reader_buffer_size=131072 bytes, writer_buffer_size=131072 bytes, "
        "max_accepts_per_batch=1, backlog=64"
    )


def test_what_is_as_by_default_can_be_left_out() -> None:
    """But for max_connections, which depends on the machine."""
    assert short(max_connections=100) == "max_connections=100"
    assert short().startswith("max_connections=")
    assert short(
        max_connections=100,
        overflow="hold",
        deny=["::1"],
        refusal="reset",
        max_connections_per_peer=4,
        peer_prefixes=(32, 64),
        idle_timeout=60,
        backlog=64,
    ) == (
        "max_connections=100, max_connections_per_peer=4, deny=::1/128, "
        "idle_timeout=60 s"
    )


def test_a_limit_by_default_that_was_taken_away_is_said() -> None:
    """Where what is left out is as by default."""
    assert "buffer_age_limit" not in line(buffer_age_limit=None)
    assert "buffer_age_limit=none" in short(buffer_age_limit=None)


@ensureDeferred
async def test_a_server_tells_both(serve: Any) -> None:
    """All of them, and those that were set."""
    server = await serve(echo, max_connections=5, lifetime=7)
    assert server.limits_set == "max_connections=5, lifetime=7 s"
    assert server.limits.startswith("max_connections=5, overflow=hold, ")
    server.change(lifetime=None)
    assert server.limits_set == "max_connections=5"


def test_a_reply_is_said_by_its_size() -> None:
    """Not by its bytes, which may be many."""
    said = line(overflow=Reply(b"full\n"), refusal=Reply(b"no\n"), allow=["::1"])
    assert "overflow=a reply of 5 bytes" in said
    assert "refusal=a reply of 3 bytes" in said


@pytest.mark.parametrize(
    "options",
    [
        {"max_connections_per_peer": 1},
        {"accept_rate_per_peer": "1/s"},
        {"allow": ["::1"]},
        {"deny": ["::1"]},
        {"on_exhaustion": "shed"},
    ],
)
def test_how_clients_are_refused_is_said_where_any_may_be(options: Any) -> None:
    """And what a peer is where that matters."""
    said = line(**options)
    assert "refusal=reset" in said
    assert ("peer_prefixes=/32 and /64" in said) == any("peer" in o for o in options)


def test_options_of_streams_are_said_of_streams_only() -> None:
    """Sockets and protocols have no buffers of ours."""
    for factory in (
        ServerFactory.of_socks(print, on_handler_error="raise"),
        ServerFactory.of_protocols(
            _Factory(),  # type: ignore[arg-type]
            on_handler_error="raise",
        ),
    ):
        said = line_of(factory)
        for name in ("buffer", "flush_timeout", "eof"):
            assert name not in said
        assert "max_connections=" in said


class _Factory:
    def buildProtocol(self, address: Any) -> None:
        """Nothing."""


def test_who_allows_nobody_reads_so() -> None:
    """No network is another thing than no limit."""
    assert "allow=nobody" in line(allow=[])
    assert "deny" not in line(deny=[])


def test_a_dry_run_of_all_is_said_in_a_word() -> None:
    """Not in all of their names."""
    assert "dry_run=all" in line(dry_run=True)


@ensureDeferred
async def test_a_backlog_is_said_where_it_is_the_servers_own(serve: Any) -> None:
    """An endpoint has its own."""
    server = await serve(echo, backlog=9)
    assert "backlog=9" in server.limits
    where: Any = WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    server = await serve(echo, where=where)
    assert "backlog" not in server.limits
    with socket.create_server((LOCALHOST, 0)) as own:
        where = WhereToListen.of_fd(own.fileno())
        server = await serve(echo, where=where)
        assert "backlog" not in server.limits
    assert isinstance(server, Server)


def test_what_was_changed_is_said_as_it_is_now() -> None:
    """Also whether clients are dropped, which has a method of its own."""
    factory = ServerFactory.of_streams(
        echo, on_handler_error="raise", idle_timeout=5, max_connections=3
    )
    factory.change({"idle_timeout": None, "lifetime": 7})
    factory.max_connections = 4
    factory.set_drop_incoming_connections(True)
    said = line_of(factory)
    assert "idle_timeout" not in said
    assert "lifetime=7 s" in said
    assert "max_connections=4" in said
    assert "drop_incoming_connections" in said
    factory.set_drop_incoming_connections(False)
    assert "drop_incoming_connections" not in line_of(factory)
