"""
The process of ``twistd tcpsvc``: its listeners, its signals, its exit status.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.python.failure import Failure

from tcpsvc.address_text import address_text
from tcpsvc.log import log
from tcpsvc.log_fields import error_text
from tcpsvc.service import TcpService

#: What the process exits with instead of 0, once the reactor has stopped.
_exit_status: list[int] = []


def _exit() -> None:
    # twistd swallows whatever leaves reactor.run(), and has no other way to set
    # the status (Twisted 26.10). Registered before the handler's module is
    # imported, so that what that registers has run by now.
    if _exit_status and _exit_status[0]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_status[0])


atexit.register(_exit)


def _set_exit_status(status: int) -> None:
    _exit_status.append(status)  # The first counts.


def _keep_what_is_loaded() -> None:
    """
    Have the garbage collector look at what is loaded by now for the last time: some
    48 000 objects of Twisted's and the handler's modules stay as long as the process.
    A full collection takes 28 ms with them, in which nobody is served, about once a
    second where clients come and go; one without them takes less than 1 ms.
    """
    gc.collect()
    gc.freeze()


class Daemon(MultiService):
    """
    The listeners of one process: stopped together by the first signal, at once
    by the second.
    """

    def __init__(
        self, reactor: Any, *, prints: bool = False, is_verbose: bool = False
    ) -> None:
        """
        :param prints: print the addresses too, which are logged in any case.
        :param is_verbose: log what is at debug too.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._prints = prints
        self._is_verbose = is_verbose

    def services_of_tcp(self) -> list[TcpService]:
        """The listeners."""
        return [s for s in self.services if isinstance(s, TcpService)]

    def startService(self) -> None:
        """Serve, and watch for what is to end the process."""
        log.says_debug = self._is_verbose
        atexit.unregister(self.abandon)
        super().startService()  # type: ignore[no-untyped-call]
        for service in self.services_of_tcp():
            # Its Deferred fires at once when the service was bound early.
            service.bind().addCallbacks(
                lambda _, service=service: self._watch(service), self._cannot_listen
            )
        _keep_what_is_loaded()

    def abandon(self) -> None:
        """The process ends before it has served: leave no path behind."""
        for service in self.services_of_tcp():
            service.abandon()

    def _watch(self, service: TcpService) -> None:
        server = service.server
        if server is None:  # It was bound late, and could not begin.
            self._end(1)
            return
        if self._prints:
            # By now twistd's log has taken the place of sys.stdout.
            for listener in server.listeners:
                print(
                    f"listening on {address_text(listener.address)}",
                    file=sys.__stdout__,
                    flush=True,
                )
        log.info(
            "limits: {limits}; the others are as by default", limits=server.limits_set
        )
        log.debug("all limits: {limits}", limits=server.limits)
        server.failed().addErrback(self._failed)

    def _cannot_listen(self, _: Failure) -> None:
        self._end(1)  # The service has logged why.

    def _failed(self, failure: Failure) -> None:
        log.critical(
            "a handler error ends the process: {error}",
            error=error_text(failure),
            log_failure=failure,
        )
        self._end(1)

    def _end(self, status: int) -> None:
        _set_exit_status(status)
        try:
            self._reactor.stop()
        except ReactorNotRunning:
            pass  # It is stopping already.

    def stopService(self) -> Deferred[Any]:
        """Drain all listeners; a further signal ends the drain."""
        self._take_exit_status()
        restore = self._catch_signals()
        stopping: Deferred[Any] = super().stopService()  # type: ignore[no-untyped-call]
        return stopping.addBoth(restore)

    def _take_exit_status(self) -> None:
        for service in self.services_of_tcp():
            stopped_by = None if service.server is None else service.server.stopped_by
            if isinstance(stopped_by, KeyboardInterrupt):
                _set_exit_status(128 + signal.SIGINT)
            elif isinstance(stopped_by, SystemExit):
                code = stopped_by.code
                if code is not None and not isinstance(code, int):
                    sys.stderr.write(f"{code}\n")
                    code = 1
                _set_exit_status(code or 0)

    def _catch_signals(self) -> Callable[[Any], Any]:
        before: dict[int, Any] = {}

        def forced(number: int, _: object) -> None:
            self._reactor.callFromThread(self._force)

        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                before[number] = signal.signal(number, forced)
            except ValueError:
                break  # Not in the main thread: no signal comes here.

        def restore(result: Any) -> Any:
            for number, handler in before.items():
                signal.signal(number, handler)
            return result

        return restore

    def _force(self) -> None:
        log.warn("a second signal: closing what remains now")
        for service in self.services_of_tcp():
            service.force_stop()
