"""
The factory: its making, its changes, its end, and what is known of it.

:class:`ServerFactory` is what a :class:`tcpsvc.Server` listens with. It is
public, so that an application that has an endpoint already can listen with it. Who
gets in is :mod:`tcpsvc.entrance`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IProtocolFactory, IProtocolNegotiationFactory
from twisted.python.failure import Failure
from zope.interface import alsoProvides, implementer, noLongerProvides

from tcpsvc._waiters import Event, all_of
from tcpsvc.checks import at_least_one
from tcpsvc.connection import Connection
from tcpsvc.entrance import Entrance, nothing
from tcpsvc.exhaustion import Exhaustion
from tcpsvc.failures import Failures
from tcpsvc.handler import OnHandlerError
from tcpsvc.interfaces import IServerFactory
from tcpsvc.log import log
from tcpsvc.options import Options, StreamOptions
from tcpsvc.protocol_connection import ProtocolConnection
from tcpsvc.reasons import Reason
from tcpsvc.settings import Settings, change_options, check_options, describe_settings
from tcpsvc.sock_connection import SockConnection
from tcpsvc.stream_connection import StreamConnection

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: The hosts of listeners whose connections come to any of the machine's addresses.
_WILDCARDS = ("", "0.0.0.0", "::")


@implementer(IServerFactory)
class ServerFactory(Entrance):
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
        self, kind: Callable[..., Any], handler: Any, settings: Settings, **options: Any
    ) -> None:
        """Not to be called: use :meth:`of_streams` or :meth:`of_protocols`."""
        super().__init__(kind, handler, settings, **options)
        self._failures = Failures(
            settings.on_handler_error, self.errors, self._maybe_over
        )
        self._failures.on_fatal = self.close
        self._when_over = Event()
        #: Happens when those are closed that are being closed just now.
        self._closing: Event | None = None
        #: Whether handlers are being cancelled just now, any of which may ask for that.
        self.is_cancelling = False
        self._has_server = False
        #: Whether it is known where it listens, and that is one place.
        self.has_one_address = False
        #: Whether connections may have another own address than the listener's.
        self.is_listening_anywhere = True
        #: The server that listens with it, for ``on_accept_error``.
        self.server: Any = None
        #: What happens when a gate's accept fails.
        self.exhaustion = Exhaustion(self, self._place_found)
        #: Called when a connection's socket was closed.
        self.descriptor_closed = self.exhaustion.descriptor_closed
        #: What a handler raised to stop the process (spec H7).
        self.stopped_by: BaseException | None = None

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
        made._negotiate_as(factory)
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

    def _negotiate_as(self, factory: Any) -> None:
        """TLS asks the factory that it wraps which protocols it speaks (ALPN)."""
        if IProtocolNegotiationFactory.providedBy(factory):
            self.acceptableProtocols = factory.acceptableProtocols
            alsoProvides(self, IProtocolNegotiationFactory)
        elif IProtocolNegotiationFactory.providedBy(self):
            noLongerProvides(self, IProtocolNegotiationFactory)

    # Who is admitted.

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

    def change(self, changes: dict[str, Any]) -> None:
        """
        Other options from now on, all or, if one is wrong, none.

        :raises ValueError: an option has a bad value.
        :raises TypeError: an option is unknown, or cannot be changed.
        """
        before = self.settings
        settings = change_options(self._options, before, changes)
        self.settings = settings
        self.slots.limit = settings.max_connections
        present = [*self._live.values(), *self._held, *self._held_unconnected.values()]
        self._admission.change(settings, present, self.clock.seconds())
        self._timeouts.change(settings)
        self._limit_as_set()
        self.exhaustion.update_reserve()
        if settings.accept_rate != before.accept_rate or "accept_rate" in (
            settings.dry_run ^ before.dry_run
        ):
            self._rate_as_set()
        self._place_found()

    def set_handler(self, handler: Any) -> None:
        """
        Serve new connections with another handler of the same kind. Those that are
        live, or accepted and not started, keep theirs.

        :param handler: a function, or a protocol factory where it was one.
        :raises TypeError: it is not of that kind.
        """
        _check_handler(self._kind, handler)
        if self._kind is ProtocolConnection:
            # Twisted tells a factory how many ports it has.
            for _ in range(self.numPorts):
                handler.doStart()
            self._negotiate_as(handler)
            before, self.handler = self.handler, handler
            for _ in range(self.numPorts):
                try:
                    before.doStop()
                except Exception:
                    # The new one serves, and the next port is to be told all the same.
                    log.failure("doStop of {factory} failed", factory=before)
        self.handler = handler

    def when_connections(self, condition: Callable[[int], object]) -> Deferred[None]:
        """
        :param condition: called with the number of taken slots, now and at each change.
        :returns: a Deferred of one's own that fires when it has returned something
            true. It fails with what that raises, and with ServerClosed when the server
            has ended without it.
        """
        return self._conditions.wait(condition, self.num_connections)

    @property
    def is_reporting_errors(self) -> bool:
        """Whether a call of ``on_handler_error`` has not ended yet."""
        return self._failures.is_reporting

    def hold_starts(self) -> None:
        """Start no handler before :meth:`begin_starts`."""
        self._starts.hold()

    def begin_starts(self) -> None:
        """Handlers may start, in turns of the reactor after this one."""
        self._starts.begin()

    # Errors (spec E, H7).

    def report(self, peer: Any, error: Failure) -> None:
        """A handler has failed: do as its owner chose."""
        self._failures.report(peer, error)

    def failed(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fails with the first error that
            closed the server (``on_handler_error="raise"``, or a callable that
            raised), also when asked for afterwards. It fires ``None`` when
            everything has ended without one (spec E3).
        """
        return self._failures.failed()

    def stop_reactor(self, error: BaseException) -> None:
        """A handler raised ``SystemExit`` or ``KeyboardInterrupt`` (spec H7)."""
        if self.stopped_by is None:
            self.stopped_by = error
        # A Clock in a test is no reactor that runs.
        stop = getattr(self.reactor, "stop", nothing)
        try:
            stop()
        except ReactorNotRunning:
            pass

    # Closing (spec X).

    def close(self) -> None:
        """
        Admit nobody from now on: connections that come are closed, no further
        handler starts. Existing connections go on. A port of your own is yours
        to close.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self._stop_waiting_for_rate()
        self._refuse_held(Reason.UNSERVED)
        self._replies.close()
        self._starts.refuse_all()
        self._maybe_over()

    def close_connections(self) -> Deferred[None]:
        """
        Close the sockets of all live connections at once (spec X3).

        :returns: a Deferred that fires when they are closed. It does not wait
            for handlers.
        """
        if self._closing is not None:
            # By whoever is told of it, maybe by all, one within the other.
            return self._closing.wait()
        closing = self._closing = Event()
        closed = []
        try:
            for connection in list(self._live.values()):
                closed.append(connection.when_socket_closed.wait())
                connection.close()
        finally:
            self._closing = None
        all_of(closed).addCallback(lambda _: closing.happen())
        return closing.wait()

    def start_accepted(self) -> None:
        """Start what was accepted and waits for its turn, which a close would end."""
        self._starts.start_now()

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
        if self.is_cancelling:
            return
        self.is_cancelling = True
        try:
            for connection in list(self._live.values()):
                connection.cancel_handler()
        finally:
            self.is_cancelling = False

    def when_over(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when :meth:`close` was called, no
            connection is live, and ``on_handler_error`` of the last has returned.
        """
        return self._when_over.wait()

    def _maybe_over(self) -> None:
        if self.is_closed and not self._live and not self._failures.is_reporting:
            self._when_over.happen()
            self._conditions.look(self.slots)
            self._conditions.over()
            if not self._has_server:
                self.nothing_can_fail()

    def nothing_can_fail(self) -> None:
        """Everything has ended: :meth:`failed` fires, unless it has failed."""
        self._failures.over()

    # For the gate and the connections.

    def listen_with(
        self,
        on_place: Callable[[], None],
        on_failure: Callable[[], None],
        addresses: Callable[[], Sequence[object]],
    ) -> None:
        """A server tells what to call when a place is found, and so on."""
        self._has_server = True
        self._on_place = on_place
        self._failures.on_fatal = on_failure
        self._addresses = addresses
        self.has_one_address = len(addresses()) == 1
        self.is_listening_anywhere = (
            getattr(self.listening_on(), "host", "") in _WILDCARDS
        )

    def listening_on(self) -> Any:
        """The listening address, where it is known and there is no other."""
        return self._addresses()[0] if self.has_one_address else None

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits to be accepted, at a port that has a gate."""
        return self.exhaustion.pause is None and self.exhaustion.is_awaited

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
            "is_dropping_incoming_connections": self.is_dropping,
            "held": len(self._held),
            "peers": self._admission.describe(),
            "connections": [c.describe() for c in self._live.values()],
            "counters": asdict(self.counters),
        }

    def invariant(self) -> None:
        """
        :raises AssertionError: the state is broken; it says how (spec I1).
        """
        broken = self.slots.broken()
        broken += [*self.broken_entrance(), *self.exhaustion.broken()]
        if self.settings.max_accepts_per_batch < 1:
            broken.append("max_accepts_per_batch >= 1")
        if self._when_over.has_happened and (self._live or self._failures.is_reporting):
            broken.append("nothing live after the end")
        if broken:
            raise AssertionError(f"broken: {', '.join(broken)}: {self.describe()}")

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.num_connections}/{self.max_connections} "
            f"connections{' closed' if self.is_closed else ''}>"
        )


def _check_handler(kind: object, handler: object) -> None:
    if kind is ProtocolConnection:
        if not callable(getattr(handler, "buildProtocol", None)):
            raise TypeError(f"factory={handler!r} has no buildProtocol")
    elif not callable(handler):
        raise TypeError(f"handler={handler!r} is not callable")
