"""
All the places where one server listens: opened together, closed together, and
fair to each other (spec L).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort

from tcpsvc._waiters import all_of
from tcpsvc.factory import ServerFactory
from tcpsvc.listener import Listener
from tcpsvc.listening import close_all_at_once, listen_everywhere, listen_now
from tcpsvc.where import SocketPlace, WhereToListen


class Listeners:
    """
    The listeners of a server. Made by :meth:`bind_now` and :meth:`bind`.

    :ivar all: each of them, in the order in which they were asked for.
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
            self.all = tuple(
                Listener(where, port, factory, is_given=given is not None)
                for where, port in zip(places, ports, strict=True)
            )
        except BaseException:
            close_all_at_once(ports)
            raise
        #: Who is asked first when a place is found.
        self._order = list(self.all)
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
        for listener in self.all:
            try:
                listener.begin()
            except OSError as error:
                self.stop_at_once()
                raise CannotListenError("", str(listener.address), error) from error

    # Who is accepted.

    def update(self) -> None:
        """
        Something has changed: accept exactly while the factory has a place.

        When places are found one by one, whoever is read from first has each of
        them, and epoll reports what is ready in the order in which it was added. So
        the listener that was first this time is last the next, and none starves
        beside a busy one.
        """
        if len(self._order) == 1:
            self._order[0].update()  # Once a connection: nothing more.
            return
        first: Listener[Any, Any] | None = None
        for listener in self._order:
            if listener.update() and first is None:
                first = listener
        if first is not None:
            self._order.remove(first)
            self._order.append(first)

    def addresses(self) -> list[Any]:
        """The address of each."""
        return [listener.address for listener in self.all]

    def _ports_are_new(self) -> None:
        self._factory.inherits_nodelay = all(
            listener.inherits_nodelay for listener in self.all
        )

    # Closing, and listening again.

    def stop(self) -> Deferred[None]:
        """
        Close all sockets. Twice is once.

        :returns: a Deferred of one's own that fires when they are closed.
        """
        return all_of([listener.stop() for listener in self.all])

    def stop_at_once(self) -> None:
        """Close all sockets now. They have served nobody."""
        for listener in self.all:
            listener.stop_at_once()

    def again(self) -> list[SocketPlace[Any, Any]]:
        """
        Where to :meth:`listen_again`, once all are closed.

        :raises ValueError: one of them cannot be promised the same address again.
        """
        places = []
        for listener in self.all:
            try:
                places.append(listener.again())
            except ValueError as error:
                raise ValueError(
                    f"pause('refuse') closes {listener.where}, which could not be "
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
        served = 0
        try:
            for listener, port in zip(self.all, ports, strict=True):
                served += 1
                listener.serve(port)
        except BaseException:
            self.stop_at_once()
            close_all_at_once(ports[served:])
            raise
        self._ports_are_new()
        if self._has_begun:
            self.begin()
