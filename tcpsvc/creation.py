"""
Creating a server, in two halves: bind, and begin. In between clients wait in the
backlog; a daemon forks and drops its privileges there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, cast

from twisted.internet.defer import Deferred, maybeDeferred

from tcpsvc.factory import ServerFactory
from tcpsvc.listeners import Listeners
from tcpsvc.places import Places, places_of
from tcpsvc.sockets import close_given
from tcpsvc.where import InetAddress, SocketPlace


class Created(Protocol):
    """What is asked of a server."""

    @property
    def is_closed(self) -> bool: ...

    def close(self) -> Deferred[None]: ...


ServerT = TypeVar("ServerT", bound=Created)

#: Makes a server of what it listens on, and of its factory.
Make = Callable[[Listeners, ServerFactory], ServerT]


class Bound(Generic[ServerT]):
    """
    A server that is bound, and lets nobody in yet.

    :ivar server: the server.
    """

    def __init__(
        self, make: Make[ServerT], listeners: Listeners, factory: ServerFactory
    ) -> None:
        self.server = make(listeners, factory)
        self._listeners = listeners
        self._factory = factory

    def begin(self) -> ServerT:
        """
        Let clients in, unless it was closed meanwhile.

        :returns: the server.
        :raises CannotListenError: there is no descriptor left to serve with. The
            server is closed then.
        """
        self._factory.starts.begin()
        if not self.server.is_closed:
            try:
                self._listeners.begin()
            except BaseException:
                self.abandon()
                raise
        return self.server

    def abandon(self) -> None:
        """
        Close the listening sockets at once, before they have ever served and
        without a running reactor; the server is closed then.
        """
        self._listeners.stop_at_once()
        self.server.close()


def bind(
    make: Make[ServerT],
    where: Places[Any, Any],
    make_factory: Callable[..., ServerFactory],
    options: Any,
) -> Deferred[Bound[ServerT]]:
    """
    Listen, and let clients wait.

    :param make_factory: makes the factory of the options, and raises what is wrong
        with them.
    :returns: a Deferred that fires with what is bound. It has fired already where no
        endpoint is in the way.
    """
    bound: Deferred[Any] = maybeDeferred(_bind, make, where, make_factory, options)
    return bound


def create(
    make: Make[ServerT],
    where: Places[Any, Any],
    make_factory: Callable[..., ServerFactory],
    options: Any,
) -> Deferred[ServerT]:
    """Listen, and let clients in."""
    return bind(make, where, make_factory, options).addCallback(_begin)


def create_inet(
    make: Make[ServerT],
    where: Places[InetAddress, int],
    make_factory: Callable[..., ServerFactory],
    options: Any,
) -> ServerT:
    """The same at once, for inet addresses only."""
    try:
        for place in places_of(where):
            if not isinstance(place, SocketPlace) or not isinstance(
                place.address, InetAddress
            ):
                raise ValueError(f"where={place!r} is no inet address: use create")
    except BaseException:
        close_given(options.get("socket"))
        raise
    bound = _bind(make, where, make_factory, options)
    return cast("Bound[ServerT]", bound).begin()


def _bind(
    make: Make[ServerT],
    where: Places[Any, Any],
    make_factory: Callable[..., ServerFactory],
    options: Any,
) -> Bound[ServerT] | Deferred[Bound[ServerT]]:
    given = options.get("socket")
    try:
        places = places_of(where)
        is_immediate = all(isinstance(place, SocketPlace) for place in places)
        if given is not None and len(places) > 1:
            raise ValueError(
                f"socket={given!r} with {len(places)} places: it can be bound to "
                "one; leave it out, or create a server of its own for it"
            )
        if given is not None and not is_immediate:
            raise ValueError(f"socket={given!r} with an endpoint, which has its own")
        factory = make_factory(**options)
        factory.check_limits_at(place.address for place in places)
    except BaseException:
        close_given(given)
        raise
    if is_immediate:
        listeners = Listeners.bind_now(cast(Any, places), factory, given)
        return Bound(make, listeners, factory)
    factory.starts.hold()
    binding = Deferred.fromCoroutine(Listeners.bind(places, factory))
    return binding.addCallback(lambda bound: Bound(make, bound, factory))


def _begin(bound: Bound[ServerT]) -> ServerT:
    return bound.begin()
