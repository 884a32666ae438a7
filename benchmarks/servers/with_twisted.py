"""
Twisted as it is: ``python -m benchmarks.servers.with_twisted KIND``.

Twisted has no streams. ``chunks`` is what its users write when they want a coroutine
for each client; ``lines`` and ``oneshot`` are its own ``LineOnlyReceiver``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure
from twisted.python.log import startLogging

from benchmarks.servers import BACKLOG, HOST, listens_on


class Echo(Protocol):
    """Sends back what comes."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class EchoLines(LineOnlyReceiver):
    """Sends back each line."""

    delimiter = b"\n"
    transport: Any

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def lineReceived(self, line: bytes) -> None:
        self.sendLine(line)


class EchoOneLine(EchoLines):
    """Sends one line back, and closes."""

    def lineReceived(self, line: bytes) -> None:
        self.sendLine(line)
        self.transport.loseConnection()


class EchoChunks(Echo):
    """Sends back whatever is there, from a coroutine that awaits a Deferred."""

    def connectionMade(self) -> None:
        super().connectionMade()
        self._unread = b""
        self._is_over = False
        self._waiting: Deferred[bytes] | None = None
        # An error here would be one of the benchmark: Twisted logs it.
        ensureDeferred(self._serve())

    async def _serve(self) -> None:
        while data := await self._read():
            self.transport.write(data)

    def _read(self) -> Deferred[bytes]:
        if self._unread or self._is_over:
            data, self._unread = self._unread, b""
            return succeed(data)
        self._waiting = Deferred()
        return self._waiting

    def dataReceived(self, data: bytes) -> None:
        if self._waiting is None:
            self._unread += data
        else:
            waiting, self._waiting = self._waiting, None
            waiting.callback(data)

    def connectionLost(self, reason: Failure | None = None) -> None:
        self._is_over = True
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.callback(b"")


PROTOCOLS: dict[str, type[Protocol]] = {
    "protocol": Echo,
    "lines": EchoLines,
    "chunks": EchoChunks,
    "oneshot": EchoOneLine,
}


def main(kind: str) -> None:
    """Serve until killed."""
    from twisted.internet import reactor

    the_reactor: Any = reactor
    factory = Factory.forProtocol(PROTOCOLS[kind])
    port = the_reactor.listenTCP(0, factory, backlog=BACKLOG, interface=HOST)
    listens_on(port.getHost().port)
    the_reactor.run()


if __name__ == "__main__":
    with open(os.devnull, "w", encoding="utf-8") as log:
        startLogging(log, setStdout=False)
        main(*sys.argv[1:])
