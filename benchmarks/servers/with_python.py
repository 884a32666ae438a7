"""
Python, with nothing but epoll: ``python -m benchmarks.servers.with_python KIND``.

The counterpart of ``with_epoll.c``: what the kernel costs when it is asked from
Python, and so the least that is possible in Python. It is a floor and no example: it
has no buffers, so it relies on the load, which never sends more than it has room to
receive, and sends a line in one piece.
"""

from __future__ import annotations

import select
import socket
import sys

from benchmarks.servers import BACKLOG, HOST, listens_on

EVENTS = 256


def accept_all(
    poller: select.epoll, listener: socket.socket, clients: dict[int, socket.socket]
) -> None:
    """Watch whoever has come."""
    while True:
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        clients[client.fileno()] = client
        poller.register(client.fileno(), select.EPOLLIN)


def send_all(client: socket.socket, data: bytes) -> None:
    """Send all; wait where the socket is full, which this load does not let happen."""
    sent = client.send(data)
    while sent < len(data):
        try:
            sent += client.send(memoryview(data)[sent:])
        except BlockingIOError:
            pass


def serve(kind: str) -> None:
    """Serve until killed."""
    is_oneshot = kind == "oneshot"
    listener = socket.create_server((HOST, 0), backlog=BACKLOG)
    listener.setblocking(False)
    poller = select.epoll()
    poller.register(listener.fileno(), select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    listens_on(listener.getsockname()[1])
    listening = listener.fileno()
    while True:
        for descriptor, _ in poller.poll(-1, EVENTS):
            if descriptor == listening:
                accept_all(poller, listener, clients)
                continue
            client = clients[descriptor]
            try:
                data = client.recv(65536)
                if data:
                    send_all(client, data)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if is_oneshot or not data:
                del clients[descriptor]
                client.close()


if __name__ == "__main__":
    serve(sys.argv[1])
