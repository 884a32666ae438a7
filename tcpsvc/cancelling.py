"""
Cancelling handlers, and telling whose do not heed it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from tcpsvc.address_text import address_text
from tcpsvc.connection import Connection
from tcpsvc.drain_options import GRACE
from tcpsvc.factory import ServerFactory
from tcpsvc.log import log

#: How many clients a line names.
MOST_NAMED = 10


def peers_text(connections: Iterable[Connection[Any]]) -> str:
    """Their clients, for a line of the log: the first of them."""
    peers = [address_text(connection.peer) for connection in connections]
    more = len(peers) - MOST_NAMED
    return ", ".join(peers[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


class Cancellation:
    """
    Cancels all handlers of a server that is closed. A grace later a line names the
    clients of those that have not ended; nobody waits for them.

    :param factory: the server's.
    """

    def __init__(self, factory: ServerFactory) -> None:
        self._factory = factory
        self._timer: IDelayedCall | None = None
        self._cancelled: list[Connection[Any]] = []

    def cancel(self) -> None:
        """Cancel those that run now."""
        factory = self._factory
        if factory.ending.is_cancelling:
            return
        self._cancelled = [c for c in factory.connections if c.is_cancellable]
        factory.cancel_handlers()
        if self._timer is None and any(c.is_running for c in self._cancelled):
            self._timer = factory.clock.callLater(GRACE, self._tell)
            factory.when_over().addCallback(self._over)

    def _tell(self) -> None:
        self._timer = None
        going_on = [c for c in self._cancelled if c.is_running]
        self._cancelled = []
        if going_on:
            log.error(
                "{count} {do} not end, not even when cancelled: {peers}",
                count=len(going_on),
                do="handler does" if len(going_on) == 1 else "handlers do",
                peers=peers_text(going_on),
            )

    def _over(self, _: None) -> None:
        self._cancelled = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
