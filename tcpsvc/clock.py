"""
The time of a server that was given no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

from twisted.internet.base import ReactorBase
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer


@implementer(IReactorTime)
class SteadyClock:
    """
    A reactor's timers, with a time that nobody sets: most of Twisted's reactors have
    the wall clock's, by which a connection may be idle for hours in a moment.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    #: Seconds since some moment.
    seconds = staticmethod(monotonic)

    def callLater(
        self, delay: float, callable: Any, *args: object, **kw: object
    ) -> IDelayedCall:
        """As the reactor's."""
        call: IDelayedCall = self._reactor.callLater(delay, callable, *args, **kw)
        return call

    def getDelayedCalls(self) -> Sequence[IDelayedCall]:
        """As the reactor's."""
        calls: Sequence[IDelayedCall] = self._reactor.getDelayedCalls()
        return calls


def clock_of(reactor: Any) -> Any:
    """The time by which a reactor's servers go: its own, if it is a test's."""
    return SteadyClock(reactor) if isinstance(reactor, ReactorBase) else reactor
