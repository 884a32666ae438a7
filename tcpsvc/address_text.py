"""
Addresses as people write them, for log lines and reprs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress


def one_line(text: str) -> str:
    """A text with what does not print escaped: a path may hold a newline."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def address_text(address: object) -> str:
    """An address as people write it: ``127.0.0.1:80``, ``[::1]:80``, ``unix:/p``."""
    if isinstance(address, IPv4Address):
        return f"{address.host}:{address.port}"
    if isinstance(address, IPv6Address):
        return f"[{address.host}]:{address.port}"
    if isinstance(address, UNIXAddress):
        return f"unix:{one_line(os.fsdecode(address.name or b''))}"
    return str(address)


def addresses_text(addresses: Iterable[object]) -> str:
    """Several addresses in one line, as :func:`address_text` says each."""
    return ", ".join(address_text(address) for address in addresses)
