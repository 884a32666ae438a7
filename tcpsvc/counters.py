"""
What a server counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """
    What has happened since the start.

    :ivar accepted: connections that took a slot.
    :ivar dropped: clients closed at once because the server was dropping.
    :ivar refused: connections closed without a handler: after ``close``, or
        because the application's factory built no protocol.
    :ivar finished: handlers that ended by themselves.
    :ivar left: handlers that ended because their connection was gone, or because
        the server cancelled them.
    :ivar failed: handlers that raised.
    :ivar later_errors: errors after a handler's first.
    :ivar too_old: connections closed by ``buffer_age_limit``.
    :ivar aborted: connections aborted because the client did not take its bytes.
    :ivar accept_errors: failed attempts to accept.
    """

    accepted: int = 0
    dropped: int = 0
    refused: int = 0
    finished: int = 0
    left: int = 0
    failed: int = 0
    later_errors: int = 0
    too_old: int = 0
    aborted: int = 0
    accept_errors: int = 0
