"""The public names: what they provide, and how they print (spec I3)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.application.service import IService
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IHandshakeListener,
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IPullProducer,
    ITCPTransport,
)
from twisted.internet.protocol import Factory, Protocol
from zope.interface.verify import verifyObject

import tcpsvc
from tcpsvc import (
    IReader,
    IServer,
    IServerFactory,
    IWriter,
    Server,
    ServerFactory,
    TcpService,
    WhereToListen,
)
from tcpsvc.testing import MemoryServer
from tests.support import LOOPBACK, until

ROOT = Path(__file__).resolve().parent.parent


async def forever(address: object, reader: tcpsvc.Reader, writer: Any) -> None:
    """A handler that ends with its client."""
    await reader.drain_to_eof()


def test_every_public_name_is_there() -> None:
    """What __all__ promises is there."""
    for name in tcpsvc.__all__:
        assert getattr(tcpsvc, name) is not None


@pytest.mark.whatever("engine", "reactor")
def test_importing_imports_no_reactor() -> None:
    """No global reactor at import, in any module but the users' own choice."""
    code = (
        "import sys, tcpsvc, tcpsvc.tap, tcpsvc.testing, tcpsvc.handlers\n"
        "assert 'twisted.internet.reactor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@ensureDeferred
async def test_a_server_and_its_streams_provide_their_interfaces(
    serve: Any, connect: Any
) -> None:
    """Interfaces: verified on live objects; I3: each has a one-line repr."""
    server = await serve(forever)
    connect(server)
    await until(lambda: server.num_connections == 1)
    [connection] = server._factory.connections
    verifyObject(IServer, server)
    verifyObject(IReader, connection.reader)
    verifyObject(IWriter, connection.writer)
    verifyObject(IProtocol, connection)
    verifyObject(IHalfCloseableProtocol, connection)
    verifyObject(IHandshakeListener, connection)
    verifyObject(IPullProducer, connection)
    verifyObject(IServerFactory, server._factory)
    verifyObject(IListeningPort, server._listeners.ports[0].port)
    assert connection.reader.peer == connection.writer.peer == connection.peer
    assert connection.reader.host == connection.writer.host == connection.host
    assert connection.reader.transport is connection.writer.transport
    for thing in (server, connection, connection.reader, connection.writer):
        assert "\n" not in repr(thing)


def test_services_and_factories_provide_their_interfaces() -> None:
    """Interfaces, without a port."""
    service = TcpService(LOOPBACK, forever, on_handler_error="ignore")
    verifyObject(IService, service)
    assert repr(service) == "<TcpService on 127.0.0.1:0 stopped>"
    memory = MemoryServer(forever)
    client = memory.connect()
    verifyObject(ITCPTransport, client._transport)
    assert "held" not in repr(memory.factory)
    client.send_eof()
    protocols = MemoryServer.of_protocols(Factory.forProtocol(Protocol))
    client = protocols.connect()
    verifyObject(IProtocol, protocols.factory.connections[0])
    client.send_eof()
    assert protocols.factory.num_connections == 0


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (WhereToListen.of_port(80), "<WhereToListen 0.0.0.0:80>"),
        (WhereToListen.bind_to("::1", 80), "<WhereToListen [::1]:80>"),
        (WhereToListen.of_file("/run/x"), "<WhereToListen unix:/run/x>"),
        (WhereToListen.of_fd(3), "<WhereToListen fd:3>"),
        (WhereToListen.of_endpoint("tcp:80"), "<WhereToListen tcp:80>"),
    ],
)
def test_where_to_listen_prints_as_asked_for(where: Any, text: str) -> None:
    """I3: one line each."""
    assert repr(where) == text


@ensureDeferred
async def test_an_unknown_option_is_named(serve: Any) -> None:
    """An option that is not there is an error, not ignored."""
    with pytest.raises(TypeError, match="max_conections=3"):
        await serve(forever, max_conections=3)
    with pytest.raises(TypeError, match=r"buffer_age_limit=3 is .* stream"):
        await serve(forever, create=Server.create_sock, buffer_age_limit=3)


@pytest.mark.parametrize(
    ("interface", "implementation"),
    [(IServer, Server), (tcpsvc.IObserver, tcpsvc.Observer)],
)
def test_the_interfaces_are_complete(interface: Any, implementation: Any) -> None:
    """What is public is in the interface, but for the creators."""
    public = {name for name in dir(implementation) if not name.startswith("_")}
    public = {name for name in public if not name.startswith("create")}
    assert public == set(interface.names())


def documented(name: str) -> dict[str, set[str]]:
    """What the reference shows of a class, and what it leaves out of it."""
    text = (ROOT / "docs" / "reference.rst").read_text(encoding="utf-8")
    [entry] = re.findall(
        rf"^\.\. autoclass:: tcpsvc\.{name}(?:\(\))?\n((?:   .*\n)+)",
        text,
        re.MULTILINE,
    )
    options = re.findall(r"^   :([\w-]+):(.*(?:\n      .*)*)", entry, re.MULTILINE)
    return {option: set(re.findall(r"\w+", names)) for option, names in options}


@pytest.mark.parametrize(
    ("interface", "implementation"),
    [(IReader, tcpsvc.Reader), (IWriter, tcpsvc.Writer)],
)
def test_what_handlers_see_beside_the_interface_is_out_of_the_docs(
    interface: Any, implementation: Any
) -> None:
    """What is the connection's own, and nobody sets anything from outside."""
    public = {name for name in dir(implementation) if not name.startswith("_")}
    left_out = documented(implementation.__name__)["exclude-members"]
    assert public - left_out == set(interface.names())
    assert left_out <= public
    slots = {s for s in implementation.__slots__ if not s.startswith("_")}
    assert slots <= {"bytes_arrived", "bytes_written", "has_eof"}


def test_the_reference_shows_what_a_factory_promises() -> None:
    """And nothing that the gate, the connections and the server ask it."""
    promised = set(IServerFactory.names())
    makers = {"of_streams", "of_protocols", "of_socks"}
    told = " ".join((ServerFactory.__doc__ or "").split())
    attributes = set(re.findall(r":ivar (\w+):", told))
    members = documented("ServerFactory")["members"]
    assert members - makers == promised - attributes
    assert makers <= members
    assert attributes <= promised
    assert "IServerFactory" in told
    assert IServerFactory.extends(IProtocolFactory)


@pytest.mark.parametrize(
    "factory",
    [
        ServerFactory.of_streams(forever, on_handler_error="ignore"),
        ServerFactory.of_protocols(
            Factory.forProtocol(Protocol), on_handler_error="ignore"
        ),
        ServerFactory.of_socks(print, on_handler_error="ignore"),
    ],
    ids=["streams", "protocols", "socks"],
)
def test_every_kind_of_factory_provides_its_interface(factory: Any) -> None:
    """Interfaces, without a port."""
    verifyObject(IServerFactory, factory)
    verifyObject(IProtocolFactory, factory)
    assert not factory.is_closed
    factory.close()
    assert factory.is_closed


def test_a_listener_is_not_its_users_to_close() -> None:
    """It tells where it listens; what it does is the server's business."""
    public = {name for name in dir(tcpsvc.Listener) if not name.startswith("_")}
    told = {"where", "address", "listening_on", "is_listening", "describe"}
    assert public == told
