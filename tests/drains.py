"""Handlers to drain, and what is seen of a drain on a clock of the test's own."""

from __future__ import annotations

import re
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from tcpsvc import DrainReport
from tests.support import Fired, Logs, turn, until


async def until_over(fired: Any, clock: Clock) -> None:
    """Wait for the end of a drain, and that it has left no timer."""
    await until(lambda: fired)
    assert clock.getDelayedCalls() == []


async def reads(address: Any, reader: Any, writer: Any) -> None:
    """Goes on until its client has left or was closed."""
    await reader.drain_to_eof()


async def floods(address: Any, reader: Any, writer: Any) -> None:
    """Writes more than the kernel takes, and ends only when cancelled."""
    writer.write(b"x" * 20_000_000)
    await Deferred()


async def deaf(address: Any, reader: Any, writer: Any) -> None:
    """Does not see that its connection was closed, but heeds a cancellation."""
    await Deferred()


class Release:
    """Ends handlers that heed no cancellation."""

    def __init__(self) -> None:
        self.waiting: list[Deferred[None]] = []
        self.cancels = 0
        self.is_over = False

    async def wait(self) -> None:
        while not self.is_over:
            self.waiting.append(Deferred())
            try:
                await self.waiting[-1]
            except CancelledError:
                self.cancels += 1

    def __call__(self) -> None:
        self.is_over = True
        for waiting in self.waiting:
            if not waiting.called:
                waiting.callback(None)


def stubborn_and_its_release() -> tuple[Any, Release]:
    """A handler that swallows cancellations, and what ends it."""
    release = Release()

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        await release.wait()

    return handler, release


def remaining(logs: Logs) -> list[int]:
    """What the lines say, one after the other."""
    found = [re.search(r"draining, (\d+) connections?", t) for t in logs.texts()]
    return [int(m.group(1)) for m in found if m]


async def report_of(fired: Fired, clock: Clock, *clients: Any) -> DrainReport:
    """What a drain that is over when these clients leave says in the end."""
    for client in clients:
        client.close()
    await until_over(fired, clock)
    (report,) = fired.results
    assert isinstance(report, DrainReport)
    return report


@pytest.fixture
def serving(serve: Any, connect: Any, clock: Clock) -> Any:
    """``await serving(handler, 3, **options)``: a server on the clock, and so many
    clients (one), whose handlers run."""

    async def serving(handler: Any, n: int = 1, **options: Any) -> Any:
        server = await serve(handler, clock=clock, **options)
        clients = [connect(server) for _ in range(n)]
        await until(lambda: server.num_connections == n)
        await turn()
        return server, clients

    return serving
