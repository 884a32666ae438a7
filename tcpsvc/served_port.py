"""
The port of one listener: who is let in at it, its close, and its opening again.
"""

from __future__ import annotations

import socket
from typing import Any, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.python.failure import Failure

from tcpsvc._waiters import Event
from tcpsvc.factory import ServerFactory
from tcpsvc.gate import Gate, can_gate
from tcpsvc.listening import close_at_once
from tcpsvc.log import log
from tcpsvc.where import SocketPlace, WhereToListen


class ServedPort:
    """
    A port that a server listens with, and its gate where it can have one.

    :ivar where: where it was asked for.
    :ivar address: its address, whether it is open or not.
    """

    def __init__(
        self,
        where: WhereToListen[Any, Any],
        port: IListeningPort,
        factory: ServerFactory,
        *,
        is_given: bool,
    ) -> None:
        self.where = where
        self.address: Any = port.getHost()
        self._factory = factory
        #: Whether its socket was the caller's own (spec W7).
        self._is_given = is_given
        self.serve(port)
        if self._gate is None:
            log.warn(
                "accepting on {port} cannot be gated: clients beyond "
                "max_connections={limit} are held accepted, not in the backlog, and "
                "each takes a descriptor; overflow='reset' sends them away",
                port=port,
                limit=factory.max_connections,
            )

    @property
    def is_listening(self) -> bool:
        """Whether its socket is open."""
        return not self._is_stopping

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

    def again(self) -> SocketPlace[Any, Any]:
        """
        Where to listen on the very same address once more.

        :raises ValueError: that cannot be promised; it says why.
        """
        if self._is_given:
            raise ValueError("a socket of one's own can be bound only once")
        where: Any = self.where
        return cast("SocketPlace[Any, Any]", where.again(self.address))

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
        log.failure("closing {port} failed", failure=failure, port=self.port)
