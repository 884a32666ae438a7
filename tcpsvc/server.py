"""
A TCP or UNIX-socket server: how it is created, where it listens, what it tells of
itself.

:class:`Server` is put together of what is here, of its life from then on
(:mod:`tcpsvc.lifecycle`), and of what its owner sees and changes meanwhile
(:mod:`tcpsvc.control`).
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
from tcpsvc.control import Control
from tcpsvc.errors import ServerClosed
from tcpsvc.factory import ServerFactory
from tcpsvc.handler import OnHandlerError
from tcpsvc.interfaces import IServer
from tcpsvc.lifecycle import Lifecycle
from tcpsvc.listener import Listener
from tcpsvc.listeners import Listeners
from tcpsvc.options import Options, StreamOptions
from tcpsvc.places import Places, places_text
from tcpsvc.reader import Reader
from tcpsvc.where import AddressT, InetAddress, ListeningOnT
from tcpsvc.writer import Writer

if TYPE_CHECKING:
    from typing_extensions import Unpack

StreamHandler = Callable[[AddressT, Reader, Writer], object]
SockHandler = Callable[[AddressT, socket_module.socket], object]


@implementer(IServer)
class Server(Control, Lifecycle, Generic[AddressT, ListeningOnT]):
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
        super().__init__(listeners, factory)
        factory.server = self

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

    # Inspection.

    def invariant(self) -> None:
        """
        :raises AssertionError: the server's state is broken; it says how (I1).
        """
        self._factory.invariant()
        broken = self._broken_lifecycle()
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
        if factory.is_dropping_incoming_connections:
            state += ", dropping"
        return (
            f"<Server on {places_text(x.where for x in self.listeners)} {state}, "
            f"{factory.num_connections}/{factory.max_connections} connections>"
        )


InetServer = Server[InetAddress, int]
UnixServer = Server[UNIXAddress, str]
