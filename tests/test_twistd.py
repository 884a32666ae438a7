"""
``twistd tcpsvc`` and ``python -m twisted tcpsvc``, as real processes: every
option, the signals, the exit status, and what is said about bad input (issue 2,
section 3; spec H7, E3).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.endpoints import serverFromString

import tcpsvc
from tcpsvc import tap
from tcpsvc.settings import ENGINES
from tests.daemons import (
    HANDS,
    OURS,
    environment,
    kill_all_in,
    processes_in,
    reactor_options,
    refused,
    stop,
    twist,
    twistd,
    wait_for_end,
)
from tests.support import the_reactor
from tests.tls import client_context, make_certificate

pytestmark = pytest.mark.whatever("engine")

MODULES = {
    "hands.py": HANDS,
    "divides.py": "1 / 0\n",
    "garbled.py": "def fn(:\n",
    "needy.py": "import no_such_thing_at_all\n",
    "quits.py": "import sys\nsys.exit()\n",
}


# What it serves, and where it says so.


def test_with_no_option_it_echoes_on_localhost_and_says_where(
    start: Any, connect: Any
) -> None:
    """No option at all: the echo handler, on localhost only; -n prints it."""
    first = start(*twistd("-n", "tcpsvc"))
    second = start(*twist("tcpsvc"))
    for child in (first, second):
        client = connect(child.address())
        client.send(b"abc")
        assert client.read(3) == b"abc"
        client.shut()
        assert client.read_all() == b""
        assert child.out.count("listening on") == 1
    # SIGTERM ends both as it ends any program of Twisted's.
    assert stop(first, second) == [-signal.SIGTERM] * 2
    assert first.err == ""
    assert second.err == ""
    assert sorted(os.listdir(first.directory)) == OURS


def test_n_prints_the_address_also_when_the_log_goes_to_a_file(start: Any) -> None:
    """Printed under -n, at once, though stdout is a pipe; and logged once."""
    child = start(*twistd("-n", "--logfile=x.log", "tcpsvc", "--socket=a.sock"))
    child.expect(r"^listening on unix:\S+/a\.sock\n")
    log = (child.directory / "x.log").read_text()
    assert log.count("listening on") == 1
    stop(child)
    assert child.out.count("\n") == 1


def test_a_daemon_logs_its_address_and_ends_by_sigterm(
    start: Any, connect: Any
) -> None:
    """Without -n: pidfile and log, nothing said, and a drain at the end."""
    child = start(
        *twistd(
            "--pidfile=x.pid", "--logfile=x.log", "--rundir=..", "tcpsvc",
            "--handler=hands.obey", "--port=0", "--socket=x.sock",
            "--listen=unix:y.sock",
        )
    )  # fmt: skip
    assert child.wait() == 0
    assert child.out == ""
    assert child.err == ""
    child.directory, own = child.directory.parent, child.directory
    log = own / "x.log"
    ports = re.findall(r"listening on 0\.0\.0\.0:(\d+)\n", log.read_text())
    assert f"listening on unix:{own}/x.sock\n" in log.read_text()
    address = IPv4Address("TCP", "127.0.0.1", int(*ports))
    clients = [connect(address)]
    clients += [connect(UNIXAddress(str(own / f"{x}.sock"))) for x in "xy"]
    for client in clients:
        assert client.read(6) == b"hello\n"
    pid = int((own / "x.pid").read_text())
    assert pid in processes_in(own.parent)
    os.kill(pid, signal.SIGTERM)
    assert refused(address)
    for client in clients:
        client.send(b"answer\n")
        assert len(client.read_all()) == 1_000_000
    wait_for_end(pid)
    # A relative path is unlinked wherever --rundir has led.
    assert sorted(os.listdir(own)) == [*OURS, "x.log"]
    assert "Traceback" not in log.read_text()


def test_the_plugin_is_listed_and_explains_itself(start: Any) -> None:
    """twistd --help lists tcpsvc; its own --help has every option of section 3."""
    listed = start(*twistd("--help"))
    own = start(*twistd("tcpsvc", "--help"))
    version = start(*twistd("tcpsvc", "--version"))
    assert [c.wait() for c in (listed, own, version)] == [0, 0, 0]
    assert re.search(r"^ +tcpsvc +\S", listed.out, re.MULTILINE)
    for option in (
        "handler", "factory", "sock-handler", "listen", "port", "socket",
        "max-connections", "max-accepts-per-batch", "backlog", "drop-incoming",
        "reuse-port", "buffer-age-limit", "on-handler-error", "app-dir",
        "drain-timeout", "drain-announce", "drain-spread", "eof-on-drain", "engine",
        "verbose", "version", "help",
    ):  # fmt: skip
        assert f"--{option}" in own.out
    assert version.out == f"tcpsvc {tcpsvc.__version__}\n"


# The options.


def make_named_certificate(directory: Path, name: str) -> Path:
    """As make_certificate, for a name instead of an address."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.timezone.utc)
    day = dt.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .sign(key, hashes.SHA256())
    )
    path = directory / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_several_listeners_of_every_kind_at_once(
    start: Any, connect: Any, tmp_path: Path
) -> None:
    """--port, --socket and --listen, each given twice, tls: and ssl: too."""
    pems = tmp_path / "pems"
    pems.mkdir()
    # tls: looks for the name that the client asks for, and takes no address.
    pem = make_named_certificate(pems, "localhost")
    tls_description = f"tls:{pems}:0:interface=127.0.0.1"
    try:
        serverFromString(the_reactor(), tls_description)
    except ValueError:
        # Twisted 24.7 has no tls: yet.
        tls_description = f"ssl:0:privateKey={pem}:certKey={pem}:interface=127.0.0.1"
    child = start(
        *twistd(
            "-n", "tcpsvc", "--handler", "hands.obey",
            "--port", "0", "--port", "0", "--socket", "a.sock", "--socket", "b.sock",
            "--listen", "tcp:0:interface=127.0.0.1", "--listen", "unix:c.sock",
            "--listen", tls_description,
            "--listen", f"ssl:0:privateKey={pem}:certKey={pem}:interface=127.0.0.1",
        )
    )  # fmt: skip
    child.expect("listening on ", count=8)
    everywhere = child.expect(r"listening on 0\.0\.0\.0:(\d+)\n", count=2)
    local = child.expect(r"listening on 127\.0\.0\.1:(\d+)\n", count=3)
    paths = child.expect(r"listening on unix:(\S+)\n", count=3)
    assert [os.path.basename(p) for p in paths] == ["a.sock", "b.sock", "c.sock"]
    addresses: list[Any] = [
        IPv4Address("TCP", "127.0.0.1", int(port)) for port in everywhere + local
    ]
    addresses += [UNIXAddress(str(child.directory / path)) for path in paths]
    tls = addresses[3:5]
    for address in addresses:
        client = connect(address)
        if address in tls:
            client.socket = client_context().wrap_socket(
                client.socket, server_hostname="localhost"
            )
        assert client.read(6) == b"hello\n"
        client.send(b"answer\n")
        assert client.read(1_000_000) == b"x" * 1_000_000
        client.close()
    assert stop(child) == [-signal.SIGTERM]
    assert sorted(os.listdir(child.directory)) == OURS


def test_handlers_of_every_kind(start: Any, connect: Any) -> None:
    """--sock-handler and --factory, by both commands; modules of --app-dir."""
    children = [
        start(*twistd("-n", "tcpsvc", "--sock-handler=hands.sock", "--drop-incoming")),
        start(*twistd("-n", "tcpsvc", "--sock-handler=hands.sock")),
        start(*twist("tcpsvc", "--factory=hands.factory")),
    ]
    app = children[0].directory
    elsewhere = app.parent / "elsewhere"
    elsewhere.mkdir()
    children.append(
        start(
            *twistd(
                "-n", "tcpsvc", f"--app-dir={app}", "--factory", "hands.factory",
                "--port=0", "--max-connections=1",
            ),
            directory=elsewhere,
        )
    )  # fmt: skip
    said = [connect(child.address(r"\d+\.0\.0\.[01]")).read_all() for child in children]
    # The first one drops: EOF and nothing else.
    assert said == [b"", b"socket\n", b"protocol\n", b"protocol\n"]
    stop(*children)


@pytest.mark.parametrize("engine", ENGINES)
def test_handlers_of_every_kind_are_served_by_each_engine(
    start: Any, connect: Any, engine: str
) -> None:
    """--engine, by both commands."""
    children = [
        start(*command, "tcpsvc", f"--engine={engine}", *handler)
        for command, handler in (
            (twistd("-n"), ()),
            (twist(), ("--sock-handler=hands.sock",)),
            (twistd("-n"), ("--factory=hands.factory",)),
        )
    ]
    echo, sock, protocol = (connect(child.address("127.0.0.1")) for child in children)
    echo.send(b"hello\n")
    echo.shut()
    said = [client.read_all() for client in (echo, sock, protocol)]
    assert said == [b"hello\n", b"socket\n", b"protocol\n"]
    assert stop(*children) == [-signal.SIGTERM] * 3


def test_a_garbage_collection_leaves_alone_what_was_loaded(
    start: Any, connect: Any
) -> None:
    """Else it would keep clients waiting for the 48 000 objects that always stay."""
    child = start(*twistd("-n", "tcpsvc", "--handler=hands.obey"))
    client = connect(child.address("127.0.0.1"))
    assert client.read(6) == b"hello\n"
    client.send(b"collect\n")
    client.shut()
    assert 0 < int(client.read_all()) < 5000
    stop(child)


def test_the_limits_of_connections_and_backlog(start: Any, connect: Any) -> None:
    """--max-connections, and --backlog for --socket and for --listen."""
    child = start(
        *twistd(
            "-n", "tcpsvc", "--handler=hands.obey", "--max-connections=1",
            "--backlog=2", "--socket=a.sock", "--listen=unix:b.sock",
        )
    )  # fmt: skip
    child.expect("listening on", count=2)
    for name in ("a.sock", "b.sock"):
        address = UNIXAddress(str(child.directory / name))
        clients = [connect(address)]
        assert clients[0].read(6) == b"hello\n"
        # Linux lets one more wait than the backlog says, and a UNIX client that
        # does not block hears at once that there is no room.
        clients += [connect(address) for _ in range(3)]
        with socket.socket(socket.AF_UNIX) as beyond:
            beyond.setblocking(False)
            with pytest.raises(BlockingIOError):
                beyond.connect(address.name)
        for client in clients:
            client.send(b"answer\n")
        assert [len(c.read_all()) for c in clients] == [1_000_000] + [1_000_006] * 3
    stop(child)


def test_two_processes_share_a_port_with_reuse_port(start: Any, connect: Any) -> None:
    """--reuse-port: the second process listens too, and serves when it is alone."""
    first = start(*twistd("-n", "tcpsvc", "--port=0", "--reuse-port"))
    address = first.address(r"0\.0\.0\.0")
    second = start(*twistd("-n", "tcpsvc", f"--port={address.port}", "--reuse-port"))
    third = start(*twistd("-n", "tcpsvc", f"--port={address.port}"))
    assert second.address(r"0\.0\.0\.0") == address
    assert third.wait() == 1
    stop(first)
    client = connect(address)
    client.send(b"abc")
    assert client.read(3) == b"abc"
    client.close()
    stop(second)


def test_a_client_that_does_not_read_is_closed_by_the_buffer_age_limit(
    start: Any, connect: Any
) -> None:
    """--buffer-age-limit, and none; logged by default (S6, E1)."""
    options = ["tcpsvc", "--handler=hands.obey"]
    limited = start(*twistd("-n", *options, "--buffer-age-limit=0.2"))
    unlimited = start(*twistd("-n", *options, "--buffer-age-limit=none"))
    clients = [connect(child.address()) for child in (limited, unlimited)]
    for client in clients:
        client.send(b"flood\n")
    # Nothing is read, and the connection ends all the same.
    limited.expect("BufferAgeLimitExceeded")
    with contextlib.suppress(ConnectionResetError):
        clients[0].read_all()
    # The other one goes on for longer than any buffer is.
    enough = 50_000_000
    while enough > 0:
        enough -= len(clients[1].read(1_000_000))
    clients[1].close()
    assert stop(limited, unlimited) == [-signal.SIGTERM] * 2
    assert "BufferAgeLimitExceeded" not in unlimited.out


@pytest.fixture
def made() -> Callable[..., dict[str, Any]]:
    """``made(*options)``: the description of what the options make."""

    def made(*options: str) -> Any:
        parsed = tap.Options()
        if not any(option.startswith("--sock-handler") for option in options):
            options = ("--handler=tcpsvc.handlers.discard", *options)
        parsed.parseOptions(options)
        daemon = tap.makeService(parsed)
        try:
            (service,) = daemon.services_of_tcp()
            assert service.server is not None
            return service.server.describe()
        finally:
            daemon.abandon()
            atexit.unregister(daemon.abandon)

    return made


def test_no_default_is_of_what_nobody_knows(made: Any, tmp_path: Path) -> None:
    """T1: a UNIX socket that a handler has; what is typed for it is an error."""

    def timeouts(*options: str) -> tuple[Any, Any]:
        set_ = made("--sock-handler=tcpsvc.handlers.echo", *options)["options"]
        return set_["first_byte_timeout"], set_["idle_timeout"]

    unix = f"--socket={tmp_path / 's'}"
    assert timeouts("--port=0") == timeouts(unix, "--port=0") == (60.0, 3600.0)
    assert timeouts(unix) == (None, None)
    parsed = tap.Options()
    parsed.parseOptions(
        ["--sock-handler=tcpsvc.handlers.echo", unix, "--idle-timeout=3600"]
    )
    with pytest.raises(ValueError, match="idle_timeout=3600"):
        tap._service(parsed)


def test_every_option_reaches_the_server(made: Any) -> None:
    """What cannot be seen from outside."""
    described = made(
        "--max-connections=7", "--max-accepts-per-batch=5", "--buffer-age-limit=none",
        "--drop-incoming", "--on-handler-error=raise", "--engine=reactor",
        "--eof-on-drain",
    )  # fmt: skip
    assert described["options"]["eof_on_drain"] is True
    assert described["max_connections"] == 7
    assert described["options"]["max_accepts_per_batch"] == 5
    assert described["options"]["buffer_age_limit"] is None
    assert described["is_dropping_incoming_connections"] is True
    assert described["options"]["on_handler_error"] == "raise"
    assert described["options"]["engine"] == "reactor"
    dry = made("--dry-run=buffer-age-limit,deny")["options"]["dry_run"]
    assert dry == ["buffer_age_limit", "deny"]
    assert made("--buffer-age-limit=2.5")["options"]["buffer_age_limit"] == 2.5
    default = made()["options"]
    assert default["buffer_age_limit"] == 120
    assert default["max_accepts_per_batch"] == 1
    assert default["drop_incoming_connections"] is False
    assert default["on_handler_error"] == "log_error"
    assert default["engine"] == "auto"
    assert default["eof_on_drain"] is False
    assert tap.Options()["drain-timeout"] == 30
    assert tap.Options()["drain-announce"] == tap.Options()["drain-spread"] == 0


def test_the_limits_in_force_are_logged_at_the_start(start: Any) -> None:
    """With their units, in one line; with --verbose also those by default."""
    child = start(
        *twistd("-n", "tcpsvc", "--max-connections=7", "--deny=10.0.0.0/8",
                "--peer-prefixes=24,56", "--max-connections-per-peer=3",
                "--min-throughput=10", "--overflow=reply:full", "--verbose")
    )  # fmt: skip
    child.expect(
        "limits: max_connections=7, overflow=a reply of 4 bytes, "
        "max_connections_per_peer=3, peer_prefixes=/24 and /56, deny=10.0.0.0/8, "
        "first_byte_timeout=60 s, idle_timeout=3600 s, min_throughput=10 bytes/s; "
        "the others are as by default"
    )
    child.expect(
        "all limits: max_connections=7, overflow=a reply of 4 bytes, "
        "max_connections_per_peer=3, peer_prefixes=/24 and /56, deny=10.0.0.0/8, "
        "refusal=reset, on_exhaustion=back-off, first_byte_timeout=60 s, "
        "idle_timeout=3600 s, min_throughput=10 bytes/s, throughput_window=30 s, "
        "buffer_age_limit=120 s, flush_timeout=30 s"
    )
    stop(child)


def test_the_line_of_limits_is_short_where_nobody_gave_any(start: Any) -> None:
    """It says those that twistd tcpsvc has, and servers in programs have not."""
    child = start(*twistd("-n", "tcpsvc", "--max-connections=7"))
    child.expect(
        "limits: max_connections=7, first_byte_timeout=60 s, idle_timeout=3600 s; "
        "the others are as by default"
    )
    assert "all limits" not in child.out
    stop(child)


# Signals.


def test_a_signal_drains_and_in_the_end_insists(start: Any, connect: Any) -> None:
    """
    SIGTERM and SIGINT: nobody is accepted, an answer is finished, once a second a
    line says how many remain, and at --drain-timeout what is left is closed.
    """
    options = ["tcpsvc", "--handler=hands.obey", "--drain-timeout=2.5"]
    runs = [
        (start(*twistd("-n", *options)), signal.SIGTERM),
        (start(*twistd("-n", *options)), signal.SIGINT),
        (start(*twist(*options)), signal.SIGTERM),
        (start(*twist(*options)), signal.SIGINT),
    ]
    clients = []
    for child, number in runs:
        address = child.address()
        answered, idle, deaf = three = [connect(address) for _ in range(3)]
        for client in three:
            assert client.read(6) == b"hello\n"
        deaf.send(b"deaf\n")
        assert deaf.read(6) == b"what?\n"
        child.signal(number)
        child.expect("draining, 3 connections remain")
        assert refused(address)
        answered.send(b"answer\n")
        assert answered.read_all() == b"x" * 1_000_000
        answered.close()
        clients.append((idle, deaf))
    for (child, number), (idle, deaf) in zip(runs, clients, strict=True):
        assert idle.read_all() == b""
        assert deaf.read_all() == b""
        assert child.wait() == -number
        said = re.findall(r"draining, (\d) connections? remain", child.out)
        # Once a second, at 0, 1 and 2 s; a busy machine may leave out one.
        assert said in (["3", "2", "2"], ["3", "2"])
        assert "closing 2 connections that remain" in child.out
        assert "Traceback" not in child.out
        assert child.err == ""


@pytest.mark.parametrize("verbose", [(), ("--verbose",)])
def test_a_client_has_a_line_of_its_own_only_by_request(
    verbose: tuple[str, ...], start: Any, connect: Any
) -> None:
    """twistd's log has no levels, and clients could fill the disk with it."""
    child = start(*twistd("-n", "tcpsvc", "--handler=hands.obey", *verbose))
    client = connect(child.address())
    assert client.read(6) == b"hello\n"
    client.send(b"flood\n")
    assert client.read(1) == b"x"
    client.reset()
    other = connect(child.address())
    assert other.read(6) == b"hello\n"
    other.send(b"answer\n")
    assert len(other.read_all()) == 1_000_000
    child.signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    said = re.findall("handler of .* left with ConnectionGone", child.out)
    assert len(said) == len(verbose)


def test_a_signal_announces_spreads_and_reports(start: Any, connect: Any) -> None:
    """
    A mix: one asks in the announcement, one is idle, one answers in time, one is
    closed, one is cancelled. The report is one line of the log.
    """
    child = start(
        *twistd(
            "-n", "tcpsvc", "--handler=hands.obey", "--drain-announce=2",
            "--drain-timeout=2", "--drain-spread=0.5", "--eof-on-drain",
        )
    )  # fmt: skip
    address = child.address()
    idle, busy, half, deaf = four = [connect(address) for _ in range(4)]
    for client in four:
        assert client.read(6) == b"hello\n"
    deaf.send(b"deaf\n")
    assert deaf.read(6) == b"what?\n"
    half.send(b"ans")
    busy.send(b"ans")
    child.signal(signal.SIGTERM)
    child.expect("about to drain, accepting for another 2 s")
    late = connect(address)
    late.send(b"answer\n")
    assert late.read_all() == b"hello\n" + b"x" * 1_000_000
    late.close()
    child.expect("draining, 3 connections remain, waited 0 s of 2 s")
    assert refused(address)
    assert idle.read_all() == b""
    idle.close()
    busy.send(b"wer\n")
    assert busy.read_all() == b"x" * 1_000_000
    busy.close()
    assert half.read_all() == b""
    assert deaf.read_all() == b""
    assert child.wait() == -signal.SIGTERM
    assert "closing 2 connections that remain, over 0.5 s" in child.out
    (report,) = re.findall(r"drained in [\d.]+ s: (.*); longest wait", child.out)
    assert report == "1 finished, 1 closed idle, 1 closed, 1 cancelled"
    assert "Traceback" not in child.out
    assert child.err == ""


def test_a_second_signal_ends_the_announcement_too(start: Any, connect: Any) -> None:
    """Closed, cancelled and reset at once; the report says so."""
    child = start(
        *twistd(
            "-n", "tcpsvc", "--handler=hands.obey", "--drain-announce=300",
            "--drain-timeout=300", "--drain-spread=300",
        )
    )  # fmt: skip
    address = child.address()
    idle, deaf, flood = three = [connect(address) for _ in range(3)]
    for client, order in zip(three, (b"", b"deaf\n", b"flood\n"), strict=True):
        assert client.read(6) == b"hello\n"
        client.send(order)
    assert deaf.read(6) == b"what?\n"
    assert flood.read(1) == b"x"
    child.signal(signal.SIGTERM)
    child.expect("about to drain, accepting for another 300 s")
    child.signal(signal.SIGTERM)
    assert idle.read_all() == b""
    assert deaf.read_all() == b""
    assert child.wait() == -signal.SIGTERM
    (report,) = re.findall(r"drained in [\d.]+ s: (.*); longest wait", child.out)
    assert report == "2 closed, 1 cancelled"


def test_a_second_signal_closes_what_remains_at_once(start: Any, connect: Any) -> None:
    """Also of the other kind, and also handlers that do not heed a cancellation."""
    options = ["tcpsvc", "--handler=hands.obey", "--drain-timeout=300"]
    runs = [
        (start(*twistd("-n", *options)), signal.SIGTERM, signal.SIGTERM, b"deaf\n"),
        (start(*twistd("-n", *options)), signal.SIGTERM, signal.SIGINT, b"stubborn\n"),
        (start(*twist(*options)), signal.SIGINT, signal.SIGINT, b"deaf\n"),
    ]
    clients = []
    for child, *_, order in runs:
        client = connect(child.address())
        client.send(order)
        client.read(len(b"hello\n") + 1)
        clients.append(client)
    for child, number, *_ in runs:
        child.signal(number)
        child.expect("draining, 1 connection remains")
    for child, _, number, _ in runs:
        child.signal(number)
    for (child, number, *_, order), client in zip(runs, clients, strict=True):
        client.read_all()
        assert child.wait() == -number
        assert "closing 1 connection that remains" in child.out
        assert ("1 handler does not end" in child.out) == (order == b"stubborn\n")


def test_the_path_is_gone_also_after_the_second_signal(
    start: Any, connect: Any
) -> None:
    """Nothing stays on disk, whatever the handlers do."""
    child = start(*twistd("-n", "tcpsvc", "--socket=a.sock", "--drain-timeout=0"))
    child.expect("listening on")
    client = connect(UNIXAddress(str(child.directory / "a.sock")))
    client.send(b"a")
    assert client.read(1) == b"a"
    stop(child)
    assert client.read_all() == b""
    assert sorted(os.listdir(child.directory)) == OURS


# What handlers do to the process.


def test_a_handler_error_under_raise_drains_and_fails(start: Any, connect: Any) -> None:
    """E3: bounded by --drain-timeout; a non-zero exit status."""
    options = ["tcpsvc", "--handler=hands.obey", "--on-handler-error=raise"]
    waiting = start(*twistd("-n", *options, "--socket=a.sock"))
    hurrying = start(*twist(*options, "--drain-timeout=0.2"))
    waiting.expect("listening on unix:")
    hurrying.expect("listening on")
    for child in (waiting, hurrying):
        if child is waiting:
            address: Any = UNIXAddress(str(child.directory / "a.sock"))
        else:
            address = child.address()
        other, failing = connect(address), connect(address)
        assert other.read(6) == b"hello\n"
        failing.send(b"raise\n")
        assert failing.read_all() == b"hello\n"
        assert refused(address)
        if child is waiting:
            child.expect("draining, 1 connection remains")
            other.send(b"answer\n")
            assert len(other.read_all()) == 1_000_000
        else:
            assert other.read_all() == b""
        assert child.wait() == 1
        assert "ends the process: ValueError: oh dear" in child.out
        assert child.out.count("builtins.ValueError: oh dear") == 1
    assert sorted(os.listdir(waiting.directory)) == OURS


def test_handler_errors_are_logged_by_default_and_ignored_on_request(
    start: Any, connect: Any
) -> None:
    """
    E1: the server goes on; log_error names the client. (``twist`` shows no debug
    lines, twistd does.)
    """
    logging = start(*twistd("-n", "tcpsvc", "--handler=hands.obey"))
    ignoring = start(
        *twist("tcpsvc", "--handler=hands.obey", "--on-handler-error=ignore")
    )
    for child in (logging, ignoring):
        address = child.address()
        client = connect(address)
        client.send(b"raise\n")
        assert client.read_all() == b"hello\n"
        client = connect(address)
        assert client.read(6) == b"hello\n"
        client.close()
    assert stop(logging, ignoring) == [-signal.SIGTERM] * 2
    assert "ValueError: oh dear" in logging.out
    assert re.search(r"handler of .*127\.0\.0\.1.* failed", logging.out)
    assert "oh dear" not in ignoring.out


def test_the_exit_status_is_the_handlers_system_exit(start: Any, connect: Any) -> None:
    """H7: by both commands; the client still reads the last words, then FIN."""
    options = ["tcpsvc", "--handler=hands.obey", "--on-handler-error=raise"]
    runs = [
        (start(*twistd("-n", *options)), b"exit 3", 3),
        (start(*twist(*options)), b"exit 3", 3),
        (start(*twistd("-n", *options)), b"exit 0", 0),
        (start(*twistd("-n", *options)), b"exit", 0),
        (start(*twistd("-n", *options)), b"exit in anger", 1),
        (start(*twistd("-n", *options)), b"interrupt", 128 + signal.SIGINT),
    ]
    for child, order, _ in runs:
        address = child.address()
        client, other = connect(address), connect(address)
        assert other.read(6) == b"hello\n"
        client.send(b"note noted.txt\n" + order + b"\n")
        answer = b"hello\nnoted\n"
        if order.startswith(b"exit"):
            answer += b"last words\n"
        assert client.read_all() == answer
        # The rest drains as always.
        other.send(b"answer\n")
        assert len(other.read_all()) == 1_000_000
    assert [child.wait() for child, *_ in runs] == [status for *_, status in runs]
    assert "in anger" in runs[4][0].out + runs[4][0].err
    for child, *_ in runs:
        # What the handler's module had registered has run.
        assert (child.directory / "noted.txt").exists()


# Privileges.

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root drops privileges")


@as_root
def test_what_is_bound_is_bound_before_privileges_are_dropped(
    start: Any, connect: Any
) -> None:
    """The socket is made in a directory that only root may write."""
    child = start(
        *twistd("-n", "-u", "65534", "-g", "65534", "--pidfile=", "tcpsvc",
                "--handler=hands.obey", "--socket=a.sock"),
    )  # fmt: skip
    os.chmod(child.directory, 0o700)
    child.expect("listening on")
    client = connect(UNIXAddress(str(child.directory / "a.sock")))
    client.send(b"uid\n")
    assert client.read(12) == b"hello\n65534\n"
    client.close()
    stop(child)


@as_root
@pytest.mark.parametrize("mode", [("-n",), ()], ids=["n", "daemon"])
def test_a_bad_uid_leaves_no_socket_behind(start: Any, mode: tuple[str, ...]) -> None:
    """twistd fails after everything was bound."""
    nobody = "3999999"  # In no user database.
    child = start(
        *twistd(*mode, "--pidfile=", "--logfile=x.log", "--uid", nobody, "tcpsvc",
                "--socket=a.sock", "--listen=unix:b.sock", "--port=0"),
    )  # fmt: skip
    assert child.wait() == 1
    for pid in processes_in(child.directory):
        wait_for_end(pid)
    assert sorted(os.listdir(child.directory)) == [*OURS, "x.log"]


# Bad input.

#: name -> the options, and what the one line says. Everything good that comes
#: before the bad one has been bound by then, and must be gone.
BAD: dict[str, tuple[list[str], str]] = {
    "no_module": (["--handler=no_such_module.fn"], "no_such_module"),
    "no_submodule": (["--handler=hands.no_such.fn"], "no_such"),
    "no_attribute": (["--handler=hands.no_such"], "no_such"),
    "no_dot": (["--handler=hands"], "'hands'"),
    "empty_handler": (["--handler="], "--handler"),
    "odd_name": (["--handler=hands..obey"], "hands..obey"),
    "not_callable": (["--handler=hands.VALUE"], "not callable"),
    "import_fails": (["--handler=divides.fn"], "ZeroDivisionError"),
    "syntax_error": (["--handler=garbled.fn"], "SyntaxError"),
    "import_needs_module": (["--handler=needy.fn"], "no_such_thing_at_all"),
    "import_exits": (["--handler=quits.fn"], "SystemExit"),
    "sock_no_attribute": (["--sock-handler=hands.no_such"], "--sock-handler"),
    "factory_no_attribute": (["--factory=hands.no_such"], "--factory"),
    "factory_raises": (["--factory=hands.bad_factory"], "no factory today"),
    "factory_exits": (["--factory=hands.leaving_factory"], "SystemExit"),
    "factory_returns_none": (["--factory=hands.nothing"], "None"),
    "factory_is_async": (["--factory=hands.async_factory"], "coroutine"),
    "two_handlers": (
        ["--handler=hands.obey", "--factory=hands.factory"],
        "--handler and --factory",
    ),
    "port_no_number": (["--port=http"], "http"),
    "port_empty": (["--port="], "--port"),
    "port_negative": (["--port=-1"], "-1"),
    "port_too_high": (["--port=65536"], "65536"),
    "port_in_use": (["--port={used}"], "{used}"),
    "endpoint_in_use": (["--listen=tcp:{used}"], "{used}"),
    "socket_empty": (["--socket="], "--socket : '' is no path"),
    "socket_no_directory": (["--socket=no_such/a.sock"], "listen on unix:/"),
    "socket_below_file": (["--socket=../app/hands.py/a.sock"], "hands.py/a.sock"),
    "socket_is_file": (["--socket=../app/hands.py"], "no socket"),
    "socket_is_directory": (["--socket=../app"], "no socket"),
    "socket_alive": (["--socket=good.sock"], "alive"),
    "socket_too_long": (["--socket=" + "x" * 150], "107"),
    "endpoint_unknown": (["--listen=nonsense:1"], "nonsense"),
    "endpoint_no_port": (["--listen=tcp"], "tcp"),
    "endpoint_bad_port": (["--listen=tcp:http"], "http"),
    "endpoint_port_too_high": (["--listen=tcp:65536"], "65536"),
    "endpoint_port_negative": (["--listen=tcp:-1"], "-1"),
    "endpoint_bad_option": (["--listen=tcp:0:no_such=1"], "no_such"),
    "endpoint_empty": (["--listen="], "endpoint"),
    "endpoint_bad_interface": (["--listen=tcp:0:interface=192.0.2.1"], "192.0.2.1"),
    "endpoint_no_directory": (["--listen=unix:no_such/a.sock"], "no_such"),
    "endpoint_path_too_long": (["--listen=unix:" + "x" * 150], "107"),
    "endpoint_no_key": (["--listen=ssl:0:privateKey=no_such.pem"], "no_such.pem"),
    "endpoint_no_systemd": (["--listen=systemd:domain=INET:index=0"], "systemd"),
    "endpoint_no_name": (
        ["--listen=systemd:domain=INET6:name=hello"],
        "systemd has passed no socket of this name",
    ),
    "endpoint_no_plain_socket": (
        [
            "--listen=ssl:0:privateKey=../app/server.pem:certKey=../app/server.pem",
            "--sock-handler=hands.sock",
        ],
        "plain sockets",
    ),
    "endpoint_backlog": (["--listen=tcp:0:backlog=few"], "few"),
    "max_connections": (["--max-connections=0"], "max-connections"),
    "max_connections_text": (["--max-connections=many"], "many"),
    "max_accepts": (["--max-accepts-per-batch=0"], "max-accepts-per-batch"),
    "backlog": (["--backlog=0"], "backlog"),
    "backlog_negative": (["--backlog=-5"], "-5"),
    "backlog_too_large": (["--backlog=99999999999"], "--backlog=99999999999 is above"),
    "age_limit": (["--buffer-age-limit=0"], "buffer-age-limit"),
    "age_limit_text": (["--buffer-age-limit=old"], "old"),
    "age_limit_inf": (["--buffer-age-limit=inf"], "--buffer-age-limit=inf"),
    "age_limit_nan": (["--buffer-age-limit=nan"], "nan"),
    "overflow": (["--overflow=wait"], "reply:TEXT"),
    "overflow_reply_empty": (["--overflow=reply:"], "--overflow reply:"),
    "refusal": (["--refusal=evict"], "--refusal evict"),
    "max_connections_per_peer": (
        ["--max-connections-per-peer=0"],
        "--max-connections-per-peer 0: not a number from 1 on",
    ),
    "accept_rate_per_peer": (["--accept-rate-per-peer=often"], "10/s:20"),
    "accept_rate_per_peer_form": (
        ["--accept-rate-per-peer=1/d"],
        "--accept-rate-per-peer 1/d: rate '1/d' is not of the form",
    ),
    "accept_rate": (["--accept-rate=0"], "--accept-rate 0: rate '0'"),
    "peer_prefixes": (["--peer-prefixes=33,64"], "32,64"),
    "allow": (["--allow=10.0.0.1/8"], "10.0.0.0/8"),
    "deny": (["--deny=localhost"], "localhost"),
    "dry_run": (
        ["--dry-run=deny,no_thing"],
        "--dry-run deny,no_thing: 'no_thing' is not one of all, max-connections,",
    ),
    "dry_run_all_and_more": (["--dry-run=all,deny"], "'all' stands alone"),
    "dry_run_empty": (["--dry-run="], "'' is not one of all"),
    "first_byte_timeout": (["--first-byte-timeout=0"], "--first-byte-timeout 0"),
    "idle_timeout": (["--idle-timeout=-1"], "--idle-timeout -1"),
    "handler_timeout": (["--handler-timeout=nan"], "--handler-timeout nan"),
    "lifetime": (["--lifetime=long"], "--lifetime long"),
    "min_throughput": (["--min-throughput=0"], "bytes a second"),
    "throughput_window": (["--throughput-window=none"], "--throughput-window none"),
    "drain_timeout": (["--drain-timeout=-1"], "drain-timeout"),
    "drain_timeout_text": (["--drain-timeout=soon"], "'none' is for any time"),
    "drain_timeout_nan": (["--drain-timeout=nan"], "nan"),
    "drain_announce": (["--drain-announce=-1"], "drain-announce"),
    "drain_announce_text": (["--drain-announce=soon"], "soon"),
    "drain_announce_inf": (["--drain-announce=inf"], "--drain-announce=inf"),
    "drain_spread_inf": (["--drain-spread=inf"], "--drain-spread=inf"),
    "drain_spread": (["--drain-spread=-1"], "drain-spread"),
    "drain_spread_nan": (["--drain-spread=nan"], "nan"),
    "eof_on_drain_of_sockets": (
        ["--sock-handler=hands.sock", "--eof-on-drain"],
        "--eof-on-drain",
    ),
    "on_handler_error": (["--on-handler-error=panic"], "panic"),
    "engine": (["--engine=steam"], "--engine steam: not one of auto, reactor"),
    "engine_empty": (["--engine="], "--engine"),
    "unknown_option": (["--no-such-option"], "not recognized (see --help)"),
    "option_without_value": (["--port"], "port"),
    "flag_with_value": (["--drop-incoming=no"], "drop-incoming"),
    "argument": (["hands.obey"], "hands.obey: not an option; --handler names"),
}

#: Without the good options before: they would hide what is wrong.
ALONE = {
    "reuse_port_alone": (["--reuse-port"], "--reuse-port"),
    "reuse_port_of_endpoint": (["--reuse-port", "--listen=tcp:0"], "--reuse-port"),
}

GOOD = ["--port=0", "--socket=good.sock", "--listen=unix:fine.sock"]

#: Starts many processes in little time: it imports everything once, and forks.
#: It reads a job a line, and answers with a line of the job's number and status.
FORKER = """
import gc, json, os, signal, sys
import twisted.application.app, twisted.application.twist._twist, twisted.scripts.twistd
import twisted.scripts._twistd_unix, twisted.internet.base, twisted.internet.endpoints
import twisted.internet.default, twisted.internet.epollreactor
import tcpsvc.tap
from twisted.application.service import IServiceMaker
from twisted.plugin import getPlugins
list(getPlugins(IServiceMaker))
gc.freeze()
assert "twisted.internet.reactor" not in sys.modules

def run(job):
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(job["directory"] + name, os.O_WRONLY | os.O_CREAT), number)
    signal.alarm(5)  # It should have refused at once; it serves.
    os.chdir(job["directory"])
    sys.argv = job["argv"]
    if job["mode"] == "twist":
        sys.path[0] = job["directory"]
        from twisted.application.twist._twist import Twist
        Twist.main(sys.argv)
    else:
        del sys.path[0]
        from twisted.scripts.twistd import run
        run()

jobs = {}

def reap():
    pid, status = os.wait()
    print(jobs.pop(pid), os.waitstatus_to_exitcode(status), flush=True)

for line in sys.stdin:
    job = json.loads(line)
    if len(jobs) >= 3:
        reap()
    pid = os.fork()
    if pid:
        jobs[pid] = job["number"]
        continue
    sys.stdin = open(os.devnull)
    run(job)
    sys.exit()
while jobs:
    reap()
"""


class Outcome:
    """How a process with bad input has ended."""

    def __init__(self, directory: Path, status: int, used: int) -> None:
        self.status = status
        self.used = str(used)
        self.out = directory.with_name(directory.name + ".out").read_text()
        self.err = directory.with_name(directory.name + ".err").read_text()
        self.files = sorted(os.listdir(directory))
        self.running = processes_in(directory)


@pytest.fixture(scope="module")
def outcomes(
    request: Any, tmp_path_factory: Any
) -> Iterator[dict[tuple[str, str], Outcome]]:
    """All selected cases of bad input, run before the first of them is judged."""
    base = tmp_path_factory.mktemp("bad")
    app = base / "app"
    app.mkdir()
    for name, text in MODULES.items():
        (app / name).write_text(text)
    make_certificate(app)
    wanted = [
        (item.callspec.params["mode"], item.callspec.params["case"])
        for item in request.session.items
        if item.fspath == request.fspath and "outcomes" in item.fixturenames
    ]
    with socket.create_server(("", 0)) as used:
        port = used.getsockname()[1]
        jobs = []
        for number, (mode, case) in enumerate(wanted):
            directory = base / f"{mode}-{case}"
            directory.mkdir()
            bad, _ = {**BAD, **ALONE}[case]
            good = [] if case in ALONE else GOOD
            argv = ["x", *reactor_options(), *{"n": ["-n"]}.get(mode, []), "tcpsvc"]
            argv += [*good, "--app-dir=../app"]
            argv += [option.format(used=port) for option in bad]
            jobs.append(
                {
                    "number": number,
                    "mode": mode,
                    "directory": str(directory),
                    "argv": argv,
                }
            )
        try:
            done = subprocess.run(
                [sys.executable, "-c", FORKER],
                input="".join(json.dumps(job) + "\n" for job in jobs),
                capture_output=True,
                text=True,
                env=environment(),
                cwd=base,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            statuses = dict(map(int, line.split()) for line in done.stdout.splitlines())
            yield {
                key: Outcome(Path(job["directory"]), statuses[number], port)
                for number, (key, job) in enumerate(zip(wanted, jobs, strict=True))
            }
        finally:
            for job in jobs:
                kill_all_in(Path(job["directory"]))


#: What nobody has typed: the names that options have in Python.
PYTHON_NAMES = re.compile(
    r"\b(path|endpoint|{})\b".format(
        "|".join(
            str(parameter[0]).replace("-", "_")
            for parameter in tap.Options.optParameters
            if "-" in str(parameter[0])
        )
    )
    + r"(?=[=:,']|$)"
)

#: ``python -m twisted`` looks at the same options in the same way.
TWIST = [
    "no_module", "not_callable", "import_exits", "factory_exits", "two_handlers",
    "port_too_high", "port_in_use", "socket_is_file", "endpoint_unknown",
    "endpoint_in_use", "max_connections", "drain_timeout", "unknown_option",
]  # fmt: skip


def bad_inputs() -> Iterator[Any]:
    """
    Each with and without -n. No reactor runs before the options are read: another kind
    changes no more than :data:`TWIST` would show.
    """
    alike = pytest.mark.whatever("engine", "reactor")
    for case in [*BAD, *ALONE]:
        for mode in ("n", "daemon"):
            yield pytest.param(mode, case, marks=() if case in TWIST else alike)
    for case in TWIST:
        yield pytest.param("twist", case)


@pytest.mark.parametrize(("mode", "case"), [*bad_inputs()])
def test_bad_input_is_one_line_and_nothing_is_left(
    outcomes: dict[tuple[str, str], Outcome], mode: str, case: str
) -> None:
    """
    With and without -n: a line on stderr, a status, nothing bound or on disk. Options
    are named as they are typed.
    """
    outcome = outcomes[mode, case]
    said = {**BAD, **ALONE}[case][1].replace("{used}", outcome.used)
    assert outcome.running == [], outcome.out + outcome.err
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("tcpsvc: error: ")
    assert said in outcome.err
    typed = " ".join({**BAD, **ALONE}[case][0])
    assert not PYTHON_NAMES.search(outcome.err.replace(typed, "")), outcome.err
    assert outcome.out == ""
    assert outcome.status == 1
    assert outcome.files == []


def test_the_port_of_a_refused_start_is_free(start: Any) -> None:
    """Nothing is left bound: the very port can be listened on at once."""
    with socket.create_server(("", 0)) as chosen:
        port = chosen.getsockname()[1]
    child = start(*twistd("tcpsvc", f"--port={port}", "--socket=no_such/a.sock"))
    assert child.wait() == 1
    assert child.out == ""
    assert child.err.count("\n") == 1
    with socket.create_server(("", port)):
        pass
    assert sorted(os.listdir(child.directory)) == OURS


def test_an_endpoint_that_fails_later_ends_the_process(start: Any) -> None:
    """What cannot be known before the start: a line, and a non-zero exit."""
    children = [
        start(*command, "tcpsvc", "--handler=slow.handler", "--listen=slow:")
        for command in (twistd("-n"), twist())
    ]
    for child in children:
        assert child.wait() == 1
        assert len(re.findall("cannot listen.*not today", child.out)) == 1
        assert "AttributeError" not in child.out
        assert "Unhandled error" not in child.out
