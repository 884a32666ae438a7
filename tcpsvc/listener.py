"""
One of the places where a server listens: its port, its gate, its address.
"""

from __future__ import annotations

import socket
from typing import Any, Generic, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure

from tcpsvc._waiters import Event
from tcpsvc.address_text import address_text
from tcpsvc.factory import ServerFactory
from tcpsvc.gate import Gate, can_gate
from tcpsvc.listening import close_at_once
from tcpsvc.where import AddressT, ListeningOnT, SocketPlace, WhereToListen


class Listener(Generic[AddressT, ListeningOnT]):
    """
    One of :attr:`tcpsvc.Server.listeners`. The server makes it, pauses it and
    closes it.
    """

    _log = Logger(namespace="tcpsvc")

    def __init__(
        self,
        where: WhereToListen[AddressT, ListeningOnT],
        port: IListeningPort,
        factory: ServerFactory,
        *,
        is_given: bool,
    ) -> None:
        """Not to be called: a server does."""
        self._where = where
        self._address = port.getHost()
        self._factory = factory
        #: Whether its socket was the caller's own (spec W7).
        self._is_given = is_given
        self.serve(port)
        if self._gate is None:
            self._log.warn(
                "accepting on {port} cannot be gated: clients beyond "
                "max_connections={limit} are held accepted, not in the backlog, and "
                "each takes a descriptor; overflow='reset' sends them away",
                port=port,
                limit=factory.max_connections,
            )

    # What it is.

    @property
    def where(self) -> WhereToListen[AddressT, ListeningOnT]:
        """Where it was asked to listen."""
        return self._where

    @property
    def address(self) -> AddressT:
        """Its address. It still answers while paused, and when closed."""
        return cast(AddressT, self._address)

    @property
    def listening_on(self) -> ListeningOnT:
        """
        The port of an inet listener, the path as it was given of a UNIX listener,
        the address of any other. It still answers while paused, and when closed.
        """
        if isinstance(self._where, SocketPlace):
            return cast(ListeningOnT, self._where.listening_on(self._address))
        return cast(ListeningOnT, self._address)

    @property
    def is_listening(self) -> bool:
        """
        Whether its socket is open, and clients can connect. That they are accepted
        is another matter.
        """
        return not self._is_stopping

    # For the server.

    def serve(self, port: IListeningPort) -> None:
        """Accept from a port, once the gate is opened by :meth:`begin`."""
        self.port: Any = port
        self._is_stopping = False
        self._stopped = Event()
        self._gate = Gate(port, self._factory) if can_gate(port) else None

    def begin(self) -> None:
        """
        Let clients in, unless the socket is closed.

        :raises OSError: there is no descriptor left to serve with.
        """
        if self._gate is not None and self.is_listening:
            self._gate.open()

    def update(self) -> bool:
        """
        Accept exactly while the factory has a place.

        :returns: whether it did not before, and does now.
        """
        gate = self._gate
        if gate is None:
            return False
        was_accepting = gate.is_accepting
        gate.update()
        return not was_accepting and gate.is_accepting

    @property
    def inherits_nodelay(self) -> bool:
        """Whether its connections have TCP_NODELAY from its socket."""
        return self._gate is not None and self._gate.inherits_nodelay

    @property
    def socket(self) -> socket.socket | None:
        """Its socket, while it is open and the port shows it."""
        return None if self._is_stopping else getattr(self.port, "socket", None)

    def again(self) -> SocketPlace[AddressT, ListeningOnT]:
        """
        Where to listen on the very same address once more.

        :raises ValueError: that cannot be promised; it says why.
        """
        if self._is_given:
            raise ValueError("a socket of one's own can be bound only once")
        where: Any = self._where
        return cast("SocketPlace[AddressT, ListeningOnT]", where.again(self._address))

    def stop(self) -> Deferred[None]:
        """
        Close the socket. Twice is once.

        :returns: a Deferred of one's own that fires when it is closed, also when
            that has failed, which is logged.
        """
        if not self._is_stopping:
            self._is_stopping = True
            if self._gate is not None:
                self._gate.close()
            stopped = self._stopped
            stopping = maybeDeferred(self.port.stopListening)
            stopping.addErrback(self._failed_to_stop)
            stopping.addCallback(lambda _: stopped.happen())
        return self._stopped.wait()

    def stop_at_once(self) -> None:
        """Close the socket now, without a running reactor. It has served nobody."""
        if not self._is_stopping:
            self._is_stopping = True
            if self._gate is not None:
                self._gate.close()
            close_at_once(self.port)
            self._stopped.happen()

    def _failed_to_stop(self, failure: Failure) -> None:
        self._log.failure("closing {port} failed", failure=failure, port=self.port)

    def describe(self) -> dict[str, Any]:
        """A JSON-able description."""
        listening_on = self.listening_on
        return {
            "where": str(self._where),
            "address": str(self._address),
            "listening_on": listening_on
            if isinstance(listening_on, (int, str))
            else str(listening_on),
            "is_listening": self.is_listening,
        }

    def __repr__(self) -> str:
        state = "listening" if self.is_listening else "not listening"
        return f"<Listener on {self._where} at {address_text(self._address)}, {state}>"
