"""
The slots of a server: which connections are live, and how many of them count
(spec A5).

Every change of the number of taken slots is here.
"""

from __future__ import annotations

from typing import Any

from tcpsvc.checks import at_least_one


class Slots:
    """
    :param limit: how many there are.
    :ivar live: live connections by their ids, in the order of their accepts.
    :ivar is_full: whether no slot is free. It is asked for five times a connection.
    """

    def __init__(self, limit: int) -> None:
        self.live: dict[int, Any] = {}
        self._limit = limit
        #: What was taken when the limit was lowered, or let pass, may exceed it.
        self._allowed = limit
        #: Ids of live connections that hold no slot.
        self._uncounted: set[int] = set()
        self.is_full = False

    @property
    def limit(self) -> int:
        """How many there are. A lowered limit closes nobody."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = at_least_one("max_connections", limit)
        self._update()

    @property
    def taken(self) -> int:
        """How many are taken."""
        return len(self.live) - len(self._uncounted)

    def take(self, connection: Any, *, may_exceed: bool = False) -> None:
        """A connection takes one; beyond the limit only in a dry run."""
        live = self.live
        live[connection.id] = connection
        self.is_full = len(live) - len(self._uncounted) >= self._limit
        if may_exceed:
            self._allowed = max(self._allowed, self.taken)

    def uncount(self, connection: Any) -> None:
        """A live connection gives its slot back, and stays live."""
        self._uncounted.add(connection.id)
        self._update()

    def free(self, connection: Any) -> None:
        """A connection is over."""
        del self.live[connection.id]
        if self.is_full or self._uncounted or self._allowed != self._limit:
            self._uncounted.discard(connection.id)
            self._update()

    def holds(self, connection: Any) -> bool:
        """Whether a connection holds a slot."""
        return connection.id in self.live and connection.id not in self._uncounted

    def _update(self) -> None:
        self._allowed = max(self._limit, self.taken)
        self.is_full = self.taken >= self._limit

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        live = self.live.values()
        checks = {
            "max_connections >= 1": self._limit >= 1,
            "num_connections <= max_connections": self.taken <= self._allowed,
            "each live connection is known once": len({id(c) for c in live})
            == len(self.live),
            "live connections are not over": not any(c.is_over for c in live),
            "only live connections are uncounted": self._uncounted <= set(self.live),
            "it is full when no slot is free": self.is_full
            is (self.taken >= self._limit),
        }
        return [check for check, holds in checks.items() if not holds]
