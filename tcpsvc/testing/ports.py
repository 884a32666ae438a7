"""
Servers on real ports and their clients, for one test or one ``async with``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    UNIXClientEndpoint,
    connectProtocol,
)
from twisted.python.failure import Failure

from tcpsvc.handler import OnHandlerError, log_error
from tcpsvc.server import Server
from tcpsvc.testing.client import Client
from tcpsvc.where import LOCALHOST, WhereToListen


class _HasCleanup(Protocol):
    """A trial or unittest TestCase."""

    def addCleanup(self, function: Any, /, *args: Any, **kwargs: Any) -> Any: ...


def _log_each(address: Any, failure: Failure) -> None:
    """As log_error itself, but each with its failure: a test may count them."""
    log_error(address, failure)


def serve(
    test_case: _HasCleanup,
    handler: Any,
    *,
    where: WhereToListen[Any, Any] | None = None,
    create: Callable[..., Deferred[Server[Any, Any]]] = Server.create,
    on_handler_error: OnHandlerError | None = None,
    **options: Any,
) -> Deferred[Server[Any, Any]]:
    """
    Serve on a real port for one test. When the test is over the server and its
    connections are closed and handlers that still run are cancelled.

    :param test_case: the trial ``TestCase``.
    :param handler: what ``create`` takes.
    :param where: default: a free port of the loopback address.
    :param create: default: :meth:`tcpsvc.Server.create`.
    :param on_handler_error: default: every error is logged, so that trial reports
        it (``flushLoggedErrors``).
    :param options: of :class:`tcpsvc.StreamOptions`.
    :returns: a Deferred that fires with the server.
    """
    where = where or WhereToListen.bind_to(LOCALHOST, 0)
    made = create(
        where, handler, on_handler_error=on_handler_error or _log_each, **options
    )

    def clean_up_later(server: Server[Any, Any]) -> Server[Any, Any]:
        test_case.addCleanup(shut_down, server)
        return server

    return made.addCallback(clean_up_later)


def shut_down(server: Server[Any, Any]) -> Deferred[None]:
    """
    Close a server and its connections, and cancel its handlers.

    :returns: a Deferred that fires when the last handler has ended.
    """
    server.close(close_existing_connections=True)
    server.cancel_handlers()
    return server.close_finished_and_handlers_determined()


def connect(
    test_case: _HasCleanup, server: Server[Any, Any], *, reactor: Any = None
) -> Deferred[Client]:
    """
    A client of a server on a real port, for one test; closed when it is over.

    :param test_case: the trial ``TestCase``.
    :param server: the server.
    :returns: a Deferred that fires with the client.
    """

    def clean_up_later(client: Client) -> Client:
        test_case.addCleanup(client.close)
        return client

    return _connect(server, reactor).addCallback(clean_up_later)


@asynccontextmanager
async def serving(handler: Any, **options: Any) -> AsyncIterator[Server[Any, Any]]:
    """
    ``async with serving(handler) as server:`` as :func:`serve`, without a
    ``TestCase``.
    """
    where = options.pop("where", None) or WhereToListen.bind_to(LOCALHOST, 0)
    create = options.pop("create", Server.create)
    options.setdefault("on_handler_error", _log_each)
    server = await create(where, handler, **options)
    try:
        yield server
    finally:
        await shut_down(server)


@asynccontextmanager
async def connected(
    server: Server[Any, Any], *, reactor: Any = None
) -> AsyncIterator[Client]:
    """
    ``async with connected(server) as client:`` as :func:`connect`, without a
    ``TestCase``.
    """
    client = await _connect(server, reactor)
    try:
        yield client
    finally:
        await client.close()


def _connect(server: Server[Any, Any], reactor: Any) -> Deferred[Client]:
    if reactor is None:
        from twisted.internet import reactor
    address: Any = server.listening_on_address
    endpoint: Any
    if isinstance(address, UNIXAddress):
        endpoint = UNIXClientEndpoint(reactor, address.name)
    elif ":" in address.host:
        host = "::1" if address.host == "::" else address.host
        endpoint = TCP6ClientEndpoint(reactor, host, address.port)
    else:
        host = LOCALHOST if address.host == "0.0.0.0" else address.host
        endpoint = TCP4ClientEndpoint(reactor, host, address.port)
    made: Deferred[Client] = connectProtocol(endpoint, Client())
    return made
