"""
Running tests in processes of their own, and what became of each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.trial.runner import NOT_IN_TEST

from tests.conformance.modules import Group, is_in

#: Seconds that a process may take: several times what the slowest group does.
TIME_LIMIT = 900.0

#: How many tests of a group may end the process. What is left is absent then.
MOST_DEATHS = 5

#: The name under which a process is listed that dies after its last test.
THE_END = "<end of the run>"

#: What is no test, and comes with a whole group only.
NO_TESTS = (NOT_IN_TEST, THE_END)

ROOT = Path(__file__).resolve().parents[2]


class CannotJudgeError(Exception):
    """The tests cannot be run here."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    How a test ended.

    :param kind: ``pass``, ``skip``, ``fail``, ``error``, ``expected failure``,
        ``unexpected success`` or some of them with ``and``; ``died`` when the process
        ended in it; ``absent`` when it was not run.
    :param details: tracebacks, or the reason of a skip.
    :param accepted: how many of our transports it made.
    """

    kind: str
    details: str = ""
    accepted: int = 0


ABSENT = Outcome("absent")

Outcomes = dict[str, Outcome]


@dataclass(frozen=True, slots=True)
class Transports:
    """
    What to put in the place of Twisted's server transports, as dotted names. None
    leaves Twisted's.
    """

    tcp: str | None = None
    unix: str | None = None

    def arguments(self) -> list[str]:
        """For the child's command line."""
        return [
            argument
            for name, value in (("tcp", self.tcp), ("unix", self.unix))
            if value is not None
            for argument in (f"--{name}-transport", value)
        ]


@dataclass(slots=True)
class _Record:
    """What a child has written."""

    planned: list[str] = field(default_factory=list)
    ended: Outcomes = field(default_factory=dict)
    running: str | None = None
    finished: bool = False

    def read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            self._add(json.loads(line))

    def _add(self, entry: dict[str, Any]) -> None:
        if "cannot_load" in entry:
            raise CannotJudgeError(
                f"{entry['cannot_load']}\n"
                "Twisted's tests need: pip install -e '.[conformance]'"
            )
        self.planned = entry.get("planned", self.planned)
        self.running = entry.get("started")
        self.finished = "finished" in entry
        if "ended" not in entry:
            return
        name = entry["ended"]
        new = Outcome(entry["outcome"], entry["details"], entry["accepted"])
        old = self.ended.get(name)
        if old is not None and old != new:
            # A name that comes twice: what is logged between tests, mostly.
            kinds = {*old.kind.split(" and "), *new.kind.split(" and ")}
            new = Outcome(
                " and ".join(sorted(kinds)),
                f"{old.details}\n{new.details}",
                old.accepted + new.accepted,
            )
        self.ended[name] = new


def run(
    group: Group,
    transports: Transports,
    only: list[str] | None = None,
    died: Callable[[str], None] = lambda name: None,
) -> Outcomes:
    """
    Run tests of a group. A test that ends the process has that for its outcome, and
    another process runs the rest.

    :param only: the tests' full names; None for all.
    :param died: told of each test that ended the process.
    :raises CannotJudgeError: a module could not be loaded, or nothing ran.
    """
    outcomes: Outcomes = {}
    for _ in range(MOST_DEATHS):
        record, errors = _run_once(group, transports, only)
        outcomes |= record.ended
        if record.finished:
            break
        if not record.planned:
            raise CannotJudgeError(f"{group.name}: nothing ran\n{errors}")
        name = record.running or THE_END
        outcomes[name] = Outcome("died", errors)
        died(name)
        only = [name for name in record.planned if name not in outcomes]
        if not only:
            break
    return outcomes


def _run_once(
    group: Group, transports: Transports, only: list[str] | None
) -> tuple[_Record, str]:
    with tempfile.TemporaryDirectory(prefix="conform-") as temporary:
        directory = Path(temporary)
        path = directory / "record"
        arguments = ["--reactor", group.reactor, "--record", str(path)]
        arguments += transports.arguments()
        tests: tuple[str, ...] = group.tests
        if only is not None:
            (directory / "only").write_text(json.dumps(only))
            arguments += ["--only", str(directory / "only")]
            # Without those modules of which nothing is wanted.
            tests = tuple(t for t in tests if any(is_in(o, t) for o in only)) or tests
        command = [sys.executable, "-m", "tests.conformance.run_in_child"]
        with (directory / "output").open("w+b") as output:
            process = subprocess.Popen(
                [*command, *arguments, *tests],
                cwd=directory,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(
                        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
                    ),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            why = ""
            try:
                process.wait(TIME_LIMIT)
            except subprocess.TimeoutExpired:
                why = f"Not done after {TIME_LIMIT} seconds.\n"
            finally:
                if process.returncode is None:
                    # With those that it has started.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
        record = _Record()
        record.read(path)
        return record, f"{why}Exit status {process.returncode}.\n{text[-6000:]}"
