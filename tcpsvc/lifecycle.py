"""
The life of a server once it listens: its pauses, its close, its drain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

from tcpsvc._waiters import Event, all_of
from tcpsvc.address_text import addresses_text
from tcpsvc.cancelling import Cancellation
from tcpsvc.drain import Drain
from tcpsvc.drain_options import DrainOptions, Durations, check_drain_options
from tcpsvc.drain_report import DrainReport
from tcpsvc.factory import ServerFactory
from tcpsvc.listeners import Listeners
from tcpsvc.pausing import How, Pausing

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lifecycle:
    """Mixed into :class:`tcpsvc.Server`."""

    def __init__(self, listeners: Listeners, factory: ServerFactory) -> None:
        self._listeners = listeners
        self._factory = factory
        self._pausing = Pausing(listeners, factory)
        self._cancellation = Cancellation(factory)
        self._is_port_closing = False
        self._port_closed = Event()
        self._when_over = Event()
        self._drain: Drain | None = None
        factory.listen_with(listeners.update, self._close_port, listeners.addresses)

    # Pausing.

    @property
    def is_paused(self) -> How | None:
        """``"hold"`` or ``"refuse"`` while paused, ``None`` otherwise (Z)."""
        return self._pausing.how

    def pause(self, how: How) -> Deferred[None]:
        """
        Accept nobody for a while (Z). Existing connections go on, and so do clients
        that were accepted already. Any number of calls, from anywhere; pauses and
        resumes take effect in the order of their calls.

        :param how: ``"hold"``: clients connect, and wait in the kernel's backlog;
            who finds it full is not answered. ``"refuse"``: the listening sockets
            are closed, clients are refused, and those in the backlog are reset.
        :returns: a Deferred of one's own that fires when the listening sockets are
            closed; with ``"hold"`` it has fired. It fails with :exc:`ValueError`
            when ``how`` is neither, or when ``"refuse"`` would close what cannot be
            opened again: an inherited descriptor, a ``socket=`` of yours, an
            endpoint, a place with ``reuseaddr=False``; and with
            :exc:`ServerClosed` on a closed server. Nothing has changed then.
            From ``"refuse"`` to ``"hold"`` it listens again first, and may fail as
            :meth:`resume` does.
        """
        return self._pausing.pause(how)

    def resume(self) -> Deferred[None]:
        """
        Accept again. After ``pause("refuse")`` it listens on the same addresses
        again, also where the operating system chose the port.

        :returns: a Deferred of one's own that fires when it listens; unless sockets
            are still being closed it has fired. It fails with
            :exc:`CannotListenError <twisted.internet.error.CannotListenError>` when
            an address is taken: it listens on none then, and stays paused; and with
            :exc:`ServerClosed` on a closed server.
        """
        return self._pausing.resume()

    # Closing.

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called, or a handler error has closed it."""
        return self._factory.is_closed

    def close(
        self,
        *,
        close_existing_connections: bool = False,
        cancel_handlers: bool = False,
    ) -> Deferred[None]:
        """
        Accept nobody any more, and close the listening sockets (X). No handler
        starts from now on. Any number of calls, from anywhere.

        :param close_existing_connections: close the sockets of all existing
            connections too, at once (X3): what the kernel took is delivered,
            what only this process holds is discarded, and their handlers read
            EOF. By default they go on to their end.
        :param cancel_handlers: cancel the coroutine or Deferred of every handler that
            still runs, after the closing. Without ``close_existing_connections`` what
            a handler has written is then sent, and its client reads all of it; a
            protocol is nothing to be cancelled, and goes on. One that has not ended a
            second later is named in a line of the log.
        :returns: a Deferred of one's own that fires when the listening socket is
            closed, its port free and its path unlinked; and with
            ``close_existing_connections`` every socket that existed at the call
            too. It does not wait for handlers:
            :meth:`close_finished_and_handlers_determined` does.
        """
        self._close_port()
        closed = [self.close_finished()]
        if close_existing_connections:
            closed.append(self._factory.close_connections())
        if cancel_handlers:
            self._cancellation.cancel()
        return all_of(closed)

    def close_finished(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fires when the listening socket is
            closed. It closes nothing.
        """
        return self._port_closed.wait()

    def close_finished_and_handlers_determined(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fires when the listening socket is
            closed, no connection is live, and ``on_handler_error`` of the last
            one has returned (X4). It closes nothing.
        """
        return self._when_over.wait()

    @property
    def is_draining(self) -> bool:
        """
        Whether a drain has begun. It stays true: a server that drains does not come
        back. A health check that asks this fails before clients are refused, given
        an ``announce`` of :class:`tcpsvc.DrainOptions`.
        """
        return self._drain is not None

    def drain(self, **options: Unpack[DrainOptions]) -> Deferred[DrainReport]:
        """
        Close the server without losing a client, and see it to its end: announce it,
        accept nobody, tell the handlers, wait for them, and in the end insist. Each
        phase has a deadline, see :class:`tcpsvc.DrainOptions`; with no live connection
        it is over when the listening socket is closed.

        Called again it shortens the phases that are not over yet, the one it is in
        from now on; it never makes one longer.

        :param options: see :class:`tcpsvc.DrainOptions`.
        :returns: a Deferred of one's own that fires with the
            :class:`tcpsvc.DrainReport` at the end, also when asked for afterwards.
            Cancelling it ends the waiting only.
        :raises ValueError: an option is below 0 or not finite; nothing has happened.
        :raises TypeError: an option is unknown, or no number; nothing has happened.
        """
        durations = check_drain_options(options)
        if self._drain is None:
            self._drain = self._new_drain(Durations(**durations))
            self._drain.begin()
        else:
            self._drain.shorten(durations)
        return self._drain.when_over()

    def force_drain(self) -> Deferred[DrainReport]:
        """
        The time is up: close what is left, cancel its handlers, and reset what is
        still open, at once. Handlers that do not end within ``grace`` are given up.
        Begins a drain if there was none.

        :returns: as :meth:`drain`.
        """
        if self._drain is None:
            self._drain = self._new_drain(Durations())
            self._drain.force()
            self._drain.begin()
        else:
            self._drain.force()
        return self._drain.when_over()

    def _new_drain(self, durations: Durations) -> Drain:
        addresses = addresses_text(self._listeners.addresses())
        return Drain(self, addresses, self._factory, durations)

    def failed(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fails with the first handler error
            that closed the server, also when asked for afterwards, and fires
            when everything has ended without one (E3). If nobody has asked when
            the error comes, it is logged as critical.
        """
        return self._factory.failed()

    def cancel_handlers(self) -> None:
        """
        Cancel the coroutine or Deferred of every handler that still runs. One
        that ends by it has ended ordinarily (H6).
        """
        self._factory.cancel_handlers()

    @property
    def stopped_by(self) -> BaseException | None:
        """
        The ``SystemExit`` or ``KeyboardInterrupt`` with which a handler has
        stopped the reactor, if one has (H7).
        """
        return self._factory.failures.stopped_by

    def _close_port(self) -> None:
        if self._is_port_closing:
            return
        self._is_port_closing = True
        self._factory.close()
        stopping = self._listeners.stop()
        self._pausing.over()
        # Not before close() has returned, however fast the ports are (X1).
        if stopping.called:
            self._factory.reactor.callLater(0, stopping.addCallback, self._port_stopped)
        else:
            stopping.addCallback(self._port_stopped)

    def _port_stopped(self, _: object) -> None:
        self._port_closed.happen()
        self._factory.when_over().addCallback(self._over)

    def _over(self, _: None) -> None:
        self._when_over.happen()
        self._factory.failures.over()

    def _broken_lifecycle(self) -> list[str]:
        """What does not hold, and ought to."""
        factory, drain = self._factory, self._drain
        checks = {
            "nothing is live after the end": not (
                self._when_over.has_happened and factory.num_connections
            ),
            "nobody is let in while it is paused": self.is_closed
            or (self.is_paused is not None) is factory.entrance.is_paused,
            "what is closed is not paused": not (self.is_closed and self.is_paused),
            "it accepts nobody any more when it is closed": not self.is_closed
            or self._is_port_closing,
            "handlers are told of a drain when it has stopped accepting": not (
                factory.is_draining and (drain is None or not self.is_closed)
            ),
        }
        return [check for check, holds in checks.items() if not holds]
