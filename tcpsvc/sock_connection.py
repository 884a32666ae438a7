"""
The connection of ``create_sock``: the handler has the socket itself.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from tcpsvc.connection import AddressT, Connection, Owner
from tcpsvc.kernel import close_orderly

SockHandler = Callable[[AddressT, socket.socket], object]


class SockConnection(Connection[AddressT]):
    """A client's connected, non-blocking socket, closed when its handler ends."""

    __slots__ = ("_handler", "_socket")

    def __init__(
        self,
        factory: Owner,
        id: int,
        peer: AddressT,
        client: socket.socket,
        handler: SockHandler[AddressT],
    ) -> None:
        super().__init__(factory, id, peer)
        self._socket = client
        self._handler = handler

    def start(self) -> None:
        """Run the handler with the address and the socket."""
        self._start(self._handler, self.peer, self._socket)

    def close_now(self) -> None:
        self._closed_by_server = True
        self._finish()

    def _finish(self) -> None:
        # The handler may have closed it, or taken its descriptor away.
        close_orderly(self._socket)
        self.socket_closed()
