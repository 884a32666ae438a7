"""
Which connection goes when another is to come in: the one that was idle for longest.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from tcpsvc.reasons import Reason
from tcpsvc.refusal_log import RefusalLog
from tcpsvc.slots import Slots

#: How long a ranking is good for, in seconds: as exact as what is known of idleness.
RANKING_LASTS = 1.0

#: A new one is made before that when this part of the last one's has gone, else the
#: flood of newcomers would have every connection looked at for each of them.
_USED_UP = 1 / 4


class Eviction:
    """
    Chooses whom to evict. All are ranked at once, and that ranking is used up; who
    has moved a byte since is passed over, while there is anybody else.

    It knows connections by their ids: it is not to hold those that are over.

    :param slots: who is there.
    :param refusal_log: is told that somebody had to go.
    """

    def __init__(self, slots: Slots, refusal_log: RefusalLog) -> None:
        self._slots = slots
        self._refusal_log = refusal_log
        #: When each was last seen to have moved a byte, and its id; the latest first.
        self._ranking: list[tuple[float, int]] = []
        #: Ids of those that were passed over; the latest last.
        self._passed_over: deque[int] = deque()
        self._ranked_at = -math.inf
        #: How many of the ranking may go before there may be a new one.
        self._left = 0.0
        #: Ids of live connections that were chosen.
        self.evicted: set[int] = set()

    @property
    def under_way(self) -> int:
        """How many were chosen and still hold their slots."""
        return len(self.evicted)

    def make_room(self, wanted: int, now: float) -> None:
        """
        End as many as have to go.

        :param wanted: how many others are to get slots.
        """
        slots = self._slots
        for _ in range(wanted - slots.limit + slots.taken - self.under_way):
            victim = self.choose(now)
            if victim is None:
                return
            self._refusal_log.evicted()
            victim.end(Reason.EVICTED)

    def choose(self, now: float) -> Any:
        """
        :param now: the time.
        :returns: the one to evict, which counts as chosen; ``None`` when all have been.
        """
        if not 0 <= now - self._ranked_at < RANKING_LASTS:
            self._rank(now)
        chosen = self._next(now)
        if chosen is None and self._left > 0:
            while self._passed_over and chosen is None:
                chosen = self._candidate(self._passed_over.popleft())
        if chosen is None:
            self._rank(now)
            chosen = self._next(now)
        if chosen is not None:
            self._left -= 1
            self.evicted.add(chosen.id)
        return chosen

    def _rank(self, now: float) -> None:
        self._ranked_at = now
        self._passed_over.clear()
        self._ranking = sorted(
            (
                (connection.look(now), number)
                for number, connection in self._slots.live.items()
                if self._candidate(number) is not None
            ),
            reverse=True,
        )
        self._left = len(self._ranking) * _USED_UP

    def _next(self, now: float) -> Any:
        while self._ranking:
            last, number = self._ranking.pop()
            connection = self._candidate(number)
            if connection is None:
                continue
            if connection.look(now) == last:
                return connection
            self._passed_over.append(number)
        return None

    def _candidate(self, id: int) -> Any:
        connection = self._slots.live.get(id)
        if connection is None or id in self.evicted:
            return None
        return connection if self._slots.holds(connection) else None

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        slots = self._slots
        holding = {c.id for c in slots.live.values() if slots.holds(c)}
        return [] if self.evicted <= holding else ["who is evicted holds a slot"]

    def forget(self, connection: Any) -> None:
        """It holds no slot any more."""
        self.evicted.discard(connection.id)
