"""
asyncio and uvloop: ``python -m benchmarks.servers.with_asyncio KIND [uvloop]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks.servers import BACKLOG, HOST, listens_on


class Echo(asyncio.Protocol):
    """Sends back what comes."""

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio. (uvloop's transport is no WriteTransport by class.)"""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._transport.write(data)


async def lines(reader: StreamReader, writer: StreamWriter) -> None:
    """Sends back each line."""
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            writer.write(line)
    writer.close()


async def chunks(reader: StreamReader, writer: StreamWriter) -> None:
    """Sends back whatever is there."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


async def oneshot(reader: StreamReader, writer: StreamWriter) -> None:
    """Sends one line back, and closes."""
    with contextlib.suppress(ConnectionError):
        writer.write(await reader.readline())
    writer.close()


HANDLERS: dict[
    str, Callable[[StreamReader, StreamWriter], Coroutine[Any, Any, None]]
] = {"lines": lines, "chunks": chunks, "oneshot": oneshot}


async def main(kind: str) -> None:
    """Serve until killed."""
    if kind == "protocol":
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Echo, HOST, 0, backlog=BACKLOG)
    else:
        server = await asyncio.start_server(HANDLERS[kind], HOST, 0, backlog=BACKLOG)
    listens_on(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    if "uvloop" in sys.argv[2:]:
        import uvloop

        uvloop.run(main(sys.argv[1]))
    else:
        asyncio.run(main(sys.argv[1]))
