"""
Which connection goes when another is to come in: the one that was idle for longest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: How long a ranking is good for, in seconds: as exact as what is known of idleness.
RANKING_LASTS = 1.0


class Eviction:
    """
    Chooses whom to evict. All are ranked at once, and that ranking is used up: a flood
    of newcomers does not have every connection looked at for each of them.
    """

    def __init__(self) -> None:
        self._ranking: list[Any] = []
        self._ranked_at = 0.0
        #: Ids of live connections that were chosen.
        self._evicted: set[int] = set()

    @property
    def under_way(self) -> int:
        """How many were chosen and are not over."""
        return len(self._evicted)

    def choose(self, connections: Iterable[Any], now: float) -> Any:
        """
        :param connections: those that hold slots.
        :param now: the time.
        :returns: the one to evict, which counts as chosen; ``None`` when all have been.
        """
        if now - self._ranked_at >= RANKING_LASTS:
            self._ranking.clear()
        while True:
            while self._ranking:
                last, connection = self._ranking.pop()
                if (
                    not connection.is_over
                    and connection.id not in self._evicted
                    and connection.look(now) == last
                ):
                    self._evicted.add(connection.id)
                    return connection
            candidates = [c for c in connections if c.id not in self._evicted]
            if not candidates:
                return None
            self._ranked_at = now
            self._ranking = sorted(
                ((c.look(now), c) for c in candidates),
                key=lambda ranked: (ranked[0], ranked[1].id),
                reverse=True,
            )

    def forget(self, connection: Any) -> None:
        """It is over."""
        self._evicted.discard(connection.id)
