"""
The factory: which connections are live, who is admitted, who is dropped.

:class:`ServerFactory` is what a :class:`tcpsvc.Server` listens with. It is
public, so that an application that has an endpoint already can listen with it.

Who is admitted, in one place: :meth:`ServerFactory.has_place` says whether the next
client may be accepted, :meth:`ServerFactory.refusal_of` whether it is sent away then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from twisted.internet import protocol
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProtocolFactory,
    IProtocolNegotiationFactory,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import alsoProvides

from tcpsvc import kernel
from tcpsvc._waiters import Event, all_of
from tcpsvc.admission import Admission, host_of
from tcpsvc.conditions import Conditions
from tcpsvc.connection import Connection
from tcpsvc.counters import Counters
from tcpsvc.events import Broadcast, check_observer
from tcpsvc.eviction import RANKING_LASTS, Eviction
from tcpsvc.failures import Failures
from tcpsvc.handler import OnHandlerError
from tcpsvc.networks import Networks
from tcpsvc.options import (
    Options,
    Settings,
    StreamOptions,
    at_least_one,
    change_options,
    check_options,
)
from tcpsvc.overflow import Refusal, Reply
from tcpsvc.protocol_connection import Aborter, ProtocolConnection, Refuser
from tcpsvc.rate import Rate
from tcpsvc.reasons import LIMITS, Reason
from tcpsvc.refusing import Replies
from tcpsvc.slots import Slots
from tcpsvc.sock_connection import SockConnection
from tcpsvc.starts import Starts
from tcpsvc.stream_connection import StreamConnection
from tcpsvc.sweeper import Sweeper
from tcpsvc.timeouts import Timeouts
from tcpsvc.where import address_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: At the limit there is one warning in so many seconds (spec A3).
WARNING_INTERVAL = 60.0

#: The options that a reason is the limit of.
_LIMITS_OF = {
    reason: {name for name, limit in LIMITS.items() if limit is reason}
    for reason in LIMITS.values()
}


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
        if reactor is None:
            from twisted.internet import reactor
        self.reactor = reactor
        self.clock = reactor if clock is None else clock
        self.settings = settings
        self._options = options
        self.counters = Counters()
        #: Who is told what happens.
        self.events: Any = self.counters
        self._observers: list[Any] = []
        if observer is not None:
            self.add_observer(observer)
        self.is_dropping = settings.drop_incoming_connections
        self.is_closed = False
        self.slots = Slots(settings.max_connections)
        self._admission = Admission(settings)
        self._eviction = Eviction(self.slots)
        self._replies = Replies(self)
        self._timeouts = Timeouts(settings)
        self._conditions = Conditions()
        self._kind = kind
        #: What serves new connections: a function, or a protocol factory.
        self.handler = handler
        self.takes_sockets = kind is SockConnection
        #: Whether connections have TCP_NODELAY from their listening socket.
        self.inherits_nodelay = False
        self._live: dict[int, Connection[Any]] = self.slots.live
        self._sweeper = Sweeper(self.clock, self._live, self._look_at_timeouts)
        self._sweep_as_needed()
        #: What a dry run has told of live connections, once each.
        self._told: dict[int, set[Reason]] = {}
        #: Accepted clients are to be this few until then, for accept_rate.
        self._rate_wait: IDelayedCall | None = None
        #: Whether a gate asks before it accepts.
        self.is_gated = False
        #: What the next client is told instead of being served.
        self._reply: Reply | None = None
        #: Accepted by a port that cannot be told to stop; none holds a slot.
        self._held: deque[Any] = deque()
        self._held_unconnected: dict[int, Any] = {}
        #: Ids of those of them that came when accept_rate allowed none.
        self._too_early: set[int] = set()
        self._starts = Starts(reactor, self._started)
        self._failures = Failures(settings.on_handler_error, self._maybe_over)
        self._failures.on_fatal = self.close
        self._last_id = 0
        #: When it was last said that clients are refused, by the reason.
        self._warned_at: dict[Reason | str, float] = {}
        self._when_over = Event()
        self._has_server = False
        self._on_place: Callable[[], None] = _nothing
        self._on_descriptor_closed: Callable[[], None] = _nothing
        self._listening_on: Callable[[], object] = _nothing
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
        return cls(
            StreamConnection,
            handler,
            settings,
            options=StreamOptions,
            **_not_settings(options),
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
        :param options: of :class:`tcpsvc.Options`, as in :meth:`of_streams`.
        :raises ValueError: an option has a bad value.
        :raises TypeError: an option is unknown, or of the wrong kind.
        """
        settings = check_options(Options, on_handler_error, dict(options))
        check_protocol_factory(factory)
        made = cls(ProtocolConnection, factory, settings, **_not_settings(options))
        if IProtocolNegotiationFactory.providedBy(factory):
            # TLS asks the factory that it wraps which protocols it speaks (ALPN).
            negotiating: Any = factory
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
        return cls(SockConnection, handler, settings, **_not_settings(options))

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

    def change(self, changes: dict[str, Any]) -> None:
        """
        Other options from now on, all or, if one is wrong, none.

        :raises ValueError: an option has a bad value.
        :raises TypeError: an option is unknown, or cannot be changed.
        """
        before = self.settings
        settings = change_options(self._options, before, changes)
        self.settings = settings
        self._failures.policy = settings.on_handler_error
        self.slots.limit = settings.max_connections
        present = [*self._live.values(), *self._held, *self._held_unconnected.values()]
        self._admission.change(settings, present, self.clock.seconds())
        self._timeouts.change(settings)
        self._sweep_as_needed()
        if settings.accept_rate != before.accept_rate or "accept_rate" in (
            settings.dry_run ^ before.dry_run
        ):
            self._wait_for_rate()
        self._place_found()

    def set_handler(self, handler: Any) -> None:
        """
        Serve new connections with another handler of the same kind. Those that are
        live, or accepted and not started, keep theirs.

        :param handler: a function, or a protocol factory where it was one.
        :raises TypeError: it is not of that kind.
        """
        if self._kind is not ProtocolConnection:
            check_callable(handler)
        else:
            check_protocol_factory(handler)
            # Twisted tells a factory how many ports it has.
            for _ in range(self.numPorts):
                handler.doStart()
            for _ in range(self.numPorts):
                self.handler.doStop()
        self.handler = handler

    def when_connections(self, condition: Callable[[int], object]) -> Deferred[None]:
        """
        :param condition: called with the number of taken slots, now and at each change.
        :returns: a Deferred of one's own that fires when it has returned something
            true, and fails with what it raises.
        """
        return self._conditions.wait(condition, self.num_connections)

    def add_observer(self, observer: Any) -> None:
        """
        Tell one more what happens from now on.

        :raises ValueError: it is no :class:`tcpsvc.IObserver`.
        """
        check_observer(observer)
        self._observers.append(observer)
        self.events = Broadcast([self.counters, *self._observers])

    def remove_observer(self, observer: Any) -> None:
        """
        Tell it no more.

        :raises ValueError: it was not added.
        """
        self._observers.remove(observer)
        self.events = (
            Broadcast([self.counters, *self._observers])
            if self._observers
            else self.counters
        )

    @property
    def is_observed(self) -> bool:
        """Whether anybody is told but the counters."""
        return bool(self._observers)

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
            self._refuse_held(Reason.DROPPED)
        self._on_place()

    def has_place(self) -> bool:
        """Whether the next client may be accepted. The rule of the gate."""
        if self.is_closed:
            return False
        if self.is_dropping:
            return True
        if self._rate_wait is not None:
            return False
        return not self.slots.is_full or self._accepts_beyond()

    def _accepts_beyond(self) -> bool:
        """Whether clients are accepted although no slot is free."""
        overflow = self.settings.overflow
        if "max_connections" in self.settings.dry_run:
            return True
        if overflow == "evict":
            under_way = self._eviction.under_way
            # Nobody is evicted before its start, if that can be helped.
            started = self.slots.taken - len(self._starts)
            return started > under_way or under_way > self._waiting_for_slots
        return overflow != "hold"

    @property
    def _is_full(self) -> bool:
        """Whether whoever is accepted has to wait for a slot."""
        return self.slots.is_full and "max_connections" not in self.settings.dry_run

    @property
    def _waiting_for_slots(self) -> int:
        """How many that were accepted wait for nothing but a slot."""
        held = len(self._held) + len(self._held_unconnected)
        return held - len(self._too_early)

    def refusal_of(
        self, host: str | None, address: Any, address_of: Callable[[Any], Any]
    ) -> tuple[Reason, Refusal] | None:
        """
        Whether an accepted client is to be sent away, why and how.

        :param host: its IP address; ``None`` for a UNIX client.
        :param address: its address, or what makes it:
        :param address_of: called with that when somebody is to be told of it.
        """
        if self.is_dropping:
            return Reason.DROPPED, "drop"
        if self._admission.asks:
            reason = self._admission.refusal(
                host,
                self.clock.seconds(),
                lambda reason: self._in_dry_run(address_of(address), reason),
            )
            if reason is not None:
                return reason, self.settings.refusal
        if not self.slots.is_full:
            return None
        overflow = self.settings.overflow
        if "max_connections" in self.settings.dry_run:
            self._in_dry_run(address_of(address), Reason.OVERFLOW)
        elif overflow == "evict":
            # One that has come too early evicts nobody before its time.
            if self._rate_wait is None and not self._too_early:
                self._make_room(1)
        elif overflow != "hold":
            return Reason.OVERFLOW, overflow
        return None

    def _make_room(self, newcomers: int) -> None:
        """Evict as many as newcomers, and those who wait, need to get slots."""
        slots = self.slots
        wanted = self._waiting_for_slots + newcomers
        now = self.clock.seconds()
        for _ in range(wanted - slots.limit + slots.taken - self._eviction.under_way):
            victim = self._eviction.choose(now)
            if victim is None:
                return
            victim.end(Reason.EVICTED)

    def refused(self, address: Any, reason: Reason) -> None:
        """A client was sent away."""
        self.events.connection_refused(address, reason)
        if reason not in (Reason.DROPPED, Reason.UNSERVED) and self._may_warn(reason):
            self._log.warn(
                "{address}: refusing clients: {reason}, {count} so far",
                address=address_text(self._listening_on() or "a server"),
                reason=reason.value,
                count=self.counters.refusals[reason.value],
            )

    def _in_dry_run(self, address: Any, reason: Reason) -> None:
        """A limit would have refused, or ended, what it lets pass."""
        self.events.refused_in_dry_run(address, reason)
        if self._may_warn(f"dry run {reason.value}"):
            self._log.warn(
                "{address}: dry run: {client} would have been refused or ended: "
                "{reason}, {count} so far",
                address=address_text(self._listening_on() or "a server"),
                client=address,
                reason=reason.value,
                count=self.counters.would_refuse[reason.value],
            )

    def _may_warn(self, of: Reason | str) -> bool:
        """Whether that was not said for a while (spec A3)."""
        now = self.clock.seconds()
        warned_at = self._warned_at.get(of)
        if warned_at is not None and now - warned_at < WARNING_INTERVAL:
            return False
        self._warned_at[of] = now
        return True

    def say_instead(self, reply: Reply) -> bool:
        """
        The next client is told this, and not served.

        :returns: whether that can be done.
        """
        if not self._replies.may_reply:
            return False
        self._reply = reply
        return True

    def nothing_to_say(self) -> None:
        """Whoever was to be told something has been, or never will be."""
        self._reply = None

    @property
    def replies_next(self) -> bool:
        """Whether the next client is told something, and not served."""
        return self._reply is not None

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """A client was accepted: the protocol that serves, holds or ends it."""
        if self._reply is not None:
            reply, self._reply = self._reply, None
            return self._replies.reply(addr, self._next_id(), reply)
        if self.is_closed:
            self.events.connection_refused(addr, Reason.UNSERVED)
            return Refuser()
        if self.takes_sockets:
            self._log.error(
                "{peer} refused: only a tcpsvc.Server can serve a socket handler",
                peer=addr,
            )
            self.events.connection_refused(addr, Reason.UNSERVED)
            return Refuser()
        if not self.is_gated:
            refusal = self.refusal_of(host_of(addr), addr, _itself)
            if refusal is not None:
                return self._sent_away(addr, *refusal)
        connection: Any = self._kind(self, self._next_id(), addr, self.handler)
        if self._has_to_wait(connection):
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
        self._accepted(connection)
        return connection

    def _sent_away(self, address: Any, reason: Reason, how: Refusal) -> Any:
        """What ends a client of a port that cannot be gated."""
        self.refused(address, reason)
        if isinstance(how, Reply) and self._replies.may_reply:
            return self._replies.reply(address, self._next_id(), how)
        return Refuser() if how == "drop" else Aborter()

    def _has_to_wait(self, connection: Connection[Any]) -> bool:
        """
        A client is to be served; it counts for its peer from now on.

        :returns: whether it is to wait, for a slot or for its time.
        """
        is_early = self._rate_wait is not None or bool(self._too_early)
        if is_early:
            self._too_early.add(connection.id)
        else:
            self._take_token(connection)
        if self._admission.counts_peers:
            now = self.clock.seconds()
            self._admission.enter(connection, host_of(connection.peer), now)
        return is_early or bool(self._held) or self._is_full

    def _take_token(self, connection: Connection[Any]) -> None:
        if self.settings.accept_rate is None:
            return
        now = self.clock.seconds()
        self._admission.take_token(
            now, lambda: self._in_dry_run(connection.peer, Reason.ACCEPT_RATE)
        )
        self._wait_for_rate(now)

    def take_socket(self, client: Any, address: Any) -> None:
        """A gate has accepted a plain socket."""
        if self.is_closed:
            # By the handler of an evicted connection, say.
            kernel.close_orderly(client)
            self.events.connection_refused(address, Reason.UNSERVED)
            return
        connection: Any = self._kind(
            self, self._next_id(), address, self.handler, client
        )
        self.set_socket_options(client)
        if self._has_to_wait(connection):
            connection.hold()
            self._held_unconnected[connection.id] = connection
            self.connected(connection)
            return
        self._admit(connection)
        self._accepted(connection)
        self._start_soon(connection)

    def _start_soon(self, connection: Any) -> None:
        """Start a connection, unless an observer has closed the server."""
        if self.is_closed:
            connection.refuse()
        else:
            self._starts.add(connection)

    def _started(self) -> None:
        """Those that were to start in this turn have: they may be evicted."""
        if self.settings.overflow == "evict":
            self._on_place()

    def connected(self, connection: Any) -> None:
        """A connection's transport is there."""
        held = self._held_unconnected.pop(connection.id, None) is not None
        if held and self.is_closed:
            self._dismiss(connection, Reason.UNSERVED)
        elif held:
            self._held.append(connection)
            self._place_found()
        else:
            self._start_soon(connection)

    def forget_unconnected(self) -> None:
        """
        Whoever was to connect the newest connection has failed to (a wrapping
        factory): release its slot.
        """
        newest = self._last_id
        connection: Any = self._live.get(newest)
        if connection is not None and getattr(connection, "transport", 0) is None:
            connection.forget()
        connection = self._held_unconnected.pop(newest, None)
        if connection is not None:
            self._waits_no_more(connection)
            self.events.connection_refused(connection.peer, Reason.UNSERVED)
        self._replies.forget_unconnected(newest)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _admit(self, connection: Connection[Any]) -> None:
        """Take a slot."""
        may_exceed = "max_connections" in self.settings.dry_run
        self.slots.take(connection, may_exceed=may_exceed)
        self._sweeper.began()
        if self.slots.is_full:
            self._reached_limit()
        self._conditions.look(self.num_connections)

    def _accepted(self, connection: Connection[Any]) -> None:
        connection.is_accepted = True
        self.events.connection_accepted(connection)

    def _reached_limit(self) -> None:
        self.events.limit_reached("max_connections")
        if self.settings.overflow == "hold" and self._may_warn("max_connections"):
            self._log.warn(
                "{address}: all {limit} connections are in use; further clients wait",
                address=address_text(self._listening_on() or "a server"),
                limit=self.max_connections,
            )

    def _wait_for_rate(self, now: float | None = None) -> None:
        """Have the next client wait until accept_rate allows one."""
        self._stop_waiting_for_rate()
        wait = self._admission.wait(self.clock.seconds() if now is None else now)
        if wait > 0 and not self.is_closed:
            self._rate_wait = self.clock.callLater(wait, self._rate_allows)

    def _rate_allows(self) -> None:
        self._rate_wait = None
        self._place_found()

    def _stop_waiting_for_rate(self) -> None:
        if self._rate_wait is not None:
            self._rate_wait.cancel()
            self._rate_wait = None

    def uncount(self, connection: Connection[Any]) -> None:
        """It holds no slot any more: the next client may come in."""
        self.slots.uncount(connection)
        self._eviction.forget(connection)
        self._conditions.look(self.num_connections)
        self._place_found()

    def holds_slot(self, connection: Connection[Any]) -> bool:
        """Whether it does."""
        return self.slots.holds(connection)

    def over(self, connection: Connection[Any]) -> None:
        """It is over, and still has what it had."""
        if connection.is_accepted:
            self.events.connection_finished(connection)

    def release(self, connection: Connection[Any], error: Failure | None) -> None:
        """
        Free the slot of a connection that is over; then report its handler's
        error, then let the next client in (spec H4).
        """
        self.slots.free(connection)
        self._admission.leave(connection)
        self._eviction.forget(connection)
        self._timeouts.forget(connection)
        self._told.pop(connection.id, None)
        self._sweeper.forget(connection)
        if error is not None:
            self.report(connection.peer, error)
        self._conditions.look(self.num_connections)
        self._place_found()
        self._maybe_over()

    def _place_found(self) -> None:
        while self._held and not self.is_closed:
            connection = self._held[0]
            if connection.id in self._too_early:
                if self._rate_wait is not None:
                    break
                self._too_early.discard(connection.id)
                self._take_token(connection)
                if self._is_full and self.settings.overflow == "evict":
                    self._make_room(0)
                # Whoever was told of that may have done anything: look again.
            elif self._is_full:
                break
            else:
                self._held.popleft()
                self._admit(connection)
                self._accepted(connection)
                self._start_soon(connection)
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
        closed = []
        for connection in list(self._live.values()):
            closed.append(connection.when_socket_closed.wait())
            connection.close()
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

    def _refuse_held(self, reason: Reason) -> None:
        while self._held:
            self._dismiss(self._held.popleft(), reason)

    def _dismiss(self, connection: Any, reason: Reason) -> None:
        self._waits_no_more(connection)
        self.events.connection_refused(connection.peer, reason)
        connection.close_now()

    def _waits_no_more(self, connection: Any) -> None:
        """A connection that never had a slot counts for nobody any more."""
        self._too_early.discard(connection.id)
        self._admission.leave(connection)

    # Timeouts.

    @property
    def looks(self) -> bool:
        """Whether all that are live are looked at about once a second."""
        return self._sweeper.sweeps_all

    def _sweep_as_needed(self) -> None:
        timeout = self._timeouts.shortest
        if timeout is None and self.settings.overflow == "evict":
            timeout = RANKING_LASTS * 4
        self._sweeper.sweep_all(timeout)

    def _look_at_timeouts(self, connection: Any, now: float) -> None:
        if not connection.is_running:
            return
        reason = self._timeouts.overdue(connection, now)
        if reason is None:
            return
        if not self.settings.dry_run.isdisjoint(_LIMITS_OF[reason]):
            told = self._told.setdefault(connection.id, set())
            if reason not in told:
                told.add(reason)
                self._in_dry_run(connection.peer, reason)
            return
        connection.end(reason)

    # For the gate and the connections.

    def listen_with(
        self,
        on_place: Callable[[], None],
        on_descriptor_closed: Callable[[], None],
        on_failure: Callable[[], None],
        listening_on: Callable[[], object],
    ) -> None:
        """A server tells what to call when a place is found, and so on."""
        self._has_server = True
        self._on_place = on_place
        self._on_descriptor_closed = on_descriptor_closed
        self._failures.on_fatal = on_failure
        self._listening_on = listening_on

    def set_socket_options(self, connected: Any) -> None:
        """What each connection's socket has (spec A7, A5)."""
        keepalive = self.settings.keepalive
        if keepalive or not self.inherits_nodelay:
            kernel.set_options(
                connected, nodelay=not self.inherits_nodelay, keepalive=keepalive
            )

    def listening_on(self) -> Any:
        """The listening address, if it is known."""
        return self._listening_on()

    @property
    def is_listening_anywhere(self) -> bool:
        """Whether connections may have another own address than the listener's."""
        return getattr(self._listening_on(), "host", "") in ("", "0.0.0.0", "::")

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
            "options": self._describe_options(),
            "is_closed": self.is_closed,
            "is_dropping_incoming_connections": self.is_dropping,
            "held": len(self._held),
            "peers": self._admission.describe(),
            "connections": [c.describe() for c in self._live.values()],
            "counters": asdict(self.counters),
        }

    def _describe_options(self) -> dict[str, Any]:
        options = {
            f.name: getattr(self.settings, f.name) for f in fields(self.settings)
        }
        for name, value in options.items():
            options[name] = _as_json(value)
        policy = options["on_handler_error"]
        if not isinstance(policy, str):
            options["on_handler_error"] = getattr(policy, "__qualname__", repr(policy))
        return options

    def invariant(self) -> None:
        """
        :raises AssertionError: the state is broken; it says how (spec I1).
        """
        held = {*self._held_unconnected, *(c.id for c in self._held)}
        broken = self.slots.broken()
        broken += self._eviction.broken()
        self._admission.invariant(held.union(self._live))
        if not self._too_early <= held:
            broken.append("whoever waits for the rate is held")
        if self.is_closed and self._rate_wait is not None:
            broken.append("no timer when it is closed")
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


def _itself(address: Any) -> Any:
    """For an address that is made already."""
    return address


def _nothing(*_: object) -> None:
    """What is called while nobody has asked to be."""


def _not_settings(options: Any) -> dict[str, Any]:
    return {name: options.get(name) for name in ("reactor", "clock", "observer")}


def _as_json(value: Any) -> Any:
    if isinstance(value, Networks):
        return [str(network) for network in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, (Rate, Reply)):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def check_protocol_factory(factory: object) -> None:
    """
    :raises TypeError: it builds no protocols.
    """
    if not callable(getattr(factory, "buildProtocol", None)):
        raise TypeError(f"factory={factory!r} has no buildProtocol")


def check_callable(handler: object) -> None:
    """
    :raises TypeError: a handler is not callable.
    """
    if not callable(handler):
        raise TypeError(f"handler={handler!r} is not callable")
