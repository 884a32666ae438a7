"""
gevent: ``python -m benchmarks.servers.with_gevent KIND``.
"""

from __future__ import annotations

import contextlib
import sys

from gevent.server import StreamServer
from gevent.socket import socket

from benchmarks.servers import BACKLOG, HOST, listens_on


def lines(client: socket, address: object) -> None:
    """Sends back each line."""
    with contextlib.suppress(ConnectionError), client.makefile("rb") as reader:
        while line := reader.readline():
            client.sendall(line)


def chunks(client: socket, address: object) -> None:
    """Sends back whatever is there."""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65536):
            client.sendall(data)


def oneshot(client: socket, address: object) -> None:
    """Sends one line back, and is finished: gevent closes the socket."""
    with contextlib.suppress(ConnectionError), client.makefile("rb") as reader:
        client.sendall(reader.readline())


HANDLERS = {"lines": lines, "chunks": chunks, "oneshot": oneshot}


def main(kind: str) -> None:
    """Serve until killed."""
    server = StreamServer((HOST, 0), HANDLERS[kind], backlog=BACKLOG)
    server.start()
    listens_on(server.server_port)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
