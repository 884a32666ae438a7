"""
What is known of a connection at one time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from twisted.python.reflect import safe_str

from tcpsvc.address_text import address_text
from tcpsvc.reasons import Reason

#: Bytes in and out; ``None`` where nobody knows.
Bytes = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class ConnectionSnapshot:
    """
    A connection as it was when it was looked at.

    :ivar id: its number within the server.
    :ivar peer: the client's address.
    :ivar age: seconds since the accept.
    :ivar idle: seconds since it was last seen to move a byte, either way. They are
        looked at about once a second while there are timeouts, and when one is asked
        for this; else Linux's TCP knows it exactly.
    :ivar bytes_in: bytes received; ``None`` where nobody knows.
    :ivar bytes_out: bytes that the kernel has taken. Those of a protocol under TLS are
        counted below it.
    :ivar handler: ``"waiting"`` (it starts in the next turn), ``"running"``,
        ``"finished"``, ``"left"``, ``"failed"`` or ``"refused"``.
    :ivar socket: ``"open"`` or ``"closed"``.
    :ivar holds_slot: false after ``uncount()``.
    :ivar label: what its handler calls it.
    :ivar reason: why it ends, once something has.
    """

    id: int
    peer: Any
    age: float
    idle: float
    bytes_in: int | None
    bytes_out: int | None
    handler: str
    socket: str
    holds_slot: bool
    label: object
    reason: Reason | None

    def describe(self) -> dict[str, Any]:
        """As JSON has it; what nobody knows is left out."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {name: value for name, value in found.items() if value is not None}
        found["peer"] = address_text(self.peer)
        if self.label is not None:
            found["label"] = safe_str(self.label)
        if self.reason is not None:
            found["reason"] = self.reason.value
        return found
