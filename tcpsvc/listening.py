"""
From a where-to-listen to a listening port, or to nothing open (spec W8).
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure

from tcpsvc.factory import ServerFactory
from tcpsvc.gate import can_gate
from tcpsvc.port import port_over
from tcpsvc.sockets import SocketMaker, stream_socket
from tcpsvc.where import EndpointPlace, SocketPlace

_log = Logger(namespace="tcpsvc")

#: What opens every listening socket; tests put one that fails in its place.
make_socket: SocketMaker = stream_socket


def listen_now(
    where: SocketPlace[Any, Any], factory: ServerFactory, given: socket.socket | None
) -> IListeningPort:
    """
    Listen at once. The port accepts nothing yet.

    :param given: the caller's own socket (spec W7), closed if this fails.
    :raises CannotListenError: the kernel refused.
    :raises ValueError: ``given`` does not fit.
    """
    listening = where.open(factory.settings.backlog, given, make_socket)
    try:
        return port_over(listening, factory, factory.reactor)
    except BaseException:
        listening.discard()
        raise


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
            lambda failure: _log.failure("closing an unwanted port failed", failure)
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
            try:
                close_at_once(port)
            except Exception:
                _log.failure("closing an unwanted port failed")
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
