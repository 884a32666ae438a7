"""
A protocol factory of the application's own, within ours: what Twisted asks a factory,
and tells it, reaches it (spec P2).
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IProtocolNegotiationFactory
from zope.interface import alsoProvides, noLongerProvides

from tcpsvc.log import log


def check_user_factory(factory: object) -> None:
    """
    :raises TypeError: it builds no protocols.
    """
    if not callable(getattr(factory, "buildProtocol", None)):
        raise TypeError(f"factory={factory!r} has no buildProtocol")


def negotiate_as(ours: Any, factory: Any) -> None:
    """TLS asks the factory that it wraps which protocols it speaks (ALPN)."""
    if IProtocolNegotiationFactory.providedBy(factory):
        ours.acceptableProtocols = factory.acceptableProtocols
        alsoProvides(ours, IProtocolNegotiationFactory)
    elif IProtocolNegotiationFactory.providedBy(ours):
        noLongerProvides(ours, IProtocolNegotiationFactory)


def stop_user_factory(factory: Any, ports: int) -> None:
    """
    Another has taken its place.

    :param ports: how many it was told of.
    """
    for _ in range(ports):
        try:
            factory.doStop()
        except Exception:
            # The new one serves, and the next port is to be told all the same.
            log.failure("doStop of {factory} failed", factory=factory)
