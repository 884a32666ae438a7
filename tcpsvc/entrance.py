"""
Who gets in: whether the next client may be accepted, whether it is sent away then, and
which of those who were accepted have to wait.

:class:`Entrance` is the half of :class:`tcpsvc.ServerFactory` that a client meets
first. :meth:`Entrance.has_place` is the rule of the gate, :meth:`Entrance.refusal_of`
what it asks about each client that it has accepted. On a port that cannot be gated
nobody asks before, so there whoever is beyond a limit that holds is accepted and waits
unread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet import protocol
from twisted.internet.interfaces import IAddress, IDelayedCall
from twisted.python.failure import Failure

from tcpsvc import kernel
from tcpsvc.address_text import addresses_text
from tcpsvc.admission import Admission, host_of
from tcpsvc.clock import clock_of
from tcpsvc.conditions import Conditions
from tcpsvc.connection import Connection
from tcpsvc.counters import Counters
from tcpsvc.error_log import ErrorLog
from tcpsvc.events import Broadcast, check_observer
from tcpsvc.eviction import RANKING_LASTS, Eviction
from tcpsvc.log import log
from tcpsvc.log_fields import of_client
from tcpsvc.options import Options
from tcpsvc.overflow import Refusal, Reply
from tcpsvc.protocol_connection import ProtocolConnection
from tcpsvc.reasons import LIMITS, Reason
from tcpsvc.refusal_log import RefusalLog
from tcpsvc.refuser import Aborter, Refuser
from tcpsvc.refusing import Replies
from tcpsvc.settings import Settings
from tcpsvc.slots import Slots
from tcpsvc.sock_connection import SockConnection
from tcpsvc.starts import Starts
from tcpsvc.stream_connection import StreamConnection
from tcpsvc.sweeper import Sweeper
from tcpsvc.timeouts import Timeouts

#: The options that a reason is the limit of.
_LIMITS_OF = {
    reason: {name for name, limit in LIMITS.items() if limit is reason}
    for reason in LIMITS.values()
}


class Entrance(protocol.ServerFactory):
    """Lets clients in, one by one, and out again."""

    noisy = False

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
        if reactor is None:
            from twisted.internet import reactor
        self.reactor = reactor
        self.clock = clock_of(reactor) if clock is None else clock
        self.settings = settings
        self._options = options
        self.counters = Counters()
        #: How errors are logged that clients can bring about.
        self.errors = ErrorLog(self.clock)
        #: Who is told what happens.
        self.events: Any = self.counters
        self._observers: list[Any] = []
        #: Whether anybody is told but the counters.
        self.is_observed = False
        if observer is not None:
            self.add_observer(observer)
        self.is_dropping = settings.drop_incoming_connections
        self.is_closed = False
        #: Whether handlers were told that the server drains.
        self.is_draining = False
        #: Whether a server's pause lets nobody in for now (spec Z1).
        self.is_paused = False
        #: Whoever was accepted after that one waits for the resume.
        self._last_before_pause = 0
        self.slots = Slots(settings.max_connections)
        self._admission = Admission(settings)
        self._eviction = Eviction(self.slots)
        self._replies = Replies(self)
        self._refusal_log = RefusalLog(self, self._names)
        self._timeouts = Timeouts(settings)
        self._conditions = Conditions()
        self._kind = kind
        #: What serves new connections: a function, or a protocol factory.
        self.handler = handler
        self.takes_sockets = kind is SockConnection
        self.takes_streams = kind is StreamConnection
        #: Whether connections have TCP_NODELAY from their listening socket.
        self.inherits_nodelay = False
        self._live: dict[int, Connection[Any]] = self.slots.live
        self.sweeper = Sweeper(self.clock, self._live, self._look_at_timeouts)
        #: Whether there is, or ever was, a limit that remembers connections.
        self._is_limited = False
        self._limit_as_set()
        #: What a dry run has told of live connections, once each.
        self._told: dict[int, set[Reason]] = {}
        #: Accepted clients are to be this few until then, for accept_rate.
        self._rate_wait: IDelayedCall | None = None
        #: Whether a gate has asked about the next client.
        self._is_judged = False
        #: What the next client is told instead of being served.
        self._reply: Reply | None = None
        #: Accepted by a port that cannot be told to stop; none holds a slot.
        self._held: deque[Any] = deque()
        self._held_unconnected: dict[int, Any] = {}
        #: Ids of those of them that came when accept_rate allowed none.
        self._too_early: set[int] = set()
        self._starts = Starts(reactor, self._started)
        self._last_id = 0
        self._on_place: Callable[[], None] = nothing
        self._addresses: Callable[[], Sequence[object]] = tuple

    def add_observer(self, observer: Any) -> None:
        """
        Tell one more what happens from now on.

        :raises ValueError: it is no :class:`tcpsvc.IObserver`.
        """
        check_observer(observer)
        self._observers.append(observer)
        self._observers_changed()

    def remove_observer(self, observer: Any) -> None:
        """
        Tell it no more.

        :raises ValueError: it was not added.
        """
        for place, known in enumerate(self._observers):
            if known is observer:
                del self._observers[place]
                self._observers_changed()
                return
        raise ValueError(f"observer={observer!r} was not added")

    def _observers_changed(self) -> None:
        self.is_observed = bool(self._observers)
        self.events = (
            Broadcast(self.counters, self._observers, self.errors, self.stop_reactor)
            if self.is_observed
            else self.counters
        )

    def stop_reactor(self, error: BaseException) -> None:
        """Somebody has raised ``SystemExit`` or ``KeyboardInterrupt``."""
        raise NotImplementedError  # pragma: no cover

    def _maybe_over(self) -> None:
        """A connection is over, or nobody is let in any more."""
        raise NotImplementedError  # pragma: no cover

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits to be accepted, as far as that is known."""
        raise NotImplementedError  # pragma: no cover

    def report(self, peer: Any, error: Failure) -> None:
        """A handler has failed."""
        raise NotImplementedError  # pragma: no cover

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

    @property
    def num_connections(self) -> int:
        """How many slots are taken (spec A5)."""
        return self.slots.taken

    def set_paused(self, paused: bool) -> None:
        """
        Let nobody in for now, not even to drop them, or go on. A port that cannot
        be gated accepts nevertheless: whom it accepts is held. Who was accepted
        before gets the next slot.
        """
        if paused and not self.is_paused:
            # One that is being judged was accepted too: it may be for its sake that a
            # handler was evicted that pauses.
            self._last_before_pause = self._last_id + self._is_judged
        self.is_paused = paused
        if not paused and self.settings.overflow == "evict" and self._held:
            self._make_room(0)
        self._place_found()

    def has_place(self) -> bool:
        """Whether the next client may be accepted. The rule of the gate."""
        if self.is_closed or self.is_paused:
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
        self._is_judged = True
        if self.is_dropping:
            return Reason.DROPPED, "drop"
        if self._admission.asks:
            reason = self._admission.refusal(host, self.clock.seconds())
            if self._admission.tried_out:
                self._tell_what_was_tried_out(address_of(address))
            if reason is not None:
                return reason, self.settings.refusal
        if not self.slots.is_full:
            return None
        overflow = self.settings.overflow
        if "max_connections" in self.settings.dry_run:
            self._refusal_log.in_dry_run(address_of(address), Reason.OVERFLOW)
        elif overflow == "evict":
            # One that has to wait for its time, or for a resume, evicts nobody yet.
            if not (self._rate_wait or self._too_early or self.is_paused):
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
            self._refusal_log.evicted()
            victim.end(Reason.EVICTED)

    def refused(self, address: Any, reason: Reason) -> None:
        """A client was sent away."""
        self._is_judged = False
        self._refusal_log.refused(address, reason)

    def may_say(self, of: Reason | str) -> bool:
        """Whether the log had no line of that for a while."""
        return self._refusal_log.may_say(of)

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
            if self.may_say("no sockets"):
                log.error(
                    "{client} refused, as all are: only a tcpsvc.Server can serve a "
                    "socket handler; use Server.create_sock",
                    **of_client(addr),
                )
            self.events.connection_refused(addr, Reason.UNSERVED)
            return Refuser()
        if not self._is_judged:
            refusal = self.refusal_of(host_of(addr), addr, _itself)
            if refusal is not None:
                return self._sent_away(addr, *refusal)
        self._is_judged = False
        self._last_id += 1
        connection: Any = self._kind(self, self._last_id, addr, self.handler)
        if self._has_to_wait(connection):
            connection.hold()
            self._held_unconnected[connection.id] = connection
            return connection
        self._admit(connection)
        # The application's factory may refuse. It may close this server, as whoever is
        # told of the last slot may.
        if self.is_closed or (
            isinstance(connection, ProtocolConnection)
            and (not connection.build() or self.is_closed)
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
        elif self._admission.has_rate:
            self._take_token(connection)
        if self._admission.counts_peers:
            now = self.clock.seconds()
            self._admission.enter(connection, host_of(connection.peer), now)
        return (
            is_early
            or bool(self._held)
            or (self.slots.is_full and self._is_full)
            or self.is_paused
        )

    def _take_token(self, connection: Connection[Any]) -> None:
        wait = self._admission.take_token(self.clock.seconds())
        if self._admission.tried_out:
            self._tell_what_was_tried_out(connection.peer)
        if wait > 0:
            self._wait_for_rate(wait)

    def _tell_what_was_tried_out(self, client: Any) -> None:
        reasons = self._admission.tried_out[:]
        self._admission.tried_out.clear()
        for reason in reasons:
            self._refusal_log.in_dry_run(client, reason)

    def take_socket(self, client: Any, address: Any) -> None:
        """A gate has accepted a plain socket."""
        self._is_judged = False
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
        self._add(connection)

    def set_socket_options(self, connected: Any) -> None:
        """What each connection's socket has (spec A7, A5)."""
        keepalive = self.settings.keepalive
        if keepalive or not self.inherits_nodelay:
            kernel.set_options(
                connected, nodelay=not self.inherits_nodelay, keepalive=keepalive
            )

    def _add(self, connection: Any) -> None:
        """It has a slot: start it, unless whoever waited for that has closed this."""
        if self.is_closed:
            connection.refuse()
            return
        self._accepted(connection)
        self._start_soon(connection)

    def _start_soon(self, connection: Any) -> None:
        if self.is_closed:
            connection.refuse()  # An observer has closed the server.
        else:
            self._starts.add(connection)

    def _started(self) -> None:
        """Those that were to start in this turn have: they may be evicted."""
        if self.settings.overflow == "evict":
            self._on_place()

    def connected(self, connection: Any) -> None:
        """A connection's transport is there."""
        if self._held_unconnected.pop(connection.id, None) is None:
            self._start_soon(connection)
        elif self.is_closed:
            self._dismiss(connection, Reason.UNSERVED)
        else:
            self._held.append(connection)
            self._place_found()

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
        self._reply = None
        self._is_judged = False

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _admit(self, connection: Connection[Any]) -> None:
        """Take a slot."""
        slots = self.slots
        may_exceed = "max_connections" in self.settings.dry_run
        slots.take(connection, may_exceed=may_exceed)
        if self.sweeper.sweeps_all:
            self.sweeper.began()
        if slots.is_full and not may_exceed:
            self._refusal_log.all_slots_taken()
        if self._conditions.waiting:
            self._conditions.look(slots)

    def _accepted(self, connection: Connection[Any]) -> None:
        connection.is_accepted = True
        self.events.connection_accepted(connection)

    def _rate_as_set(self) -> None:
        """There is another accept_rate."""
        self._wait_for_rate(self._admission.wait(self.clock.seconds()))

    def _wait_for_rate(self, wait: float) -> None:
        """Have the next client wait for so many seconds, for accept_rate."""
        was_waiting = self._rate_wait is not None
        self._stop_waiting_for_rate()
        if wait > 0 and not self.is_closed:
            self._rate_wait = self.clock.callLater(wait, self._rate_allows)
            if not was_waiting:
                self.events.limit_reached("accept_rate")

    def _rate_allows(self) -> None:
        self._rate_wait = None
        # Whoever waits now could have come in but for the rate.
        if (
            not self.is_dropping
            and self.has_place()
            and (self._too_early or self.is_awaited)
        ):
            self._refusal_log.waits_for_rate()
        self._place_found()

    def _stop_waiting_for_rate(self) -> None:
        if self._rate_wait is not None:
            self._rate_wait.cancel()
            self._rate_wait = None

    def uncount(self, connection: Connection[Any]) -> None:
        """It holds no slot any more: the next client may come in."""
        self.slots.uncount(connection)
        self._eviction.forget(connection)
        if self._conditions.waiting:
            self._conditions.look(self.slots)
        self._place_found()

    def holds_slot(self, connection: Connection[Any]) -> bool:
        """Whether it does."""
        return self.slots.holds(connection)

    def release(self, connection: Connection[Any], error: Failure | None) -> None:
        """
        Free the slot of a connection that is over; then report its handler's
        error, then let the next client in (spec H4).
        """
        slots = self.slots
        was_full = slots.is_full
        slots.free(connection)
        if self.sweeper.timer is not None:
            self.sweeper.forget(connection)
        if self._is_limited:
            if self._admission.counts_peers:
                self._admission.leave(connection)
            if self._eviction.evicted:
                self._eviction.forget(connection)
            if self._timeouts.windows:
                self._timeouts.forget(connection)
            self._told.pop(connection.id, None)
        if error is not None:
            self.report(connection.peer, error)
        if self._conditions.waiting:
            self._conditions.look(slots)
        if was_full or self._held:
            self._place_found()
        if self.is_closed:
            self._maybe_over()

    def _place_found(self) -> None:
        while self._held and not self.is_closed:
            connection = self._held[0]
            if self.is_paused and connection.id > self._last_before_pause:
                break
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
                connection.admitted()
                self._admit(connection)
                self._add(connection)
        self._on_place()

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
        return self._timeouts.looks

    def _limit_as_set(self) -> None:
        interval = self._timeouts.interval
        if interval is None and self.settings.overflow == "evict":
            interval = RANKING_LASTS
        self.sweeper.sweep_all(interval)
        if interval is not None or self._admission.counts_peers:
            self._is_limited = True

    def _look_at_timeouts(self, connection: Any, now: float) -> None:
        if not connection.is_running or connection.is_ended:
            return
        for reason in self._timeouts.overdue(connection, now):
            if not self.lets_pass(connection, reason):
                connection.end(reason)
                return
            if connection.is_ended or connection.is_over:
                return  # Whoever was told of the dry run has ended it.

    def lets_pass(self, connection: Any, reason: Reason) -> bool:
        """Whether what ends a connection is in a dry run. Then that is told, once."""
        if self.settings.dry_run.isdisjoint(_LIMITS_OF[reason]):
            return False
        told = self._told.setdefault(connection.id, set())
        if reason not in told:
            told.add(reason)
            self._is_limited = True
            self._refusal_log.in_dry_run(connection.peer, reason)
        return True

    def broken_entrance(self) -> list[str]:
        """What does not hold, and ought to."""
        held = {*self._held_unconnected, *(c.id for c in self._held)}
        broken = self._eviction.broken()
        self._admission.invariant(held.union(self._live))
        if not self._too_early <= held:
            broken.append("whoever waits for the rate is held")
        live, counters = self._live, self.counters
        checks = {
            "no timer when it is closed": not self.is_closed or self._rate_wait is None,
            "a timer only for accept_rate": self._rate_wait is None
            or (
                self.settings.accept_rate is not None
                and "accept_rate" not in self.settings.dry_run
            ),
            "who is held is not live": held.isdisjoint(live),
            "who was accepted is live or has ended": counters.accepted
            == sum(c.is_accepted and not c.is_over for c in live.values())
            + sum(counters.ends.values()),
            "whose handler has ended knows why": not any(
                c.reason is None and not (c.may_start or c.is_running)
                for c in live.values()
            ),
            "only live connections are remembered": self._told.keys() <= live.keys()
            and self._timeouts.windows.keys() <= live.keys(),
        }
        broken += [check for check, holds in checks.items() if not holds]
        return [*broken, *self.sweeper.broken(), *self._replies.broken()]

    def _names(self) -> str:
        return addresses_text(self._addresses()) or "a server"


def _itself(address: Any) -> Any:
    """For an address that is made already."""
    return address


def nothing(*_: object) -> None:
    """What is called while nobody has asked to be."""
