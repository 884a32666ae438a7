"""
Transports that judge the judge: those that must agree, and those that must not.

::

    python -m tests.conformance --tcp-transport tests.conformance.stand_ins.SameTCP \\
        --unix-transport tests.conformance.stand_ins.SameUNIX
    python -m tests.conformance --tcp-transport tests.conformance.stand_ins.LosesBytes
"""

from __future__ import annotations

import os
import signal

from twisted.internet import tcp, unix


class SameTCP(tcp.Server):
    """Twisted's."""


class SameUNIX(unix.Server):
    """Twisted's."""


class LosesBytes(tcp.Server):
    """Closes at once, whatever still waits to be sent."""

    def loseConnection(self) -> None:
        self.abortConnection()


class Dies(tcp.Server):
    """Ends the process when the peer closes: a test that has no outcome."""

    def readConnectionLost(self, reason: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(tcp.Server):
    """Does not return when the connection ends: a test that trial cannot end."""

    def connectionLost(self, reason: object) -> None:
        while True:
            signal.pause()
