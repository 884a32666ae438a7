"""
Running one handler to its end, and what is done when it fails (spec H2, H7, E).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IAddress
from twisted.python.failure import Failure
from twisted.python.reflect import safe_repr

from tcpsvc.log import log
from tcpsvc.log_fields import of_client

#: What a handler may raise to stop the whole process (spec H7).
STOPPING = (KeyboardInterrupt, SystemExit)

#: What is called with the client's address and the failure of its handler.
ErrorCallable = Callable[[Any, Failure], object]
#: What the log says of an error.
HANDLER_FAILED = "handler of {client} failed"
OnHandlerError = Literal["raise", "ignore"] | ErrorCallable


def run_handler(handler: Callable[..., object], *args: object) -> Deferred[object]:
    """
    Call a handler, or an ``on_handler_error``, and follow it to its end.

    :param handler: a coroutine function, a function that returns a Deferred, or
        a plain function, which has finished when it returns.
    :returns: a Deferred that fires when the handler has ended, and fails with
        what it raised, ``KeyboardInterrupt`` and ``SystemExit`` included.
        Cancelling it cancels the handler.
    """
    try:
        result = handler(*args)
    except BaseException:
        return fail(Failure())
    return follow(result, handler)


def follow(result: object, function: object) -> Deferred[object]:
    """
    Follow what a function returned to its end, as :func:`run_handler` does.

    :param function: named by the error, when it has returned a thing that looks
        like something to wait for and is none.
    """
    if result is None:
        return succeed(None)
    if isinstance(result, Deferred):
        return result
    if inspect.iscoroutine(result):
        return Deferred.fromCoroutine(result)
    mistake = None
    if inspect.isgenerator(result):
        mistake = "a generator: decorate it with inlineCallbacks, or use async def"
        result.close()
    elif inspect.isasyncgen(result):
        mistake = "an async generator: it has a yield where an await is meant"
    elif asyncio.isfuture(result):
        mistake = "an asyncio Future: return Deferred.fromFuture(future)"
    if mistake is not None:
        return fail(Failure(TypeError(f"{function!r} returned {mistake}")))
    if inspect.isawaitable(result):
        return Deferred.fromCoroutine(_awaited(result))
    return succeed(result)


async def _awaited(awaitable: Awaitable[object]) -> object:
    return await awaitable


def log_error(address: IAddress, failure: Failure) -> None:
    """
    An ``on_handler_error`` that logs the failure with its client's address, and
    lets the server go on (spec E1). Of failures of one kind, of the same type and
    raised at the same place, the server logs one in a minute with its traceback, and
    the others in a line each. Called by a function of yours, it logs the traceback of
    each.
    """
    log.failure(HANDLER_FAILED, failure=failure, **of_client(address))


def check_on_handler_error(policy: object) -> None:
    """
    :raises ValueError: it is neither ``"raise"`` nor ``"ignore"`` nor callable.
    """
    if policy not in ("raise", "ignore") and not callable(policy):
        raise ValueError(
            f"on_handler_error={policy!r} is not 'raise', 'ignore' or a callable "
            "f(address, failure); tcpsvc.log_error is one"
        )


def report_error(
    policy: OnHandlerError, address: Any, failure: Failure
) -> Deferred[object]:
    """
    Do with a handler's error as its owner chose.

    :returns: a Deferred that fires when that is done and the server goes on, and
        fails with what closes it when not (spec E2).
    """
    if policy == "raise":
        return fail(failure)
    if policy == "ignore":
        log.debug(
            "handler of {client} failed, ignored: {error}",
            **of_client(address),
            error=safe_repr(failure.value),
        )
        return succeed(None)
    assert not isinstance(policy, str)
    return run_handler(policy, address, failure)
