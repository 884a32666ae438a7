"""
Accepting: who comes in, and how many at a time (spec A1, A6, D1, H5).

A :class:`Gate` stands in a port's ``doRead``. It asks the kernel for a client
only while there is a place for one, so ``max_connections`` is exact: whoever is
beyond it waits in the kernel's backlog.

The rule is :meth:`Entrance.has_place <tcpsvc.entrance.Entrance.has_place>`: a client is
accepted while the server is open, is not paused, and either drops (a dropped client
needs no slot) or has a free slot, or an overflow that needs none, and need not wait for
``accept_rate``. Everything that may change this calls :meth:`Gate.update`.

This file and :mod:`tcpsvc.port` are the only ones that know the inside of
:class:`twisted.internet.tcp.Port` (Twisted 24.7 to 26.10: ``doRead``,
``socket``, ``_preexistingSocket``, ``sessionno``, ``transport``, ``factory``,
``_buildAddr``).
"""

from __future__ import annotations

import os
import socket
from typing import Any, Protocol, cast

from twisted.internet import tcp
from twisted.internet.interfaces import IListeningPort
from twisted.python.failure import Failure

from tcpsvc.addresses import ipv4_address
from tcpsvc.counters import Counters
from tcpsvc.engine import Engine, engage
from tcpsvc.entrance import Entrance
from tcpsvc.error_log import ErrorLog
from tcpsvc.exhaustion import NEXT_CLIENT_ERRNOS, Exhaustion
from tcpsvc.handler import STOPPING
from tcpsvc.kernel import close_orderly, has_nodelay, is_readable, set_options
from tcpsvc.log_fields import of_client
from tcpsvc.overflow import Refusal, Reply
from tcpsvc.reasons import Reason
from tcpsvc.refusing import Replies, send_away
from tcpsvc.settings import Settings
from tcpsvc.transport import telling

#: How many lost clients in a row one turn of the reactor puts up with.
MAX_LOST_CLIENTS = 100

_INET = int(socket.AF_INET)
_STREAM = int(socket.SOCK_STREAM)
_HAS_ACCEPT = hasattr(socket.socket, "_accept")


def can_gate(port: IListeningPort) -> bool:
    """Whether accepting on a port can be gated: it is a TCP or UNIX port."""
    return isinstance(port, tcp.Port)


class Admits(Protocol):
    """What a gate asks, and whom it tells: the factory."""

    settings: Settings
    counters: Counters
    errors: ErrorLog
    exhaustion: Exhaustion
    entrance: Entrance
    replies: Replies
    takes_sockets: bool
    takes_streams: bool

    @property
    def is_observed(self) -> bool: ...

    def take_socket(self, client: socket.socket, address: Any) -> None: ...

    def forget_unconnected(self) -> None: ...

    def stop_reactor(self, error: BaseException) -> None: ...


class Gate:
    """
    Accepts for one port, by the rule of its factory.

    :param port: a port that :func:`can_gate`.
    :param factory: whose entrance knows the free slots and whether to drop or refuse;
        it takes who gets in, and knows when to rest because accepting fails.
    """

    def __init__(self, port: Any, factory: Admits) -> None:
        self._port = port
        self._factory = factory
        self._entrance = factory.entrance
        self._exhaustion = factory.exhaustion
        self._is_open = False
        #: Whether the port is read from. Nobody else starts or stops that.
        self._is_accepting = False
        self._family = int(port.socket.family) if _HAS_ACCEPT else None
        port.doRead = self.accept_batch
        if type(port) is tcp.Port and port._preexistingSocket is None:
            # An endpoint has opened it for us alone.
            set_options(port.socket, nodelay=True, keepalive=False)
        #: Whether connections have TCP_NODELAY from the listening socket.
        self.inherits_nodelay = has_nodelay(port.socket)
        #: Serves the connections; ``None`` where Twisted's own transports do.
        self._engine: Engine | None = None
        if isinstance(port.transport, type):
            self._choose_transports(port.transport)

    def _choose_transports(self, wanted: type) -> None:
        port = self._port
        if self._factory.settings.engine == "auto":
            self._engine = engage(port.reactor, wanted)
        if self._engine is not None:
            chosen = self._engine.transport_class
        else:
            # A reader and a writer count by themselves.
            chosen = telling(wanted, not self._factory.takes_streams)
        if hasattr(port, "serve_with"):
            port.serve_with(chosen)
        else:
            port.transport = chosen

    @property
    def is_accepting(self) -> bool:
        """Whether it asks the kernel for clients now."""
        return self._is_accepting

    def open(self) -> None:
        """
        Begin to accept.

        :raises OSError: there is no descriptor left for the engine.
        """
        if self._engine is not None:
            self._engine.reactor.stay()
        self._is_open = True
        self._exhaustion.enter(self)
        self.update()

    def close(self) -> None:
        """Accept no more, and leave nothing behind."""
        if self._engine is not None and self._is_open:
            self._engine.reactor.may_leave()
        self._is_open = False
        self._is_accepting = False
        self._exhaustion.leave(self)
        self._port.stopReading()

    def update(self) -> None:
        """Ask the kernel for clients exactly while there is a place for one."""
        if not self._is_open:
            return
        may_accept = self._exhaustion.pause is None and self._entrance.has_place()
        if may_accept is not self._is_accepting:
            self._is_accepting = may_accept
            if may_accept:
                self._port.startReading()
            else:
                self._port.stopReading()

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits to be accepted."""
        return is_readable(self._port.socket)

    def turn_away(self) -> None:
        """
        Accept a client, for which there is no descriptor but a moment, and close it.

        :raises OSError: as ``accept`` does; it is a ``BlockingIOError`` when nobody
            waits.
        """
        client, address = self._accept()
        how = self._factory.settings.refusal
        if self._entrance.is_dropping:
            self._send_away(client, address, Reason.DROPPED, "drop")
        elif isinstance(how, Reply):
            # It would keep the descriptor until the client has read it.
            self._send_away(client, address, Reason.SHED, "reset")
        else:
            self._send_away(client, address, Reason.SHED, how)

    def accept_batch(self) -> None:
        """The port is readable: accept what may come in."""
        factory = self._factory
        entrance = self._entrance
        exhaustion = self._exhaustion
        taken = lost = 0
        while taken < factory.settings.max_accepts_per_batch and entrance.has_place():
            try:
                client, address = self._accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in NEXT_CLIENT_ERRNOS and lost < MAX_LOST_CLIENTS:
                    lost += 1
                    continue
                exhaustion.failed(error)
                return
            if exhaustion.episode is not None:
                exhaustion.accepted()
            taken += 1
            host = address[0] if isinstance(address, tuple) else None
            refusal = entrance.refusal_of(host, address, self._port._buildAddr)
            if refusal is None:
                self._take(client, address)
            else:
                self._send_away(client, address, *refusal)
            if not self._is_open:
                return
        self.update()

    def _send_away(
        self, client: socket.socket, address: Any, reason: Reason, how: Refusal
    ) -> None:
        factory = self._factory
        if factory.is_observed:
            peer = self._port._buildAddr(_with_interface(address))
            self._entrance.refused(peer, reason)
        else:
            self._entrance.refused(None, reason)
        if not isinstance(how, Reply):
            send_away(client, how)
        elif factory.replies.say_next(how):
            self._take(client, address)
            factory.replies.nothing_to_say()
        else:
            send_away(client, "reset")

    def _accept(self) -> tuple[socket.socket, Any]:
        listening = self._port.socket
        if type(listening) is not socket.socket or self._family is None:
            return cast(tuple[socket.socket, Any], listening.accept())
        # What socket.accept() does, without looking its own family up as an enum
        # for each client (CPython 3.10 to 3.13): 2 of 30 µs of a connection.
        descriptor, address = listening._accept()  # type: ignore[attr-defined]
        try:
            client = socket.socket(self._family, _STREAM, 0, descriptor)
            return client, address
        except BaseException:
            os.close(descriptor)
            raise

    def _take(self, client: socket.socket, address: Any) -> None:
        port = self._port
        try:
            if len(address) == 4:
                address = _with_interface(address)
            if self._factory.takes_sockets and self._factory.replies.next is None:
                client.setblocking(False)
                self._factory.take_socket(client, port._buildAddr(address))
                return
            protocol = port.factory.buildProtocol(
                ipv4_address(address)
                if self._family == _INET
                else port._buildAddr(address)
            )
            if protocol is None:
                close_orderly(client)
                # A wrapping factory may have asked ours before.
                self._factory.forget_unconnected()
                return
            session = port.sessionno
            port.sessionno = session + 1
            transport = port.transport(
                client,
                protocol,
                address,
                port,
                session,
                self._engine.reactor if self._engine else port.reactor,
            )
        except BaseException as error:
            # A wrapping factory failed, or its protocol: nobody has the socket.
            self._failed(error, address)
            client.close()
            return
        try:
            protocol.makeConnection(transport)
        except BaseException as error:
            transport.abortConnection()
            self._failed(error, address)

    def _failed(self, error: BaseException, address: Any) -> None:
        peer = self._port._buildAddr(address)
        self._factory.errors.failure(
            "could not serve {client}", Failure(), **of_client(peer)
        )
        self._factory.forget_unconnected()
        if isinstance(error, STOPPING):
            self._factory.stop_reactor(error)


def _with_interface(address: Any) -> Any:
    """The address of a link-local IPv6 peer with its interface, as Twisted has it."""
    if not (isinstance(address, tuple) and len(address) == 4 and address[3]):
        return address
    host, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return (host, *address[1:])
