"""
One event, and a fresh Deferred for each who waits for it.

A Deferred that is shared passes one waiter's result, and one waiter's
cancellation, on to the next; so nobody here is ever handed the same one twice.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred, DeferredList, fail, succeed
from twisted.python.failure import Failure


class Event:
    """Something that happens once. It stays happened."""

    __slots__ = ("_failure", "_waiting", "has_happened")

    def __init__(self) -> None:
        self.has_happened = False
        self._failure: Failure | None = None
        self._waiting: list[Deferred[None]] = []

    def wait(self) -> Deferred[None]:
        """
        :returns: a Deferred of the caller's own. It fires when the event
            happens, or has fired already. Cancelling it affects nobody else.
        """
        if self.has_happened:
            return succeed(None) if self._failure is None else fail(self._failure)
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        return waiter

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for it now."""
        return bool(self._waiting)

    def happen(self) -> None:
        """It has happened: fire every waiter, in the order they asked. Once."""
        self._settle(None)

    def fail(self, failure: Failure) -> None:
        """It has failed to happen, and will not: errback every waiter. Once."""
        self._settle(failure)

    def _settle(self, failure: Failure | None) -> None:
        if self.has_happened:
            return
        self.has_happened = True
        self._failure = failure
        while self._waiting:
            waiter = self._waiting.pop(0)
            if failure is None:
                waiter.callback(None)
            else:
                waiter.errback(failure)


def all_of(waiters: list[Deferred[None]]) -> Deferred[None]:
    """
    :returns: a Deferred that fires when all have fired, none of which may fail.
        Cancelling it ends the waiting only.
    """
    everything = Event()
    DeferredList(waiters).addCallback(lambda _: everything.happen())
    return everything.wait()
