"""
Clients that were accepted and wait, unread and in order: for a slot, for
``accept_rate``, for the end of a pause.

Where a gate asks before each accept they are few: those for whom somebody is evicted,
most of them. A port that cannot be told to stop accepting has as many as come.
"""

from __future__ import annotations

from collections import deque
from typing import Any


class Held:
    """
    None of them holds a slot.

    :ivar waiting: those that are connected, in the order of their accepts.
    :ivar unconnected: those whose transports are still to come, by their ids.
    :ivar too_early: ids of those that came when ``accept_rate`` allowed none.
    :ivar last_before_pause: whoever has a later id waits for the resume.
    """

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()
        self.unconnected: dict[int, Any] = {}
        self.too_early: set[int] = set()
        self.last_before_pause = 0

    @property
    def for_slots(self) -> int:
        """How many wait for nothing but a slot."""
        return len(self.waiting) + len(self.unconnected) - len(self.too_early)

    @property
    def all(self) -> list[Any]:
        """All of them."""
        return [*self.waiting, *self.unconnected.values()]

    def add(self, connection: Any) -> None:
        """One that has to wait. Its transport is still to come."""
        connection.hold()
        self.unconnected[connection.id] = connection

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        held = {c.id for c in self.all}
        return [] if self.too_early <= held else ["whoever waits for the rate is held"]
