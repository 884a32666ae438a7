"""
The fast path: connections that are served by a sub-reactor, with transports that
send at once.

The rest of tcpsvc knows :func:`engage` alone. Where the fast path cannot go (no
epoll, a port whose transports are of somebody's own class), Twisted's transports
serve, with the same behaviour: one behaviour, two speeds.

- :mod:`tcpsvc.engine.subreactor`: which connections are ready, and serving them.
- :mod:`tcpsvc.engine.transports`: sending at once.
"""

from __future__ import annotations

import select
from typing import Any, NamedTuple

from twisted.internet import tcp, unix
from twisted.internet.interfaces import IReactorFDSet


class Engine(NamedTuple):
    """
    What a port serves its connections with.

    :ivar transport_class: what its transports are made of.
    :ivar reactor: given to them in the place of the reactor. It is to ``stay``
        while the port accepts, and ``may_leave`` afterwards.
    """

    transport_class: type
    reactor: Any


def engage(reactor: Any, wanted: type) -> Engine | None:
    """
    The engine of a port.

    :param reactor: what serves.
    :param wanted: the class of transports that the port would make.
    :returns: ``None`` where the fast path cannot go.
    """
    if (
        wanted not in (tcp.Server, unix.Server)
        or not hasattr(select, "epoll")
        or not IReactorFDSet.providedBy(reactor)
    ):
        return None
    from tcpsvc.engine.subreactor import SubReactor
    from tcpsvc.engine.transports import TCPServerTransport, UNIXServerTransport

    is_unix = wanted is unix.Server
    return Engine(
        UNIXServerTransport if is_unix else TCPServerTransport, SubReactor.of(reactor)
    )
