"""
The three kinds of handlers, as ones that stay for as long as their clients do; and
what a client sees of its end.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from twisted.internet import tcp
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from tcpsvc import LOCALHOST, Observer, Server, ServerFactory, WhereToListen
from tests.support import in_thread, the_reactor, until
from tests.tls import tls_endpoint


class Staying:
    """
    Handlers that stay until their clients leave or they are cancelled.

    :ivar started: the peers' addresses, in the order of the starts.
    :ivar cancelled: those of the cancelled ones.
    """

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.cancelled: list[Any] = []
        self.protocols: list[Any] = []

    async def stream(self, address: Any, reader: Any, writer: Any) -> None:
        """Echoes."""
        self.started.append(address)
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except CancelledError:
            self.cancelled.append(address)
            raise

    async def sock(self, address: Any, client: Any) -> None:
        """Stays until it is cancelled."""
        self.started.append(address)
        try:
            await Deferred()
        except CancelledError:
            self.cancelled.append(address)
            raise

    def factory(self) -> Any:
        """Of protocols that echo."""
        staying = self

        class Echo(Protocol):
            def connectionMade(self) -> None:
                staying.started.append(self.transport.getPeer())  # type: ignore[union-attr]
                staying.protocols.append(self)

            def dataReceived(self, data: bytes) -> None:
                self.transport.write(data)  # type: ignore[union-attr]

            def connectionLost(self, reason: Any = None) -> None:
                staying.cancelled.append(None)

        return Factory.forProtocol(Echo)


@dataclass
class Kind:
    """One kind of handlers."""

    create: Callable[..., Any]
    make: Callable[[Staying], Any]
    of: Callable[..., ServerFactory]


KINDS = {
    "stream": Kind(Server.create, lambda s: s.stream, ServerFactory.of_streams),
    "protocol": Kind(
        Server.create_protocol, lambda s: s.factory(), ServerFactory.of_protocols
    ),
    "sock": Kind(Server.create_sock, lambda s: s.sock, ServerFactory.of_socks),
}


@pytest.fixture
def staying() -> Staying:
    """The handlers of the test."""
    return Staying()


@pytest.fixture
def full(serve: Any, connect: Any, staying: Staying) -> Any:
    """``await full(kind=, **options)``: a server of one slot, and who has it."""

    async def full(*, kind: str = "stream", **options: Any) -> tuple[Any, Any]:
        handler, create = KINDS[kind].make(staying), KINDS[kind].create
        server = await serve(handler, create=create, max_connections=1, **options)
        client = connect(server)
        await until(lambda: staying.started)
        return server, client

    return full


async def echoes(client: Any) -> bool:
    """Whether a client is served by who echoes."""
    client.send(b"hello")
    return bool(await in_thread(client.read, 5) == b"hello")


async def is_refused(
    serve: Any,
    error: type[Exception],
    name: str,
    value: Any,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """
    A wrong option is named, when a server is made, before anything is bound, and when
    it is changed with others, of a server of these options, which changes nothing.
    """
    bound = socket.socket()
    handler = Staying().stream
    with pytest.raises(error, match=name):
        await Server.create(
            place("tcp", None),
            handler,
            on_handler_error="raise",
            socket=bound,
            **{name: value},
        )
    assert bound.fileno() == -1
    server = await serve(handler, max_connections=3, **options)
    before, settings = server.describe(), server._factory.settings
    with pytest.raises(error, match=name):
        server.change(**{"max_connections": 5, **(changes or {}), name: value})
    assert server.describe() == before
    assert server._factory.settings is settings


def connect_from(server: Any, source: str, timeout: float = 10.0) -> socket.socket:
    """A client of an address of its own, of 127.0.0.0/8."""
    address = getattr(server, "listening_on_address", server)
    host = {"0.0.0.0": LOCALHOST, "::": LOCALHOST}.get(address.host, address.host)
    return socket.create_connection(
        (host, address.port), timeout, source_address=(source, 0)
    )


def end_of(client: Any) -> tuple[bytes, str]:
    """What a blocking client gets, and how that ends: with EOF or with a reset."""
    client = getattr(client, "socket", client)
    got = b""
    try:
        while data := client.recv(65536):
            got += data
    except ConnectionResetError:
        return got, "reset"
    return got, "eof"


@implementer(IListeningPort)
class OtherPort:
    """A port that is no tcp.Port: nobody can tell it to stop accepting."""

    def __init__(self, port: tcp.Port) -> None:
        self._port = port

    def startListening(self) -> None:
        """It does already."""

    def stopListening(self) -> Any:
        return self._port.stopListening()

    def getHost(self) -> Any:
        return self._port.getHost()


@implementer(IStreamServerEndpoint)
class OtherEndpoint:
    """Its port cannot be gated."""

    def listen(self, factory: Any) -> Deferred[Any]:
        listening = TCP4ServerEndpoint(the_reactor(), 0, interface=LOCALHOST).listen(
            factory
        )
        result: Deferred[Any] = listening.addCallback(OtherPort)
        return result


def place(name: str, tmp_path: Any) -> Any:
    """Where to listen: ``tcp``, ``unix``, ``endpoint``, ``tls`` or ``ungated``."""
    if name == "unix":
        return WhereToListen.of_file(str(tmp_path / "socket"))
    if name == "endpoint":
        return WhereToListen.of_endpoint("tcp:0:interface=127.0.0.1")
    if name == "tls":
        return WhereToListen.of_endpoint(tls_endpoint(tmp_path))
    if name == "ungated":
        return WhereToListen.of_endpoint(OtherEndpoint())
    return WhereToListen.bind_to(LOCALHOST, 0)


class Seen(Observer):
    """An observer that notes what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def names(self) -> list[str]:
        """What has happened."""
        return [event[0] for event in self.events]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """What was told with one event, each time."""
        return [event[1:] for event in self.events if event[0] == name]


def _noting(name: str) -> Any:
    def note(self: Any, *told: Any) -> None:
        self.events.append((name, *told))

    return note


EVENTS = [name for name in vars(Observer) if not name.startswith("_")]
for _name in EVENTS:
    setattr(Seen, _name, _noting(_name))


class Raising(Observer):
    """An observer that raises whatever it is told."""


class ObserverError(Exception):
    """What it raises."""


def _raising(self: Any, *told: Any) -> None:
    raise ObserverError


for _name in EVENTS:
    setattr(Raising, _name, _raising)
