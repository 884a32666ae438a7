"""
The exceptions that tcpsvc raises itself. What asyncio or Twisted already name
(:exc:`asyncio.IncompleteReadError`, :exc:`asyncio.LimitOverrunError`,
:exc:`twisted.internet.error.CannotListenError`) is used as it is.
"""

from __future__ import annotations

from tcpsvc.reasons import Reason


class ConnectionGone(ConnectionError):
    """
    The connection that was written to is no longer there: the client has reset
    it, or the server has closed it (spec S4).

    A handler that ends with the ``ConnectionGone`` of its own connection has
    ended ordinarily; it is not reported to ``on_handler_error`` (spec H6).
    """

    #: The connection that is gone, to tell a handler's own from another's.
    connection: object = None

    #: Why it has ended, where that is known.
    reason: Reason | None = None


class BufferAgeLimitExceeded(ConnectionGone):
    """
    The client has not taken bytes for longer than ``buffer_age_limit`` and the
    connection was closed (spec S6). Unlike a plain :exc:`ConnectionGone` this is
    an error of the handler and goes to ``on_handler_error``.

    :ivar age: how long, in seconds, the oldest byte had waited.
    :ivar limit: the limit in seconds.
    """

    def __init__(self, age: float, limit: float) -> None:
        super().__init__(
            f"bytes in the write buffer are {age:.1f} s old, "
            f"more than buffer_age_limit={limit:g} s: the client does not read"
        )
        self.reason = Reason.TOO_OLD
        self.age = age
        self.limit = limit


class ServerClosed(RuntimeError):
    """
    The server is closed, or paused with its sockets closed, and something was asked
    of it that it cannot do any more (spec X6, Z5): its listening socket, a pause, or
    to go on.
    """
