"""
One of the places where a server listens, as its users see it.
"""

from __future__ import annotations

from typing import Any, Generic, cast

from tcpsvc.address_text import address_text
from tcpsvc.served_port import ServedPort
from tcpsvc.where import AddressT, ListeningOnT, SocketPlace, WhereToListen


class Listener(Generic[AddressT, ListeningOnT]):
    """
    One of :attr:`tcpsvc.Server.listeners`. The server opens it, pauses it and
    closes it.
    """

    def __init__(
        self, where: WhereToListen[AddressT, ListeningOnT], port: ServedPort
    ) -> None:
        """Not to be called: a server does."""
        self._where = where
        self._port = port

    @property
    def where(self) -> WhereToListen[AddressT, ListeningOnT]:
        """Where it was asked to listen."""
        return self._where

    @property
    def address(self) -> AddressT:
        """Its address. It still answers while paused, and when closed."""
        return cast(AddressT, self._port.address)

    @property
    def listening_on(self) -> ListeningOnT:
        """
        The port of an inet listener, the path as it was given of a UNIX listener,
        the address of any other. It still answers while paused, and when closed.
        """
        if isinstance(self._where, SocketPlace):
            return cast(ListeningOnT, self._where.listening_on(self.address))
        return cast(ListeningOnT, self.address)

    @property
    def is_listening(self) -> bool:
        """
        Whether its socket is open, and clients can connect. That they are accepted
        is another matter.
        """
        return self._port.is_listening

    def describe(self) -> dict[str, Any]:
        """A JSON-able description."""
        listening_on = self.listening_on
        return {
            "where": str(self._where),
            "address": address_text(self.address),
            "listening_on": listening_on
            if isinstance(listening_on, (int, str))
            else address_text(listening_on),
            "is_listening": self.is_listening,
        }

    def __repr__(self) -> str:
        state = "listening" if self.is_listening else "not listening"
        return f"<Listener on {self._where} at {address_text(self.address)}, {state}>"
