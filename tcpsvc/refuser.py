"""
Protocols that end their connection at once.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from tcpsvc import kernel


class Refuser(Protocol):
    """
    Ends its connection at once with FIN.

    ``None`` from ``buildProtocol`` would do that on a plain port only; behind a
    wrapping factory (TLS, PROXY, policies) it leaves the client hanging
    (https://github.com/twisted/twisted/issues/5232).
    """

    def makeConnection(self, transport: Any) -> None:
        """Close it: orderly where the socket is there, else as can be."""
        base = kernel.base_transport(transport)
        lose = getattr(base, "connectionLost", None)
        if lose is None or base is not transport:
            transport.abortConnection()
        else:
            lose(Failure(ConnectionDone()))

    def dataReceived(self, data: bytes) -> None:
        """It is not listened to."""


class Aborter(Refuser):
    """Ends its connection at once with RST."""

    def makeConnection(self, transport: Any) -> None:
        """Reset it."""
        transport.abortConnection()
