"""
Pausing a server, and going on (spec Z).

::

                 pause("hold")               pause("refuse")
      ┌─────────▶ hold ──────────────────────────┐
    open ◀─resume─┘ ▲                            ▼
      │ ▲           └──────pause("hold")───── refuse
      │ └────────────────resume────────────────┘ ▲
      └──────────────pause("refuse")─────────────┘

What leaves *refuse* binds the addresses again, and may fail; then it stays there.
Closing a socket takes a turn of the reactor, so changes wait for each other, in the
order in which they were asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.python.failure import Failure

from tcpsvc._waiters import Event
from tcpsvc.address_text import addresses_text
from tcpsvc.errors import ServerClosed
from tcpsvc.factory import ServerFactory
from tcpsvc.listeners import Listeners
from tcpsvc.log import log
from tcpsvc.where import SocketPlace

#: The ways to pause: leave clients in the backlog, or refuse them.
How = Literal["hold", "refuse"]

Change = Callable[[Any], Deferred[None] | None]


class Pausing:
    """
    Whether a server is paused, and how.

    :ivar how: ``None`` when it is not paused.
    """

    def __init__(self, listeners: Listeners, factory: ServerFactory) -> None:
        self.how: How | None = None
        self._listeners = listeners
        self._factory = factory
        self._is_over = False
        #: The changes to come, and who waits for each.
        self._queue: deque[tuple[Change, How | None, Event]] = deque()
        #: Whether one is being made.
        self._is_changing = False
        #: Where to listen again, while refusing.
        self._places: Sequence[SocketPlace[Any, Any]] = ()

    def pause(self, how: How) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fires when the pause is there.
        """
        return self._in_turn(self._pause, how)

    def resume(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fires when clients are accepted.
        """
        return self._in_turn(self._change, None)

    def over(self) -> None:
        """The server is closed: no change from now on."""
        if not self._is_over:
            self._is_over = True
            was, self.how = self.how, None
            if was == "refuse":
                self._factory.doStop()

    def _in_turn(self, change: Change, to: How | None) -> Deferred[None]:
        done = Event()
        waiter = done.wait()  # Cancelling it ends the waiting, not the change.
        self._queue.append((change, to, done))
        self._work()
        return waiter

    def _work(self) -> None:
        """Make the changes that are due, up to one that takes its time."""
        while self._queue and not self._is_changing:
            change, to, done = self._queue.popleft()
            self._is_changing = True
            changing: Deferred[Any] = maybeDeferred(change, to)
            changing.addBoth(self._changed, done)
            if self._is_changing:
                changing.addBoth(lambda _: self._work())

    def _changed(self, result: object, done: Event) -> None:
        self._is_changing = False
        if not isinstance(result, Failure):
            done.happen()
        elif done.is_awaited:
            done.fail(result)
        else:
            log.error(
                "{address}: {error}",
                address=addresses_text(self._listeners.addresses()),
                error=result.getErrorMessage(),
            )

    def _pause(self, how: How) -> Deferred[None] | None:
        if how not in ("hold", "refuse"):
            raise ValueError(f"pause({how!r}): how is neither 'hold' nor 'refuse'")
        return self._change(how)

    def _change(self, to: How | None) -> Deferred[None] | None:
        if self._is_over:
            raise self._closed(to)
        if to == self.how:
            return None
        if to == "refuse":
            return self._refuse()
        if self.how == "refuse":
            self._listeners.listen_again(self._places)
            if self._is_over:  # By the application's factory, when it was started.
                self._listeners.stop_at_once()
                raise self._closed(to)
            self._factory.doStop()
        self._is_now(to)
        return None

    def _is_now(self, how: How | None) -> None:
        self.how = how
        if how is None:  # Observers hear of that before they hear who comes in.
            self._tell(None)
            self._factory.set_paused(False)
        else:
            self._factory.set_paused(True)
            self._tell(how)

    def _closed(self, to: How | None) -> ServerClosed:
        asked = "resume()" if to is None else f"pause({to!r})"
        return ServerClosed(
            f"{addresses_text(self._listeners.addresses())}: {asked} on a server that "
            "is closed; create a new one"
        )

    def _refuse(self) -> Deferred[None]:
        self._places = self._listeners.again()
        # The application's factory is not to hear that it has stopped: its ports
        # come back, and its connections go on.
        self._factory.doStart()
        self.how = "refuse"
        self._factory.set_paused(True)
        stopped = self._listeners.stop()
        self._tell("refuse")
        return stopped

    def _tell(self, how: How | None) -> None:
        """Observers hear of it, unless one has closed the server meanwhile."""
        if self._is_over:
            return
        events = self._factory.events
        if how is None:
            events.server_resumed()
        else:
            events.server_paused(how)
