"""The ready-made handlers, on real sockets (issue 2, section 3)."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

import pytest
from pytest_twisted import ensureDeferred

from tcpsvc import handlers
from tests.support import Client, in_thread, turn, until


@ensureDeferred
async def test_echo_sends_back_what_comes(serve: Any, connect: Any) -> None:
    """RFC 862: every byte, in order, until the client has finished."""
    server = await serve(handlers.echo, on_handler_error="raise")
    client = connect(server)
    data = bytes(range(256)) * 10_000
    sent = in_thread(client.send, data)
    assert await in_thread(client.read, len(data)) == data
    await sent
    assert await in_thread(client.finish) == b""
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_echo_holds_back_a_client_that_does_not_read(
    serve: Any, connect: Any
) -> None:
    """It buffers no more than it must: the client is stopped, not the server."""
    server = await serve(handlers.echo, on_handler_error="raise")
    client = connect(server)
    client.socket.settimeout(0)
    sent = 0
    idle = 0
    # Each turn lets the server take what it wants, until it wants no more.
    while idle < 20:
        try:
            sent += client.socket.send(b"x" * 65536)
            idle = 0
        except BlockingIOError:
            idle += 1
            await turn(0.001)
    (connection,) = server.describe()["connections"]
    assert connection["bytes_in"] < sent
    client.socket.settimeout(10)
    assert len(await in_thread(client.finish)) == sent


@ensureDeferred
async def test_discard_reads_everything_and_answers_nothing(
    serve: Any, connect: Any
) -> None:
    """RFC 863: also much more than any buffer, and then FIN."""
    server = await serve(handlers.discard, on_handler_error="raise")
    client = connect(server)
    await in_thread(client.send, b"x" * 5_000_000)
    assert server.num_connections == 1
    assert await in_thread(client.finish) == b""
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_daytime_says_the_time_and_closes(serve: Any, connect: Any) -> None:
    """RFC 867: one line, with its zone; what the client sends does not matter."""
    server = await serve(handlers.daytime, on_handler_error="raise")
    client = connect(server)
    client.send(b"what time is it?")
    said = await in_thread(client.read_all)
    assert said.endswith(b"\r\n")
    time = datetime.fromisoformat(said.decode("ascii").rstrip())
    assert time.tzinfo is not None
    assert abs(datetime.now().astimezone() - time) < timedelta(minutes=1)


@ensureDeferred
async def test_chargen_sends_rotating_lines(serve: Any, connect: Any) -> None:
    """RFC 864: 72 characters, each line one further, round and round."""
    server = await serve(handlers.chargen, on_handler_error="raise")
    client = connect(server)
    lines = (await in_thread(client.read, 74 * 200)).split(b"\r\n")[:-1]
    ring = bytes(range(32, 127)) * 2
    assert lines == [ring[n % 95 : n % 95 + 72] for n in range(200)]
    client.close()
    await until(lambda: server.num_connections == 0)
    assert server.describe()["counters"]["failed"] == 0


@ensureDeferred
async def test_chargen_leaves_the_reactor_to_others(serve: Any, connect: Any) -> None:
    """A client that reads as fast as it can does not starve the next one."""
    server = await serve(handlers.chargen, on_handler_error="raise")
    greedy, other = connect(server), connect(server)
    reading = in_thread(greedy.read, 3_000_000)
    assert await in_thread(other.read, 74) == bytes(range(32, 104)) + b"\r\n"
    await reading
    greedy.reset()
    other.reset()
    await until(lambda: server.num_connections == 0)
    assert server.describe()["counters"]["failed"] == 0


@ensureDeferred
@pytest.mark.parametrize("handler", [handlers.echo, handlers.chargen, handlers.discard])
async def test_a_client_that_vanishes_is_no_error(
    serve: Any, connect: Any, handler: Any
) -> None:
    """H6: an RST in the middle; the listener of on_handler_error="raise" stays."""
    server = await serve(handler, on_handler_error="raise")
    client = connect(server)
    client.send(b"x" * 1000)
    await until(lambda: server.num_connections == 1)
    client.reset()
    await until(lambda: server.num_connections == 0)
    assert not server.is_closed


GREETING = b"commands: echo TEXT, time, quit\r\n"


async def talk(client: Client, said: bytes) -> bytes:
    """The whole answer to some lines, after which the client has finished."""
    await in_thread(client.send, said)
    client.shut()
    answer: bytes = await in_thread(client.read_all)
    assert answer.startswith(GREETING)
    return answer[len(GREETING) :]


@ensureDeferred
@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"", b""),
        (b"echo abc\n", b"abc\r\n"),
        (b"echo abc\r\necho  d e \r\n", b"abc\r\n d e\r\n"),
        (b"echo\n", b"\r\n"),
        (b"\n\r\n  \n", b""),
        (b"dance\n", b"error: unknown command\r\n"),
        (b"\xff\x00\n", b"error: unknown command\r\n"),
        (b"quit\necho not read any more\n", b"bye\r\n"),
        (b"echo whole\necho unfinished", b"whole\r\n"),
        (b"quit", b""),
        (b"x" * 200_000 + b"\necho no\n", b"error: line too long\r\n"),
    ],
)
async def test_commands(serve: Any, connect: Any, said: bytes, answer: bytes) -> None:
    """Lines of either end, unknown ones, too long ones, unfinished ones."""
    server = await serve(handlers.commands, on_handler_error="raise")
    assert await talk(connect(server), said) == answer
    await until(lambda: server.num_connections == 0)
    assert not server.is_closed


@ensureDeferred
async def test_commands_tells_the_time(serve: Any, connect: Any) -> None:
    """A time that a program can read."""
    server = await serve(handlers.commands, on_handler_error="raise")
    said = await talk(connect(server), b"time\n")
    assert re.fullmatch(rb"\d{4}-\d\d-\d\dT[\d:.]+\S*\r\n", said)
    datetime.fromisoformat(said.decode().strip())


@ensureDeferred
async def test_commands_takes_lines_in_pieces(serve: Any, connect: Any) -> None:
    """However the input is segmented (S2)."""
    server = await serve(handlers.commands, on_handler_error="raise")
    client = connect(server)
    assert await in_thread(client.read, len(GREETING)) == GREETING
    sent = 0
    for piece in (b"ec", b"ho a", b"bc\r", b"\nqu", b"it\n"):
        await until(lambda sent=sent: server.connections[0].bytes_in == sent)
        client.send(piece)
        sent += len(piece)
    assert await in_thread(client.read_all) == b"abc\r\nbye\r\n"


@ensureDeferred
async def test_commands_ends_with_a_client_that_resets(
    serve: Any, connect: Any
) -> None:
    """While it writes to it: an ordinary end (H6)."""
    server = await serve(handlers.commands, on_handler_error="raise")
    client = connect(server)
    client.send(b"echo " + b"x" * 100_000 + b"\n")
    await until(lambda: server.num_connections == 1)
    client.reset()
    await until(lambda: server.num_connections == 0)
    assert not server.is_closed
