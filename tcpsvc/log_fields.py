"""
What lines of the log say of clients and of errors, as their fields. The texts are made
where a line is written, not where it is asked for: at debug there may be no such place.
"""

from __future__ import annotations

from typing import Any

from twisted.python.failure import Failure
from twisted.python.reflect import safe_str

from tcpsvc.address_text import address_text, one_line

#: How much of an error's message a line tells: a client may have a say in it.
MOST_OF_A_MESSAGE = 200


class _Client:
    """An address that prints as people write it."""

    __slots__ = ("_address",)

    def __init__(self, address: object) -> None:
        self._address = address

    def __str__(self) -> str:
        return address_text(self._address)

    __repr__ = __str__


def of_client(address: object) -> dict[str, Any]:
    """
    The fields of a line that names a client: ``peer``, its address, and ``client``,
    which is for the line.
    """
    return {"peer": address, "client": _Client(address)}


def error_text(failure: Failure) -> str:
    """An error in one line of bounded length: ``ValueError: oh dear``."""
    message = one_line(safe_str(failure.value)[: MOST_OF_A_MESSAGE + 1])
    if len(message) > MOST_OF_A_MESSAGE:
        message = message[:MOST_OF_A_MESSAGE] + "..."
    kind = failure.type.__name__ if failure.type is not None else "error"
    return f"{kind}: {message}" if message else kind
