"""
Building connections, starting their handlers, and freeing their slots: what ports and
connections call.

Who gets in, and who has to wait, is :mod:`tcpsvc.entrance`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import protocol
from twisted.internet.interfaces import IAddress
from twisted.python.failure import Failure

from tcpsvc import kernel
from tcpsvc.admission import host_of
from tcpsvc.clock import clock_of
from tcpsvc.conditions import Conditions
from tcpsvc.connection import Connection
from tcpsvc.counters import Counters
from tcpsvc.dry_run import DryRun
from tcpsvc.ending import Ending
from tcpsvc.entrance import Entrance
from tcpsvc.error_log import ErrorLog
from tcpsvc.exhaustion import Exhaustion
from tcpsvc.failures import Failures
from tcpsvc.log import log
from tcpsvc.log_fields import of_client
from tcpsvc.overflow import Refusal, Reply
from tcpsvc.protocol_connection import ProtocolConnection
from tcpsvc.reasons import Reason
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
from tcpsvc.whereabouts import Whereabouts


class ConnectionFactory(protocol.ServerFactory):
    """Has connections from their accepts to the ends of their handlers and sockets."""

    noisy = False

    def __init__(
        self,
        kind: Callable[..., Any],
        handler: Any,
        settings: Settings,
        *,
        reactor: Any = None,
        clock: Any = None,
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor
        self.reactor = reactor
        self.clock = clock_of(reactor) if clock is None else clock
        self.settings = settings
        self._kind = kind
        #: What serves new connections: a function, or a protocol factory.
        self.handler = handler
        self.takes_sockets = kind is SockConnection
        self.takes_streams = kind is StreamConnection
        #: The server that listens with it, for ``on_accept_error``.
        self.server: Any = None
        self.whereabouts = Whereabouts()
        #: Whether connections have TCP_NODELAY from their listening socket.
        self.inherits_nodelay = False
        #: Whether handlers were told that the server drains.
        self.is_draining = False
        self.counters = Counters()
        #: How errors are logged that clients can bring about.
        self.errors = ErrorLog(self.clock)
        #: Who is told what happens.
        self.events: Any = self.counters
        #: Whether anybody is told but the counters.
        self.is_observed = False
        self.slots = Slots(settings.max_connections)
        self._live: dict[int, Connection[Any]] = self.slots.live
        self._last_id = 0
        self._refusal_log = RefusalLog(self, self.whereabouts)
        self.starts = Starts(reactor, self._started)
        self.entrance = Entrance(self, self.slots, self.starts, self._refusal_log)
        self.replies = Replies(self)
        self._dry_run = DryRun(self, self._refusal_log)
        self._timeouts = Timeouts(settings, self._dry_run.lets_pass)
        self.sweeper = Sweeper(self.clock, self._live, self._timeouts.look)
        #: Whether there is, or ever was, a limit that remembers connections.
        self._is_limited = False
        self._limit_as_set()
        self._conditions = Conditions()
        self.failures = Failures(settings.on_handler_error, self.errors, reactor)
        self.ending = Ending(
            self.slots,
            self.entrance,
            self.starts,
            self.replies,
            self._conditions,
            self.failures,
        )
        #: What happens when a gate's accept fails.
        self.exhaustion = Exhaustion(self, self.entrance.place_found)
        #: Called when a connection's socket was closed.
        self.descriptor_closed = self.exhaustion.descriptor_closed

    # Building.

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """A client was accepted: the protocol that serves, holds or ends it."""
        reply = self.replies.next
        if reply is not None:
            self.replies.nothing_to_say()
            return self.replies.reply(addr, self._next_id(), reply)
        entrance = self.entrance
        if entrance.is_closed:
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
        if not entrance.is_judged:
            refusal = entrance.refusal_of(host_of(addr), addr, _itself)
            if refusal is not None:
                return self._sent_away(addr, *refusal)
        self._last_id += 1
        connection: Any = self._kind(self, self._last_id, addr, self.handler)
        if entrance.has_to_wait(connection):
            entrance.held.add(connection)
            return connection
        self._admit(connection)
        # The application's factory may refuse. It may close this server, as whoever is
        # told of the last slot may.
        if entrance.is_closed or (
            isinstance(connection, ProtocolConnection)
            and (not connection.build() or entrance.is_closed)
        ):
            connection.forget()
            return Refuser()
        connection.is_accepted = True
        self.events.connection_accepted(connection)
        return connection

    def _sent_away(self, address: Any, reason: Reason, how: Refusal) -> Any:
        """What ends a client of a port that cannot be gated."""
        self.entrance.refused(address, reason)
        if isinstance(how, Reply) and self.replies.may_reply:
            return self.replies.reply(address, self._next_id(), how)
        return Refuser() if how == "drop" else Aborter()

    def take_socket(self, client: Any, address: Any) -> None:
        """A gate has accepted a plain socket."""
        entrance = self.entrance
        if entrance.is_closed:
            # By the handler of an evicted connection, say.
            kernel.close_orderly(client)
            self.events.connection_refused(address, Reason.UNSERVED)
            return
        connection: Any = self._kind(
            self, self._next_id(), address, self.handler, client
        )
        self.set_socket_options(client)
        if entrance.has_to_wait(connection):
            entrance.held.add(connection)
            entrance.held_connected(connection)
            return
        self._admit(connection)
        self._add(connection)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def set_socket_options(self, connected: Any) -> None:
        """What each connection's socket has (spec A7, A5)."""
        keepalive = self.settings.keepalive
        if keepalive or not self.inherits_nodelay:
            kernel.set_options(
                connected, nodelay=not self.inherits_nodelay, keepalive=keepalive
            )

    def forget_unconnected(self) -> None:
        """
        Whoever was to connect the newest connection has failed to (a wrapping
        factory): release its slot.
        """
        newest = self._last_id
        connection: Any = self._live.get(newest)
        if connection is not None and getattr(connection, "transport", 0) is None:
            connection.forget()
        self.entrance.forget_unconnected(newest)
        self.replies.forget_unconnected(newest)

    # Starting.

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

    def admit_held(self, connection: Any) -> None:
        """One that had to wait has a slot now, and may start."""
        connection.admitted()
        self._admit(connection)
        self._add(connection)

    def _add(self, connection: Any) -> None:
        """It has a slot: start it, unless whoever waited for that has closed this."""
        if self.entrance.is_closed:
            connection.refuse()
            return
        connection.is_accepted = True
        self.events.connection_accepted(connection)
        self._start_soon(connection)

    def connected(self, connection: Any) -> None:
        """A connection's transport is there."""
        if connection.id in self.entrance.held.unconnected:
            self.entrance.held_connected(connection)
        else:
            self._start_soon(connection)

    def _started(self) -> None:
        """Those that were to start in this turn have: they may be evicted."""
        if self.settings.overflow == "evict":
            self.entrance.on_place()

    def _start_soon(self, connection: Any) -> None:
        if self.entrance.is_closed:
            connection.refuse()  # An observer has closed the server.
        else:
            self.starts.add(connection)

    # Releasing.

    def uncount(self, connection: Connection[Any]) -> None:
        """It holds no slot any more: the next client may come in."""
        self.slots.uncount(connection)
        self.entrance.eviction.forget(connection)
        if self._conditions.waiting:
            self._conditions.look(self.slots)
        self.entrance.place_found()

    def holds_slot(self, connection: Connection[Any]) -> bool:
        """Whether it does."""
        return self.slots.holds(connection)

    def release(self, connection: Connection[Any], error: Failure | None) -> None:
        """
        Free the slot of a connection that is over; then report its handler's
        error, then let the next client in (spec H4).
        """
        slots, entrance = self.slots, self.entrance
        was_full = slots.is_full
        slots.free(connection)
        if self.sweeper.timer is not None:
            self.sweeper.forget(connection)
        if self._dry_run.told:
            self._dry_run.forget(connection)
        if self._is_limited:
            if entrance.admission.counts_peers:
                entrance.admission.leave(connection)
            if entrance.eviction.evicted:
                entrance.eviction.forget(connection)
            if self._timeouts.windows:
                self._timeouts.forget(connection)
        if error is not None:
            self.report(connection.peer, error)
        if self._conditions.waiting:
            self._conditions.look(slots)
        if was_full or entrance.held.waiting:
            entrance.place_found()
        if entrance.is_closed:
            self.ending.maybe_over()

    def report(self, peer: Any, error: Failure) -> None:
        """A handler has failed: do as its owner chose."""
        self.failures.report(peer, error)

    def stop_reactor(self, error: BaseException) -> None:
        """Somebody has raised ``SystemExit`` or ``KeyboardInterrupt`` (spec H7)."""
        self.failures.stop_reactor(error)

    # Limits.

    def _limit_as_set(self) -> None:
        interval = self._timeouts.interval
        self.sweeper.sweep_all(interval)
        if interval is not None or self.entrance.admission.counts_peers:
            self._is_limited = True

    @property
    def looks(self) -> bool:
        """Whether all that are live are looked at about once a second."""
        return self._timeouts.looks

    def lets_pass(self, connection: Any, reason: Reason) -> bool:
        """Whether what ends a connection is in a dry run. Then that is told, once."""
        return self._dry_run.lets_pass(connection, reason)

    def may_say(self, of: Reason | str) -> bool:
        """Whether the log had no line of that for a while."""
        return self._refusal_log.may_say(of)

    # What is known of it.

    @property
    def is_closed(self) -> bool:
        """Whether nobody is let in any more, and no handler may start."""
        return self.entrance.is_closed

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits to be accepted, at a port that has a gate."""
        return self.exhaustion.pause is None and self.exhaustion.is_awaited

    def broken_connections(self) -> list[str]:
        """What does not hold, and ought to."""
        live, counters = self._live, self.counters
        checks = {
            "who was accepted is live or has ended": counters.accepted
            == sum(c.is_accepted and not c.is_over for c in live.values())
            + sum(counters.ends.values()),
            "whose handler has ended knows why": not any(
                c.reason is None and not (c.may_start or c.is_running)
                for c in live.values()
            ),
        }
        broken = [check for check, holds in checks.items() if not holds]
        broken += [
            *self.slots.broken(),
            *self.entrance.broken(),
            *self.replies.broken(),
        ]
        broken += [*self._dry_run.broken(live), *self._timeouts.broken(live)]
        broken += [*self.sweeper.broken(), *self.exhaustion.broken()]
        return [*broken, *self.ending.broken()]


def _itself(address: Any) -> Any:
    """For an address that is made already."""
    return address
