"""Which hosts are in which networks, what is no network, and the keys of prefixes."""

from __future__ import annotations

from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpsvc import networks as networks_module
from tcpsvc.addresses import key_of, name_of, network_of, number_of, packed_of
from tcpsvc.networks import Networks

pytestmark = pytest.mark.whatever("engine", "reactor")

NO_ADDRESSES = [
    *("", " ", ".", ":", ":%", "%", "%eth0", "localhost", "example.org", "/run/s"),
    *("1", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.-4", "01.2.3.4", "0x1.2.3.4"),
    *("1.2.3.4 ", " 1.2.3.4", "1.2.3.4\n", "1.2.3.4\0", "1.2.3.4/32", "1.2.3.4%eth0"),
    *("1.2.3.4:80", "[::1]", "::1::", "1:2:3:4:5:6:7:8:9", "::12345", "::g", "::1\0"),
    *("::ffff:1.2.3", "::1/128", "\ud800", "\ud800::1", "\u0661.2.3.4", "1" * 100_000),
    *(":" * 100_000, "10.0.0.\u00b2"),
]


def test_hosts_in_networks() -> None:
    """Of both versions, the first and last address included."""
    networks = Networks(["10.0.0.0/8", "192.168.1.7", "2001:db8::/32", "::1"])
    for host in (
        *("10.0.0.0", "10.255.255.255", "192.168.1.7"),
        *("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "::1"),
    ):
        assert host in networks
    for host in (
        *("9.255.255.255", "11.0.0.0", "192.168.1.6", "192.168.1.8"),
        *("2001:db7:ffff::", "2001:db9::", "::", "::2", "::192.168.1.7"),
    ):
        assert host not in networks


def test_an_ipv4_address_written_as_ipv6_is_ipv4() -> None:
    """In a host and in a network: a dual-stack socket tells it so."""
    networks = Networks(["10.0.0.0/8"])
    assert "::ffff:10.1.2.3" in networks
    assert "::FFFF:0a01:0203" in networks
    assert "::ffff:11.1.2.3" not in networks
    assert "::10.1.2.3" not in networks
    assert Networks(["::ffff:10.0.0.0/104"]) == networks
    assert Networks([IPv6Address("::ffff:10.1.2.3")]) == Networks(["10.1.2.3"])
    assert "10.1.2.3" in Networks(["::ffff:0:0/96"])
    everything_6 = Networks(["::/0"])
    assert "10.1.2.3" not in everything_6
    assert "::ffff:10.1.2.3" not in everything_6
    assert "10.1.2.3" in Networks(["0.0.0.0/0"])
    assert "::1" not in Networks(["0.0.0.0/0"])


def test_a_scope_id_is_ignored() -> None:
    """The same address on another interface is in the same network."""
    assert "fe80::1%eth0" in Networks(["fe80::/10"])
    assert "fe80::1%1" in Networks(["fe80::1"])
    assert "::ffff:10.0.0.1%eth0" in Networks(["10.0.0.1"])


@pytest.mark.parametrize("host", NO_ADDRESSES)
def test_what_is_no_address_is_in_no_network(host: str) -> None:
    """Not even in all of them."""
    assert host not in Networks(["0.0.0.0/0", "::/0"])


@pytest.mark.parametrize("host", [None, 1, b"1.2.3.4", b"\1\2\3\4", [":"], object()])
def test_what_is_no_text_is_in_no_network(host: Any) -> None:
    """A UNIX client has no host."""
    assert host not in Networks(["0.0.0.0/0", "::/0"])


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("10.0.0.1/8", "the network is 10.0.0.0/8, the host 10.0.0.1"),
        ("2001:db8::1/32", "the network is 2001:db8::/32, the host 2001:db8::1"),
        ("::ffff:10.0.0.1/104", "bits set after its prefix"),
        ("10.0.0.0/33", "not of the form"),
        ("10.0.0.0/", "not of the form"),
        ("10.0.0.0/-1", "not of the form"),
        ("10.0.0", "not of the form"),
        ("10.*", "not of the form"),
        ("", "not of the form"),
        ("localhost", "not of the form"),
        ("::/129", "not of the form"),
        ("010.0.0.0/8", "not of the form"),
        ("10.0.0.0\0", "not of the form"),
        ("fe80::%eth0/64", "leave it out"),
        (IPv6Address("fe80::1%eth0"), "leave it out"),
    ],
)
def test_what_is_no_network(network: Any, said: str) -> None:
    """It is named, and what would be one."""
    with pytest.raises(ValueError, match=r"^network ") as caught:
        Networks(["10.0.0.0/8", network])
    assert repr(str(network)) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("network", [1, None, b"10.0.0.0", ("10.0.0.0", 8), True])
def test_networks_of_a_wrong_kind(network: Any) -> None:
    """ipaddress would take 1 for 0.0.0.1."""
    with pytest.raises(TypeError, match="is neither a str nor"):
        Networks([network])


@pytest.mark.parametrize("networks", ["10.0.0.0/8", b"10.0.0.0/8", ""])
def test_one_network_is_no_list(networks: Any) -> None:
    """Its letters would be networks."""
    with pytest.raises(TypeError, match=r"is not a list; give \["):
        Networks(networks)


def test_a_set_of_networks() -> None:
    """Each once, in order; equal to those of the same networks; a value."""
    one = Networks(
        ["::1", "10.0.0.0/8", IPv4Address("9.0.0.1"), "10.0.0.0/255.0.0.0", "10.0.0.0"]
    )
    listed = ["9.0.0.1/32", "10.0.0.0/8", "10.0.0.0/32", "::1/128"]
    assert [str(n) for n in one] == listed
    assert len(one) == 4
    other = Networks(list(one)[::-1])
    assert one == other
    assert hash(one) == hash(other)
    assert one != Networks(["::1"])
    assert one != set(listed)
    assert repr(one) == f"Networks({listed})"


def test_no_networks() -> None:
    """Nobody is in none of them."""
    assert "10.0.0.1" not in Networks()
    assert not Networks()
    assert list(Networks([])) == []
    with pytest.raises(AttributeError):
        Networks().more = 1  # type: ignore[attr-defined]


def test_many_networks_cost_no_more_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is looked up once for each length of a prefix."""
    looked_up = 0

    class Counted(frozenset[int]):
        def __contains__(self, number: object) -> bool:
            nonlocal looked_up
            looked_up += 1
            return super().__contains__(number)

    monkeypatch.setattr(networks_module, "frozenset", Counted, raising=False)
    networks = Networks(
        [*(f"10.{n >> 8}.{n & 255}.0/24" for n in range(5000)), "::1", "::/64"]
    )
    assert "11.0.0.1" not in networks
    assert looked_up == 1
    assert "2001:db8::1" not in networks
    assert looked_up == 3


ADDRESSES = st.one_of(
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.integers(0, 2**128 - 1).map(IPv6Address),
    st.integers(0xFFFF_0000_0000, 0xFFFF_FFFF_FFFF).map(IPv6Address),
    # Close to each other and to the ends, so that they are in the networks.
    st.integers(0, 20).map(IPv4Address),
    st.integers(0, 20).map(IPv6Address),
)


@st.composite
def some_networks(draw: st.DrawFn) -> IPv4Network | IPv6Network:
    """A network around some address."""
    address = draw(ADDRESSES)
    length = draw(st.integers(0, address.max_prefixlen))
    return ip_network(f"{address}/{length}", strict=False)


def is_in(host: str, network: IPv4Network | IPv6Network) -> bool:
    """As ipaddress tells it, with IPv4 addresses written as IPv6 ones as IPv4."""
    address = ip_address(host)
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if isinstance(network, IPv6Network) and network.subnet_of(
        IPv6Network("::ffff:0:0/96")
    ):
        first = network.network_address.ipv4_mapped
        network = ip_network(f"{first}/{network.prefixlen - 96}")
    return address in network


@settings(max_examples=200, deadline=None)
@given(st.lists(some_networks(), max_size=8), st.lists(ADDRESSES, max_size=8))
def test_it_is_what_ipaddress_says(
    given_networks: list[IPv4Network | IPv6Network],
    hosts: list[IPv4Address | IPv6Address],
) -> None:
    """For any networks and hosts, those at the networks' ends among them."""
    networks = Networks(given_networks)
    ends = [a for n in given_networks for a in (n[0], n[-1])]
    for host in map(str, hosts + ends):
        assert (host in networks) == any(is_in(host, n) for n in given_networks)
    assert Networks(networks) == networks
    assert Networks(map(str, networks)) == networks


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.text("0123456789abcdef.:%", max_size=20))
def test_no_text_breaks_it(text: str) -> None:
    """And what ipaddress takes for an address is one."""
    try:
        is_address = bool(ip_address(text))
    except ValueError:
        is_address = False
    found = text in Networks(["0.0.0.0/0", "::/0"])
    # Empty scope ids are ignored too.
    assert found == is_address or (found and "%" in text)


@settings(max_examples=200, deadline=None)
@given(some_networks(), some_networks())
def test_a_number_and_a_key_say_all_of_a_network(
    one: IPv4Network | IPv6Network, other: IPv4Network | IPv6Network
) -> None:
    """Two networks have neither the same number nor the same key."""

    def number(network: IPv4Network | IPv6Network) -> int:
        left_off = network.max_prefixlen - network.prefixlen
        return number_of(network.network_address.packed) >> left_off

    def key(network: IPv4Network | IPv6Network) -> bytes:
        return key_of(network.network_address.packed, network.prefixlen)

    assert network_of(number(one)) == one
    assert name_of(key(one)) == str(one)
    assert (number(one) == number(other)) == (one == other)
    assert (key(one) == key(other)) == (one == other)


@pytest.mark.parametrize("length", range(0, 129, 4))
def test_keys_of_both_versions_and_of_all_lengths_differ(length: int) -> None:
    """Though all bits of the addresses are the same."""
    keys = [key_of(bytes(4), n) for n in range(33)]
    assert key_of(bytes(16), length) not in keys
    assert len(set(keys)) == 33


def test_the_bytes_of_an_address() -> None:
    """Four or sixteen, one for all ways to write it."""
    assert packed_of("1.2.3.4") == packed_of("::ffff:102:304") == b"\1\2\3\4"
    assert packed_of("::1") == packed_of("0:0::0:1%x") == bytes(15) + b"\1"
    assert packed_of("localhost") is None
