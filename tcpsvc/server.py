"""
A TCP or UNIX-socket server: its creation, its pauses, its closing, its inspection.

:class:`Server` puts three things together and adds the order of events between
them: where it listens (:mod:`tcpsvc.listeners`), who is admitted and what is live
(:mod:`tcpsvc.factory`), and whether it is paused (:mod:`tcpsvc.pausing`).
"""

from __future__ import annotations

import socket as socket_module
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, cast

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocolFactory
from zope.interface import implementer

from tcpsvc import creation
from tcpsvc._waiters import Event, all_of
from tcpsvc.cancelling import Cancellation
from tcpsvc.control import Control
from tcpsvc.drain import Drain
from tcpsvc.drain_options import DrainOptions, Durations, check_drain_options
from tcpsvc.drain_report import DrainReport
from tcpsvc.errors import ServerClosed
from tcpsvc.factory import ServerFactory
from tcpsvc.handler import OnHandlerError
from tcpsvc.interfaces import IServer
from tcpsvc.listener import Listener
from tcpsvc.listeners import Listeners
from tcpsvc.options import Options, StreamOptions
from tcpsvc.pausing import How, Pausing
from tcpsvc.places import Places, places_text
from tcpsvc.reader import Reader
from tcpsvc.where import AddressT, InetAddress, ListeningOnT
from tcpsvc.writer import Writer

if TYPE_CHECKING:
    from typing_extensions import Unpack

StreamHandler = Callable[[AddressT, Reader, Writer], object]
SockHandler = Callable[[AddressT, socket_module.socket], object]


@implementer(IServer)
class Server(Control, Generic[AddressT, ListeningOnT]):
    """
    A server that listens. Make one with :meth:`create` or one of its kin::

        server = await Server.create(
            WhereToListen.of_port(8000), handler, on_handler_error=tcpsvc.log_error
        )

    The type parameters are the clients' address type and the type of
    :attr:`listening_on`; :data:`InetServer` and :data:`UnixServer` are the usual
    two.
    """

    def __init__(self, listeners: Listeners, factory: ServerFactory) -> None:
        """Not to be called: use :meth:`create` and its kin."""
        self._listeners = listeners
        self._factory = factory
        self._pausing = Pausing(listeners, factory)
        factory.server = self
        self._is_port_closing = False
        self._port_closed = Event()
        self._when_over = Event()
        self._drain: Drain | None = None
        factory.listen_with(
            listeners.update,
            self._close_port,
            listeners.addresses,
        )

    # Creation.

    @classmethod
    def create(
        cls,
        where: Places[AddressT, ListeningOnT],
        handler: StreamHandler[AddressT],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[StreamOptions],
    ) -> Deferred[Server[AddressT, ListeningOnT]]:
        """
        Listen, and run a stream handler for each client.

        :param where: where to listen; or a sequence of places, which are one server
            then, with one limit and one end (L).
        :param handler: called as ``handler(address, reader, writer)``. It may be
            a coroutine function, return a Deferred, or be finished when it
            returns. When it has finished, what it wrote is sent, then the
            connection is closed (H).
        :param on_handler_error: required, so that nobody hides errors unawares
            (E6). ``"raise"``: a handler's first error closes the listening
            socket, see :meth:`failed`; a client that leaves in the middle of a
            message (``IncompleteReadError``) is such an error. ``"ignore"``:
            errors are only counted. ``f(address, failure)``: called for each
            failed handler, a coroutine or Deferred of its is waited for;
            :func:`tcpsvc.log_error` is one. If ``f`` raises, that is as
            ``"raise"`` (E1, E2).
        :param options: see :class:`tcpsvc.StreamOptions` and
            :class:`tcpsvc.Options`.
        :returns: a Deferred that fires with the server when it listens. It fails
            with :exc:`CannotListenError
            <twisted.internet.error.CannotListenError>` when the kernel refuses,
            and with :exc:`ValueError` or :exc:`TypeError` when an option is
            wrong, before anything is opened. Cancelling it leaves nothing open.
        """
        return creation.create(
            cls,
            where,
            partial(
                ServerFactory.of_streams, handler, on_handler_error=on_handler_error
            ),
            options,
        )

    @classmethod
    def create_inet(
        cls,
        where: Places[InetAddress, int],
        handler: StreamHandler[InetAddress],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[StreamOptions],
    ) -> InetServer:
        """
        As :meth:`create`, but at once, and for an IPv4 or IPv6 address only.

        :returns: the server; it listens.
        :raises CannotListenError: the kernel refused.
        :raises ValueError: an option is wrong, or ``where`` is no inet address.
        :raises TypeError: an option is unknown or of the wrong kind.
        """
        return creation.create_inet(
            cast("type[InetServer]", cls),
            where,
            partial(
                ServerFactory.of_streams, handler, on_handler_error=on_handler_error
            ),
            options,
        )

    @classmethod
    def create_sock(
        cls,
        where: Places[AddressT, ListeningOnT],
        handler: SockHandler[AddressT],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> Deferred[Server[AddressT, ListeningOnT]]:
        """
        Listen, and run a handler with each client's socket.

        :param handler: called as ``handler(address, socket)`` with the connected,
            non-blocking :class:`socket.socket`. When it has finished, the socket
            is shut down and closed; nothing is flushed.
        :param options: see :class:`tcpsvc.Options`.
        :returns: as :meth:`create`. An endpoint whose transport is no plain
            socket, such as TLS, is a :exc:`ValueError`.
        """
        return creation.create(
            cls,
            where,
            partial(ServerFactory.of_socks, handler, on_handler_error=on_handler_error),
            options,
        )

    @classmethod
    def create_sock_inet(
        cls,
        where: Places[InetAddress, int],
        handler: SockHandler[InetAddress],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> InetServer:
        """
        As :meth:`create_sock`, but at once; see :meth:`create_inet`.
        """
        return creation.create_inet(
            cast("type[InetServer]", cls),
            where,
            partial(ServerFactory.of_socks, handler, on_handler_error=on_handler_error),
            options,
        )

    @classmethod
    def create_protocol(
        cls,
        where: Places[AddressT, ListeningOnT],
        factory: IProtocolFactory,
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> Deferred[Server[AddressT, ListeningOnT]]:
        """
        Listen, and serve each client with a protocol of an existing factory,
        such as a :class:`twisted.web.server.Site`, under the same rules (P): the
        protocol is the handler, and has finished at ``connectionLost``.

        :param factory: any :class:`IProtocolFactory
            <twisted.internet.interfaces.IProtocolFactory>`. An error is an
            exception out of ``makeConnection``, ``dataReceived`` or
            ``connectionLost``, or the loss of the connection for a reason that
            is no ordinary one.
        :param options: see :class:`tcpsvc.Options`.
        :returns: as :meth:`create`.
        """
        return creation.create(
            cls,
            where,
            partial(
                ServerFactory.of_protocols, factory, on_handler_error=on_handler_error
            ),
            options,
        )

    @classmethod
    def create_protocol_inet(
        cls,
        where: Places[InetAddress, int],
        factory: IProtocolFactory,
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> InetServer:
        """
        As :meth:`create_protocol`, but at once; see :meth:`create_inet`.
        """
        return creation.create_inet(
            cast("type[InetServer]", cls),
            where,
            partial(
                ServerFactory.of_protocols, factory, on_handler_error=on_handler_error
            ),
            options,
        )

    # Where it listens.

    @property
    def listeners(self) -> tuple[Listener[AddressT, ListeningOnT], ...]:
        """Each place where it listens, in the order in which they were given (L)."""
        return self._listeners.all

    @property
    def listening_on(self) -> ListeningOnT:
        """
        The port of an inet server, the path as it was given of a UNIX server,
        the address of any other; of the first of :attr:`listeners`. It still
        answers when closed.
        """
        return self.listeners[0].listening_on

    @property
    def listening_on_address(self) -> AddressT:
        """The first listening address. It still answers when closed (X6)."""
        return self.listeners[0].address

    @property
    def listening_socket(self) -> socket_module.socket:
        """
        The first real listening socket, for its options and for handing it on.
        Accepting on it circumvents ``max_connections`` and every other rule.

        :raises ServerClosed: it is closed, also by ``pause("refuse")``.
        """
        listening = self._listeners.ports[0].socket
        if self.is_closed or listening is None:
            raise ServerClosed(
                f"{self!r} has no listening socket until it is resumed"
                if self.is_paused
                else f"{self!r} has no listening socket any more"
            )
        return listening

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
        return self._factory.is_dropping

    def set_drop_incoming_connections(self, drop: bool) -> None:
        """
        Accept each incoming connection and close it at once, or stop doing so
        (D). Existing connections go on. Clients that wait because all slots are
        taken are dropped too.

        :param drop: whether to drop from now on.
        """
        self._factory.set_drop_incoming_connections(drop)

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
            Cancellation(self._factory)
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
            self._drain = Drain(self, self._factory, Durations(**durations))
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
            self._drain = Drain(self, self._factory, Durations())
            self._drain.force()
            self._drain.begin()
        else:
            self._drain.force()
        return self._drain.when_over()

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
        return self._factory.stopped_by

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
        self._factory.nothing_can_fail()

    # Inspection.

    def invariant(self) -> None:
        """
        :raises AssertionError: the server's state is broken; it says how (I1).
        """
        self._factory.invariant()
        drain = self._drain
        checks = {
            "nothing is live after the end": not (
                self._when_over.has_happened and self.num_connections
            ),
            "nobody is let in while it is paused": self.is_closed
            or (self.is_paused is not None) is self._factory.is_paused,
            "what is closed is not paused": not (self.is_closed and self.is_paused),
            "it accepts nobody any more when it is closed": not self.is_closed
            or self._is_port_closing,
            "handlers are told of a drain when it has stopped accepting": not (
                self._factory.is_draining and (drain is None or not self.is_closed)
            ),
        }
        broken = [check for check, holds in checks.items() if not holds]
        if broken:
            raise AssertionError(f"broken: {', '.join(broken)}: {self.describe()}")

    def describe(self) -> dict[str, Any]:
        """
        :returns: a JSON-able description: where it listens, its options and
            state, its connections and its counters (I4).
        """
        listeners = [listener.describe() for listener in self.listeners]
        first = {k: v for k, v in listeners[0].items() if k != "is_listening"}
        return {
            **first,
            "listeners": listeners,
            "is_paused": self.is_paused,
            "is_draining": self.is_draining,
            **self._factory.describe(),
        }

    def __repr__(self) -> str:
        factory = self._factory
        state = "closed" if self.is_closed else "listening"
        if self.is_paused:
            state = f"paused ({self.is_paused})"
        if self.is_draining:
            state += ", draining"
        if factory.is_dropping:
            state += ", dropping"
        return (
            f"<Server on {places_text(x.where for x in self.listeners)} {state}, "
            f"{factory.num_connections}/{factory.max_connections} connections>"
        )


InetServer = Server[InetAddress, int]
UnixServer = Server[UNIXAddress, str]
