"""
What the owner of a server sees of it, and can change, while it runs: its
connections, its limits, its handler, who observes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from tcpsvc.connection import Connection
from tcpsvc.factory import ServerFactory
from tcpsvc.limits_line import limits_line
from tcpsvc.listener import Listener
from tcpsvc.snapshot import ConnectionSnapshot

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tcpsvc.options import StreamOptions


class Control:
    """Mixed into :class:`tcpsvc.Server`."""

    _factory: ServerFactory

    @property
    def listeners(self) -> tuple[Listener[Any, Any], ...]:
        """Where it listens."""
        raise NotImplementedError  # pragma: no cover

    # Connections.

    @property
    def connections(self) -> tuple[ConnectionSnapshot, ...]:
        """All that are live, as they are now, in the order of their accepts."""
        return tuple(c.snapshot() for c in self._factory.connections)

    def connection(self, id: int) -> Connection[Any]:
        """
        A live connection: to close it, abort it, or have it hold no slot. See
        :class:`tcpsvc.IConnection`.

        :param id: its number, as in :attr:`connections`.
        :raises KeyError: there is none, or no longer.
        """
        return self._factory.connection(id)

    def when_connections(self, condition: Callable[[int], object]) -> Deferred[None]:
        """
        Wait until the number of taken slots is as one wishes::

            await server.when_connections(lambda n: n < 10)

        :param condition: called with it, now and at each change: an accept, a release,
            and an ``uncount()``.
        :returns: a Deferred of one's own that fires when it has returned something
            true, in the middle of the change. It fails with what that raises, and with
            :exc:`ServerClosed <tcpsvc.ServerClosed>` when the server has ended without
            it.
            Cancelling it ends the waiting only.
        """
        return self._factory.when_connections(condition)

    # Who is let in.

    @property
    def num_connections(self) -> int:
        """How many slots are taken: live connections, handlers included (A5)."""
        return self._factory.num_connections

    @property
    def max_connections(self) -> int:
        """How many slots there are. To be set at any time; closes nobody."""
        return self._factory.max_connections

    @max_connections.setter
    def max_connections(self, limit: int) -> None:
        self._factory.max_connections = limit

    @property
    def is_dropping_incoming_connections(self) -> bool:
        """Whether each incoming connection is closed at once (D)."""
        return self._factory.is_dropping_incoming_connections

    def set_drop_incoming_connections(self, drop: bool) -> None:
        """
        Accept each incoming connection and close it at once, or stop doing so
        (D). Existing connections go on. Clients that wait because all slots are
        taken are dropped too.

        :param drop: whether to drop from now on.
        """
        self._factory.set_drop_incoming_connections(drop)

    # Changes.

    @property
    def limits(self) -> str:
        """The limits that there are, in a line, for a log."""
        return self._limits_line(with_defaults=True)

    @property
    def limits_set(self) -> str:
        """
        Those of them that are not as by default, in a shorter line; and always
        ``max_connections``, whose default depends on the process.
        """
        return self._limits_line(with_defaults=False)

    def _limits_line(self, *, with_defaults: bool) -> str:
        factory = self._factory
        return limits_line(
            factory.settings,
            of_streams=factory.takes_streams,
            is_dropping=factory.is_dropping_incoming_connections,
            has_backlog=any(one.where.takes_backlog for one in self.listeners),
            with_defaults=with_defaults,
        )

    def change(self, **options: Unpack[StreamOptions]) -> None:
        """
        Other options from now on: all of them, or none if one is wrong.

        Timeouts, their ``dry_run`` and ``buffer_age_limit`` take effect on
        connections that are live, at the next look at them; ``flush_timeout`` at their
        next close; limits on clients, at the next accept, or at once on those who wait.
        A lowered limit closes nobody. Buffer sizes and ``keepalive`` are those of new
        connections, ``eof_on_drain`` of the drain, ``on_exhaustion`` and
        ``on_accept_error`` of the next failure to accept. ``backlog`` is that of the
        next bind. ``engine``, ``socket``, ``reactor``, ``clock`` and
        ``on_handler_error`` cannot be changed; ``drop_incoming_connections``, the
        handler and the observers have methods of their own.

        :raises ValueError: an option has a bad value; it is named.
        :raises TypeError: an option is unknown, cannot be changed, or its value is of
            the wrong kind.
        """
        self._factory.change(dict(options))

    def set_handler(self, handler: Any) -> None:
        """
        Serve new connections with another handler. Those that are live, or accepted
        and not started, keep theirs.

        :param handler: of the same kind as the one before: a function, or a protocol
            factory, which then is told of the ports (``doStart``, ``doStop``).
        :raises TypeError: it is not.
        """
        self._factory.set_handler(handler)

    # Observers.

    def add_observer(self, observer: Any) -> None:
        """
        Tell one more what happens from now on.

        :param observer: a :class:`tcpsvc.Observer`.
        :raises ValueError: it is no :class:`tcpsvc.IObserver`.
        """
        self._factory.add_observer(observer)

    def remove_observer(self, observer: Any) -> None:
        """
        Tell it no more.

        :raises ValueError: it was not added.
        """
        self._factory.remove_observer(observer)
