"""tcpsvc inside applications that were there before (issue 2, section 4)."""

from __future__ import annotations

import http.client
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.application import internet
from twisted.application.service import MultiService
from twisted.internet import protocol
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    connectProtocol,
)
from twisted.internet.task import Clock, LoopingCall
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from tcpsvc import Server, ServerFactory, TcpService
from tests.support import (
    LOOPBACK,
    Client,
    Fired,
    in_thread,
    settle,
    the_reactor,
    turn,
    until,
)


class Page(Resource):
    """Says who asked for what; ``/slow`` answers when the test says so."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Any] = []

    def render_GET(self, request: Any) -> Any:
        if request.path == b"/slow":
            self.waiting.append(request)
            return NOT_DONE_YET
        if request.path == b"/broken":
            raise RuntimeError("a page that fails")
        return b"you asked for " + request.path

    def render_POST(self, request: Any) -> bytes:
        return b"%d bytes" % len(request.content.read())


@pytest.fixture
def page() -> Page:
    """What the site serves."""
    return Page()


@pytest.fixture
def site(page: Page) -> Site:
    """A site, with Twisted's own timeout for idle clients taken out of the way."""
    made = Site(page, timeout=None)
    # Else the site's log of requests has a timer for the time of day.
    made._updateLogDateTime = lambda: None
    return made


class Browser:
    """A real HTTP client on one kept connection; blocking, for threads."""

    def __init__(self, address: Any) -> None:
        self.connection = http.client.HTTPConnection(
            address.host, address.port, timeout=10
        )

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """The status and the text."""
        self.connection.request("GET" if body is None else "POST", path, body)
        response = self.connection.getresponse()
        return response.status, response.read()

    def close(self) -> None:
        self.connection.close()


@ensureDeferred
async def test_a_web_site_in_a_service_asked_by_an_http_client(
    site: Site, page: Page, clock: Clock
) -> None:
    """create_protocol inside a TcpService: keep-alive, bodies, many at once."""
    service = TcpService.of_protocols(
        LOOPBACK, site, on_handler_error="raise", clock=clock
    )
    service.startService()
    server = service.server
    assert server is not None
    browsers = [Browser(server.listening_on_address) for _ in range(3)]
    for browser in browsers:
        for path in ("/a", "/b"):
            status, text = await in_thread(browser.ask, path)
            assert (status, text) == (200, b"you asked for " + path.encode())
    # Each has kept its connection for its second question.
    assert server.num_connections == 3
    big = b"x" * 1_000_000
    assert await in_thread(browsers[0].ask, "/form", big) == (200, b"1000000 bytes")
    for browser in browsers:
        browser.close()
    await until(lambda: server.num_connections == 0)
    await service.stopService()


@ensureDeferred
async def test_a_site_that_stops_finishes_the_page_it_makes(
    site: Site, page: Page, clock: Clock
) -> None:
    """The drain waits for the answer; kept idle connections end with the time."""
    service = TcpService.of_protocols(
        LOOPBACK, site, on_handler_error="raise", clock=clock, drain_timeout=5.0
    )
    service.startService()
    assert service.server is not None
    address = service.server.listening_on_address
    idle, busy = Browser(address), Browser(address)
    assert (await in_thread(idle.ask, "/"))[0] == 200
    answer = in_thread(busy.ask, "/slow")
    await until(lambda: page.waiting)
    over = Fired(service.stopService())
    await turn()
    with pytest.raises(ConnectionRefusedError):
        Client(address)
    page.waiting[0].write(b"at last")
    page.waiting[0].finish()
    assert await answer == (200, b"at last")
    busy.close()
    await turn()
    assert not over
    clock.pump([1.0] * 5)
    assert idle.connection.sock is not None
    assert await in_thread(idle.connection.sock.recv, 1) == b""
    idle.close()
    await until(lambda: over)


@ensureDeferred
async def test_a_site_is_limited_as_any_handler(
    site: Site, page: Page, serve: Any
) -> None:
    """A1: the second client waits unaccepted until the first has gone."""
    server = await serve(site, create=Server.create_protocol, max_connections=1)
    first, second = (Browser(server.listening_on_address) for _ in range(2))
    assert (await in_thread(first.ask, "/"))[0] == 200
    answer = in_thread(second.ask, "/second")
    await settle()
    assert server.num_connections == 1
    assert not answer.called
    first.close()
    assert await answer == (200, b"you asked for /second")
    second.close()


@ensureDeferred
async def test_the_sites_own_factory_is_started_and_stopped(
    serve: Any,
) -> None:
    """P2: with each run of the service, once."""

    class Counting(protocol.Factory):
        noisy = False
        protocol = protocol.Protocol
        calls: list[str] = []

        def startFactory(self) -> None:
            self.calls.append("start")

        def stopFactory(self) -> None:
            self.calls.append("stop")

    factory = Counting()
    service = TcpService.of_protocols(LOOPBACK, factory, on_handler_error="raise")
    for _ in range(2):
        service.startService()
        await service.stopService()
    assert factory.calls == ["start", "stop"] * 2


class Line(protocol.Protocol):
    """A client that collects what it reads, up to the end."""

    def __init__(self) -> None:
        self.got = b""
        self.ended: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.got += data

    def connectionLost(self, reason: Any = protocol.connectionDone) -> None:
        self.ended.callback(self.got)


@ensureDeferred
async def test_a_server_in_an_application_that_uses_the_reactor_itself(
    serve: Any,
) -> None:
    """Its timers, ports and clients go on, beside the server and after it."""
    reactor = the_reactor()
    ticks: list[None] = []
    ticking = LoopingCall(ticks.append, None)
    ended = ticking.start(0.001)

    class Shout(protocol.Protocol):
        def dataReceived(self, data: bytes) -> None:
            assert self.transport is not None
            self.transport.write(data.upper())
            self.transport.loseConnection()

    own = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(
        protocol.Factory.forProtocol(Shout)
    )

    async def ask(port: int, text: bytes) -> bytes:
        line = Line()
        await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), line)
        assert line.transport is not None
        line.transport.write(text)
        return await line.ended

    async def relay(address: Any, reader: Any, writer: Any) -> None:
        """The handler asks the application's own port, with its own client."""
        text = await reader.readline()
        writer.write(await ask(own.getHost().port, text))

    server = await serve(relay)
    answers = [
        Deferred.fromCoroutine(ask(server.listening_on, b"hello %d\n" % n))
        for n in range(20)
    ]
    for n, answer in enumerate(answers):
        assert await answer == b"HELLO %d\n" % n
    seen = len(ticks)
    await server.close()
    await until(lambda: len(ticks) > seen)
    assert await ask(own.getHost().port, b"still here\n") == b"STILL HERE\n"
    await own.stopListening()
    ticking.stop()
    await ended


@ensureDeferred
async def test_many_servers_in_one_process(serve: Any, connect: Any) -> None:
    """One that closes, or fails, does not concern the others."""

    async def name(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"%d" % writer.transport.getHost().port)

    async def fails(address: Any, reader: Any, writer: Any) -> None:
        raise RuntimeError

    servers = [await serve(name) for _ in range(3)]
    failing = await serve(fails, on_handler_error="raise")
    failed = failing.failed()
    assert await in_thread(connect(failing).read_all) == b""
    with pytest.raises(RuntimeError):
        await failed
    await servers[0].close()
    for server in servers[1:]:
        said = await in_thread(connect(server).read_all)
        assert said == b"%d" % server.listening_on


@ensureDeferred
async def test_a_service_beside_another_service(connect: Any) -> None:
    """Twisted's own services and ours, under one parent."""
    ticks: list[None] = []
    parent = MultiService()
    timer = internet.TimerService(0.001, ticks.append, None)
    timer.clock = the_reactor()
    timer.setServiceParent(parent)

    class Hello(protocol.Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            self.transport.write(b"theirs")
            self.transport.loseConnection()

    theirs = internet.StreamServerEndpointService(
        TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1"),
        protocol.Factory.forProtocol(Hello),
    )
    theirs.setServiceParent(parent)

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(b"ours")
        await reader.drain_to_eof()

    ours = TcpService(LOOPBACK, handler, on_handler_error="raise")
    ours.setServiceParent(parent)
    parent.privilegedStartService()
    parent.startService()
    port = await theirs._waitingForPort
    assert await in_thread(connect(port.getHost()).read_all) == b"theirs"
    client = connect(ours.server)
    assert await in_thread(client.read, 4) == b"ours"
    await until(lambda: len(ticks) > 1)
    # One service is stopped alone; the other goes on.
    over = Fired(ours.stopService())
    assert await in_thread(connect(port.getHost()).read_all) == b"theirs"
    assert not over
    stopped = parent.stopService()
    assert not stopped.called
    client.close()
    await stopped
    assert over


@ensureDeferred
async def test_our_factory_on_an_endpoint_of_the_application(connect: Any) -> None:
    """Section 2: the factory is public, and keeps its own live connections."""

    async def handler(address: Any, reader: Any, writer: Any) -> None:
        writer.write(await reader.readline())

    factory = ServerFactory.of_streams(handler, on_handler_error="raise")
    port = await TCP4ServerEndpoint(the_reactor(), 0, interface="127.0.0.1").listen(
        factory
    )
    client = connect(port.getHost())
    await until(lambda: factory.num_connections == 1)
    client.send(b"abc\n")
    assert await in_thread(client.read_all) == b"abc\n"
    client.close()
    await until(lambda: factory.num_connections == 0)
    await port.stopListening()
    factory.close()
    await factory.when_over()
