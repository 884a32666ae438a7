"""
tcpsvc: ``python -m benchmarks.servers.with_tcpsvc KIND [ENGINE]``.

The limits, the error policy and the age limit of buffers are on, as they are for any
user, and there is a log, as twistd keeps one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TextIO

from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import react
from twisted.python.log import startLogging

import tcpsvc
from benchmarks.servers import BACKLOG, listens_on
from tcpsvc import CHOSEN_BY_OS, LOCALHOST, Reader, Server, WhereToListen, Writer


class Echo(Protocol):
    """Sends back what comes."""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


async def lines(address: object, reader: Reader, writer: Writer) -> None:
    """Sends back each line."""
    while line := await reader.readline():
        writer.write(line)


async def chunks(address: object, reader: Reader, writer: Writer) -> None:
    """Sends back whatever is there."""
    while data := await reader.read(65536):
        writer.write(data)


async def oneshot(address: object, reader: Reader, writer: Writer) -> None:
    """Sends one line back, and is finished."""
    writer.write(await reader.readline())


HANDLERS: dict[str, Callable[[Any, Reader, Writer], Coroutine[Any, Any, None]]] = {
    "lines": lines,
    "chunks": chunks,
    "oneshot": oneshot,
}


async def main(
    reactor: object, log: TextIO, kind: str, engine: Literal["auto", "reactor"] = "auto"
) -> None:
    """
    Serve until killed.

    :param log: where the log is written.
    :param engine: what to serve with.
    """
    where = WhereToListen.bind_to(LOCALHOST, CHOSEN_BY_OS)
    server: tcpsvc.InetServer
    if kind == "protocol":
        server = await Server.create_protocol(
            where,
            Factory.forProtocol(Echo),
            on_handler_error=tcpsvc.log_error,
            backlog=BACKLOG,
            engine=engine,
        )
    else:
        server = await Server.create(
            where,
            HANDLERS[kind],
            on_handler_error=tcpsvc.log_error,
            backlog=BACKLOG,
            engine=engine,
        )
    listens_on(server.listening_on)
    # Not earlier: what goes wrong before is to be seen on stderr.
    startLogging(log, setStdout=False)
    await server.close_finished_and_handlers_determined()


if __name__ == "__main__":
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        react(main, [nowhere, *sys.argv[1:]])
