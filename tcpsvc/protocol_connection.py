"""
The connection of ``create_protocol``: the handler is a protocol of the
application's own, built by its own factory (spec P).

It stands between the transport and the protocol so that the protocol's errors,
and its end, are seen: an exception that reached the reactor would only be
logged there.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IHandshakeListener,
    ILoggingContext,
    IProtocol,
    IProtocolFactory,
)
from twisted.python.failure import Failure
from zope.interface import alsoProvides, implementer

from tcpsvc import kernel
from tcpsvc.connection import AddressT, Connection, Owner
from tcpsvc.reasons import Reason
from tcpsvc.refuser import Refuser
from tcpsvc.snapshot import Bytes
from tcpsvc.transport import tells

#: What a protocol's own interfaces are passed on for.
_OPTIONAL = (IHalfCloseableProtocol, IHandshakeListener, IFileDescriptorReceiver)

_ORDINARY_REASONS: list[type[Exception]] = [
    ConnectionDone,
    ConnectionLost,
    ConnectionAborted,
]
with contextlib.suppress(ImportError):
    from OpenSSL.SSL import Error

    _ORDINARY_REASONS.append(Error)
with contextlib.suppress(ImportError):
    # What Twisted's certificate verification ends a connection with.
    from service_identity import VerificationError

    _ORDINARY_REASONS.append(VerificationError)


class _Below:
    """
    Watches what is below TLS: its socket is to be asked before it is closed.
    """

    def __init__(self, connection: ProtocolConnection[Any], base: Any) -> None:
        self._connection = connection
        self._base = base

    def blocked(self) -> None:
        """Of no interest."""

    sent = blocked

    def losing(self) -> None:
        """Ask it now."""
        self._connection.losing()

    def lost(self, protocol: Any, reason: Failure) -> None:
        """Nothing is left to watch."""
        self._base.watcher = None
        if reason.check(ConnectionAborted):  # TLS has another name for it.
            self._connection.ends_because(Reason.ABORTED)
        protocol.connectionLost(reason)

    def failed(self, failure: Failure) -> bool:
        """It is as it would be without us."""
        return False

    def unhandled(self, failure: Failure) -> None:
        """But for the log."""
        self._connection.unhandled(failure)


@implementer(IProtocol, ILoggingContext)
class ProtocolConnection(Connection[AddressT]):
    """A live connection whose handler is a protocol."""

    __slots__ = (
        "__provides__",
        "_base",
        "_connected",
        "_has_transport",
        "_is_held",
        "_protocol",
        "_user_factory",
        "transport",
    )

    def __init__(
        self, factory: Owner, id: int, peer: AddressT, user_factory: IProtocolFactory
    ) -> None:
        super().__init__(factory, id, peer)
        self._user_factory = user_factory
        self._protocol: Any = None
        self._is_held = False
        #: Whether the protocol has been connected.
        self._has_transport = False
        self.transport: Any = None
        #: The lowest transport, and its socket, if it has one.
        self._base: Any = None
        self._connected: socket.socket | None = None

    def hold(self) -> None:
        """There is no slot yet: the protocol is not even built."""
        self._is_held = True

    def build(self) -> bool:
        """
        Build the protocol.

        :returns: false when the application's factory refuses with ``None``.
        """
        try:
            protocol = self._user_factory.buildProtocol(self.peer)  # type: ignore[arg-type]
        except BaseException:
            self.fail(Failure())
            protocol = Refuser()
        if protocol is None:
            return False
        self._protocol = protocol
        for interface in _OPTIONAL:
            if interface.providedBy(protocol):
                alsoProvides(self, interface)
        return True

    def connectionMade(self) -> None:
        """What :meth:`makeConnection` does is all there is."""

    # The transport's side.

    def makeConnection(self, transport: Any) -> None:
        """The connection is there."""
        self.transport = transport
        base = self._base = kernel.base_transport(transport)
        self._connected = kernel.socket_of(base)
        if self._connected is not None:
            self._factory.set_socket_options(self._connected)
        if tells(base) and base is not transport:
            base.watcher = _Below(self, base)
        # Whoever is told of it may close it, or the server.
        self._is_delivering = True
        if self._is_held:
            transport.pauseProducing()
            self._factory.connected(self)
        elif self._factory.is_closed or self._closed_by_server:
            self.refuse()
        else:
            self._connect()
        self._is_delivering = False

    def start(self) -> None:
        """A slot is free for a connection that was held."""
        self._is_held = False
        if self.is_socket_closed:
            self.forget()  # The client has left meanwhile.
            return
        if self._closed_by_server:
            self.refuse()
            return
        if not self.build():
            self._protocol = Refuser()
        self.transport.resumeProducing()
        self._connect()

    def _connect(self) -> None:
        self.starts()
        if self.is_socket_closed:
            return  # By whoever was told of it.
        self._has_transport = True
        if tells(self.transport):
            # Its own protocol may be the application's, which may put another in
            # its place: the last word comes to us all the same.
            self.transport.watcher = self
            if self.transport.tells_errors:  # Which we stand in between for.
                self.transport.protocol = self._protocol
        self._guard(self._protocol.makeConnection, self.transport)

    def dataReceived(self, data: bytes) -> None:
        """Pass bytes on."""
        self._has_received = True
        self._guard(self._protocol.dataReceived, data)

    # What a transport tells (Watcher).

    def blocked(self) -> None:
        """Of no interest: the protocol looks after that itself."""

    sent = blocked

    def losing(self) -> None:
        """The socket is about to be closed: ask it now."""
        if self._factory.is_observed:
            self._note_bytes()

    def failed(self, failure: Failure) -> bool:
        """The protocol raised."""
        self._failed(failure)
        return True

    def lost(self, protocol: Any, reason: Failure) -> None:
        """The end of the protocol that the transport serves, ours or another."""
        if getattr(self.transport, "TLS", False) and not self.transport.tells_errors:
            protocol.connectionLost(reason)  # It is TLS, around us, and tells us.
            return
        if protocol is not self:
            self._protocol = protocol
        self.connectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        """The protocol's end."""
        if self.is_socket_closed:
            return
        self._note_end(reason)
        self.socket_closed()
        if self._handler_state != "running":
            return  # The protocol has not heard of it.
        if self._closed_by_server:
            # TLS tells of a truncated stream; here it is we who cut it (spec P2).
            reason = Failure(ConnectionDone())
        ended_by: Failure | None = None
        if not reason.check(*_ORDINARY_REASONS):
            ended_by = reason
        try:
            if self._has_transport:
                self._protocol.connectionLost(reason)
        except BaseException:
            raised = Failure()
            if ended_by is not None:
                self.fail(ended_by)
            ended_by = raised
        self.handler_ended(ended_by or self._error)

    def _note_end(self, reason: Failure) -> None:
        """Why it ends, where nothing has said so before."""
        if reason.check(ConnectionAborted):
            self.ends_because(Reason.ABORTED)
        elif self._has_eof or (tells(self.transport) and self.transport.has_eof):
            self.ends_because(Reason.EOF)
        elif getattr(self.transport, "disconnecting", False):
            self.ends_because(Reason.FINISHED)
        elif reason.check(ConnectionDone):
            self.ends_because(Reason.EOF)
        elif reason.check(*_ORDINARY_REASONS):
            self.ends_because(Reason.RESET)

    def readConnectionLost(self) -> None:
        """The client's FIN, for an IHalfCloseableProtocol."""
        if not getattr(self.transport, "disconnecting", False):
            self._has_eof = True
        self._guard(self._protocol.readConnectionLost)

    def writeConnectionLost(self) -> None:
        """Our FIN has gone out, for an IHalfCloseableProtocol."""
        self._guard(self._protocol.writeConnectionLost)

    def handshakeCompleted(self) -> None:
        """TLS is up, for an IHandshakeListener."""
        self._guard(self._protocol.handshakeCompleted)

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """A descriptor came, for an IFileDescriptorReceiver."""
        self._guard(self._protocol.fileDescriptorReceived, descriptor)

    def logPrefix(self) -> str:
        """The protocol's own prefix for lines of Twisted's legacy log."""
        if ILoggingContext.providedBy(self._protocol):
            return str(self._protocol.logPrefix())
        return type(self._protocol).__name__

    def _guard(self, method: Any, *args: Any) -> None:
        was_delivering = self._is_delivering
        self._is_delivering = True
        try:
            method(*args)
        except BaseException:
            self._failed(Failure())
        finally:
            self._is_delivering = was_delivering

    def _failed(self, failure: Failure) -> None:
        """The protocol raised: its first error counts, its connection ends."""
        self.ends_because(Reason.ERROR)
        self.fail(failure)
        self.transport.abortConnection()

    # The life of the connection.

    def close_now(self) -> None:
        if self.is_socket_closed:
            return
        self._closed_by_server = True
        if self.transport is None:
            return  # Closed at makeConnection, which is still to come.
        if self.reason is Reason.ABORTED:
            self.transport.abortConnection()  # Perhaps again: it stays a reset.
            return
        if not self._close_socket(self.transport):
            self.transport.loseConnection()

    def abort(self) -> None:
        """Close with a reset."""
        if not self.is_socket_closed:
            self.ends_because(Reason.ABORTED)
            if self.transport is None:
                self._closed_by_server = True
            else:
                self.transport.abortConnection()

    def _let_go(self) -> None:
        if tells(self.transport):
            self.transport.watcher = None

    def _connected_socket(self) -> socket.socket | None:
        return None if self.is_socket_closed else self._connected

    @property
    def has_received(self) -> bool:
        if self._base is self.transport:
            return super().has_received
        return self._has_received  # The rest is TLS's.

    def _bytes_seen(self) -> Bytes:
        base = self._base
        if hasattr(base, "bytes_in"):
            return base.bytes_in, base.bytes_out  # Also afterwards.
        return kernel.traffic(self._connected_socket())

    def _bytes(self) -> Bytes:
        if hasattr(self._base, "bytes_in"):
            return self._bytes_seen()
        return kernel.taken(self._connected_socket())

    def _bytes_at_end(self) -> Bytes:
        if hasattr(self._base, "bytes_in"):
            return self._bytes_seen()
        return kernel.taken_at_end(self._connected_socket())

    @property
    def bytes_waiting(self) -> int:
        return getattr(self._base, "unsent", 0)

    def _finish(self) -> None:
        """The handler ends with its socket: there is nothing left to send."""
