"""
How errors are logged that clients can bring about: of each kind one traceback in a
minute, and in between one line for each error.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.logger import LogLevel
from twisted.python.failure import Failure

from tcpsvc.log import log
from tcpsvc.log_fields import error_text

#: Of each kind there is one traceback in so many seconds.
TRACEBACK_INTERVAL = 60.0

#: How many kinds are told apart in a minute. Errors of further ones have their lines,
#: and no traceback: whoever can make errors of any number of kinds is not to fill the
#: disk either.
MOST_KINDS = 100


class _Said:
    """When a traceback of a kind was logged, and how many errors came since."""

    __slots__ = ("at", "more")

    def __init__(self, at: float) -> None:
        self.at = at
        self.more = 0


class ErrorLog:
    """
    The errors of one server. They are of one kind when they are said alike, their
    types are the same, and they were raised at the same place, by way of the same
    places: those of two handlers that read a line alike are of two kinds.

    :param clock: what times it.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._said: dict[Hashable, _Said] = {}

    def failure(
        self,
        text: str,
        failure: Failure,
        *,
        of: Hashable = None,
        between: LogLevel = LogLevel.critical,
        **fields: Any,
    ) -> None:
        """
        Log an error.

        :param text: what has failed, in the form of ``twisted.logger``.
        :param of: what else makes it another kind.
        :param between: the level of the line of an error of which there was a
            traceback.
        :param fields: what the text names.
        """
        now = self._clock.seconds()
        places = _places(failure)
        kind = (text, of, failure.type, frozenset(places))
        said = self._said.get(kind)
        if said is not None and _is_recent(said, now):
            said.more += 1
        elif said is not None or self._has_room(now):
            self._said[kind] = _Said(now)
            if said is not None and said.more:
                text += "; {more} more like it since the last traceback"
                fields["more"] = said.more
            log.failure(text, failure=failure, **fields)
            return
        log.emit(
            between,
            text + ": {error}, raised at {place}",
            error=error_text(failure),
            place="{}:{}".format(*places[-1]) if places else "an unknown place",
            **fields,
        )

    def _has_room(self, now: float) -> bool:
        """Whether there may be a further kind. Those of which none came lately go."""
        if len(self._said) >= MOST_KINDS:
            self._said = {
                kind: said for kind, said in self._said.items() if _is_recent(said, now)
            }
        return len(self._said) < MOST_KINDS


def _is_recent(said: _Said, now: float) -> bool:
    return 0 <= now - said.at < TRACEBACK_INTERVAL


def _places(failure: Failure) -> list[tuple[str, int]]:
    """The files and lines that a failure came by; the last is where it was raised."""
    found = []
    traceback: Any = failure.getTracebackObject()
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append((code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found
