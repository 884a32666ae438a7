"""
The connection of ``create_sock``: the handler has the socket itself.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from twisted.python.failure import Failure

from tcpsvc.connection import AddressT, Connection, Owner
from tcpsvc.kernel import (
    close_orderly,
    close_with_reset,
    has_eof,
    output_state,
    taken,
    taken_at_end,
    traffic,
)
from tcpsvc.reasons import Reason
from tcpsvc.snapshot import Bytes

SockHandler = Callable[[AddressT, socket.socket], object]


class SockConnection(Connection[AddressT]):
    """A client's connected, non-blocking socket, closed when its handler ends."""

    __slots__ = ("_handler", "_socket")

    def __init__(
        self,
        factory: Owner,
        id: int,
        peer: AddressT,
        handler: SockHandler[AddressT],
        client: socket.socket,
    ) -> None:
        super().__init__(factory, id, peer)
        self._socket = client
        self._handler = handler

    def start(self) -> None:
        """Run the handler with the address and the socket."""
        if self._closed_by_server:
            self.refuse()
            return
        self._start(self._handler, self.peer, self._socket)

    def _is_ordinary_end(self, failure: Failure) -> bool:
        # The socket was closed under it.
        return super()._is_ordinary_end(failure) or (
            self._closed_by_server
            and isinstance(failure.value, OSError)
            and failure.value.errno == errno.EBADF
        )

    def hold(self) -> None:
        """There is no slot yet: it waits as it is."""

    def close_now(self) -> None:
        self._closed_by_server = True
        self._finish()

    def abort(self) -> None:
        """Close with a reset."""
        if not self.is_socket_closed:
            self._closed_by_server = True
            self.ends_because(Reason.ABORTED)
            self._note_bytes()
            close_with_reset(self._socket)
            self.socket_closed()

    def _connected_socket(self) -> socket.socket:
        return self._socket

    def _bytes_seen(self) -> Bytes:
        return traffic(self._socket)

    def _bytes(self) -> Bytes:
        return taken(self._socket)

    def _bytes_at_end(self) -> Bytes:
        return taken_at_end(self._socket)

    def handler_ended(self, failure: Failure | None) -> None:
        """The handler has finished: with its socket at EOF, or not."""
        self._has_eof = has_eof(self._socket)
        super().handler_ended(failure)

    @property
    def bytes_waiting(self) -> int:
        return output_state(self._socket)[0] or 0

    def _finish(self) -> None:
        if self._factory.is_observed:
            self._note_bytes()
        # The handler may have closed it, or taken its descriptor away.
        close_orderly(self._socket)
        self.socket_closed()
