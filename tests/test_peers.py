"""How many connections each peer may have, and how often it may make one."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpsvc import peers as peers_module
from tcpsvc.peers import Key, Peers, Refusal
from tcpsvc.rate import Rate

pytestmark = pytest.mark.whatever("engine", "reactor")

#: A time as a clock that counts from 1970 tells it: its steps are coarse.
NOW = 1_790_000_000.0


def arrive(peers: Peers, host: str | None, now: float = NOW) -> Refusal | None:
    """A client, as a server treats it. Returns why it is refused."""
    key = peers.key_of(host)
    refusal = peers.refusal(key, now)
    if refusal is None:
        peers.enter(key, now)
    peers.invariant()
    return refusal


def admitted(peers: Peers, host: str, now: float, tries: int = 50) -> int:
    """How many of so many clients get in at once, and leave again."""
    key = peers.key_of(host)
    count = 0
    for _ in range(tries):
        if arrive(peers, host, now) is None:
            peers.leave(key)
            count += 1
    return count


def remembered(peers: Peers) -> int:
    """Of how many peers the rate is remembered."""
    return int(peers.describe()["remembered_peers"])


# -- Who a peer is


def test_a_peer_is_an_ipv4_address_or_an_ipv6_64() -> None:
    """What one household has."""
    key_of = Peers().key_of
    assert key_of("10.0.0.1") == key_of("10.0.0.1") != key_of("10.0.0.2")
    assert key_of("2001:db8::1") == key_of("2001:db8::ffff:0:0:2")
    assert key_of("2001:db8::1") != key_of("2001:db8:0:1::1")
    assert key_of("fe80::1%eth0") == key_of("fe80::2")


def test_an_ipv4_address_written_as_ipv6_is_ipv4() -> None:
    """A dual-stack socket tells it so. Otherwise all of IPv4 would be one peer."""
    key_of = Peers().key_of
    assert key_of("::ffff:10.0.0.1") == key_of("10.0.0.1")
    assert key_of("::ffff:10.0.0.1") != key_of("::ffff:10.0.0.2")


@pytest.mark.parametrize(
    ("prefixes", "one", "same", "other"),
    [
        ((24, 64), "10.0.0.1", "10.0.0.255", "10.0.1.1"),
        ((20, 64), "10.0.0.1", "10.0.15.1", "10.0.16.1"),
        ((32, 48), "2001:db8::1", "2001:db8:0:ffff::1", "2001:db8:1::1"),
        ((32, 44), "2001:db8::1", "2001:db8:f::1", "2001:db8:10::1"),
        ((32, 24), "2001:d00::1", "2001:dff::1", "2001:e00::1"),
        ((32, 128), "2001:db8::1", "2001:db8:0::1", "2001:db8::2"),
        ((0, 64), "1.1.1.1", "255.1.1.1", "::"),
        ((32, 0), "::1", "ffff::", "0.0.0.0"),
    ],
)
def test_other_prefixes(
    prefixes: tuple[int, int], one: str, same: str, other: str
) -> None:
    """With whole bytes and without."""
    key_of = Peers(prefixes=prefixes).key_of
    assert key_of(one) == key_of(same) != key_of(other)


@pytest.mark.parametrize(
    "host",
    [
        *(None, "", "/run/app.sock", "localhost", "1.2.3", "1.2.3.4.5", "01.2.3.4"),
        *("1.2.3.4\0", "1.2.3.4 ", "1.2.3.4%eth0", "::1::", ":%", "\ud800", "\ud800:"),
        *("\u0661.2.3.4", "[::1]", "1" * 100_000, ":" * 100_000, "999.9.9.9"),
    ],
)
def test_who_has_no_address_is_neither_counted_nor_refused(host: str | None) -> None:
    """A UNIX client."""
    peers = Peers(1, Rate(1))
    assert peers.key_of(host) is None
    for _ in range(3):
        assert arrive(peers, host) is None
    peers.leave(None)
    assert peers.connections(None) == 0
    assert peers.describe()["live_peers"] == remembered(peers) == 0


def test_addresses_cannot_be_chosen_to_have_one_hash() -> None:
    """As ints these of one /48 would: then a dict is a list."""
    peers = Peers(prefixes=(32, 128))
    first = int(ip_network("2001:db8:7::/48").network_address)
    hosts = [
        str(ip_network(first + n * (2**61 - 1)).network_address) for n in range(200)
    ]
    assert len({hash(int(ip_network(host).network_address)) for host in hosts}) == 1
    assert len({hash(peers.key_of(host)) for host in hosts}) == 200


# -- How many connections


def test_no_limits_refuse_nobody() -> None:
    """Connections are counted nevertheless."""
    peers = Peers()
    for _ in range(100):
        assert arrive(peers, "10.0.0.1") is None
    assert peers.connections(peers.key_of("10.0.0.1")) == 100


def test_one_connection_more_is_refused() -> None:
    """Of this peer only, and until one of its connections ends."""
    peers = Peers(max_connections=2)
    assert [arrive(peers, "10.0.0.1") for _ in range(3)] == [None, None, "connections"]
    assert arrive(peers, "10.0.0.2") is None
    assert arrive(peers, "::1") is None
    peers.leave(peers.key_of("10.0.0.1"))
    assert [arrive(peers, "10.0.0.1") for _ in range(2)] == [None, "connections"]


def test_one_who_was_not_there_cannot_leave() -> None:
    """The server would have a bug."""
    peers = Peers()
    key = peers.key_of("10.0.0.1")
    with pytest.raises(KeyError):
        peers.leave(key)
    peers.enter(key, NOW)
    peers.leave(key)
    with pytest.raises(KeyError):
        peers.leave(key)
    peers.invariant()


def test_a_lowered_limit_is_for_newcomers() -> None:
    """Who is connected stays."""
    peers = Peers(max_connections=3)
    for _ in range(3):
        assert arrive(peers, "10.0.0.1") is None
    peers.change(max_connections=1)
    key = peers.key_of("10.0.0.1")
    for left in (2, 1):
        assert arrive(peers, "10.0.0.1") == "connections"
        peers.leave(key)
        assert peers.connections(key) == left
    assert arrive(peers, "10.0.0.1") == "connections"
    peers.leave(key)
    assert arrive(peers, "10.0.0.1") is None
    peers.change(max_connections=None)
    assert arrive(peers, "10.0.0.1") is None


def test_connections_made_before_there_was_a_limit_count() -> None:
    """They are there."""
    peers = Peers()
    assert arrive(peers, "10.0.0.1") is None
    peers.change(max_connections=1)
    assert arrive(peers, "10.0.0.1") == "connections"


# -- How often


def test_more_than_the_burst_is_refused() -> None:
    """Of this peer only, and until its bucket has a token again."""
    peers = Peers(rate=Rate(10, 20))
    assert admitted(peers, "10.0.0.1", NOW) == 20
    assert arrive(peers, "10.0.0.1", NOW + 0.09) == "rate"
    assert admitted(peers, "10.0.0.2", NOW + 0.09) == 20
    assert admitted(peers, "10.0.0.1", NOW + 0.11) == 1
    assert admitted(peers, "10.0.0.1", NOW + 1.11) == 10
    assert admitted(peers, "10.0.0.1", NOW + 1000) == 20


def test_who_is_refused_uses_nothing_up() -> None:
    """Asking all the time does not delay the next token, and asking is no entering."""
    peers = Peers(rate=Rate(1))
    assert sum(admitted(peers, "10.0.0.1", NOW + n / 100, 1) for n in range(1001)) == 11
    peers = Peers(max_connections=1, rate=Rate(1, 3))
    key = peers.key_of("10.0.0.1")
    assert arrive(peers, "10.0.0.1") is None
    for _ in range(10):
        assert arrive(peers, "10.0.0.1") == "connections"
    peers.leave(key)
    assert admitted(peers, "10.0.0.1", NOW) == 2


def test_who_enters_though_refused_uses_nothing_up() -> None:
    """Refusing is tried out: it tells of as many as it would refuse."""
    tried, real = Peers(rate=Rate(1, 2)), Peers(rate=Rate(1, 2))
    key = tried.key_of("10.0.0.1")
    for n in range(100):
        now = NOW + n / 8
        assert tried.refusal(key, now) == arrive(real, "10.0.0.1", now)
        tried.enter(key, now)
        tried.invariant()
    assert tried.connections(key) == 100


def test_a_clock_set_back_stops_the_time_once() -> None:
    """Nobody is refused for as long as it was set back, nor gets more."""
    peers = Peers(rate=Rate(1, 3))
    assert admitted(peers, "10.0.0.1", NOW) == 3
    back = NOW - 1_000_000
    assert admitted(peers, "10.0.0.1", back) == 0
    assert admitted(peers, "10.0.0.2", back) == 3
    assert admitted(peers, "10.0.0.1", back + 0.5) == 0
    assert admitted(peers, "10.0.0.1", back + 1) == 1
    assert admitted(peers, "10.0.0.1", back + 4) == 3
    # Noticed by an entrance.
    assert admitted(peers, "10.0.0.3", 0.0) == 3
    assert admitted(peers, "10.0.0.1", 2.0) == 2


def test_a_clock_set_back_is_noticed_by_who_is_refused() -> None:
    """Nobody else need come."""
    peers = Peers(rate=Rate(1, 3))
    assert admitted(peers, "10.0.0.1", NOW) == 3
    assert admitted(peers, "10.0.0.1", 0.0) == 0
    assert admitted(peers, "10.0.0.1", 2.0) == 2


def test_with_another_rate_everybody_starts_with_a_full_bucket() -> None:
    """The same rate is no other."""
    peers = Peers(rate=Rate(1, 3))
    assert admitted(peers, "10.0.0.1", NOW) == 3
    peers.change(rate=Rate(1, 3))
    assert admitted(peers, "10.0.0.1", NOW) == 0
    peers.change(rate=Rate(1, 2))
    assert remembered(peers) == 0
    assert admitted(peers, "10.0.0.1", NOW) == 2
    peers.change(rate=None)
    assert admitted(peers, "10.0.0.1", NOW) == 50
    peers.change(rate=Rate(0.001, 5))
    assert admitted(peers, "10.0.0.1", NOW) == 5


# -- Other limits while it runs


@pytest.mark.parametrize("prefixes", [(24, 48), (31, 63), (8, 32), (0, 0)])
def test_with_other_prefixes_everybody_starts_anew(prefixes: tuple[int, int]) -> None:
    """Who is connected leaves with the key it entered with."""
    for host in ("0.0.0.1", "::1"):
        peers = Peers(max_connections=1, rate=Rate(0.001, 2))
        old = peers.key_of(host)
        assert arrive(peers, host) is None
        peers.change(prefixes=prefixes)
        new = peers.key_of(host)
        assert new != old
        assert arrive(peers, host) is None
        assert peers.connections(old) == peers.connections(new) == 1
        peers.leave(old)
        peers.leave(new)
        assert peers.describe()["live_peers"] == 0
        assert admitted(peers, host, NOW) == 1
        peers.change(prefixes=(32, 64))
        assert admitted(peers, host, NOW) == 1


@pytest.mark.parametrize(
    ("limits", "error", "said"),
    [
        ({"max_connections": 0}, ValueError, "max_connections=0 is below 1; None is"),
        ({"max_connections": -1}, ValueError, "max_connections=-1"),
        ({"max_connections": 1.0}, TypeError, "max_connections=1.0 is neither"),
        ({"max_connections": True}, TypeError, "max_connections=True is neither"),
        ({"rate": "10/s"}, TypeError, "rate='10/s' is not a Rate; Rate.parse"),
        ({"rate": 10}, TypeError, "rate=10 is not a Rate"),
        ({"prefixes": (33, 64)}, ValueError, "33 bits of an IPv4 address"),
        ({"prefixes": (32, 129)}, ValueError, "129 bits of an IPv6 address"),
        ({"prefixes": (-1, 64)}, ValueError, "-1 bits of an IPv4 address"),
        ({"prefixes": (32,)}, TypeError, "is not a tuple of two ints"),
        ({"prefixes": [32, 64]}, TypeError, "is not a tuple of two ints"),
        ({"prefixes": (32, 64.0)}, TypeError, "is not a tuple of two ints"),
        ({"prefixes": (True, 64)}, TypeError, "is not a tuple of two ints"),
        ({"prefixes": None}, TypeError, "prefixes=None"),
    ],
)
def test_wrong_limits_change_nothing(
    limits: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Not even those that are right beside them."""
    with pytest.raises(error) as caught:
        Peers(**limits)
    assert said in str(caught.value)
    peers = Peers(5, Rate(2), (24, 56))
    before = peers.describe()
    right: dict[str, Any] = {"max_connections": 9, "rate": None, "prefixes": (8, 8)}
    with pytest.raises(error):
        peers.change(**{**right, **limits})
    assert peers.describe() == before


# -- What is remembered


def test_whose_bucket_is_full_again_is_forgotten() -> None:
    """By the entrances of others, without a timer."""
    peers = Peers(rate=Rate(1, 10))
    for n in range(100):
        admitted(peers, f"10.0.0.{n}", NOW, 10)
    assert remembered(peers) == 100
    for seconds in range(1, 25):
        admitted(peers, "10.0.1.1", NOW + seconds, 1)
    assert remembered(peers) == 1


def test_with_another_rate_they_are_forgotten_as_soon_as_it_fills_them() -> None:
    """Not as soon as the one before would have."""
    peers = Peers(rate=Rate(1 / 3600, 10))
    admitted(peers, "10.0.0.1", NOW)
    peers.change(rate=Rate(1, 10))
    admitted(peers, "10.0.0.1", NOW)
    assert remembered(peers) == 1
    for seconds in range(1, 25):
        admitted(peers, "10.0.1.1", NOW + seconds, 1)
    assert remembered(peers) == 1


def test_after_a_pause_all_are_forgotten_at_once() -> None:
    """Their buckets are full."""
    peers = Peers(rate=Rate(1, 10))
    for n in range(100):
        admitted(peers, f"10.0.0.{n}", NOW, 10)
    admitted(peers, "10.0.1.1", NOW + 100, 1)
    assert remembered(peers) == 1


def test_who_is_connected_and_forgotten_is_counted() -> None:
    """Only its rate is forgotten."""
    peers = Peers(1, Rate(1))
    assert arrive(peers, "10.0.0.1") is None
    admitted(peers, "10.0.0.2", NOW + 100)
    assert remembered(peers) == 1
    assert arrive(peers, "10.0.0.1", NOW + 100) == "connections"


def test_the_oldest_are_forgotten_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who entered lately are not, be it again."""
    monkeypatch.setattr(peers_module, "MOST_PEERS", 100)
    peers = Peers(rate=Rate(0.001, 2))
    hosts = [f"10.0.{n >> 8}.{n & 255}" for n in range(1000)]
    assert admitted(peers, "10.1.1.1", NOW) == 2
    for n, host in enumerate(hosts):
        assert admitted(peers, host, NOW + n / 1000) == 2
        assert 0 < remembered(peers) <= 100
        if n % 40 == 0:
            assert arrive(peers, "10.1.1.1", NOW + n / 1000) == "rate"
            peers.enter(peers.key_of("10.1.1.1"), NOW + n / 1000)
    for host in hosts[-50:]:
        assert arrive(peers, host, NOW + 1) == "rate"
    assert arrive(peers, hosts[0], NOW + 1) is None


@contextmanager
def memory_traced() -> Iterator[None]:
    """What is allocated within is known, and nothing of before is counted."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def test_a_flood_of_peers_takes_little_memory() -> None:
    """More of them take no more, and it is given back."""

    def host_of(n: int) -> str:
        # Keys of IPv6 are the larger ones.
        return f"2001:{n >> 16:x}:{n & 65535:x}::1"

    most = peers_module.MOST_PEERS
    assert most == 100_000
    peers = Peers(5, Rate(0.01, 5))
    with memory_traced():
        keys = [peers.key_of(host_of(n)) for n in range(most)]
        for key in keys:
            peers.enter(key, NOW)
        assert remembered(peers) == peers.describe()["live_peers"] == most
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
        for key in keys:
            peers.leave(key)
        del key, keys
        for n in range(most, most + most // 2 + 1):
            key = peers.key_of(host_of(n))
            peers.enter(key, NOW)
            peers.leave(key)
        assert most / 2 <= remembered(peers) <= most
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
        peers.enter(peers.key_of("192.0.2.1"), NOW + 10_000)
        assert remembered(peers) == peers.describe()["live_peers"] == 1
        # The empty table of those who were connected is made smaller only later.
        assert tracemalloc.get_traced_memory()[0] < 6 * 2**20


# -- What it tells


def test_a_description() -> None:
    """JSON-able, with who has the most connections."""
    peers = Peers(9, Rate(0.5, 20), (24, 60))
    for n in range(8):
        for _ in range(n):
            assert arrive(peers, f"10.0.{n}.1") is None
    for _ in range(9):
        assert arrive(peers, "2001:db8::1") is None
    described = peers.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "max_connections_per_peer": 9,
        "accept_rate_per_peer": "30/m:20",
        "peer_prefixes": [24, 60],
        "live_peers": 8,
        "remembered_peers": 8,
        "most_connections": {
            "2001:db8::/60": 9,
            "10.0.7.0/24": 7,
            "10.0.6.0/24": 6,
            "10.0.5.0/24": 5,
            "10.0.4.0/24": 4,
        },
    }
    assert Peers().describe() == {
        "max_connections_per_peer": None,
        "accept_rate_per_peer": None,
        "peer_prefixes": [32, 64],
        "live_peers": 0,
        "remembered_peers": 0,
        "most_connections": {},
    }


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda p, k: p._live.update({k: 0}), "who is counted is there"),
        (lambda p, k: p._recent.update({k: NOW * 2}), "lacks more than it holds"),
        (lambda p, k: p._before.update({k: NOW}), "remembered once"),
        (lambda p, k: setattr(p, "_rate", None), "without a rate"),
    ],
)
def test_a_broken_state_is_told(break_it: Any, said: str) -> None:
    """The invariant is looked at."""
    peers = Peers(1, Rate(1))
    assert arrive(peers, "10.0.0.1") is None
    break_it(peers, peers.key_of("10.0.0.1"))
    with pytest.raises(AssertionError, match=said):
        peers.invariant()


# -- Any clients at any times


class Model:
    """The same with a network, a count and a fraction of tokens for each peer."""

    def __init__(self) -> None:
        self.most: int | None = None
        self.rate: Rate | None = None
        self.prefixes = (32, 64)
        self.live: dict[str, int] = {}
        self.tokens: dict[str, tuple[Fraction, float]] = {}

    def key_of(self, host: str) -> str:
        """Of hosts that are not written strangely."""
        length = self.prefixes[":" in host]
        return str(ip_network(f"{host}/{length}", strict=False))

    def there(self, key: str, now: float) -> Fraction:
        """How many tokens there are."""
        assert self.rate is not None
        tokens, since = self.tokens.get(key, (Fraction(self.rate.burst), now))
        tokens += Fraction(now - since) * Fraction(self.rate.per_second)
        return min(tokens, Fraction(self.rate.burst))

    def refusal(self, key: str, now: float) -> Refusal | None:
        """As Peers tells it."""
        if self.most is not None and self.live.get(key, 0) >= self.most:
            return "connections"
        if self.rate is not None and self.there(key, now) < 1:
            return "rate"
        return None

    def enter(self, key: str, now: float) -> None:
        """As Peers does it."""
        self.live[key] = self.live.get(key, 0) + 1
        if self.rate is not None:
            there = self.there(key, now)
            self.tokens[key] = (there - 1 if there >= 1 else there, now)


HOSTS = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "0.0.0.1", "::1", "::2", "1:0:0:1::1"]
#: Of rates and times whose sums are exact.
RATES = st.builds(Rate, st.sampled_from([0.25, 0.5, 1, 2, 4]), st.integers(1, 4))
STEPS = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from(HOSTS)),
    st.tuples(st.just("arrive"), st.sampled_from(HOSTS[:2])),
    st.tuples(st.just("arrive anyway"), st.sampled_from(HOSTS)),
    st.tuples(st.just("leave"), st.integers(0, 1000)),
    st.tuples(st.just("pass"), st.integers(0, 64).map(lambda n: n / 16)),
    st.tuples(st.just("set back"), st.integers(0, 2**20)),
    st.tuples(st.just("most"), st.none() | st.integers(1, 4)),
    st.tuples(st.just("rate"), st.none() | RATES),
    st.tuples(st.just("prefixes"), st.sampled_from([(32, 64), (24, 64), (31, 10)])),
)


@settings(max_examples=150, deadline=None)
@given(st.none() | RATES, st.lists(STEPS, min_size=10, max_size=60))
def test_it_is_a_count_and_a_bucket_for_each(
    rate: Rate | None, steps: list[tuple[str, Any]]
) -> None:
    """Whatever comes, goes and is changed, in any order, under any clock."""
    peers, model = Peers(rate=rate), Model()
    model.rate = rate
    live: list[tuple[Key, str]] = []
    clock = now = NOW
    for what, value in steps:
        if what.startswith("arrive"):
            key, name = peers.key_of(value), model.key_of(value)
            refusal = peers.refusal(key, clock)
            assert refusal == model.refusal(name, now)
            if refusal is None or what == "arrive anyway":
                peers.enter(key, clock)
                model.enter(name, now)
                live.append((key, name))
        elif what == "leave" and live:
            key, name = live.pop(value % len(live))
            peers.leave(key)
            model.live[name] -= 1
        elif what == "pass":
            now += value
            clock += value
        elif what == "set back":
            # Noticed only by who comes, so somebody does at both ends.
            for _ in range(2):
                peers.enter(peers.key_of("10.9.9.9"), clock)
                peers.leave(peers.key_of("10.9.9.9"))
                clock -= value
            clock += value
        elif what == "most":
            peers.change(max_connections=value)
            model.most = value
        elif what == "rate":
            peers.change(rate=value)
            if value != model.rate:
                model.rate, model.tokens = value, {}
        elif what == "prefixes":
            peers.change(prefixes=value)
            model.prefixes = value
        peers.invariant()
        assert peers.describe()["live_peers"] == sum(map(bool, model.live.values()))
        for key, name in live:
            assert peers.connections(key) == model.live[name]
