"""
What happens in a server, told to whoever observes it: :class:`Observer`. The
counters are the first observer, and while there is no other they alone are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.logger import LogLevel
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.exceptions import Invalid
from zope.interface.verify import verifyObject

from tcpsvc.error_log import ErrorLog
from tcpsvc.handler import STOPPING
from tcpsvc.interfaces import IObserver
from tcpsvc.reasons import Reason


@implementer(IObserver)
class Observer:
    """
    Does nothing at each event: override what is of interest. Given to ``create`` as
    ``observer``; see :class:`tcpsvc.IObserver` for what each is told.

    Methods are called at once, in the middle of what they tell of. What they raise is
    counted and logged, once in a minute of each kind, and goes no further.
    """

    __slots__ = ()

    def connection_accepted(self, connection: Any) -> None:
        """A connection has taken a slot."""

    def connection_refused(self, address: Any, reason: Reason) -> None:
        """A client was not let in."""

    def refused_in_dry_run(self, address: Any, reason: Reason) -> None:
        """A client would have been refused, or closed, but for ``dry_run``."""

    def handler_started(self, connection: Any) -> None:
        """Its handler runs."""

    def handler_ended(
        self, connection: Any, outcome: str, failure: Failure | None
    ) -> None:
        """Its handler has ended."""

    def connection_finished(self, connection: Any) -> None:
        """It is over, and its slot free when all have been told."""

    def limit_reached(self, limit: str) -> None:
        """
        From now on clients wait, are refused, or have others evicted:
        ``"max_connections"``, the last slot was taken; or ``"accept_rate"``, the last
        token was. That of a peer is told by ``connection_refused``.
        """

    def accept_failed(self, error: OSError) -> None:
        """The kernel did not give a client, for want of descriptors, say."""

    def server_paused(self, how: str) -> None:
        """It accepts nobody until it is resumed."""

    def server_resumed(self) -> None:
        """It accepts again."""

    def server_draining(self) -> None:
        """A drain has begun."""

    def server_drained(self, report: Any) -> None:
        """A drain is over."""


def check_observer(observer: object) -> None:
    """
    :raises ValueError: it is no :class:`tcpsvc.IObserver`.
    """
    try:
        verifyObject(IObserver, observer)
    except Invalid as error:
        found = getattr(error, "exceptions", [error])
        more = f" And {len(found) - 1} more like it." if len(found) > 1 else ""
        raise ValueError(
            f"observer={observer!r} is no IObserver (derive it from tcpsvc.Observer): "
            + " ".join(str(found[0]).split())
            + more
        ) from error


class Broadcast:
    """
    Tells several observers.

    :param own: the server's counters, which are not guarded.
    :param others: who is told after them.
    :param errors: how their errors are logged.
    :param stop: called with a ``SystemExit`` or ``KeyboardInterrupt`` of theirs.
    """

    def __init__(
        self,
        own: Any,
        others: Iterable[Any],
        errors: ErrorLog,
        stop: Callable[[BaseException], object],
    ) -> None:
        self._own = own
        self._others = tuple(others)
        self._errors = errors
        self._stop = stop

    def __getattr__(self, event: str) -> Any:
        tell_own = getattr(self._own, event)
        tell_others = [getattr(other, event) for other in self._others]

        def tell(*told: Any) -> None:
            tell_own(*told)
            for tell_other in tell_others:
                try:
                    tell_other(*told)
                except BaseException as error:
                    # None of them is to take the slot of a connection with it.
                    self._failed(event)
                    if isinstance(error, STOPPING):
                        self._stop(error)

        # Found without this method from now on.
        setattr(self, event, tell)
        return tell

    def _failed(self, event: str) -> None:
        """Clients bring events about: there may be a flood of them."""
        self._own.observer_errors += 1
        self._errors.failure(
            "an observer failed at {event}",
            Failure(),
            of=event,
            between=LogLevel.debug,
            event=event,
        )


class Observers:
    """
    Who is told what happens in a server.

    :param own: the server's counters.
    :param errors: how observers' errors are logged.
    :param stop: called with a ``SystemExit`` or ``KeyboardInterrupt`` of theirs.
    :ivar added: those who are told beside the counters.
    """

    def __init__(
        self, own: Any, errors: ErrorLog, stop: Callable[[BaseException], object]
    ) -> None:
        self._own = own
        self._errors = errors
        self._stop = stop
        self.added: list[Any] = []

    def add(self, observer: Any) -> None:
        """
        :raises ValueError: it is no :class:`tcpsvc.IObserver`.
        """
        check_observer(observer)
        self.added.append(observer)

    def remove(self, observer: Any) -> None:
        """
        :raises ValueError: it was not added.
        """
        for place, known in enumerate(self.added):
            if known is observer:
                del self.added[place]
                return
        raise ValueError(f"observer={observer!r} was not added")

    @property
    def events(self) -> Any:
        """What is to be called from now on."""
        if not self.added:
            return self._own
        return Broadcast(self._own, self.added, self._errors, self._stop)
