"""
IP networks, and which hosts are in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface

from tcpsvc.addresses import network_of, number_of, packed_of


class Networks:
    """
    A set of networks. How long it takes to look up a host depends on how many
    lengths of prefixes there are, not on how many networks.

    IPv4 addresses written as IPv6 ones, which are what a dual-stack socket accepts,
    are IPv4: ``10.0.0.0/8`` has ``::ffff:10.0.0.1``, and ``::/0`` has not.

    :param networks: ``"10.0.0.0/8"``, ``"2001:db8::/32"``, single addresses, or
        such objects of :mod:`ipaddress`.
    :raises ValueError: one of them is no network. It is named.
    :raises TypeError: one of them is of another kind.
    """

    __slots__ = ("_numbers", "_shifts_4", "_shifts_6")

    def __init__(
        self,
        networks: Iterable[
            str | IPv4Address | IPv4Network | IPv6Address | IPv6Network
        ] = (),
    ) -> None:
        # Its letters would be taken for networks.
        if isinstance(networks, (str, bytes)):
            raise TypeError(f"networks={networks!r} is not a list; give [{networks!r}]")
        found = [_network(each) for each in networks]
        #: Of all in one set: a number says of which length its prefix is.
        self._numbers = frozenset(
            number_of(n.network_address.packed) >> _left_off(n) for n in found
        )
        self._shifts_4 = _shifts(n for n in found if n.version == 4)
        self._shifts_6 = _shifts(n for n in found if n.version == 6)

    def __contains__(self, host: object) -> bool:
        """Whether a host is in one of them; what is no IP address is not."""
        if not isinstance(host, str):
            return False
        packed = packed_of(host)
        if packed is None:
            return False
        number = number_of(packed)
        numbers = self._numbers
        for shift in self._shifts_4 if number >= 0 else self._shifts_6:
            if number >> shift in numbers:
                return True
        return False

    def __iter__(self) -> Iterator[IPv4Network | IPv6Network]:
        """IPv4 first, in the order of their addresses."""
        found = map(network_of, self._numbers)
        return iter(sorted(found, key=lambda n: (n.version, int(n[0]), n.prefixlen)))

    def __len__(self) -> int:
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Networks):
            return NotImplemented
        return self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash(self._numbers)

    def __repr__(self) -> str:
        return f"Networks({list(map(str, self))})"


def _network(given: object) -> IPv4Network | IPv6Network:
    """What is given for one, checked."""
    if not isinstance(given, (str, IPv4Address, IPv4Network, IPv6Address, IPv6Network)):
        raise TypeError(f"network {given!r} is neither a str nor one of ipaddress's")
    text = str(given)
    if "%" in text:
        raise ValueError(
            f"network {text!r} has a scope id, which is not looked at: leave it out"
        )
    try:
        interface = ip_interface(text)
    except ValueError as error:
        raise ValueError(
            f"network {text!r} is not of the form 10.0.0.0/8, 192.168.1.7,"
            f" 2001:db8::/32 or ::1 ({error})"
        ) from None
    network = interface.network
    first = network.network_address
    if interface.ip != first:
        raise ValueError(
            f"network {text!r} has bits set after its prefix:"
            f" the network is {network}, the host {interface.ip}"
        )
    if isinstance(first, IPv6Address) and network.prefixlen >= 96 and first.ipv4_mapped:
        return IPv4Network((first.ipv4_mapped, network.prefixlen - 96))
    return network


def _left_off(network: IPv4Network | IPv6Network) -> int:
    """How many bits of an address are not in the prefix."""
    return network.max_prefixlen - network.prefixlen


def _shifts(networks: Iterable[IPv4Network | IPv6Network]) -> tuple[int, ...]:
    """What the prefixes leave off, the longest prefix first."""
    return tuple(sorted(set(map(_left_off, networks))))
