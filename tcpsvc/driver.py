"""
Running a handler's coroutine: what :meth:`Deferred.fromCoroutine
<twisted.internet.defer.Deferred.fromCoroutine>` does, without a Deferred for each
read.

A read that has to wait yields a :class:`Suspension`. A :class:`Driver` notes on it
that it is the one to resume, and whoever has the bytes resumes it directly. To
anything else that may run the coroutine (``inlineCallbacks``,
``Deferred.fromCoroutine``, ``ensureDeferred``) a suspension is what it looks like:
a Deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure


class Suspension(Deferred[None]):
    """
    What a coroutine waits for: :meth:`wake` ends the waiting. It may be waited for
    again, once it was woken, unless it was used as a Deferred, and so is ``called``.
    """

    driver: Driver | None = None

    def wake(self) -> None:
        """Resume whoever waits."""
        driver = self.driver
        if driver is None:
            self.callback(None)
        else:
            self.driver = None
            driver.resume(None)


class Driver:
    """
    Runs a coroutine to its end, in a copy of the current context.

    :param running: the coroutine.
    :param on_end: called once at its end, with what it raised or ``None``.
    """

    __slots__ = (
        "_cancelled",
        "_coroutine",
        "_on_end",
        "_result",
        "_run",
        "_waiting",
    )

    def __init__(
        self,
        running: Coroutine[Any, Any, object],
        on_end: Callable[[Failure | None], None],
    ) -> None:
        self._coroutine = running
        self._on_end = on_end
        self._run = copy_context().run
        #: What it waits for, or did last: a suspension that was woken has no driver.
        #: The driver itself when it runs after anything else, ``None`` at the end.
        self._waiting: object = self
        self._result: object = None
        self._cancelled = False

    def resume(self, value: object) -> None:
        """
        Run until it waits, or ends.

        :param value: what it waited for; a ``Failure`` is raised in it.
        """
        try:
            while True:
                if value is not None and isinstance(value, Failure):
                    waits = self._run(
                        value.throwExceptionIntoGenerator, self._coroutine
                    )
                else:
                    waits = self._run(self._coroutine.send, value)
                if type(waits) is Suspension:
                    waits.driver = self
                elif isinstance(waits, Deferred):
                    # It may fire at once; then there is no recursion.
                    self._waiting = None
                    self._result = self
                    waits.addBoth(self._fired)
                    value, self._result = self._result, None
                    if value is not self:
                        self._waiting = self
                        continue
                else:
                    # Nothing to wait for, as to Twisted: an asyncio future, say,
                    # which complains when it is sent something.
                    value = waits
                    continue
                self._waiting = waits
                if self._cancelled:
                    self._cancelled = False
                    self.cancel()
                return
        except StopIteration:
            failure = None
        except BaseException:
            failure = Failure()
        self._waiting = None
        self._on_end(failure)

    def _fired(self, result: object) -> None:
        if self._result is self:
            self._result = result
        else:
            self._waiting = self
            self.resume(result)

    def cancel(self) -> None:
        """
        Raise ``CancelledError`` where it waits, or will wait next when it runs just
        now. After the end this does nothing.
        """
        waiting = self._waiting
        if type(waiting) is Suspension and waiting.driver is self:
            waiting.driver = None
            self.resume(Failure(CancelledError()))
        elif waiting is self or type(waiting) is Suspension:
            self._cancelled = True
        elif isinstance(waiting, Deferred):
            waiting.cancel()
