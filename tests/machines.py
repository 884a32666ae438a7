"""
What the suite's Hypothesis state machines share: how they are run, within the
reactor that pytest-twisted has started, and what has become of a Deferred.

``TCPSVC_DEEP=20`` runs twenty times as many examples, and other ones each time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from greenlet import greenlet
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from twisted.internet.defer import Deferred
from twisted.logger import globalLogBeginner, globalLogPublisher
from twisted.python.failure import Failure

from tests.support import Logs, the_reactor

DEEP = int(os.environ.get("TCPSVC_DEEP", "0"))


def run(machine: Any, examples: int, steps: int, chosen: int | None = None) -> None:
    """
    Run a machine; the same examples every time, unless ``TCPSVC_DEEP``.

    :param chosen: which examples: without it, those that all such machines have.
    """
    if chosen is not None and not DEEP:
        seed(chosen)(machine)
    gc.collect()
    gc.freeze()  # Else each of the machine's collections would look at it all.
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples * (DEEP or 1),
                stateful_step_count=steps,
                derandomize=not DEEP and chosen is None,
                # To shrink a failure takes minutes: TCPSVC_DEEP does.
                phases=[Phase.generate, Phase.shrink] if DEEP else [Phase.generate],
                database=None,
                deadline=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        gc.unfreeze()


async def with_the_reactor(function: Callable[..., None], *args: Any) -> None:
    """
    Run something that calls ``blockon``, which tests cannot: they run in the
    reactor's greenlet.
    """
    done: Deferred[None] = Deferred()

    def main() -> None:
        try:
            function(*args)
        except BaseException:
            the_reactor().callLater(0, done.errback, Failure())
        else:
            the_reactor().callLater(0, done.callback, None)

    greenlet(main).switch()
    await done


@contextmanager
def own_log() -> Iterator[Logs]:
    """What is logged by one example."""
    observer = Logs()
    globalLogPublisher.addObserver(observer)
    try:
        yield observer
    finally:
        globalLogPublisher.removeObserver(observer)


def forget_log() -> None:
    """
    Twisted keeps what is logged before logging begins, which under pytest it
    never does; and with it the connections that the events are of.
    """
    buffer = getattr(globalLogBeginner, "_initialBuffer", None)
    if buffer is not None:
        buffer._buffer.clear()


class Box:
    """What has become of a Deferred."""

    def __init__(self, deferred: Deferred[Any]) -> None:
        self.state = "pending"
        self.value: Any = None
        self.deferred = deferred
        deferred.addCallbacks(self._fired, self._failed)

    def _fired(self, value: Any) -> None:
        self.state, self.value = "done", value

    def _failed(self, failure: Any) -> None:
        self.state, self.value = type(failure.value).__name__, failure.value


def box(coroutine: Any) -> Box:
    """What becomes of a coroutine."""
    return Box(Deferred.fromCoroutine(coroutine))
