"""
All the places where one server listens: opened together, closed together, and
fair to each other (spec L).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort

from tcpsvc._waiters import all_of
from tcpsvc.factory import ServerFactory
from tcpsvc.listener import Listener
from tcpsvc.listening import close_all_at_once, listen_everywhere, listen_now
from tcpsvc.served_port import ServedPort
from tcpsvc.where import SocketPlace, WhereToListen


class Listeners:
    """
    The listeners of a server. Made by :meth:`bind_now` and :meth:`bind`.

    :ivar all: each of them, in the order in which they were asked for.
    :ivar ports: what each listens with.
    """

    def __init__(
        self,
        places: Sequence[WhereToListen[Any, Any]],
        ports: Sequence[IListeningPort],
        factory: ServerFactory,
        given: socket.socket | None = None,
    ) -> None:
        self._factory = factory
        self._has_begun = False
        try:
            self.ports = tuple(
                ServedPort(where, port, factory, is_given=given is not None)
                for where, port in zip(places, ports, strict=True)
            )
            # Of an endpoint, or a descriptor, it is only known now.
            factory.check_limits_at(self.addresses())
        except BaseException:
            close_all_at_once(ports)
            raise
        self.all: tuple[Listener[Any, Any], ...] = tuple(
            Listener(where, port)
            for where, port in zip(places, self.ports, strict=True)
        )
        #: Who is asked first when a place is found.
        self._order = list(self.ports)
        self._ports_are_new()

    @classmethod
    def bind_now(
        cls,
        places: Sequence[SocketPlace[Any, Any]],
        factory: ServerFactory,
        given: socket.socket | None,
    ) -> Listeners:
        """
        Listen on all places at once, or on none.

        :raises CannotListenError: the kernel refused.
        :raises ValueError: ``given`` does not fit.
        """
        return cls(places, listen_now(places, factory, given), factory, given)

    @classmethod
    async def bind(
        cls, places: Sequence[WhereToListen[Any, Any]], factory: ServerFactory
    ) -> Listeners:
        """The same, with endpoints among them."""
        return cls(places, await listen_everywhere(places, factory), factory)

    def begin(self) -> None:
        """
        Let clients in.

        :raises CannotListenError: there is no descriptor left to serve with.
            Nothing listens any more then.
        """
        self._has_begun = True
        for served in self.ports:
            try:
                served.begin()
            except OSError as error:
                self.stop_at_once()
                address = served.address
                if isinstance(address, UNIXAddress):
                    raise CannotListenError("unix", address.name, error) from error
                raise CannotListenError(address.host, address.port, error) from error

    # Who is accepted.

    def update(self) -> None:
        """
        Something has changed: accept exactly while the factory has a place.

        When places are found one by one, whoever is read from first has each of
        them, and epoll reports what is ready in the order in which it was added. So
        the port that was first this time is last the next, and none starves
        beside a busy one.
        """
        if len(self._order) == 1:
            self._order[0].update()  # Once a connection: nothing more.
            return
        first: ServedPort | None = None
        for served in self._order:
            if served.update() and first is None:
                first = served
        if first is not None:
            self._order.remove(first)
            self._order.append(first)

    def addresses(self) -> list[Any]:
        """The address of each."""
        return [served.address for served in self.ports]

    def _ports_are_new(self) -> None:
        self._factory.inherits_nodelay = all(
            served.inherits_nodelay for served in self.ports
        )

    # Closing, and listening again.

    def stop(self) -> Deferred[None]:
        """
        Close all sockets. Twice is once.

        :returns: a Deferred of one's own that fires when they are closed.
        """
        return all_of([served.stop() for served in self.ports])

    def stop_at_once(self) -> None:
        """Close all sockets now. They have served nobody."""
        for served in self.ports:
            served.stop_at_once()

    def again(self) -> list[SocketPlace[Any, Any]]:
        """
        Where to :meth:`listen_again`, once all are closed.

        :raises ValueError: one of them cannot be promised the same address again.
        """
        places = []
        for served in self.ports:
            try:
                places.append(served.again())
            except ValueError as error:
                raise ValueError(
                    f"pause('refuse') closes {served.where}, which could not be "
                    f"opened again: {error}. Use pause('hold'), which leaves it open "
                    "and lets clients wait"
                ) from error
        return places

    def listen_again(self, places: Sequence[SocketPlace[Any, Any]]) -> None:
        """
        Listen on all again, or on none.

        :param places: what :meth:`again` has said.
        :raises CannotListenError: the kernel refused one of them.
        """
        ports = listen_now(places, self._factory)
        count = 0
        try:
            for served, port in zip(self.ports, ports, strict=True):
                count += 1
                served.serve(port)
        except BaseException:
            self.stop_at_once()
            close_all_at_once(ports[count:])
            raise
        self._ports_are_new()
        if self._has_begun:
            self.begin()
