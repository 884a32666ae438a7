"""
Where a factory listens, as far as it is known: its own ports are its owner's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tcpsvc.address_text import addresses_text

#: The hosts of listeners whose connections come to any of the machine's addresses.
_WILDCARDS = ("", "0.0.0.0", "::")


class Whereabouts:
    """
    :ivar addresses: returns all of them.
    :ivar has_one_address: whether it is known, and one place.
    :ivar is_anywhere: whether connections may have another own address than the
        listener's.
    """

    def __init__(self) -> None:
        self.addresses: Callable[[], Sequence[object]] = tuple
        self.has_one_address = False
        self.is_anywhere = True

    def know(self, addresses: Callable[[], Sequence[object]]) -> None:
        """
        It has become known.

        :param addresses: returns all of the addresses.
        """
        self.addresses = addresses
        self.has_one_address = len(addresses()) == 1
        self.is_anywhere = getattr(self.listening_on(), "host", "") in _WILDCARDS

    def listening_on(self) -> Any:
        """The listening address, where it is known and there is no other."""
        return self.addresses()[0] if self.has_one_address else None

    def __str__(self) -> str:
        return addresses_text(self.addresses()) or "a server"
