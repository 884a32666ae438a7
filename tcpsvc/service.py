"""
A server as an ``IService``: for ``.tac`` files, ``MultiService`` and twistd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IProtocolFactory
from twisted.python.failure import Failure

from tcpsvc import creation
from tcpsvc._waiters import Event, all_of
from tcpsvc.address_text import address_text
from tcpsvc.creation import Bound
from tcpsvc.drain_options import DRAIN_TIMEOUT, DrainOptions, check_drain_options
from tcpsvc.drain_report import DrainReport
from tcpsvc.factory import ServerFactory
from tcpsvc.handler import OnHandlerError
from tcpsvc.log import log
from tcpsvc.options import Options, StreamOptions
from tcpsvc.places import Places, places_of, places_text
from tcpsvc.server import Server

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TcpService(Service):
    """
    Listens while it runs. It may be stopped and started again; it begins with the
    options that it was made with each time, whatever its server was changed to.

    It binds in ``privilegedStartService``, while a daemon is still root, or
    earlier with :meth:`bind`; it lets clients in at ``startService``. Its
    ``stopService`` stops accepting, lets the handlers finish, and fires when the
    last has ended, or ``drain_timeout`` is up and what was left is closed::

        service = TcpService(
            WhereToListen.of_port(8000), handler, on_handler_error=tcpsvc.log_error
        )
        service.setServiceParent(application)

    With ``on_handler_error="raise"`` an error closes the listening socket and the
    process goes on without it; ``service.server.failed()`` tells. Under
    ``twistd tcpsvc`` the process ends then.

    :param where: where to listen; or a sequence of places, which are one server then.
    :param handler: a stream handler as for :meth:`tcpsvc.Server.create`; see
        :meth:`of_socks` and :meth:`of_protocols` for others.
    :param on_handler_error: as for :meth:`tcpsvc.Server.create`.
    :param drain_timeout: seconds (default 30) that a stop waits for handlers,
        ``None`` for any time; see :class:`tcpsvc.DrainOptions`.
    :param drain_announce: seconds (default 0) that it still accepts at a stop.
    :param drain_spread: seconds (default 0) over which what is left then is closed.
    :param make_factory: what makes the factory of the handler and the options.
    :param options: of :class:`tcpsvc.StreamOptions`, but for ``socket``: a
        service that is started again needs a new one.
    :raises ValueError: an option has a bad value.
    :raises TypeError: an option is unknown, or of the wrong kind.
    """

    def __init__(
        self,
        where: Places[Any, Any],
        handler: Any,
        *,
        on_handler_error: OnHandlerError,
        drain_timeout: float | None = DRAIN_TIMEOUT,
        drain_announce: float = 0.0,
        drain_spread: float = 0.0,
        make_factory: Callable[..., ServerFactory] = ServerFactory.of_streams,
        **options: Unpack[StreamOptions],
    ) -> None:
        if "socket" in options:
            raise TypeError(
                "socket= is for Server.create: a service that is started again "
                "needs a new one each time; use WhereToListen.of_fd"
            )
        places = places_of(where)
        for place in places:
            if getattr(place, "own", False):
                raise ValueError(
                    f"where={place!r} with own=True: a service may listen again after "
                    "a stop, when that descriptor is closed"
                )
        self._drain_options: DrainOptions = {
            "announce": drain_announce,
            "timeout": drain_timeout,
            "spread": drain_spread,
        }
        check_drain_options(self._drain_options, "drain_")
        #: Where it listens: as it was given, a sequence as a tuple.
        self.where = where if where is places[0] else places
        self._places = places
        self._options = options
        self._make_factory = partial(
            make_factory, handler, on_handler_error=on_handler_error
        )
        # What is wrong is said now, not at the start.
        factory = self._make_factory(**options)
        factory.check_limits_at(place.address for place in places)
        self._bound: Event | None = None
        self._listening: Deferred[Any] | None = None
        #: What drains, at this stop or an earlier one, and when that is over.
        self._drains: dict[Server[Any, Any], Event] = {}
        self._server: Bound[Server[Any, Any]] | None = None

    @classmethod
    def of_socks(
        cls,
        where: Places[Any, Any],
        handler: Callable[..., object],
        *,
        on_handler_error: OnHandlerError,
        drain_timeout: float | None = DRAIN_TIMEOUT,
        drain_announce: float = 0.0,
        drain_spread: float = 0.0,
        **options: Unpack[Options],
    ) -> TcpService:
        """
        The same for a handler of sockets, see :meth:`tcpsvc.Server.create_sock`.
        """
        return cls(
            where,
            handler,
            on_handler_error=on_handler_error,
            drain_timeout=drain_timeout,
            drain_announce=drain_announce,
            drain_spread=drain_spread,
            make_factory=ServerFactory.of_socks,
            **options,
        )

    @classmethod
    def of_protocols(
        cls,
        where: Places[Any, Any],
        factory: IProtocolFactory,
        *,
        on_handler_error: OnHandlerError,
        drain_timeout: float | None = DRAIN_TIMEOUT,
        drain_announce: float = 0.0,
        drain_spread: float = 0.0,
        **options: Unpack[Options],
    ) -> TcpService:
        """
        The same for a protocol factory, see
        :meth:`tcpsvc.Server.create_protocol`.
        """
        return cls(
            where,
            factory,
            on_handler_error=on_handler_error,
            drain_timeout=drain_timeout,
            drain_announce=drain_announce,
            drain_spread=drain_spread,
            make_factory=ServerFactory.of_protocols,
            **options,
        )

    @property
    def server(self) -> Server[Any, Any] | None:
        """The server, from the time it is bound until it has stopped."""
        return None if self._server is None else self._server.server

    def bind(self) -> Deferred[None]:
        """
        Open the listening socket now; clients wait in its backlog until
        ``startService``. Twice is once.

        :returns: a Deferred that fires when it is open, at once unless an
            endpoint takes its time, and fails as
            :meth:`tcpsvc.Server.create`'s does.
        """
        bound = self._bound
        if bound is None:
            bound = self._bound = Event()
            self._listening = self._listen()
            self._listening.addCallbacks(
                partial(self._has_bound, bound), partial(self._not_bound, bound)
            )
        return bound.wait()

    def _listen(self) -> Deferred[Bound[Server[Any, Any]]]:
        bind = partial(
            creation.bind, Server, self.where, self._make_factory, self._options
        )
        if self.server is None:
            return bind()
        # Started again while the last server still drains: once its port is free.
        return self.server.close_finished().addCallback(lambda _: bind())

    def _has_bound(self, is_bound: Event, bound: Bound[Server[Any, Any]]) -> None:
        self._server = bound
        is_bound.happen()

    def _not_bound(self, is_bound: Event, failure: Failure) -> None:
        self._bound = None
        is_bound.fail(failure)

    def privilegedStartService(self) -> None:
        """
        Bind, unless that was done.

        :raises CannotListenError: the kernel refused.
        """
        super().privilegedStartService()  # type: ignore[no-untyped-call]
        self._or_raise(self.bind(), logs=False)

    def startService(self) -> None:
        """
        Let clients in; bind first, unless that was done.

        :raises CannotListenError: the kernel refused.
        """
        super().startService()  # type: ignore[no-untyped-call]
        # Whoever bound it, and whether or not privilegedStartService was called
        # (python -m twisted does not), a late failure is logged here and only here.
        self._or_raise(self.bind().addCallback(self._begin))

    def _begin(self, _: None) -> None:
        if self.running and self._server is not None:
            try:
                server = self._server.begin()
            except BaseException:
                self._bound = self._server = None
                raise
            for listener in server.listeners:
                log.info(
                    "listening on {address}", address=address_text(listener.address)
                )

    def _or_raise(self, done: Deferred[None], *, logs: bool = True) -> None:
        failures: list[Failure] = []
        is_late = False

        def failed(failure: Failure) -> None:
            failures.append(failure)
            if is_late and logs and not failure.check(CancelledError):
                # An endpoint took its time: nobody is left to raise it to.
                log.critical(
                    "cannot listen on {where}: {error}",
                    where=places_text(self._places),
                    error=failure.getErrorMessage(),
                )

        done.addErrback(failed)
        if failures:
            failures[0].raiseException()
        is_late = True

    def stopService(self) -> Deferred[None]:
        """
        Drain: see :meth:`tcpsvc.Server.drain`. The log tells its report.

        :returns: a Deferred that fires when the last handler has ended, or
            ``drain_timeout`` is up and what was left is closed.
        """
        super().stopService()  # type: ignore[no-untyped-call]
        bound, self._bound = self._bound, None
        if bound is not None and not bound.has_happened:
            assert self._listening is not None
            self._listening.cancel()
        elif bound is not None:
            assert self.server is not None
            self._drain(self.server)
        return all_of([over.wait() for over in self._drains.values()])

    def _drain(self, server: Server[Any, Any]) -> None:
        over = self._drains[server] = Event()

        def done(_: DrainReport) -> None:
            del self._drains[server]
            if self.server is server:
                self._server = None
            over.happen()

        server.drain(**self._drain_options).addCallback(done)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        if self._drains:
            state += ", draining"
        return f"<TcpService on {places_text(self._places)} {state}>"

    def abandon(self) -> None:
        """
        Close the listening sockets at once, before they have ever served and without
        a running reactor: for a daemon that fails to start.
        """
        if self._server is not None:
            self._server.abandon()
        elif self._listening is not None:
            self._listening.cancel()  # Endpoints take their time; others are open.

    def force_stop(self) -> None:
        """While it drains: close what is left now."""
        for server in list(self._drains):
            server.force_drain()
