"""Handlers: when they start, how they end (spec H)."""

from __future__ import annotations

from typing import Any

from pytest_twisted import ensureDeferred

from tests.support import in_thread, until


@ensureDeferred
async def test_what_a_finished_handler_wrote_is_read_whole_and_then_eof(
    serve: Any, connect: Any
) -> None:
    """H3: flushed, then FIN."""
    payload = b"x" * 3_000_000

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(payload)

    server = await serve(handler)
    client = connect(server)
    assert await in_thread(client.read_all) == payload
    await until(lambda: server.num_connections == 0)


@ensureDeferred
async def test_unread_input_does_not_cost_the_client_its_answer(
    serve: Any, connect: Any
) -> None:
    """H3 [+]: lingering close; a plain close would reset."""
    payload = b"x" * 3_000_000

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(payload)

    server = await serve(handler)
    client = connect(server)
    client.send(b"never read" * 1000)
    assert await in_thread(client.read_all) == payload
    client.close()
    await until(lambda: server.num_connections == 0)
