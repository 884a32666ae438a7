"""
Why connections end, and why clients are not let in: one closed list, the same in
counters, events, logs and errors.
"""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """
    Why a connection has ended, or a client was refused. It is a string, too: its
    value, which counters are keyed by.

    What comes first counts: a connection whose handler has finished and whose client
    then resets it while the last bytes are sent has ended because it was finished.
    """

    # It has ended by itself.
    FINISHED = "finished"
    """The handler ended, or the protocol lost its connection, while the client had
    not."""
    EOF = "eof"
    """The client ended its side first; then the handler ended."""
    RESET = "reset"
    """The client reset it, or the network did."""
    ERROR = "error"
    """The handler raised."""

    # The server has ended it.
    CLOSED = "closed"
    """``close(close_existing_connections=True)``, or ``close`` of this one."""
    ABORTED = "aborted"
    """``abort`` by the handler or of this one."""
    CANCELLED = "cancelled"
    """``cancel_handlers``, or ``close(cancel_handlers=True)``."""
    DRAINED = "drained"
    """A drain closed what was left, or gave its handler the EOF that it had asked
    for."""
    EVICTED = "evicted"
    """It was idle for longest when another client came (``overflow="evict"``)."""
    FIRST_BYTE = "first_byte"
    """No byte came within ``first_byte_timeout``."""
    IDLE = "idle"
    """No byte came or went within ``idle_timeout``."""
    HANDLER_TIMEOUT = "handler_timeout"
    """The handler ran for longer than ``handler_timeout``."""
    LIFETIME = "lifetime"
    """It was there for longer than ``lifetime``."""
    SLOW = "slow"
    """It moved fewer bytes than ``min_throughput``."""
    TOO_OLD = "too_old"
    """The client did not take its bytes within ``buffer_age_limit``."""
    FLUSH_TIMEOUT = "flush_timeout"
    """The client did not take its last bytes within ``flush_timeout``."""

    # It was not let in.
    DROPPED = "dropped"
    """The server drops incoming connections."""
    OVERFLOW = "overflow"
    """``max_connections`` were there already."""
    PEER_CONNECTIONS = "peer_connections"
    """``max_connections_per_peer`` of its peer were there already."""
    PEER_RATE = "peer_rate"
    """Its peer came more often than ``accept_rate_per_peer``."""
    ACCEPT_RATE = "accept_rate"
    """Clients came more often than ``accept_rate``. Only in a dry run: else they
    wait."""
    DENIED = "denied"
    """Its address is in ``deny``, or not in ``allow``."""
    UNSERVED = "unserved"
    """
    The server was closing, or the application's factory built no protocol. Also the
    end of whoever had a slot by then, and whose handler had not started.
    """
    SHED = "shed"
    """There was no descriptor to serve it with (``on_exhaustion="shed"``)."""

    __str__ = str.__str__

    @property
    def is_refusal(self) -> bool:
        """Whether it says why a client was not let in."""
        return self in _REFUSALS


_REFUSALS = frozenset(
    {
        Reason.DROPPED,
        Reason.OVERFLOW,
        Reason.PEER_CONNECTIONS,
        Reason.PEER_RATE,
        Reason.ACCEPT_RATE,
        Reason.DENIED,
        Reason.UNSERVED,
        Reason.SHED,
    }
)


#: The limits, by the names of their options, and whom each ends or keeps out.
LIMITS = {
    "max_connections": Reason.OVERFLOW,
    "max_connections_per_peer": Reason.PEER_CONNECTIONS,
    "accept_rate_per_peer": Reason.PEER_RATE,
    "accept_rate": Reason.ACCEPT_RATE,
    "allow": Reason.DENIED,
    "deny": Reason.DENIED,
    "first_byte_timeout": Reason.FIRST_BYTE,
    "idle_timeout": Reason.IDLE,
    "handler_timeout": Reason.HANDLER_TIMEOUT,
    "lifetime": Reason.LIFETIME,
    "min_throughput": Reason.SLOW,
    "buffer_age_limit": Reason.TOO_OLD,
}
