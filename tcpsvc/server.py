"""
A TCP or UNIX-socket server: its creation, its closing, its inspection.

:class:`Server` puts three things together and adds the order of events between
them: where it listens (:mod:`tcpsvc.where`), who is admitted and what is live
(:mod:`tcpsvc.factory`), and how clients are accepted (:mod:`tcpsvc.gate`).
"""

from __future__ import annotations

import socket as socket_module
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, cast

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, execute, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocolFactory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from tcpsvc._waiters import Event, all_of
from tcpsvc.errors import ServerClosed
from tcpsvc.factory import ServerFactory
from tcpsvc.gate import Gate, can_gate
from tcpsvc.handler import OnHandlerError
from tcpsvc.interfaces import IServer
from tcpsvc.listening import close_at_once, listen_now, listen_on_endpoint
from tcpsvc.options import Options, StreamOptions
from tcpsvc.reader import Reader
from tcpsvc.sockets import close_given
from tcpsvc.where import (
    AddressT,
    EndpointPlace,
    InetAddress,
    ListeningOnT,
    SocketPlace,
    WhereToListen,
)
from tcpsvc.writer import Writer

if TYPE_CHECKING:
    from typing_extensions import Unpack

StreamHandler = Callable[[AddressT, Reader, Writer], object]
SockHandler = Callable[[AddressT, socket_module.socket], object]


@implementer(IServer)
class Server(Generic[AddressT, ListeningOnT]):
    """
    A server that listens. Make one with :meth:`create` or one of its kin::

        server = await Server.create(
            WhereToListen.of_port(8000), handler, on_handler_error=tcpsvc.log_error
        )

    The type parameters are the clients' address type and the type of
    :attr:`listening_on`; :data:`InetServer` and :data:`UnixServer` are the usual
    two.
    """

    _log = Logger(namespace="tcpsvc")

    def __init__(
        self,
        where: WhereToListen[AddressT, ListeningOnT],
        factory: ServerFactory,
        port: IListeningPort,
    ) -> None:
        """Not to be called: use :meth:`create` and its kin."""
        self._where = where
        self._factory = factory
        factory.server = self
        self._port: Any = port
        self._address: IAddress = port.getHost()
        self._is_port_closing = False
        self._port_closed = Event()
        self._when_over = Event()
        self._gate: Gate | None = None
        if can_gate(port):
            self._gate = Gate(port, factory)
            factory.listen_with(
                self._gate.update,
                self._gate.descriptor_closed,
                self._close_port,
                lambda: self._address,
            )
        else:
            factory.listen_with(
                lambda: None,
                lambda: None,
                self._close_port,
                lambda: self._address,
            )
            self._log.warn(
                "accepting on {port} cannot be gated: clients beyond "
                "max_connections={limit} are held accepted, not in the backlog",
                port=port,
                limit=factory.max_connections,
            )

    # Creation.

    @classmethod
    def create(
        cls,
        where: WhereToListen[AddressT, ListeningOnT],
        handler: StreamHandler[AddressT],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[StreamOptions],
    ) -> Deferred[Server[AddressT, ListeningOnT]]:
        """
        Listen, and run a stream handler for each client.

        :param where: where to listen.
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
        return cls._create(
            where,
            partial(
                ServerFactory.of_streams, handler, on_handler_error=on_handler_error
            ),
            options,
        )

    @classmethod
    def create_inet(
        cls,
        where: WhereToListen[InetAddress, int],
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
        return cls._create_inet(
            where,
            partial(
                ServerFactory.of_streams, handler, on_handler_error=on_handler_error
            ),
            options,
        )

    @classmethod
    def create_sock(
        cls,
        where: WhereToListen[AddressT, ListeningOnT],
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
        return cls._create(
            where,
            partial(ServerFactory.of_socks, handler, on_handler_error=on_handler_error),
            options,
        )

    @classmethod
    def create_sock_inet(
        cls,
        where: WhereToListen[InetAddress, int],
        handler: SockHandler[InetAddress],
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> InetServer:
        """
        As :meth:`create_sock`, but at once; see :meth:`create_inet`.
        """
        return cls._create_inet(
            where,
            partial(ServerFactory.of_socks, handler, on_handler_error=on_handler_error),
            options,
        )

    @classmethod
    def create_protocol(
        cls,
        where: WhereToListen[AddressT, ListeningOnT],
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
        return cls._create(
            where,
            partial(
                ServerFactory.of_protocols, factory, on_handler_error=on_handler_error
            ),
            options,
        )

    @classmethod
    def create_protocol_inet(
        cls,
        where: WhereToListen[InetAddress, int],
        factory: IProtocolFactory,
        *,
        on_handler_error: OnHandlerError,
        **options: Unpack[Options],
    ) -> InetServer:
        """
        As :meth:`create_protocol`, but at once; see :meth:`create_inet`.
        """
        return cls._create_inet(
            where,
            partial(
                ServerFactory.of_protocols, factory, on_handler_error=on_handler_error
            ),
            options,
        )

    @classmethod
    def bind(
        cls,
        where: WhereToListen[AddressT, ListeningOnT],
        make_factory: Callable[..., ServerFactory],
        options: Any,
    ) -> Deferred[Server[AddressT, ListeningOnT]]:
        """
        The first half of a creation: listen, and let clients wait. The second is
        :meth:`begin`. In between a daemon forks and drops its privileges.

        :param make_factory: makes the factory of the options, and raises what is
            wrong with them.
        :returns: a Deferred that fires with the server. It has fired already
            where no endpoint is in the way.
        """
        if isinstance(where, EndpointPlace):
            return Deferred.fromCoroutine(
                cls._bind_endpoint(where, make_factory, options)
            )
        return execute(cls._bind_now, where, make_factory, options)

    @classmethod
    def _bind_now(
        cls,
        where: WhereToListen[AddressT, ListeningOnT],
        make_factory: Callable[..., ServerFactory],
        options: Any,
    ) -> Server[AddressT, ListeningOnT]:
        given = options.get("socket")
        try:
            factory = make_factory(**options)
            if not isinstance(where, SocketPlace):
                raise TypeError(f"where={where!r} is not a WhereToListen")
        except BaseException:
            close_given(given)
            raise
        return cls(where, factory, listen_now(where, factory, given))

    @classmethod
    async def _bind_endpoint(
        cls,
        where: Any,
        make_factory: Callable[..., ServerFactory],
        options: Any,
    ) -> Server[AddressT, ListeningOnT]:
        given = options.get("socket")
        if given is not None:
            close_given(given)
            raise ValueError(f"socket={given!r} with an endpoint, which has its own")
        factory = make_factory(**options)
        factory.hold_starts()
        port = await listen_on_endpoint(
            where, factory, needs_sockets=factory.takes_sockets
        )
        return cls(where, factory, port)

    def begin(self) -> None:
        """
        Let clients in. The second half of a creation, see :meth:`bind`.

        :raises CannotListenError: there is no descriptor left to serve with. The
            server is closed then.
        """
        self._factory.begin_starts()
        if self._gate is not None and not self.is_closed:
            try:
                self._gate.open()
            except OSError as error:
                self.abandon()
                raise CannotListenError("", str(self._address), error) from error

    @classmethod
    def _create(
        cls,
        where: WhereToListen[AddressT, ListeningOnT],
        make_factory: Callable[..., ServerFactory],
        options: Any,
    ) -> Deferred[Server[AddressT, ListeningOnT]]:
        return cls.bind(where, make_factory, options).addCallback(_begun)

    @classmethod
    def _create_inet(
        cls,
        where: WhereToListen[InetAddress, int],
        make_factory: Callable[..., ServerFactory],
        options: Any,
    ) -> InetServer:
        if isinstance(where, SocketPlace) and isinstance(where.address, InetAddress):
            return _begun(cls._bind_now(where, make_factory, options))
        close_given(options.get("socket"))
        raise ValueError(f"where={where!r} is no inet address: use create")

    # Where it listens.

    @property
    def listening_on(self) -> ListeningOnT:
        """
        The port of an inet server, the path as it was given of a UNIX server,
        the address of any other. It still answers when closed.
        """
        if isinstance(self._where, SocketPlace):
            return cast(ListeningOnT, self._where.listening_on(self._address))
        return cast(ListeningOnT, self._address)

    @property
    def listening_on_address(self) -> AddressT:
        """The listening address. It still answers when closed (X6)."""
        return cast(AddressT, self._address)

    @property
    def listening_socket(self) -> socket_module.socket:
        """
        The real listening socket, for its options and for handing it on.
        Accepting on it circumvents ``max_connections`` and every other rule.

        :raises ServerClosed: it is closed.
        """
        listening = getattr(self._port, "socket", None)
        if self.is_closed or listening is None:
            raise ServerClosed(f"{self!r} has no listening socket any more")
        return cast(socket_module.socket, listening)

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

    # Closing.

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called, or a handler error has closed it."""
        return self._factory.is_closed

    def close(self, *, close_existing_connections: bool = False) -> Deferred[None]:
        """
        Accept nobody any more, and close the listening socket (X). No handler
        starts from now on. Any number of calls, from anywhere.

        :param close_existing_connections: close the sockets of all existing
            connections too, at once (X3): what the kernel took is delivered,
            what only this process holds is discarded, and their handlers read
            EOF. By default they go on to their end.
        :returns: a Deferred of one's own that fires when the listening socket is
            closed, its port free and its path unlinked; and with
            ``close_existing_connections`` every socket that existed at the call
            too. It does not wait for handlers:
            :meth:`close_finished_and_handlers_determined` does.
        """
        self._close_port()
        if not close_existing_connections:
            return self.close_finished()
        return all_of([self._factory.close_connections(), self.close_finished()])

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

    def failed(self) -> Deferred[None]:
        """
        :returns: a Deferred of one's own that fails with the first handler error
            that closed the server, also when asked for afterwards, and fires
            when everything has ended without one (E3). If nobody has asked when
            the error comes, it is logged as critical.
        """
        return self._factory.failed()

    def abandon(self) -> None:
        """
        Close the listening socket at once, before it has ever served and without
        a running reactor: for a daemon that fails to start.
        """
        if not self._is_port_closing:
            self._is_port_closing = True
            self._factory.close()
            close_at_once(self._port)

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

    @property
    def is_reporting_errors(self) -> bool:
        """Whether a call of ``on_handler_error`` has not ended yet."""
        return self._factory.is_reporting_errors

    @property
    def clock(self) -> Any:
        """What times this server: the ``clock`` it was given, or its reactor."""
        return self._factory.clock

    def _close_port(self) -> None:
        if self._is_port_closing:
            return
        self._is_port_closing = True
        if self._gate is not None:
            self._gate.close()
        self._factory.close()
        stopping = maybeDeferred(self._port.stopListening)
        # Not before close() has returned, however fast the port is (X1).
        if stopping.called:
            self._factory.reactor.callLater(0, self._when_port_stopped, stopping)
        else:
            self._when_port_stopped(stopping)

    def _when_port_stopped(self, stopping: Deferred[Any]) -> None:
        stopping.addErrback(self._port_failed_to_stop)
        stopping.addCallback(self._port_stopped)

    def _port_failed_to_stop(self, failure: Failure) -> None:
        self._log.failure("closing {port} failed", failure=failure, port=self._port)

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
        if self._when_over.has_happened and self.num_connections:
            raise AssertionError(f"live after the end: {self.describe()}")

    def describe(self) -> dict[str, Any]:
        """
        :returns: a JSON-able description: where it listens, its options and
            state, its connections and its counters (I4).
        """
        return {
            "where": str(self._where),
            "address": str(self._address),
            "listening_on": self.listening_on
            if isinstance(self.listening_on, (int, str))
            else str(self.listening_on),
            **self._factory.describe(),
        }

    def __repr__(self) -> str:
        factory = self._factory
        state = "closed" if self.is_closed else "listening"
        if factory.is_dropping:
            state += ", dropping"
        return (
            f"<Server on {self._where} {state}, "
            f"{factory.num_connections}/{factory.max_connections} connections>"
        )


def _begun(server: Server[AddressT, ListeningOnT]) -> Server[AddressT, ListeningOnT]:
    server.begin()
    return server


InetServer = Server[InetAddress, int]
UnixServer = Server[UNIXAddress, str]
