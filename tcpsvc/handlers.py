"""
Ready-made handlers: the classic small services, and one worth copying.

Run one with ``twistd -n tcpsvc --handler tcpsvc.handlers.commands``.
"""

from __future__ import annotations

from asyncio import LimitOverrunError
from datetime import datetime

from tcpsvc.reader import Reader
from tcpsvc.writer import Writer


async def echo(address: object, reader: Reader, writer: Writer) -> None:
    """Send back what comes (RFC 862)."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def discard(address: object, reader: Reader, writer: Writer) -> None:
    """Read everything, answer nothing (RFC 863)."""
    await reader.drain_to_eof()


async def daytime(address: object, reader: Reader, writer: Writer) -> None:
    """Send the date and time, and close (RFC 867)."""
    now = datetime.now().astimezone()
    writer.write(now.isoformat(sep=" ", timespec="seconds").encode() + b"\r\n")


async def chargen(address: object, reader: Reader, writer: Writer) -> None:
    """Send rotating lines of characters until the client leaves (RFC 864)."""
    characters = bytes(range(32, 127))
    first = 0
    # Ends with ConnectionGone, which is an ordinary end (spec H6).
    while True:
        line = (characters + characters)[first : first + 72]
        writer.write(line + b"\r\n")
        await writer.drain()
        first = (first + 1) % len(characters)


async def commands(address: object, reader: Reader, writer: Writer) -> None:
    """
    A small line protocol, to copy: ``echo TEXT``, ``time``, ``quit``.

    It shows what a line-based handler has to think of: lines that end in
    ``\\r\\n`` or ``\\n``, a line that is too long, an unknown command, a client that
    leaves in mid-line, one that reads slowly, and an orderly end.
    """
    writer.write(b"commands: echo TEXT, time, quit\r\n")
    while True:
        try:
            line = await reader.readline()
        except LimitOverrunError:
            # It stays in the buffer: there is no way to the next line but past it.
            writer.write(b"error: line too long\r\n")
            return
        if not line.endswith(b"\n"):
            return  # EOF, perhaps in mid-line: an unfinished command is not run.
        command, _, text = line.strip().partition(b" ")
        if command == b"echo":
            writer.write(text + b"\r\n")
        elif command == b"time":
            now = datetime.now().astimezone()
            writer.write(now.isoformat(timespec="seconds").encode() + b"\r\n")
        elif command == b"quit":
            writer.write(b"bye\r\n")
            return  # What was written is sent, then the connection is closed.
        elif command:
            writer.write(b"error: unknown command\r\n")
        await writer.drain()  # Do not answer faster than the client reads.
