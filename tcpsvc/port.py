"""
Twisted's listening ports over a socket that is open already.

``reactor.listenTCP`` and ``listenUNIX`` open their sockets themselves: they
take no IPV6_V6ONLY, chmod a UNIX path to 0666, leave ``listen`` outside their
``try``, and ``adoptStreamPort`` duplicates the descriptor, unlinks an inherited
path and shuts an inherited UNIX listener down (Twisted 26.10). So the socket is
opened by :mod:`tcpsvc.sockets` and served by these two.

This file and :mod:`tcpsvc.gate` are the only ones that know the inside of
:class:`twisted.internet.tcp.Port`.
"""

from __future__ import annotations

import socket
from functools import cache
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.base import BasePort
from twisted.internet.protocol import ServerFactory
from twisted.python.failure import Failure

from tcpsvc.log import log
from tcpsvc.sockets import ListeningSocket

_MAPPED = "::ffff:"


def unmap(host: str) -> str | None:
    """The IPv4 literal of a mapped IPv6 address, or ``None`` (spec W4)."""
    if host.startswith(_MAPPED) and "." in host:
        return host[len(_MAPPED) :]
    return None


class _ShowsIPv4:
    """Mixed into a transport: it shows a mapped IPv4 address as IPv4, at both ends."""

    def getPeer(self) -> IPv4Address | IPv6Address:
        return _unmapped(super().getPeer())  # type: ignore[misc]

    def getHost(self) -> IPv4Address | IPv6Address:
        return _unmapped(super().getHost())  # type: ignore[misc]


@cache
def _showing_ipv4(transport_class: type) -> type:
    return type(transport_class.__name__, (_ShowsIPv4, transport_class), {})


def _unmapped(address: IPv6Address) -> IPv4Address | IPv6Address:
    host = unmap(address.host)
    return address if host is None else IPv4Address("TCP", host, address.port)


class _OpenedPort(tcp.Port):
    """What both ports do differently from Twisted's: their start and their end."""

    _listening: ListeningSocket
    factory: ServerFactory
    fileno: Any

    def serve_with(self, transport_class: Any) -> None:
        """Make transports of a class."""
        self.transport = transport_class

    def startListening(self) -> None:
        """Serve the socket, which listens already. It is not read from yet."""
        self.factory.doStart()
        self.connected = True
        self.socket = self._listening.socket
        self.fileno = self.socket.fileno
        self._shouldShutdown = not self._listening.is_shared
        self.numberAccepts = 1

    def connectionLost(self, reason: Failure) -> None:
        """Unlink the path, while the descriptor is open; then close it."""
        path = self._listening.path
        if path is not None:
            try:
                if not path.unlink():
                    log.warn(
                        "could not unlink {path}: it is gone, or out of reach of "
                        "this process's root directory",
                        path=path.path,
                    )
            except OSError as error:
                log.error(
                    "could not unlink {path}: {error}", path=path.path, error=error
                )
        self._realPortNumber = None
        BasePort.connectionLost(self, reason)
        self.connected = False
        self._closeSocket(True)  # type: ignore[no-untyped-call]
        del self.socket
        del self.fileno
        self.factory.doStop()


class TCPListeningPort(_OpenedPort):
    """A :class:`tcp.Port <twisted.internet.tcp.Port>` over an open socket."""

    def __init__(
        self, listening: ListeningSocket, factory: ServerFactory, reactor: Any
    ) -> None:
        name = listening.socket.getsockname()
        tcp.Port.__init__(self, name[1], factory, interface=name[0], reactor=reactor)
        self._listening = listening

    def startListening(self) -> None:
        self._realPortNumber = self.port
        _OpenedPort.startListening(self)

    def serve_with(self, transport_class: Any) -> None:
        """Make transports of a class."""
        if self._listening.maps_ipv4:
            transport_class = _showing_ipv4(transport_class)
        self.transport = transport_class

    def _buildAddr(self, address: tuple[Any, ...]) -> IPv4Address | IPv6Address:
        made: IPv4Address | IPv6Address = tcp.Port._buildAddr(self, address)
        if self._listening.maps_ipv4 and isinstance(made, IPv6Address):
            return _unmapped(made)
        return made


class UNIXListeningPort(_OpenedPort, unix.Port):
    """A :class:`unix.Port <twisted.internet.unix.Port>` over an open socket."""

    def __init__(
        self, listening: ListeningSocket, factory: ServerFactory, reactor: Any
    ) -> None:
        name = listening.socket.getsockname()
        unix.Port.__init__(self, name, factory, reactor=reactor)
        self._listening = listening


def port_over(
    listening: ListeningSocket, factory: ServerFactory, reactor: Any
) -> TCPListeningPort | UNIXListeningPort:
    """
    A port that serves an open listening socket. It owns the socket from now on,
    and accepts nothing before its ``startReading`` is called.
    """
    made: TCPListeningPort | UNIXListeningPort
    if listening.socket.family == socket.AF_UNIX:
        made = UNIXListeningPort(listening, factory, reactor)
    else:
        made = TCPListeningPort(listening, factory, reactor)
    made.startListening()
    return made
