"""
Attacks on a server in a process of its own, by clients in another: whoever is good
is served all the while.

Latencies are bounded generously, for slow machines; each test prints what it has
measured (``pytest -s``).
"""

from __future__ import annotations

import json
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pytest_twisted import ensureDeferred

from tests.scripts import Script
from tests.support import PATIENCE, in_thread, the_reactor

# That limits hold for a few is shown on each engine and reactor elsewhere; that they do
# for thousands is the server's doing, which is above both.
pytestmark = pytest.mark.whatever("engine", "reactor")

#: How many slow clients there are, if so many descriptors may be open.
SLOW = 10_000
#: Descriptors of a process that are no clients'.
OTHERS = 200

#: How often the good client asks: fewer times than its own rate allows at once.
REQUESTS = 40
#: How long it may wait, in seconds.
WORST = 8.0
MEDIAN = 1.0

SERVER = """
import json, os, resource, sys
if sys.argv[1] == "AsyncioSelectorReactor":
    from twisted.internet import asyncioreactor
    asyncioreactor.install()
from twisted.internet import reactor, stdio
from twisted.protocols.basic import LineReceiver
from tcpsvc import LOCALHOST, Server, WhereToListen

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
most = 0

async def echo(address, reader, writer):
    global most
    most = max(most, server.num_connections)
    async for line in reader:
        writer.write(line)

class Commands(LineReceiver):
    delimiter = b"\\n"
    def lineReceived(self, line):
        used = os.times()
        server.invariant()
        self.tell(
            live=server.num_connections,
            most=most,
            cpu=used.user + used.system,
            **server.describe()["counters"],
        )
    def tell(self, **what):
        print(json.dumps(what), flush=True)
    def connectionLost(self, reason):
        if reactor.running:
            reactor.stop()

def started(made):
    global server
    server = made
    commands.tell(port=server.listening_on)

stdio.StandardIO(commands := Commands())
options = json.loads(sys.argv[2])
if "peer_prefixes" in options:
    options["peer_prefixes"] = tuple(options["peer_prefixes"])
Server.create(
    WhereToListen.bind_to(LOCALHOST, 0), echo, on_handler_error="ignore",
    max_accepts_per_batch=50, backlog=4096, **options,
).addCallback(started)
reactor.run()
"""

CLIENTS = """
import json, os, resource, select, socket, sys, time

port, number, comes_again, says_nothing = map(int, sys.argv[1:])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
poller = select.epoll()
poller.register(0)
there, connecting, made, lost = {}, set(), 0, 0
asked = None  # How many are to be made before we answer.

def come():
    global made
    client = socket.socket()
    client.setblocking(False)
    client.bind((f"127.1.{made // 250 % 250}.{made % 250 + 1}", 0))
    made += 1
    client.connect_ex(("127.0.0.1", port))
    there[client.fileno()] = client
    connecting.add(client.fileno())
    poller.register(client.fileno(), select.EPOLLOUT)

def go(fd):
    global lost
    lost += 1
    connecting.discard(fd)
    poller.unregister(fd)
    there.pop(fd).close()

trickling = iter(())
while True:
    for _ in range(50):
        if len(connecting) >= 200 or len(there) >= number:
            break
        if made >= number and not comes_again:
            break
        come()
    for fd, event in poller.poll(0.01, 500):
        if fd == 0:
            if not (told := os.read(0, 100)):
                sys.exit()
            asked = int(told)
        elif event & (select.EPOLLERR | select.EPOLLHUP | select.EPOLLIN):
            go(fd)
        else:
            connecting.discard(fd)
            poller.modify(fd, select.EPOLLIN)
    if asked is not None and made >= asked:
        print(json.dumps(dict(made=made, lost=lost, there=len(there))), flush=True)
        asked = None
    # Each says a byte every few seconds.
    for _ in range(0 if says_nothing else 30):
        fd = next(trickling, None)
        if fd is None:
            trickling = iter(list(there))
            break
        if fd in there and fd not in connecting:
            try:
                there[fd].send(b"x")
            except OSError:
                pass
"""


@contextmanager
def attacked(
    options: dict[str, Any],
    number: int,
    *,
    comes_again: bool = False,
    says_nothing: bool = False,
) -> Iterator[tuple[int, Script, Script]]:
    """A server of some options, and its attackers."""
    with Script(SERVER, type(the_reactor()).__name__, json.dumps(options)) as server:
        port = server.told()["port"]
        with Script(
            CLIENTS, port, number, int(comes_again), int(says_nothing)
        ) as clients:
            yield port, server, clients
            assert clients.end() == 0
        assert server.end() == 0


def ask_as_a_good_one(port: int) -> float:
    """One request of a client of another network; how long it has waited."""
    began = time.monotonic()
    with socket.create_connection(
        ("127.0.0.1", port), 2 * WORST, source_address=("127.2.0.1", 0)
    ) as client:
        client.sendall(b"hello\n")
        got = client.recv(100)
        assert got == b"hello\n", time.monotonic() - began
    return time.monotonic() - began


def ask_while_they_come(port: int, clients: Script, number: int) -> list[float]:
    """The good client's requests, between so many clients that come."""
    waited = []
    before = clients.ask("0")["made"]
    for request in range(1, REQUESTS + 1):
        waited.append(ask_as_a_good_one(port))
        clients.ask(str(before + (number - before) * request // REQUESTS))
    return waited


def check(name: str, waited: list[float], report: Any, attack: Any) -> None:
    """The good client was served all the while."""
    worst, median = max(waited), statistics.median(waited)
    shown = {k: v for k, v in report.items() if v}
    sys.stdout.write(
        f"\n{name}: {len(waited)} good requests, median {median * 1e3:.1f} ms, worst "
        f"{worst * 1e3:.1f} ms; server {shown}; attackers {attack}\n"
    )
    assert worst < WORST
    assert median < MEDIAN


def how_many_slow() -> int:
    """As many as may be."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        return SLOW
    return min(SLOW, hard - OTHERS)


SLOWLORIS: dict[str, dict[str, Any]] = {
    "evict": {
        "max_connections": 2000,
        "overflow": "evict",
        "first_byte_timeout": 2.0,
    },
    "timeouts": {
        "max_connections": 9000,
        "overflow": "evict",
        "first_byte_timeout": 2.0,
        "min_throughput": 50.0,
        "throughput_window": 2.0,
    },
    "per peer": {
        "max_connections": 2000,
        "max_connections_per_peer": 500,
        "peer_prefixes": (16, 64),
    },
}


@pytest.mark.parametrize(
    ("way", "says_nothing", "all_go"),
    [
        ("evict", False, False),
        ("evict", True, True),
        ("timeouts", False, True),
        ("per peer", True, False),
    ],
)
@ensureDeferred
async def test_ten_thousand_slow_clients(
    way: str, says_nothing: bool, all_go: bool
) -> None:
    """
    Slowloris: 10 000 clients, or as many as the hard limit of open files allows, that
    say nothing, or a byte every few seconds, which is no request; more than there are
    slots. While they come, when all have, and until those have gone whom a timeout has
    go, a good client is served.
    """
    number = how_many_slow()
    options = SLOWLORIS[way]

    def attack() -> None:
        with attacked(options, number, says_nothing=says_nothing) as (
            port,
            server,
            clients,
        ):
            waited = ask_while_they_come(port, clients, number)
            waited += [ask_as_a_good_one(port) for _ in range(REQUESTS)]
            deadline = time.monotonic() + 6 * PATIENCE
            while all_go and clients.ask("0")["lost"] < number:
                waited.append(ask_as_a_good_one(port))
                assert time.monotonic() < deadline
            report, attackers = server.ask(), clients.ask("0")
            check(f"slowloris, {way}", waited, report, attackers)
            assert report["most"] <= options["max_connections"]
            assert attackers["made"] == number
            if way == "per peer":
                assert report["live"] <= 501
                assert report["refusals"]["peer_connections"] > 0
            else:
                assert attackers["lost"] > 0
                assert report["ends"].keys() & {"evicted", "first_byte", "slow"}

    await in_thread(attack)


@pytest.mark.parametrize(
    "limits",
    [
        {"accept_rate_per_peer": "50/s:50"},
        {"max_connections_per_peer": 20},
        {"max_connections_per_peer": 20, "refusal": "drop"},
        {"deny": ["127.1.0.0/16"]},
    ],
    ids=str,
)
@ensureDeferred
async def test_a_flood_of_connections_from_one_prefix(limits: dict[str, Any]) -> None:
    """Clients of 127.1.0.0/16 that come again at once when they are sent away; a good
    one of another prefix is served promptly."""
    options = {"peer_prefixes": (16, 64), "max_connections": 1000, **limits}
    number = 5000

    def attack() -> None:
        with attacked(options, 500, comes_again=True) as (port, server, clients):
            waited = ask_while_they_come(port, clients, number)
            report, attackers = server.ask(), clients.ask("0")
            check(f"flood, {limits}", waited, report, attackers)
            assert sum(report["refusals"].values()) > 100
            assert attackers["made"] >= number

    await in_thread(attack)
