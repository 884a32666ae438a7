"""
From places to listen to listening ports, or to nothing open (spec W8, L1).
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

from twisted.internet.defer import Deferred, FirstError, gatherResults, maybeDeferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IListeningPort
from twisted.python.failure import Failure

from tcpsvc.factory import ServerFactory
from tcpsvc.gate import can_gate
from tcpsvc.log import log
from tcpsvc.places import discard_all, open_all
from tcpsvc.port import port_over
from tcpsvc.where import EndpointPlace, SocketPlace, WhereToListen


def listen_now(
    places: Sequence[SocketPlace[Any, Any]],
    factory: ServerFactory,
    given: socket.socket | None = None,
) -> list[IListeningPort]:
    """
    Listen on all places at once, or on none. The ports accept nothing yet.

    :param given: the caller's own socket (spec W7), closed if this fails.
    :raises CannotListenError: the kernel refused.
    :raises ValueError: ``given`` does not fit.
    """
    opened = deque(open_all(places, factory.settings.backlog, given))
    ports: list[IListeningPort] = []
    try:
        while opened:
            ports.append(port_over(opened[0], factory, factory.reactor))
            opened.popleft()
    except BaseException:
        close_all_at_once(ports)
        discard_all(opened)
        raise
    return ports


async def listen_everywhere(
    places: Sequence[WhereToListen[Any, Any]], factory: ServerFactory
) -> list[IListeningPort]:
    """
    Listen on all places, endpoints among them, or on none. Those that need no
    endpoint are bound first; then all endpoints begin. Cancelling leaves nothing
    open.

    :raises CannotListenError: the kernel refused.
    :raises ValueError: an endpoint is no good.
    """
    endpoints = [n for n, p in enumerate(places) if isinstance(p, EndpointPlace)]
    others = [n for n, p in enumerate(places) if isinstance(p, SocketPlace)]
    made = listen_now([cast(Any, places[n]) for n in others], factory)
    ports = dict(zip(others, made, strict=True))
    pending: list[Deferred[Any]] = []
    try:
        for number in endpoints:
            listening = listen_on_endpoint(
                cast(Any, places[number]), factory, needs_sockets=factory.takes_sockets
            )
            pending.append(listening.addCallback(partial(ports.__setitem__, number)))
        await gatherResults(pending, consumeErrors=True)
    except BaseException as error:
        for listening in pending:
            listening.addErrback(lambda _: None)  # One error is told, the first.
            listening.cancel()
        close_all_at_once(ports.values())
        if isinstance(error, FirstError):
            error.subFailure.raiseException()
        raise
    return [ports[number] for number in range(len(places))]


def close_all_at_once(ports: Iterable[IListeningPort]) -> None:
    """As :func:`close_at_once`, whatever befalls one of them."""
    for port in ports:
        try:
            close_at_once(port)
        except Exception:
            log.failure("closing an unwanted port failed")


def close_at_once(port: Any) -> None:
    """
    Close a port that has served nobody. Twisted's own need no turn of the
    reactor for that, which may never come.
    """
    if can_gate(port):
        port.connectionLost(Failure(ConnectionDone()))
    else:
        stopping = maybeDeferred(port.stopListening)
        stopping.addErrback(
            lambda failure: log.failure("closing an unwanted port failed", failure)
        )


def listen_on_endpoint(
    where: EndpointPlace, factory: ServerFactory, *, needs_sockets: bool
) -> Deferred[IListeningPort]:
    """
    Listen on an endpoint.

    :param needs_sockets: the accepted plain sockets are needed, so that a
        wrapped factory (TLS, PROXY) or another kind of port will not do.
    :returns: a Deferred that fires with the port. An endpoint may not know how
        to cancel, and its port must not be lost; so when this is cancelled, the
        port is closed as soon as it is there.
    """
    is_cancelled = False

    def cancel(_: Deferred[IListeningPort]) -> None:
        nonlocal is_cancelled
        is_cancelled = True

    result: Deferred[IListeningPort] = Deferred(cancel)

    def listened(port: Any) -> None:
        if is_cancelled:
            close_at_once(port)
            factory.close()  # It may have accepted already.
        elif needs_sockets and not (can_gate(port) and port.factory is factory):
            error = ValueError(
                f"endpoint={str(where)!r} does not hand out plain sockets: use create"
            )
            close_all_at_once([port])
            failed(Failure(error))
        else:
            if can_gate(port):
                port.stopReading()
            result.callback(port)

    def failed(failure: Failure) -> None:
        factory.close()
        if not is_cancelled:
            result.errback(failure)

    listening = maybeDeferred(where.resolve(factory.reactor).listen, factory)
    listening.addCallbacks(listened, failed)
    return result
