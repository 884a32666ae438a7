"""
One process of the comparison: puts the transports in place, runs tests as trial
does, and records what becomes of each.

The record has a JSON object a line, written at once, so that it holds when the
process dies: ``{"planned": [names]}`` first, or ``{"cannot_load": text}``, then
``{"started": name}`` and ``{"ended": name, "outcome": ..., "details": ...,
"accepted": ...}`` for each test, and ``{"finished": true}``.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

from twisted.application.reactors import installReactor
from twisted.internet import tcp, unix
from twisted.python.failure import Failure
from twisted.python.reflect import namedAny
from twisted.trial import reporter, runner, util

#: Seconds that a test may take before trial ends it. Twisted's default is 120; none
#: here takes 5, and a transport that is being written makes many wait in vain.
TIMEOUT = 20.0

#: Seconds after which the process ends itself, in a test that trial does not end.
HANGS = 45.0


class Counted:
    """A port's transport, which counts how many are made."""

    made = 0

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __call__(self, *args: Any) -> Any:
        Counted.made += 1
        return self._transport(*args)


def as_text(error: Any) -> str:
    """An exception, in the forms in which tests report them, or a reason."""
    if isinstance(error, tuple):
        error = Failure(error[1], error[0], error[2])
    return error.getTraceback() if isinstance(error, Failure) else str(error)


class Recorder(reporter.TestResult):
    """A reporter that writes the record."""

    def __init__(self, path: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._file = path.open("a", encoding="utf-8")
        self._outcomes: set[str] = set()
        self._details: list[str] = []
        self._made = 0

    def record(self, **fields: Any) -> None:
        """Write a line."""
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def startTest(self, test: Any) -> None:
        super().startTest(test)  # type: ignore[no-untyped-call]
        faulthandler.dump_traceback_later(HANGS, exit=True, file=sys.__stderr__)
        self._made = Counted.made
        self.record(started=test.id())

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)  # type: ignore[no-untyped-call]
        self._end(test.id(), Counted.made - self._made)

    def _end(self, name: str, accepted: int = 0) -> None:
        self.record(
            ended=name,
            # A test may fail, and tearDown after it.
            outcome=" and ".join(sorted(self._outcomes)) or "nothing",
            details="\n".join(self._details),
            accepted=accepted,
        )
        self._outcomes.clear()
        self._details.clear()

    def _add(self, outcome: str, details: Any = "") -> None:
        self._outcomes.add(outcome)
        self._details.append(as_text(details))

    def addSuccess(self, test: Any) -> None:
        self._add("pass")

    def addSkip(self, test: Any, reason: Any) -> None:
        self._add("skip", reason)

    def addFailure(self, test: Any, fail: Any) -> None:
        self._add("fail", fail)

    def addError(self, test: Any, error: Any) -> None:
        self._add("error", error)
        if test.id() == runner.NOT_IN_TEST:
            # Logged between tests: no start and no stop come with it.
            self._end(test.id())

    def addExpectedFailure(self, test: Any, error: Any, todo: Any = None) -> None:
        self._add("expected failure", error)

    def addUnexpectedSuccess(self, test: Any, todo: Any = None) -> None:
        self._add("unexpected success")


def flat(suite: Any) -> list[Any]:
    """The tests of suites in suites."""
    try:
        inner = iter(suite)
    except TypeError:
        return [suite]
    return [test for one in inner for test in flat(one)]


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reactor", required=True)
    parser.add_argument("--record", required=True, type=Path)
    parser.add_argument("--tcp-transport")
    parser.add_argument("--unix-transport")
    parser.add_argument(
        "--only", type=Path, help="a JSON list of tests to run of these"
    )
    parser.add_argument("tests", nargs="+")
    options = parser.parse_args()

    # Before anything imports it by name.
    util.DEFAULT_TIMEOUT_DURATION = TIMEOUT
    installReactor(options.reactor)
    if options.tcp_transport:
        tcp.Port.transport = Counted(namedAny(options.tcp_transport))
    if options.unix_transport:
        unix.Port.transport = Counted(namedAny(options.unix_transport))

    recorder = Recorder(options.record)
    loader = runner.TestLoader()
    tests: list[Any] = []
    for name in options.tests:
        try:
            tests += flat(loader.loadByName(name))
        except Exception:
            recorder.record(cannot_load=f"{name}:\n{Failure().getTraceback()}")
            return
    for test in tests:
        if isinstance(test, runner.ErrorHolder):
            text = as_text(test.error)
            recorder.record(cannot_load=f"{test.id()}:\n{text}")
            return
    if options.only:
        only = set(json.loads(options.only.read_text()))
        tests = [test for test in tests if test.id() in only]
    recorder.record(planned=[test.id() for test in tests])
    runner.TrialRunner(
        lambda *args: recorder, workingDirectory=str(options.record.parent / "trial")
    ).run(runner.TestSuite(tests))
    recorder.record(finished=True)
    # What a thread or an atexit function does from here on is no test's outcome.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
