"""
The factory: its making, its changes, its end, and what is known of it.

:class:`ServerFactory` is what a :class:`tcpsvc.Server` listens with. It is
public, so that an application that has an endpoint already can listen with it. What
ports and connections call is in :mod:`tcpsvc.connection_factory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocolFactory
from zope.interface import implementer

from tcpsvc.address_text import address_text
from tcpsvc.checks import at_least_one
from tcpsvc.connection import Connection
from tcpsvc.connection_factory import ConnectionFactory
from tcpsvc.events import Observers
from tcpsvc.handler import OnHandlerError
from tcpsvc.interfaces import IServerFactory
from tcpsvc.options import Options, StreamOptions
from tcpsvc.protocol_connection import ProtocolConnection
from tcpsvc.settings import Settings, change_options, check_options, describe_settings
from tcpsvc.sock_connection import SockConnection
from tcpsvc.stream_connection import StreamConnection
from tcpsvc.timeouts import OF_TRAFFIC
from tcpsvc.user_factory import check_user_factory, negotiate_as, stop_user_factory

if TYPE_CHECKING:
    from typing_extensions import Unpack


@implementer(IServerFactory)
class ServerFactory(ConnectionFactory):
    """
    Runs a handler for each connection, never more than ``max_connections``.

    Listening with it yourself, ``endpoint.listen(ServerFactory.of_streams(...))``,
    it cannot tell the port to stop accepting. So beyond the limit no handler is
    started: the surplus is held accepted, unread and unstarted, in order, and
    costs a descriptor each. :meth:`tcpsvc.Server.create` has no surplus.

    Made by :meth:`of_streams` and :meth:`of_protocols`. What it promises is
    :class:`tcpsvc.IServerFactory`; what else has a name without an underscore is for
    the gates, connections and servers of this package, and may change.

    :ivar is_closed: whether :meth:`close` was called.
    :ivar is_draining: whether handlers were told that the server drains.
    """

    def __init__(
        self,
        kind: Callable[..., Any],
        handler: Any,
        settings: Settings,
        *,
        options: Any = Options,
        reactor: Any = None,
        clock: Any = None,
        observer: Any = None,
    ) -> None:
        """Not to be called: use :meth:`of_streams` or :meth:`of_protocols`."""
        super().__init__(kind, handler, settings, reactor=reactor, clock=clock)
        self._options = options
        self._observers = Observers(self.counters, self.errors, self.stop_reactor)
        if observer is not None:
            self.add_observer(observer)

    # Making.

    @classmethod
    def of_streams(
        cls,
        handler: Callable[..., object],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[StreamOptions],
    ) -> ServerFactory:
        """
        A factory whose handler reads and writes streams.

        :param handler: called as ``handler(address, reader, writer)``.
        :param on_handler_error: as in :meth:`tcpsvc.Server.create`.
        :param options: of :class:`tcpsvc.StreamOptions`; ``backlog`` and
            ``socket`` are the port's, and without effect here.
        :raises ValueError: an option has a bad value.
        :raises TypeError: an option is unknown, or of the wrong kind.
        """
        return cls._of(
            StreamConnection, handler, on_handler_error, StreamOptions, dict(options)
        )

    @classmethod
    def of_protocols(
        cls,
        factory: IProtocolFactory,
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> ServerFactory:
        """
        A factory around any protocol factory (spec P).

        :param factory: builds a protocol for each connection.
        :param options: of :class:`tcpsvc.Options`; all else as in :meth:`of_streams`.
        """
        made = cls._of(
            ProtocolConnection, factory, on_handler_error, Options, dict(options)
        )
        negotiate_as(made, factory)
        return made

    @classmethod
    def of_socks(
        cls,
        handler: Callable[..., object],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> ServerFactory:
        """
        A factory whose handler has the plain socket. Only a
        :class:`tcpsvc.Server` can listen with it: a port of Twisted's hands out
        transports.

        :param handler: called as ``handler(address, socket)``.
        :param options: of :class:`tcpsvc.Options`, as in :meth:`of_streams`.
        """
        return cls._of(
            SockConnection, handler, on_handler_error, Options, dict(options)
        )

    @classmethod
    def _of(
        cls,
        kind: Callable[..., Any],
        handler: Any,
        on_handler_error: OnHandlerError,
        known: Any,
        options: dict[str, Any],
    ) -> ServerFactory:
        settings = check_options(known, on_handler_error, options)
        _check_handler(kind, handler)
        others = {name: options.get(name) for name in ("reactor", "clock", "observer")}
        return cls(kind, handler, settings, options=known, **others)

    # Who is admitted.

    @property
    def num_connections(self) -> int:
        """How many slots are taken (spec A5)."""
        return self.slots.taken

    @property
    def max_connections(self) -> int:
        """
        How many slots there are. It may be set at any time; a lowered limit
        closes nobody.
        """
        return self.slots.limit

    @max_connections.setter
    def max_connections(self, limit: int) -> None:
        at_least_one("max_connections", limit)
        self.change({"max_connections": limit})

    @property
    def is_dropping_incoming_connections(self) -> bool:
        """Whether each incoming connection is closed at once (spec D1)."""
        return self.entrance.is_dropping

    def set_drop_incoming_connections(self, drop: bool) -> None:
        """
        Close each incoming connection at once, or stop doing so (spec D). May be
        called any number of times, also when closed.

        :param drop: whether to drop from now on.
        """
        self.entrance.set_dropping(bool(drop))

    def change(self, changes: dict[str, Any]) -> None:
        """
        Other options from now on, all or, if one is wrong, none.

        :raises ValueError: an option has a bad value.
        :raises TypeError: an option is unknown, or cannot be changed.
        """
        before = self.settings
        settings = change_options(self._options, before, changes)
        self.check_limits_at(self.whereabouts.addresses(), settings)
        self.settings = settings
        self.slots.limit = settings.max_connections
        self.entrance.limits_changed()
        self._timeouts.change(settings)
        self._limit_as_set()
        self.exhaustion.update_reserve()
        if settings.accept_rate != before.accept_rate or "accept_rate" in (
            settings.dry_run ^ before.dry_run
        ):
            self.entrance.rate_changed()
        self.entrance.place_found()

    def check_limits_at(
        self, addresses: Iterable[object], settings: Settings | None = None
    ) -> None:
        """
        :param addresses: where it is to listen.
        :param settings: the limits, else as they are.
        :raises ValueError: one is about what nobody knows: what the UNIX sockets of
            socket handlers move. Without any other it would do nothing.
        """
        where = list(addresses)
        if not (self.takes_sockets and where) or not all(
            isinstance(address, UNIXAddress) for address in where
        ):
            return
        settings = settings or self.settings
        for name in OF_TRAFFIC:
            limit = getattr(settings, name)
            if limit is not None:
                raise ValueError(
                    f"{name}={limit!r} at {address_text(where[0])}: nobody knows what "
                    "a UNIX socket moves whose handler has the socket; use "
                    "handler_timeout or lifetime, or Server.create"
                )

    def set_handler(self, handler: Any) -> None:
        """
        Serve new connections with another handler of the same kind. Those that are
        live, or accepted and not started, keep theirs.

        :param handler: a function, or a protocol factory where it was one.
        :raises TypeError: it is not of that kind.
        """
        _check_handler(self._kind, handler)
        if self._kind is not ProtocolConnection:
            self.handler = handler
            return
        # Twisted tells a factory how many ports it has.
        for _ in range(self.numPorts):
            handler.doStart()
        negotiate_as(self, handler)
        before, self.handler = self.handler, handler
        stop_user_factory(before, self.numPorts)

    def when_connections(self, condition: Callable[[int], object]) -> Deferred[None]:
        """
        :param condition: called with the number of taken slots, now and at each change.
        :returns: a Deferred of one's own that fires when it has returned something
            true. It fails with what that raises, and with ServerClosed when the server
            has ended without it.
        """
        return self._conditions.wait(condition, self.num_connections)

    # Who is told.

    def add_observer(self, observer: Any) -> None:
        """
        Tell one more what happens from now on.

        :raises ValueError: it is no :class:`tcpsvc.IObserver`.
        """
        self._observers.add(observer)
        self._observers_changed()

    def remove_observer(self, observer: Any) -> None:
        """
        Tell it no more.

        :raises ValueError: it was not added.
        """
        self._observers.remove(observer)
        self._observers_changed()

    def _observers_changed(self) -> None:
        self.is_observed = bool(self._observers.added)
        self.events = self._observers.events

    # For its server.

    def listen_with(
        self,
        on_place: Callable[[], None],
        on_failure: Callable[[], None],
        addresses: Callable[[], Sequence[object]],
    ) -> None:
        """A server tells what to call when a place is found, and so on."""
        self.entrance.on_place = on_place
        self.failures.on_fatal = on_failure
        self.ending.has_server = True
        self.whereabouts.know(addresses)

    def set_paused(self, paused: bool) -> None:
        """Let nobody in for now, not even to drop them, or go on."""
        self.entrance.set_paused(paused, self._last_id)

    # Errors (spec E, H7).

    def failed(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fails with the first error that
            closed the server (``on_handler_error="raise"``, or a callable that
            raised), also when asked for afterwards. It fires ``None`` when
            everything has ended without one (spec E3).
        """
        return self.failures.failed()

    # Closing (spec X).

    def close(self) -> None:
        """
        Admit nobody from now on: connections that come are closed, no further
        handler starts. Existing connections go on. A port of your own is yours
        to close.
        """
        self.ending.close()

    def close_connections(self) -> Deferred[None]:
        """
        Close the sockets of all live connections at once (spec X3).

        :returns: a Deferred that fires when they are closed. It does not wait
            for handlers.
        """
        return self.ending.close_connections()

    def tell_of_drain(self) -> None:
        """
        Tell every handler that the server drains: readers that wait at a boundary
        are at EOF, if that was asked for. Again, it looks for further ones.
        """
        self.is_draining = True
        for connection in list(self._live.values()):
            connection.tell_of_drain()

    def cancel_handlers(self) -> None:
        """Cancel every handler that still runs."""
        self.ending.cancel_handlers()

    def when_over(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when :meth:`close` was called, no
            connection is live, and ``on_handler_error`` of the last has returned.
        """
        return self.ending.when_over()

    # Twisted's hooks.

    def doStart(self) -> None:
        """A port listens: tell the application's own factory (spec P2)."""
        super().doStart()  # type: ignore[no-untyped-call]
        if self._kind is ProtocolConnection:
            self.handler.doStart()

    def doStop(self) -> None:
        """A port has closed: tell the application's own factory (spec P2)."""
        super().doStop()  # type: ignore[no-untyped-call]
        if self._kind is ProtocolConnection:
            self.handler.doStop()

    # Inspection (spec I).

    @property
    def connections(self) -> list[Connection[Any]]:
        """The live connections, in the order of their accepts."""
        return list(self._live.values())

    def connection(self, id: int) -> Connection[Any]:
        """
        :raises KeyError: it is not live.
        """
        return self._live[id]

    def describe(self) -> dict[str, Any]:
        """A JSON-able description of the state (spec I4)."""
        return {
            "num_connections": self.num_connections,
            "max_connections": self.max_connections,
            "options": describe_settings(self.settings),
            "is_closed": self.is_closed,
            "is_dropping_incoming_connections": self.entrance.is_dropping,
            "held": len(self.entrance.held.waiting),
            "peers": self.entrance.admission.describe(),
            "connections": [c.describe() for c in self._live.values()],
            "counters": asdict(self.counters),
        }

    def invariant(self) -> None:
        """
        :raises AssertionError: the state is broken; it says how (spec I1).
        """
        broken = self.broken_connections()
        if self.settings.max_accepts_per_batch < 1:
            broken.append("max_accepts_per_batch >= 1")
        if broken:
            raise AssertionError(f"broken: {', '.join(broken)}: {self.describe()}")

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.num_connections}/{self.max_connections} "
            f"connections{' closed' if self.is_closed else ''}>"
        )


def _check_handler(kind: object, handler: object) -> None:
    if kind is ProtocolConnection:
        check_user_factory(handler)
    elif not callable(handler):
        raise TypeError(f"handler={handler!r} is not callable")
