"""
What becomes of handlers' errors: reported as the owner chose, and told to those
who asked when one of them closes the server (spec E1 to E5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ReactorNotRunning
from twisted.python.failure import Failure

from tcpsvc._waiters import Event
from tcpsvc.error_log import ErrorLog
from tcpsvc.handler import (
    HANDLER_FAILED,
    OnHandlerError,
    log_error,
    report_error,
)
from tcpsvc.log import log
from tcpsvc.log_fields import of_client


class Failures:
    """
    The errors of one server's handlers.

    :param policy: ``on_handler_error``.
    :param errors: how they are logged.
    :param reactor: what some of them stop.
    :ivar on_reported: called whenever an error has been dealt with.
    :ivar on_fatal: called when an error is to close the server, before anyone hears of
        it.
    :ivar stopped_by: what a handler raised to stop the process (spec H7).
    """

    def __init__(
        self,
        policy: OnHandlerError,
        errors: ErrorLog,
        reactor: Any,
    ) -> None:
        self._errors = errors
        self._policy = self._log_error if policy is log_error else policy
        self._reactor = reactor
        self.on_reported: Callable[[], object] = _nothing
        self.on_fatal: Callable[[], object] = _nothing
        self.stopped_by: BaseException | None = None
        self._pending = 0
        self._fatal: Failure | None = None
        self._when_failed = Event()

    @property
    def is_reporting(self) -> bool:
        """Whether an ``on_handler_error`` has not returned yet."""
        return self._pending > 0

    def report(self, peer: Any, error: Failure) -> None:
        """A handler has failed: do as its owner chose."""
        self._pending += 1
        try:
            done = report_error(self._policy, peer, error)
        except BaseException:
            done = fail(Failure())
        done.addErrback(self._close_for, peer)
        done.addBoth(self._reported)

    def _log_error(self, peer: Any, error: Failure) -> None:
        """What :func:`log_error` does, where there may be a flood of them."""
        self._errors.failure(HANDLER_FAILED, error, **of_client(peer))

    def _reported(self, _: object) -> None:
        self._pending -= 1
        self.on_reported()

    def stop_reactor(self, error: BaseException) -> None:
        """Somebody has raised ``SystemExit`` or ``KeyboardInterrupt`` (spec H7)."""
        if self.stopped_by is None:
            self.stopped_by = error
        # A Clock in a test is no reactor that runs.
        stop = getattr(self._reactor, "stop", _nothing)
        with contextlib.suppress(ReactorNotRunning):
            stop()

    def _close_for(self, failure: Failure, peer: Any) -> None:
        if self._fatal is not None:
            self._errors.failure(
                "a further handler error, of {client}, after the one that closed the "
                "server",
                failure,
                **of_client(peer),
            )
            return
        self._fatal = failure
        self.on_fatal()
        if not self._when_failed.is_awaited:
            log.critical(
                "a handler error has closed the server: {error}",
                error=failure.getErrorMessage(),
                log_failure=failure,
            )
        self._when_failed.fail(failure)

    def failed(self) -> Deferred[None]:
        """
        :returns: a Deferred that fails with the first fatal error, and fires at
            :meth:`over` when there was none.
        """
        return self._when_failed.wait()

    def over(self) -> None:
        """There will be no error any more."""
        self._when_failed.happen()


def _nothing() -> None:
    """What is called while nobody has asked to be."""
