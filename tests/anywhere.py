"""
One connection of any kind, anywhere: stream, protocol and socket handlers, over TCP,
UNIX sockets, TLS and memory, by both engines; so that a test says once what is to
hold of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock

from tcpsvc import ServerFactory
from tcpsvc.testing import MemoryServer
from tests.kinds import KINDS
from tests.kinds import place as where_of
from tests.support import Client, in_thread, turn, until
from tests.tls import client_context

#: Where a kind can be, and what serves it there.
PLACES = ("tcp", "tcp-reactor", "unix", "unix-reactor", "tls", "tls-reactor", "memory")


def everywhere(*kinds: str, places: tuple[str, ...] = PLACES) -> Any:
    """For these kinds (default: all), wherever they can be."""
    return pytest.mark.parametrize(
        ("kind", "place"),
        [
            (kind, place)
            for kind in kinds or KINDS
            for place in places
            if kind != "sock" or place.partition("-")[0] in ("tcp", "unix")
        ],
    )


class Handlers:
    """
    Handlers of each kind. They end when told by :attr:`end`, by EOF if they
    ``read``, and note what becomes of them.

    :ivar started: what each was given: a writer, a protocol, or a socket.
    :ivar heard: what each has heard, in order.
    """

    def __init__(self, *, reads: bool = True) -> None:
        self.reads = reads
        self.end: Deferred[None] = Deferred()
        self.started: list[Any] = []
        self.heard: list[str] = []

    def of(self, kind: str) -> Any:
        """The handler of a kind."""
        return getattr(self, kind)

    async def stream(self, address: Any, reader: Any, writer: Any) -> None:
        """Read until EOF, or wait to be told."""
        self.started.append(writer)
        if self.reads:
            await reader.drain_to_eof()
            self.heard.append("eof")
        else:
            await self.wait()

    async def sock(self, address: Any, client: Any) -> None:
        """Wait to be told."""
        self.started.append(client)
        await self.wait()

    async def wait(self) -> None:
        """Until told, or cancelled."""
        mine: Deferred[None] = Deferred()
        self.end.addBoth(lambda _: mine.called or mine.callback(None))
        try:
            await mine
        except CancelledError:
            self.heard.append("cancelled")
            raise
        self.heard.append("told")

    @property
    def protocol(self) -> Any:
        """A factory of protocols."""
        handlers = self

        class Held(Protocol):
            def connectionMade(self) -> None:
                handlers.started.append(self)

            def connectionLost(self, reason: Any = None) -> None:
                handlers.heard.append("lost")

        return Factory.forProtocol(Held)


CREATE = {name: kind.create for name, kind in KINDS.items()}


class MemoryEnd:
    """A client in memory, by the methods of a real one."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def send(self, data: bytes) -> None:
        self._client.send(data)

    def shut(self) -> None:
        self._client.send_eof()

    def stop_reading(self) -> None:
        self._client.stop_reading()

    close = shut

    def reset(self) -> None:
        self._client.reset()

    def read_all(self) -> bytes:
        assert self._client.has_eof
        return bytes(self._client.received)


class TLSEnd(Client):
    """A client that speaks TLS."""

    def handshake(self) -> None:
        """Begin."""
        self.socket = client_context().wrap_socket(self.socket)

    def shut(self) -> None:
        """There is no half of a TLS connection."""
        with contextlib.suppress(OSError):
            self.socket.unwrap()  # type: ignore[attr-defined]


class Scene:
    """
    A server, and its first client.

    :ivar errors: what ``on_handler_error`` has heard.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.handlers = Handlers()
        self.errors: list[Any] = []
        self.server: Any = None
        self.factory: Any = None
        self.client: Any = None
        self.kind = ""
        self.connection: Any = None

    @property
    def counters(self) -> Any:
        """What the server has counted."""
        return self.factory.counters

    @property
    def timers(self) -> list[Any]:
        """What the clock has still to call."""
        return self.clock.getDelayedCalls()

    @property
    def is_over(self) -> bool:
        """Whether the connection is."""
        return bool(self.connection.is_over)

    def write(self, data: bytes) -> None:
        """Have the handler send."""
        given = self.handlers.started[0]
        if self.kind == "stream":
            given.write(data)
        elif self.kind == "protocol":
            given.transport.write(data)
        else:
            given.send(data)

    async def send(self, data: bytes) -> None:
        """Have the client send, and wait until that is seen."""
        before = self.connection._bytes_seen()[0]
        await in_thread(self.client.send, data)
        if before is not None:
            await until(lambda: self.connection._bytes_seen()[0] > before)

    async def push(self, data: bytes) -> None:
        """Have the handler send, and wait until that is seen."""
        before = self.connection._bytes_seen()[1]
        self.write(data)
        if before is not None:
            await until(lambda: self.connection._bytes_seen()[1] > before)

    async def stuck(self) -> None:
        """Wait until nothing moves any more."""
        still, before = 0, None
        while still < 5:
            await turn(0.01)
            now = self.connection._bytes_seen()
            still, before = (still + 1 if now == before else 0), now

    def passes(self, seconds: float, step: float = 0.01) -> float:
        """Let time pass, until the connection is over; how much has."""
        start = self.clock.seconds()
        while self.clock.seconds() - start < seconds - step / 2 and not self.is_over:
            self.clock.advance(step)
        return self.clock.seconds() - start


@pytest.fixture
def scene(serve: Any, tmp_path: Any) -> Iterator[Callable[..., Any]]:
    """``await scene(kind, place, **options)``."""
    clients: list[Any] = []
    in_memory: list[Any] = []

    async def scene(
        kind: str, place: str = "tcp", *, handlers: Any = None, **options: Any
    ) -> Scene:
        made = Scene()
        made.kind = kind
        made.handlers = handlers or made.handlers
        handler = made.handlers.of(kind)
        options.setdefault(
            "on_handler_error", lambda _, failure: made.errors.append(failure.value)
        )
        place, _, engine = place.partition("-")
        if place == "memory":
            make = {
                "stream": ServerFactory.of_streams,
                "protocol": ServerFactory.of_protocols,
            }
            memory = MemoryServer(
                handler, make_factory=make[kind], clock=made.clock, **options
            )
            in_memory.append(memory)
            made.factory = memory.factory
            made.client = MemoryEnd(memory.connect())
        else:
            if engine:
                options["engine"] = engine
            made.server = await serve(
                handler,
                where=where_of(place, tmp_path),
                create=CREATE[kind],
                clock=made.clock,
                **options,
            )
            made.factory = made.server._factory
            made.client = (TLSEnd if place == "tls" else Client)(made.server)
            clients.append(made.client)
        await until(lambda: made.handlers.started)
        (made.connection,) = made.factory.connections
        if place == "tls":
            await in_thread(made.client.handshake)
            await made.stuck()
        return made

    yield scene
    for client in clients:
        client.close()
    for memory in in_memory:
        memory.factory.close()
        memory.factory.close_connections()
        memory.factory.cancel_handlers()
