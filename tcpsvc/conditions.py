"""
Waiting until the number of connections is as one wishes.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred, fail, succeed

from tcpsvc.slots import Slots

Condition = Callable[[int], object]


class Conditions:
    """Conditions that somebody waits for."""

    def __init__(self) -> None:
        self._waiting: dict[Deferred[None], Condition] = {}

    def wait(self, condition: Condition, count: int) -> Deferred[None]:
        """
        :param count: the number now.
        :returns: a Deferred of one's own that fires when the condition holds, now or
            later, and fails with what it raises. Cancelling it affects nobody else.
        """
        try:
            if condition(count):
                return succeed(None)
        except Exception:
            return fail()
        waiter: Deferred[None] = Deferred(self._forget)
        self._waiting[waiter] = condition
        return waiter

    def _forget(self, waiter: Deferred[None]) -> None:
        self._waiting.pop(waiter, None)

    def look(self, slots: Slots) -> None:
        """The number has changed, or may have."""
        if self._waiting:
            self._tell(slots.taken)

    def _tell(self, count: int) -> None:
        for waiter, condition in list(self._waiting.items()):
            if waiter not in self._waiting:
                continue  # Whoever was told before has cancelled it.
            try:
                holds = condition(count)
            except Exception:
                del self._waiting[waiter]
                waiter.errback()
                continue
            if holds:
                del self._waiting[waiter]
                waiter.callback(None)
