"""
One connection's life, from the taking of its slot to its release.

A connection is *live* until two things have happened, in either order: its
handler has finished, and its socket is closed. Then its slot is released, and
only then is a handler's error reported (spec A5, H4). The kinds of connection
differ in what a handler is given and in how the socket is closed:
:mod:`tcpsvc.stream_connection`, :mod:`tcpsvc.sock_connection` and
:mod:`tcpsvc.protocol_connection`.

Where the state changes::

    taken ──start()──▶ running ──handler_ended()──▶ ended ┐
                                                          ├──▶ released
    open ──────────── socket_closed() ──────────▶ closed ─┘

A connection whose handler may not start any more (spec H5) is refused: it has
no handler to wait for, and is released when its socket is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import CoroutineType
from typing import Any, Generic, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.main import CONNECTION_DONE
from twisted.python.failure import Failure
from twisted.python.reflect import safe_repr
from zope.interface import implementer

from tcpsvc import kernel
from tcpsvc._waiters import Event
from tcpsvc.address_text import address_text
from tcpsvc.counters import Counters
from tcpsvc.driver import Driver
from tcpsvc.error_log import ErrorLog
from tcpsvc.errors import BufferAgeLimitExceeded, ConnectionGone
from tcpsvc.handler import STOPPING, follow
from tcpsvc.interfaces import IConnection
from tcpsvc.log import log
from tcpsvc.log_fields import of_client
from tcpsvc.reasons import Reason
from tcpsvc.settings import Settings
from tcpsvc.snapshot import ConnectionSnapshot
from tcpsvc.sweeper import Sweeper
from tcpsvc.traffic import Traffic
from tcpsvc.whereabouts import Whereabouts

AddressT = TypeVar("AddressT")


#: Why we close: one for all, since it says nothing of any connection.
CLOSED = Failure(CONNECTION_DONE)


class _FirstStep:
    """
    What runs while a handler is called: what can be cancelled is only known when it
    has returned.
    """

    def cancel(self) -> None:
        """It will be."""


_FIRST_STEP = _FirstStep()


class Owner(Protocol):
    """What a connection asks, and whom it tells: the factory."""

    settings: Settings
    counters: Counters
    errors: ErrorLog
    events: Any
    clock: Any
    reactor: Any
    #: Whether anybody is told of what happens but the counters.
    is_observed: bool
    #: Where it listens.
    whereabouts: Whereabouts

    @property
    def is_closed(self) -> bool:
        """Whether no handler may start any more."""

    @property
    def is_draining(self) -> bool:
        """Whether handlers were told that the server drains."""

    def set_socket_options(self, connected: Any) -> None:
        """What is set on each connection's socket."""

    def connected(self, connection: Any) -> None:
        """Its transport is there."""

    def lets_pass(self, connection: Any, reason: Reason) -> bool:
        """Whether what ends it is in a dry run. Then that is told, once."""

    @property
    def sweeper(self) -> Sweeper:
        """Sweeps connections that have something to look after."""

    def descriptor_closed(self) -> None:
        """Its socket is closed."""

    def release(self, connection: Any, error: Failure | None) -> None:
        """It is over, with its handler's error."""

    def report(self, peer: Any, error: Failure) -> None:
        """Its handler's error is to be reported before it is over."""

    def uncount(self, connection: Any) -> None:
        """It holds no slot any more, and stays live."""

    def holds_slot(self, connection: Any) -> bool:
        """Whether it does."""

    @property
    def looks(self) -> bool:
        """Whether all that are live are looked at about once a second."""

    def may_say(self, of: Reason | str) -> bool:
        """Whether the log had no line of that for a while."""

    def stop_reactor(self, error: BaseException) -> None:
        """Its handler has raised ``SystemExit`` or ``KeyboardInterrupt``."""


@implementer(IConnection)
class Connection(Traffic, Generic[AddressT]):
    """
    What every live connection has.

    :ivar id: a number of its own within the factory, from 1 on.
    :ivar peer: the client's address.
    :ivar is_accepted: whether observers were told of it.
    :ivar had_eof_of_drain: whether its reader is at EOF because the server drains.
    :ivar is_ended: whether a limit has ended it. Its handler may still run.
    :ivar label: what the handler calls it.
    :ivar reason: why it ends; ``None`` until something has.
    """

    __slots__ = (
        "__weakref__",
        "_closed_by_server",
        "_error",
        "_error_reported",
        "_factory",
        "_handler_cancelled",
        "_handler_state",
        "_has_eof",
        "_is_delivering",
        "_is_released",
        "_is_closed_with_the_server",
        "is_ended",
        "_running",
        "_socket_closed",
        "_when_draining",
        "had_eof_of_drain",
        "id",
        "is_accepted",
        "is_socket_closed",
        "label",
        "peer",
        "reason",
    )

    _factory: Owner

    def __init__(self, factory: Owner, id: int, peer: AddressT) -> None:
        self._factory = factory
        self.id = id
        self.peer = peer
        self._accepted_at = self._active_at = factory.clock.seconds()
        self._moved = 0
        self._has_received = False
        self._at_end = None
        #: Whether the client has ended its side.
        self._has_eof = False
        self.is_accepted = False
        self.is_ended = False
        self.had_eof_of_drain = False
        self.label: object = None
        self.reason: Reason | None = None
        self._handler_state = "waiting"
        self._running: Driver | Deferred[object] | _FirstStep | None = None
        self._handler_cancelled = False
        self._closed_by_server = False
        self._is_closed_with_the_server = False
        self._error: Failure | None = None
        self._error_reported = False
        self._is_released = False
        self._is_delivering = False
        self.is_socket_closed = False
        self._socket_closed: Event | None = None
        self._when_draining: Event | None = None

    # What a kind of connection says and does.

    def close_now(self) -> None:
        """
        Close the socket at once and orderly: what the kernel took is delivered,
        what only we hold is discarded (spec X3).
        """
        raise NotImplementedError  # pragma: no cover

    def _finish(self) -> None:
        """The handler has ended: send what it wrote, then close."""
        raise NotImplementedError  # pragma: no cover

    def abort(self) -> None:
        """Close the socket at once with a reset."""
        raise NotImplementedError  # pragma: no cover

    # Transitions.

    def admitted(self) -> None:
        """It was held, and has a slot now: it begins anew."""
        self._accepted_at = self._active_at = self._factory.clock.seconds()

    def _start(self, handler: Callable[..., object], *args: object) -> None:
        """Run the handler. Whatever it does, it ends in :meth:`handler_ended`."""
        self._running = _FIRST_STEP  # Whoever is told of it may cancel it.
        self.starts()
        try:
            result = handler(*args)
        except BaseException:
            self.handler_ended(Failure())
            return
        if type(result) is CoroutineType:
            driver = self._running = Driver(result, self.handler_ended)
            if self._handler_cancelled:
                driver.cancel()
            driver.resume(None)
        elif result is None:
            self.handler_ended(None)
        else:
            running = self._running = follow(result, handler)
            running.addCallbacks(self._handler_returned, self.handler_ended)
            if self._handler_cancelled:
                self.cancel_handler()

    def starts(self) -> None:
        """The handler runs from now on."""
        self._handler_state = "running"
        if self._factory.is_observed:  # The counters count no starts.
            self._factory.events.handler_started(self)

    def _handler_returned(self, _: object) -> None:
        self.handler_ended(None)

    def refuse(self) -> None:
        """No handler is to start for this connection: close it."""
        self._refused()
        self.close_now()
        self._release_if_over()

    def _close_socket(self, transport: Any) -> bool:
        """
        Close a transport's socket at once, by ``shutdown`` and ``close``: of
        Twisted's ways only ``connectionLost`` does that (``loseConnection`` first
        flushes, ``abortConnection`` resets).

        :returns: whether the transport can do that; one in memory may not.
        """
        base = kernel.base_transport(transport)
        lose = getattr(base, "connectionLost", None)
        if lose is None:
            return False
        is_wrapped = base is not transport or getattr(base, "TLS", False)
        if self._is_delivering and is_wrapped:
            # TLS does not stand it while it calls us.
            self._factory.reactor.callLater(0, lose, CLOSED)
        else:
            lose(CLOSED)
        return True

    def _refused(self) -> None:
        self._handler_state = "refused"
        self.ends_because(Reason.UNSERVED)
        if not self.is_accepted:
            self._factory.events.connection_refused(self.peer, Reason.UNSERVED)

    def close(self) -> None:
        """
        Close it at once and orderly, as ``close(close_existing_connections=True)``
        of the server does (spec X3): what the kernel took is delivered, what only
        this process holds is discarded, and the handler reads EOF.
        """
        self.close_because(Reason.CLOSED)

    def close_because(self, reason: Reason) -> None:
        """The same, for a reason of the server's."""
        if not self.is_socket_closed:
            self.ends_because(reason)
            self._is_closed_with_the_server = True
            self.close_now()

    def end(self, reason: Reason) -> None:
        """
        A limit is exceeded: close it, and cancel its handler. Once: what the handler
        still does then is its own to end.
        """
        if self.is_ended:
            return
        self.is_ended = True
        log.debug(
            "ending {client}: {reason}", **of_client(self.peer), reason=reason.value
        )
        self.ends_because(reason)  # Also of one whose socket is closed already.
        if self._handler_state == "waiting":
            self._handler_state = "refused"  # It has none that could be cancelled.
        self.close_because(reason)
        self.cancel_handler()
        self._release_if_over()

    def uncount(self) -> None:
        """
        It holds no slot from now on: for a long-lived connection beside which others
        are to come in. It stays live: close and drain include it, and the limits per
        peer and the timeouts go on. Twice is once.
        """
        if self.holds_slot and not self._is_released:
            self._factory.uncount(self)

    def ends_because(self, reason: Reason) -> None:
        """Note why it ends. What comes first counts."""
        if self.reason is None:
            self.reason = reason

    def forget(self) -> None:
        """It never gets a transport: there is nothing to close."""
        self._refused()
        self.socket_closed()
        self._release_if_over()

    def handler_ended(self, failure: Failure | None) -> None:
        """The handler has finished, with what it raised or ``None``."""
        self._running = None
        outcome = "finished"
        if failure is None:
            if self.reason is None:
                self.reason = self._why_it_returned()
        elif failure.check(*STOPPING):
            outcome = "failed"
            self.ends_because(Reason.ERROR)
            self._stops_reactor(failure)
        elif self._is_ordinary_end(failure):
            outcome = "left"
            self.ends_because(self._why_it_left(failure.value))
            log.debug(
                "handler of {client} left with {error}",
                **of_client(self.peer),
                error=safe_repr(failure.value),
            )
        else:
            outcome = "failed"
            self.ends_because(Reason.ERROR)
            self.fail(failure)
        self._handler_state = outcome
        self._factory.events.handler_ended(self, outcome, failure)
        if self.is_socket_closed:
            self._release_if_over()
        else:
            self._finish()

    def _why_it_returned(self) -> Reason:
        if self._handler_cancelled:
            return Reason.CANCELLED
        if self.had_eof_of_drain:
            return Reason.DRAINED
        return Reason.EOF if self._has_eof else Reason.FINISHED

    def _why_it_left(self, error: BaseException | None) -> Reason:
        if isinstance(error, ConnectionGone):
            # A reset was noted when it was seen. What else is gone, the handler had
            # closed itself.
            return Reason.EOF if self._has_eof else Reason.FINISHED
        if isinstance(error, asyncio.IncompleteReadError):
            return Reason.DRAINED
        return Reason.CANCELLED

    def _stops_reactor(self, failure: Failure) -> None:
        if self._error is not None and self._error.value is not failure.value:
            self._factory.counters.later_errors += 1
            log.failure(
                "an error of the handler of {client} before it stopped the reactor",
                failure=self._error,
                **of_client(self.peer),
            )
        self._error_reported = True
        log.critical(
            "handler of {client} raised {kind}: stopping the reactor",
            **of_client(self.peer),
            kind=type(failure.value).__name__,
            log_failure=failure,
        )
        assert failure.value is not None
        self._factory.stop_reactor(failure.value)

    @property
    def when_socket_closed(self) -> Event:
        """The end of the socket. Made when it is first asked for."""
        if self._socket_closed is None:
            self._socket_closed = Event()
            if self.is_socket_closed:
                self._socket_closed.happen()
        return self._socket_closed

    def socket_closed(self) -> None:
        """The socket is closed, by whichever side."""
        if self.is_socket_closed:
            return
        self.is_socket_closed = True
        if self._socket_closed is not None:
            self._socket_closed.happen()
        self._factory.descriptor_closed()
        self._release_if_over()

    def _release_if_over(self) -> None:
        if (
            not self._is_released
            and self.is_socket_closed
            and self._handler_state not in ("waiting", "running")
        ):
            self._is_released = True
            factory = self._factory
            if factory.is_observed:
                self._note_bytes()
            if self.is_accepted:
                factory.events.connection_finished(self)
            self._let_go()
            factory.release(self, None if self._error_reported else self._error)

    def _let_go(self) -> None:
        """
        It is over: drop what refers back to this connection. Otherwise each would
        wait for the garbage collector.
        """

    def fail(self, failure: Failure) -> None:
        """
        Keep the handler's first error, for after the release; log a later one
        (spec E4).
        """
        if self._error is None:
            self._error = failure
            return
        if failure.value is self._error.value:
            return
        self._factory.counters.later_errors += 1
        self._factory.errors.failure(
            "a further error of the handler of {client}",
            failure,
            **of_client(self.peer),
        )

    def fail_at_once(self, failure: Failure) -> None:
        """An error that is reported while the handler still runs (spec S6)."""
        is_first = self._error is None
        self.fail(failure)
        if is_first:
            self._error_reported = True
            self._factory.report(self.peer, failure)

    def unhandled(self, failure: Failure) -> None:
        """What nobody deals with was raised below the handler (Watcher)."""
        self._factory.errors.failure(
            "an error in the connection of {client}", failure, **of_client(self.peer)
        )

    def cancel_handler(self) -> None:
        """Cancel the handler's coroutine or Deferred, if it still runs."""
        if self._running is not None:
            self._handler_cancelled = True
            try:
                self._running.cancel()
            except Exception:
                # A canceller of the handler's own; others are to be cancelled too.
                self._factory.errors.failure(
                    "cancelling the handler of {client} failed",
                    Failure(),
                    **of_client(self.peer),
                )

    def _is_ordinary_end(self, failure: Failure) -> bool:
        """Whether what a handler raised is an ordinary end of it (spec H6)."""
        error = failure.value
        if isinstance(error, (CancelledError, asyncio.CancelledError)):
            return self._handler_cancelled
        if isinstance(error, BufferAgeLimitExceeded):
            return False
        if isinstance(error, ConnectionGone):
            return getattr(error, "connection", None) is self
        if isinstance(error, asyncio.IncompleteReadError):
            return self._is_closed_with_the_server or self.had_eof_of_drain
        return False

    # The drain of the server.

    @property
    def draining(self) -> bool:
        """Whether the server drains, and its handler should come to an end."""
        return self._factory.is_draining

    def when_draining(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fires when :attr:`draining` becomes
            true. It never does if the connection is over before.
        """
        if self._when_draining is None:
            self._when_draining = Event()
            if self.draining:
                self._when_draining.happen()
        return self._when_draining.wait()

    def tell_of_drain(self) -> None:
        """The server drains. It may be told again."""
        if self._when_draining is not None:
            self._when_draining.happen()

    # What is known of it.

    @property
    def is_cancellable(self) -> bool:
        """Whether its handler is a coroutine or Deferred that has not ended."""
        return self._running is not None

    @property
    def may_start(self) -> bool:
        """Whether the handler has not started, and still may."""
        return self._handler_state == "waiting"

    @property
    def is_running(self) -> bool:
        """Whether the handler has started and not ended."""
        return self._handler_state == "running"

    @property
    def is_over(self) -> bool:
        """Whether its slot was released."""
        return self._is_released

    @property
    def holds_slot(self) -> bool:
        """Whether it counts against ``max_connections``."""
        return self._factory.holds_slot(self)

    def snapshot(self) -> ConnectionSnapshot:
        """Its state now."""
        now = self._factory.clock.seconds()
        return ConnectionSnapshot(
            id=self.id,
            peer=self.peer,
            age=self.age,
            idle=self._idle(now),
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            handler=self._handler_state,
            socket="closed" if self.is_socket_closed else "open",
            holds_slot=self.holds_slot,
            label=self.label,
            reason=self.reason,
        )

    def describe(self) -> dict[str, Any]:
        """A JSON-able description (spec I4)."""
        return self.snapshot().describe()

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} #{self.id} from {address_text(self.peer)} "
            f"{self._handler_state}>"
        )
