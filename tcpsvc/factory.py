"""
The factory: which connections are live, who is admitted, who is dropped.

:class:`ServerFactory` is what a :class:`tcpsvc.Server` listens with. It is
public, so that an application that has an endpoint already can listen with it.

Every change of the number of taken slots is in :meth:`ServerFactory._admit` and
:meth:`ServerFactory.release`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from twisted.internet import protocol
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import (
    IAddress,
    IProtocolFactory,
    IProtocolNegotiationFactory,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import alsoProvides

from tcpsvc import kernel
from tcpsvc._waiters import Event, all_of
from tcpsvc.connection import Connection
from tcpsvc.counters import Counters
from tcpsvc.failures import Failures
from tcpsvc.handler import OnHandlerError
from tcpsvc.options import (
    Options,
    Settings,
    StreamOptions,
    at_least_one,
    check_options,
)
from tcpsvc.protocol_connection import ProtocolConnection, Refuser
from tcpsvc.sock_connection import SockConnection
from tcpsvc.starts import Starts
from tcpsvc.stream_connection import StreamConnection
from tcpsvc.sweeper import Sweeper
from tcpsvc.where import addresses_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: At the limit there is one warning in so many seconds (spec A3).
WARNING_INTERVAL = 60.0


class ServerFactory(protocol.ServerFactory):
    """
    Runs a handler for each connection, never more than ``max_connections``.

    Listening with it yourself, ``endpoint.listen(ServerFactory.of_streams(...))``,
    it cannot tell the port to stop accepting. So beyond the limit no handler is
    started: the surplus is held accepted, unread and unstarted, in order, and
    costs a descriptor each. :meth:`tcpsvc.Server.create` has no surplus.

    Made by :meth:`of_streams` and :meth:`of_protocols`.
    """

    noisy = False
    _log = Logger(namespace="tcpsvc")

    def __init__(
        self,
        make_connection: Callable[..., Any],
        settings: Settings,
        *,
        reactor: Any = None,
        clock: Any = None,
        user_factory: Any = None,
        takes_sockets: bool = False,
    ) -> None:
        """Not to be called: use :meth:`of_streams` or :meth:`of_protocols`."""
        if reactor is None:
            from twisted.internet import reactor
        self.reactor = reactor
        self.clock = reactor if clock is None else clock
        self.settings = settings
        self.counters = Counters()
        self.is_dropping = settings.drop_incoming_connections
        self.is_closed = False
        #: Whether a server's pause lets nobody in for now (spec Z1).
        self.is_paused = False
        self._max_connections = settings.max_connections
        #: What was live when the limit was lowered may exceed it.
        self._allowed = settings.max_connections
        self._make_connection = make_connection
        self._user_factory = user_factory
        self.takes_sockets = takes_sockets
        #: Whether connections have TCP_NODELAY from their listening socket.
        self.inherits_nodelay = False
        self._sweeper = Sweeper(self.clock)
        #: Live connections, in the order of their accepts; each holds a slot.
        self._live: dict[int, Connection[Any]] = {}
        #: Accepted by a port that cannot be told to stop; none holds a slot.
        self._held: deque[Any] = deque()
        self._held_unconnected: dict[int, Any] = {}
        self._starts = Starts(reactor)
        self._failures = Failures(settings.on_handler_error, self._maybe_over)
        self._failures.on_fatal = self.close
        self._last_id = 0
        self._warned_at: float | None = None
        self._when_over = Event()
        self._has_server = False
        self._on_place: Callable[[], None] = _nothing
        self._on_descriptor_closed: Callable[[], None] = _nothing
        self._addresses: Callable[[], Sequence[object]] = tuple
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
        settings = check_options(StreamOptions, on_handler_error, dict(options))
        check_callable(handler)

        def make(factory: ServerFactory, id: int, peer: Any) -> Connection[Any]:
            return StreamConnection(factory, id, peer, handler)

        return cls(make, settings, **_times(options))

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
        :param options: of :class:`tcpsvc.Options`, as in :meth:`of_streams`.
        :raises ValueError: an option has a bad value.
        :raises TypeError: an option is unknown, or of the wrong kind.
        """
        settings = check_options(Options, on_handler_error, dict(options))
        if not callable(getattr(factory, "buildProtocol", None)):
            raise TypeError(f"factory={factory!r} has no buildProtocol")
        user_factory = factory

        def make(factory: ServerFactory, id: int, peer: Any) -> Connection[Any]:
            return ProtocolConnection(factory, id, peer, user_factory)

        made = cls(make, settings, user_factory=user_factory, **_times(options))
        if IProtocolNegotiationFactory.providedBy(user_factory):
            # TLS asks the factory that it wraps which protocols it speaks (ALPN).
            negotiating: Any = user_factory
            made.acceptableProtocols = negotiating.acceptableProtocols  # type: ignore[attr-defined]
            alsoProvides(made, IProtocolNegotiationFactory)
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
        settings = check_options(Options, on_handler_error, dict(options))
        check_callable(handler)

        def make(
            factory: ServerFactory, id: int, peer: Any, client: Any
        ) -> Connection[Any]:
            return SockConnection(factory, id, peer, client, handler)

        return cls(make, settings, takes_sockets=True, **_times(options))

    # Who is admitted.

    @property
    def num_connections(self) -> int:
        """How many slots are taken (spec A5)."""
        return len(self._live)

    @property
    def max_connections(self) -> int:
        """
        How many slots there are. It may be set at any time; a lowered limit
        closes nobody.
        """
        return self._max_connections

    @max_connections.setter
    def max_connections(self, limit: int) -> None:
        self._max_connections = at_least_one("max_connections", limit)
        self._allowed = max(limit, len(self._live))
        self._place_found()

    @property
    def is_reporting_errors(self) -> bool:
        """Whether a call of ``on_handler_error`` has not ended yet."""
        return self._failures.is_reporting

    @property
    def is_dropping_incoming_connections(self) -> bool:
        """Whether each incoming connection is closed at once (spec D1)."""
        return self.is_dropping

    def set_drop_incoming_connections(self, drop: bool) -> None:
        """
        Close each incoming connection at once, or stop doing so (spec D). May be
        called any number of times, also when closed.

        :param drop: whether to drop from now on.
        """
        self.is_dropping = bool(drop)
        if drop:
            self._refuse_held(self._count_dropped)
        self._on_place()

    def set_paused(self, paused: bool) -> None:
        """
        Let nobody in for now, not even to drop them, or go on. A port that cannot
        be gated accepts nevertheless: whom it accepts is held.
        """
        self.is_paused = paused
        self._place_found()

    def has_place(self) -> bool:
        """Whether the next client may be accepted. The rule of the gate."""
        return (
            not self.is_closed
            and not self.is_paused
            and (self.is_dropping or len(self._live) < self._max_connections)
        )

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """A client was accepted: the protocol that serves, holds or ends it."""
        if self.is_closed:
            self.counters.refused += 1
            return Refuser()
        if self.takes_sockets:
            self._log.error(
                "{peer} refused: only a tcpsvc.Server can serve a socket handler",
                peer=addr,
            )
            self.counters.refused += 1
            return Refuser()
        if self.is_dropping:
            self.counters.dropped += 1
            return Refuser()
        connection: Any = self._make_connection(self, self._next_id(), addr)
        if len(self._live) >= self._max_connections or self._held or self.is_paused:
            connection.hold()
            self._held_unconnected[connection.id] = connection
            return connection
        self._admit(connection)
        # The application's factory may refuse, and may close this server.
        if isinstance(connection, ProtocolConnection) and (
            not connection.build() or self.is_closed
        ):
            connection.forget()
            return Refuser()
        self.counters.accepted += 1
        return connection

    def take_socket(self, client: Any, address: Any) -> None:
        """A gate has accepted a plain socket."""
        connection = self._make_connection(self, self._next_id(), address, client)
        self.set_socket_options(client)
        self._admit(connection)
        self.counters.accepted += 1
        self._starts.add(connection)

    def connected(self, connection: Any) -> None:
        """A connection's transport is there."""
        held = self._held_unconnected.pop(connection.id, None) is not None
        if held and self.is_closed:
            self.counters.refused += 1
            connection.close_now()
        elif held:
            self._held.append(connection)
            self._place_found()
        elif self.is_closed:
            connection.refuse()
        else:
            self._starts.add(connection)

    def forget_unconnected(self) -> None:
        """
        Whoever was to connect the newest connection has failed to (a wrapping
        factory): release its slot.
        """
        connection: Any = self._live.get(self._last_id)
        if connection is not None and connection.transport is None:
            connection.forget()
        self._held_unconnected.pop(self._last_id, None)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _admit(self, connection: Connection[Any]) -> None:
        """Take a slot."""
        self._live[connection.id] = connection
        if len(self._live) >= self._max_connections:
            self._warn_at_limit()

    def _warn_at_limit(self) -> None:
        now = self.clock.seconds()
        if self._warned_at is None or now - self._warned_at >= WARNING_INTERVAL:
            self._warned_at = now
            self._log.warn(
                "{address}: all {limit} connections are in use; further clients wait",
                address=addresses_text(self._addresses()) or "a server",
                limit=self._max_connections,
            )

    def release(self, connection: Connection[Any], error: Failure | None) -> None:
        """
        Free the slot of a connection that is over; then report its handler's
        error, then let the next client in (spec H4).
        """
        del self._live[connection.id]
        self._allowed = max(self._max_connections, len(self._live))
        self._sweeper.forget(connection)  # type: ignore[arg-type]
        if error is not None:
            self.report(connection.peer, error)
        self._place_found()
        self._maybe_over()

    def _place_found(self) -> None:
        while (
            self._held
            and not self.is_closed
            and not self.is_paused
            and len(self._live) < self._max_connections
        ):
            connection = self._held.popleft()
            self._admit(connection)
            self.counters.accepted += 1
            self._starts.add(connection)
        self._on_place()

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
        stop = getattr(self.reactor, "stop", _nothing)
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
        self._refuse_held(self._count_refused)
        self._starts.refuse_all()
        self._maybe_over()

    def close_connections(self) -> Deferred[None]:
        """
        Close the sockets of all live connections at once (spec X3).

        :returns: a Deferred that fires when they are closed. It does not wait
            for handlers.
        """
        closed = []
        for connection in list(self._live.values()):
            closed.append(connection.when_socket_closed.wait())
            connection.close_existing()
        return all_of(closed)

    def cancel_handlers(self) -> None:
        """Cancel every handler that still runs."""
        for connection in list(self._live.values()):
            connection.cancel_handler()

    def when_over(self) -> Deferred[None]:
        """
        :returns: a Deferred that fires when :meth:`close` was called, no
            connection is live, and ``on_handler_error`` of the last has returned.
        """
        return self._when_over.wait()

    def _maybe_over(self) -> None:
        if self.is_closed and not self._live and not self._failures.is_reporting:
            self._when_over.happen()
            if not self._has_server:
                self.nothing_can_fail()

    def nothing_can_fail(self) -> None:
        """Everything has ended: :meth:`failed` fires, unless it has failed."""
        self._failures.over()

    def _refuse_held(self, count: Callable[[], None]) -> None:
        while self._held:
            count()
            self._held.popleft().close_now()

    def _count_dropped(self) -> None:
        self.counters.dropped += 1

    def _count_refused(self) -> None:
        self.counters.refused += 1

    # For the gate and the connections.

    def listen_with(
        self,
        on_place: Callable[[], None],
        on_descriptor_closed: Callable[[], None],
        on_failure: Callable[[], None],
        addresses: Callable[[], Sequence[object]],
    ) -> None:
        """A server tells what to call when a place is found, and so on."""
        self._has_server = True
        self._on_place = on_place
        self._on_descriptor_closed = on_descriptor_closed
        self._failures.on_fatal = on_failure
        self._addresses = addresses

    def set_socket_options(self, connected: Any) -> None:
        """What each connection's socket has (spec A7, A5)."""
        keepalive = self.settings.keepalive
        if keepalive or not self.inherits_nodelay:
            kernel.set_options(
                connected, nodelay=not self.inherits_nodelay, keepalive=keepalive
            )

    def listening_on(self) -> Any:
        """The listening address, where it is known and there is no other."""
        addresses = self._addresses()
        return addresses[0] if len(addresses) == 1 else None

    @property
    def is_listening_anywhere(self) -> bool:
        """Whether connections may have another own address than the listener's."""
        return getattr(self.listening_on(), "host", "") in ("", "0.0.0.0", "::")

    def descriptor_closed(self) -> None:
        """A connection's socket was closed."""
        self._on_descriptor_closed()

    def watch(self, connection: Any) -> float:
        """Sweep a connection. Returns the time."""
        return self._sweeper.watch(connection)

    # Twisted's hooks.

    def doStart(self) -> None:
        """A port listens: tell the application's own factory (spec P2)."""
        super().doStart()  # type: ignore[no-untyped-call]
        if self._user_factory is not None:
            self._user_factory.doStart()

    def doStop(self) -> None:
        """A port has closed: tell the application's own factory (spec P2)."""
        super().doStop()  # type: ignore[no-untyped-call]
        if self._user_factory is not None:
            self._user_factory.doStop()

    # Inspection (spec I).

    @property
    def connections(self) -> list[Connection[Any]]:
        """The live connections, in the order of their accepts."""
        return list(self._live.values())

    def describe(self) -> dict[str, Any]:
        """A JSON-able description of the state (spec I4)."""
        return {
            "num_connections": len(self._live),
            "max_connections": self._max_connections,
            "options": self._describe_options(),
            "is_closed": self.is_closed,
            "is_dropping_incoming_connections": self.is_dropping,
            "held": len(self._held),
            "connections": [c.describe() for c in self._live.values()],
            "counters": asdict(self.counters),
        }

    def _describe_options(self) -> dict[str, Any]:
        options = {
            f.name: getattr(self.settings, f.name) for f in fields(self.settings)
        }
        options["max_connections"] = self._max_connections
        policy = options["on_handler_error"]
        if not isinstance(policy, str):
            options["on_handler_error"] = getattr(policy, "__qualname__", repr(policy))
        return options

    def invariant(self) -> None:
        """
        :raises AssertionError: the state is broken; it says how (spec I1).
        """
        live = len(self._live)
        checks = {
            "max_connections >= 1": self._max_connections >= 1,
            "max_accepts_per_batch >= 1": self.settings.max_accepts_per_batch >= 1,
            "num_connections <= max_connections": live <= self._allowed,
            "each live connection is known once": len(
                {id(c) for c in self._live.values()}
            )
            == live,
            "live connections are not over": not any(
                c._is_released for c in self._live.values()
            ),
            "nothing live after the end": not (
                self._when_over.has_happened and (live or self._failures.is_reporting)
            ),
        }
        broken = [check for check, holds in checks.items() if not holds]
        if broken:
            raise AssertionError(f"broken: {', '.join(broken)}: {self.describe()}")

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {len(self._live)}/{self._max_connections} "
            f"connections{' closed' if self.is_closed else ''}>"
        )


def _nothing(*_: object) -> None:
    """What is called while nobody has asked to be."""


def _times(options: Any) -> dict[str, Any]:
    return {"reactor": options.get("reactor"), "clock": options.get("clock")}


def check_callable(handler: object) -> None:
    """
    :raises TypeError: a handler is not callable.
    """
    if not callable(handler):
        raise TypeError(f"handler={handler!r} is not callable")
