"""
Waiting until the number of connections is as one wishes.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred, fail, succeed

from tcpsvc.errors import ServerClosed
from tcpsvc.slots import Slots

Condition = Callable[[int], object]


class Conditions:
    """
    Conditions that somebody waits for.

    :ivar waiting: whoever does. While nobody does, there is no need to :meth:`look`.
    """

    def __init__(self) -> None:
        self.waiting: dict[Deferred[None], Condition] = {}
        self._is_over = False

    def wait(self, condition: Condition, count: int) -> Deferred[None]:
        """
        :param count: the number now.
        :returns: a Deferred of one's own that fires when the condition holds, now or
            later, and fails with what it raises, and with ServerClosed when the
            number cannot change any more. Cancelling it affects nobody else.
        """
        if not callable(condition):
            return fail(
                TypeError(f"condition={condition!r} is not callable: give a function")
            )
        try:
            if condition(count):
                return succeed(None)
        except BaseException:
            return fail()
        if self._is_over:
            return fail(_never())
        waiter: Deferred[None] = Deferred(self._forget)
        self.waiting[waiter] = condition
        return waiter

    def _forget(self, waiter: Deferred[None]) -> None:
        self.waiting.pop(waiter, None)

    def over(self) -> None:
        """The number cannot change any more."""
        self._is_over = True
        while self.waiting:
            self.waiting.popitem()[0].errback(_never())

    def look(self, slots: Slots) -> None:
        """The number has changed, or may have."""
        for waiter, condition in list(self.waiting.items()):
            # Whoever is asked or told may cancel any, or change the number: it is
            # looked at each time, and so is who still waits.
            if waiter not in self.waiting:
                continue
            try:
                holds = condition(slots.taken)
            except BaseException:
                if self.waiting.pop(waiter, None) is not None:
                    waiter.errback()
                continue
            if holds and self.waiting.pop(waiter, None) is not None:
                waiter.callback(None)


def _never() -> ServerClosed:
    return ServerClosed(
        "the server is over: its number of connections cannot change any more"
    )
