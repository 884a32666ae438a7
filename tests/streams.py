"""A connection whose streams the test holds, and what becomes of what they return."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from tcpsvc.kernel import base_transport
from tests.support import turn, until


def outcome(deferred: Any) -> list[Any]:
    """
    What a Deferred or a coroutine comes to, once it has: its result, or its
    error.
    """
    results: list[Any] = []
    if not isinstance(deferred, Deferred):
        deferred = Deferred.fromCoroutine(deferred)
    deferred.addCallbacks(results.append, lambda f: results.append(f.value))
    return results


async def ended(results: list[Any]) -> Any:
    """Wait for an outcome."""
    await until(lambda: results)
    return results[0]


class Held:
    """A connection. Its handler gives its streams to the test, and ends when told."""

    reader: Any = None
    writer: Any = None

    def __init__(self) -> None:
        self.clock = Clock()
        self.end: Deferred[None] = Deferred()
        self.has_ended = False
        self.errors: list[BaseException] = []
        self.server: Any = None
        self.client: Any = None

    async def handler(self, address: Any, reader: Any, writer: Any) -> None:
        self.reader, self.writer = reader, writer
        try:
            await self.end
        finally:
            self.has_ended = True

    async def begin(self, serve: Any, connect: Any, **options: Any) -> None:
        """A server on the clock, and its client."""
        self.server = await serve(
            self.handler,
            clock=self.clock,
            on_handler_error=lambda _, failure: self.errors.append(failure.value),
            **options,
        )
        self.client = connect(self.server)

    async def started(self) -> None:
        """Wait for the handler."""
        await until(lambda: self.writer is not None)

    async def seconds_until(self, condition: Callable[[], Any], most: int = 100) -> int:
        """Let seconds pass, with turns between; how many it took."""
        for passed in range(most):
            if condition():
                return passed
            self.clock.advance(1)
            for _ in range(3):
                await turn(0.001)  # The kernel's acknowledgements take real time.
        raise AssertionError(f"not within {most} s: {condition}")

    def narrow(self) -> None:
        """Make the kernel hold little, so that it is full as soon as it is asked."""
        self.client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        base_transport(self.writer.transport).getHandle().setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
        )


@pytest.fixture
def hold(serve: Any, connect: Any) -> Any:
    """``await hold(**options)``: one whose handler has started."""

    async def hold(**options: Any) -> Held:
        held = Held()
        await held.begin(serve, connect, **options)
        await held.started()
        return held

    return hold
