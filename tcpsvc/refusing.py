"""
How a client that is not let in is sent away: with FIN, with a reset, or with a
last word.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

from twisted.python.failure import Failure

from tcpsvc.counters import Counters
from tcpsvc.error_log import ErrorLog
from tcpsvc.kernel import close_orderly, close_with_reset
from tcpsvc.log_fields import of_client
from tcpsvc.overflow import Refusal, Reply
from tcpsvc.reasons import Reason
from tcpsvc.settings import Settings
from tcpsvc.stream_connection import StreamConnection
from tcpsvc.sweeper import Sweeper
from tcpsvc.whereabouts import Whereabouts

#: How long a client may take for a last word, in seconds.
REPLY_TIMEOUT = 5.0

#: How many clients are given one at a time; more are reset. Each costs a descriptor.
MOST_REPLIES = 256


def send_away(client: socket.socket, how: Refusal) -> None:
    """Close an accepted socket, with FIN (``"drop"``) or RST."""
    if how == "drop":
        close_orderly(client)
    else:
        close_with_reset(client)


class Replies:
    """
    Clients that are being given a last word. None of them is a live connection of the
    server: they hold no slot, and nobody waits for them.

    Their connections are those of stream handlers: what was written is sent, and the
    client reads it also when it has sent something itself. This is their owner.

    :param owner: the factory, for its clock and its address.
    :ivar next: what the next client is told instead of being served.
    """

    is_observed = looks = False

    def __init__(self, owner: Any) -> None:
        self.reactor = owner.reactor
        self.clock = owner.clock
        # As they are now: of what can be changed a last word uses keepalive, for which
        # the owner is asked, and no other that is not replaced here. What comes in is
        # discarded, and its handler waits for nothing.
        self.settings: Settings = replace(
            owner.settings, flush_timeout=REPLY_TIMEOUT, buffer_age_limit=None
        )
        self.counters = self.events = Counters()
        self.errors: ErrorLog = owner.errors
        #: Not asked for: nobody asks for their own addresses.
        self.whereabouts = Whereabouts()
        self.whereabouts.is_anywhere = False
        self._owner = owner
        self._connections: dict[int, StreamConnection[Any]] = {}
        self.sweeper = Sweeper(self.clock, self._connections)
        self.next: Reply | None = None

    @property
    def may_reply(self) -> bool:
        """Whether there is room for one more."""
        return len(self._connections) < MOST_REPLIES

    def reply(self, address: Any, id: int, reply: Reply) -> StreamConnection[Any]:
        """The protocol of a client that is given a last word."""

        def write(peer: Any, reader: Any, writer: Any) -> None:
            writer.write(reply.data)

        connection = StreamConnection[Any](self, id, address, write)
        self._connections[id] = connection
        return connection

    def say_next(self, reply: Reply) -> bool:
        """
        The next client is told this, and not served.

        :returns: whether that can be done.
        """
        if not self.may_reply:
            return False
        self.next = reply
        return True

    def nothing_to_say(self) -> None:
        """Whoever was to be told something has been, or never will be."""
        self.next = None

    def forget_unconnected(self, id: int) -> None:
        """Whoever was to connect one has failed to."""
        self.next = None
        connection = self._connections.get(id)
        if connection is not None and connection.transport is None:
            connection.forget()

    def broken(self) -> list[str]:
        """What does not hold, and ought to."""
        broken = [f"of last words: {check}" for check in self.sweeper.broken()]
        if len(self._connections) > MOST_REPLIES:
            broken.append("not too many are given a last word")
        return broken

    def close(self) -> None:
        """Close all: what the kernel took is delivered."""
        for connection in list(self._connections.values()):
            connection.close_now()

    # What the connections ask and tell (Owner).

    #: A last word is soon over.
    is_draining = False

    @property
    def is_closed(self) -> bool:
        """Whether the server is."""
        return bool(self._owner.is_closed)

    def set_socket_options(self, connected: Any) -> None:
        """What is set on each connection's socket."""
        self._owner.set_socket_options(connected)

    def connected(self, connection: Any) -> None:
        """Its transport is there: in a later turn, as of any."""
        self.reactor.callLater(0, self._start, connection)

    def _start(self, connection: Any) -> None:
        if connection.is_socket_closed or self.is_closed:
            connection.refuse()
        else:
            connection.start()

    def lets_pass(self, connection: Any, reason: Reason) -> bool:
        """There are no limits, and so no dry runs of them."""
        return False

    def descriptor_closed(self) -> None:
        """One more for the server."""
        self._owner.descriptor_closed()

    def release(self, connection: Any, error: Failure | None) -> None:
        """It is over."""
        self._connections.pop(connection.id, None)
        self.sweeper.forget(connection)

    def report(self, peer: Any, error: Failure) -> None:
        """It has no handler that could fail."""
        self.errors.failure("a last word to {client} failed", error, **of_client(peer))

    def uncount(self, connection: Any) -> None:
        """It holds no slot anyway."""

    def holds_slot(self, connection: Any) -> bool:
        """Never."""
        return False

    def may_say(self, of: Reason | str) -> bool:
        """That they are refused is said."""
        return False

    def stop_reactor(self, error: BaseException) -> None:
        """It has no handler that could ask for that."""
