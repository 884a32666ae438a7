"""
trio: ``python -m benchmarks.servers.with_trio chunks``.

Its streams read whatever is there. They have no ``readline``, so there are no other
kinds.
"""

from __future__ import annotations

import trio

from benchmarks.servers import BACKLOG, HOST, listens_on


async def chunks(stream: trio.SocketStream) -> None:
    """Sends back whatever is there."""
    try:
        while data := await stream.receive_some(65536):
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass


async def main() -> None:
    """Serve until killed."""
    listeners = await trio.open_tcp_listeners(0, host=HOST, backlog=BACKLOG)
    listens_on(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(chunks, listeners)


if __name__ == "__main__":
    trio.run(main)
