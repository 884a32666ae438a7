"""
``python -m tests.conformance``: see the package.
"""

from __future__ import annotations

import argparse
import platform
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from json import dumps, loads
from pathlib import Path

import twisted

from tests.conformance import __doc__ as about
from tests.conformance.expected import EXPECTED, MOST_EXPECTED
from tests.conformance.modules import REACTORS, Group, groups, is_in
from tests.conformance.outcomes import (
    ABSENT,
    NO_TESTS,
    CannotJudgeError,
    Outcome,
    Outcomes,
    Transports,
    run,
)

TWISTEDS_OWN = Transports()

#: When more of a group differ, none is run again: it is no accident.
MOST_RERUNS = 25

#: More that differ and agree when run alone are no accidents.
MOST_ACCIDENTS = 5

#: A reactor's name in that of a test that is made for each.
REACTOR_IN_NAME = re.compile(r"_(\w+?)(?:Reactor)?Tests\.")

VERSIONS = f"Twisted {twisted.__version__}, Python {platform.python_version()}"


def say(text: str = "") -> None:
    """Print, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass(slots=True)
class Difference:
    """A test that did not end as it does without us."""

    group: Group
    name: str
    unmodified: Outcome
    modified: Outcome

    def show(self) -> None:
        """Print it, with the tracebacks."""
        say(f"\n{self.name} [{self.group.name}]")
        say(f"  {self.unmodified.kind} -> {self.modified.kind}")
        for whose, outcome in (("ours", self.modified), ("Twisted's", self.unmodified)):
            if outcome.kind != "pass" and outcome.details:
                for line in outcome.details.splitlines():
                    say(f"    {whose}: {line}")


@dataclass(slots=True)
class Unmodified:
    """
    The outcomes without us, kept in a file if one is given.

    :param path: the file. What it has of another Twisted or Python is not used.
    """

    path: Path | None
    _kept: dict[str, Outcomes] = field(default_factory=dict)
    _tests: dict[str, list[str]] = field(default_factory=dict)

    def load(self) -> None:
        """Read the file, if there is one."""
        if self.path is None or not self.path.exists():
            return
        kept = loads(self.path.read_text(encoding="utf-8"))
        if kept["versions"] != VERSIONS:
            return
        self._tests = kept["tests"]
        self._kept = {
            group: {name: Outcome(**outcome) for name, outcome in outcomes.items()}
            for group, outcomes in kept["outcomes"].items()
        }

    def of(self, group: Group) -> Outcomes:
        """Run a group, or take what is kept of it."""
        kept = self._tests.get(group.name, [])
        if not all(any(is_in(test, have) for have in kept) for test in group.tests):
            # Run anew and as a whole: the next test may depend on the last.
            self._kept[group.name] = run(group, TWISTEDS_OWN)
            self._tests[group.name] = list(group.tests)
            self._save()
        return {
            name: outcome
            for name, outcome in self._kept[group.name].items()
            if name in NO_TESTS or any(is_in(name, test) for test in group.tests)
        }

    def _save(self) -> None:
        if self.path is None:
            return
        kept = {
            "versions": VERSIONS,
            "tests": self._tests,
            "outcomes": {
                group: {name: asdict(outcome) for name, outcome in outcomes.items()}
                for group, outcomes in self._kept.items()
            },
        }
        self.path.write_text(dumps(kept, indent=1), encoding="utf-8")


@dataclass(slots=True)
class Judge:
    """
    Compares, group by group, and tells.

    :param transports: what is put in place.
    :param unmodified: the outcomes to compare with.
    :param once: do not run again what differs.
    """

    transports: Transports
    unmodified: Unmodified
    once: bool = False
    differences: list[Difference] = field(default_factory=list)
    accidents: list[Difference] = field(default_factory=list)
    accepted: int = 0
    compared: int = 0
    seen: set[str] = field(default_factory=set)

    def compare(self, group: Group) -> None:
        """Run a group both ways, and what differs once more."""
        started = time.monotonic()
        before = self.unmodified.of(group)
        between = time.monotonic()
        after = run(group, self.transports, died=lambda name: say(f"  died: {name}"))
        self.accepted += sum(outcome.accepted for outcome in after.values())
        self.compared += len(before.keys() | after.keys())
        self.seen |= before.keys() | after.keys()
        self._tell(group, before, after)
        say(
            f"  {between - started:.0f} s as they are,"
            f" {time.monotonic() - between:.0f} s with the transports in place"
        )
        found = [
            Difference(group, name, before.get(name, ABSENT), after.get(name, ABSENT))
            for name in sorted(before.keys() | after.keys())
            if before.get(name, ABSENT).kind != after.get(name, ABSENT).kind
        ]
        if found:
            say(f"  {len(found)} differ")
        again = not self.once and len(found) <= MOST_RERUNS
        for difference in found:
            if (
                difference.name in EXPECTED
                or not again
                or self._differs_again(difference)
            ):
                self.differences.append(difference)
            else:
                self.accidents.append(difference)

    def _tell(self, group: Group, before: Outcomes, after: Outcomes) -> None:
        say(f"\n{group.name}: {len(before)} tests")
        every = [*before.values(), *after.values()]
        for kind in sorted({outcome.kind for outcome in every}):
            counts = [
                sum(outcome.kind == kind for outcome in outcomes.values())
                for outcomes in (before, after)
            ]
            same = "" if counts[0] == counts[1] else f" -> {counts[1]}"
            say(f"  {counts[0]}{same} {kind}")
        ours = [name for name, outcome in after.items() if outcome.accepted]
        made = sum(outcome.accepted for outcome in after.values())
        say(f"  {len(ours)} of them through {made} transports of ours")
        reactors = Counter(
            found[1] for name in ours if (found := REACTOR_IN_NAME.search(name))
        )
        for reactor, count in sorted(reactors.items()):
            say(f"    {count} on {reactor}")

    def _differs_again(self, difference: Difference) -> bool:
        """Whether a test still differs when run alone; keep the new outcomes then."""
        name = difference.name
        # What is logged between tests, or ends the process after them, needs all.
        only = None if name in NO_TESTS else [name]
        before = run(difference.group, TWISTEDS_OWN, only).get(name, ABSENT)
        after = run(difference.group, self.transports, only).get(name, ABSENT)
        if before.kind == after.kind:
            return False
        difference.unmodified, difference.modified = before, after
        return True

    def verdict(self, *, everything: bool) -> int:
        """
        Print what differs.

        :param everything: whether all tests were run, so that a name in EXPECTED
            that was not seen is wrong.
        :return: the exit status.
        """
        if self.accidents:
            say("\n== differed, and agreed when run alone")
            for difference in self.accidents:
                difference.show()
        named = [d for d in self.differences if d.name in EXPECTED]
        unnamed = [d for d in self.differences if d.name not in EXPECTED]
        if unnamed:
            say("\n== differ")
            for difference in unnamed:
                difference.show()
        if named:
            say("\n== differ as expected")
            for name in sorted({d.name for d in named}):
                say(f"  {name}: {EXPECTED[name]}")

        complaints = []
        if unnamed:
            count = Counter(d.group.name for d in unnamed)
            complaints.append(
                f"{len(unnamed)} differ: "
                + ", ".join(f"{n} in {group}" for group, n in count.items())
            )
        if len(self.accidents) > MOST_ACCIDENTS:
            complaints.append(f"{len(self.accidents)} accidents are too many")
        complaints += [
            f"named in EXPECTED, but it does not differ: {name}"
            for name in sorted(EXPECTED.keys() - {d.name for d in named})
            if name in self.seen or everything
        ]
        if len(EXPECTED) > MOST_EXPECTED:
            complaints.append(f"{len(EXPECTED)} names in EXPECTED are too many")
        say()
        for complaint in complaints:
            say(complaint)
        if not complaints and not self.accepted:
            say("none of these tests has made a transport of ours")
            return 2
        if not complaints:
            say(f"all {self.compared} agree, but for {len(EXPECTED)} named tests")
        return 1 if complaints else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tests", nargs="*", help="modules, classes or tests")
    parser.add_argument(
        "--reactor",
        action="append",
        choices=["each", *REACTORS],
        help="only these; each is the tests that make a reactor themselves",
    )
    parser.add_argument(
        "--once", action="store_true", help="do not run again what differs"
    )
    parser.add_argument(
        "--unmodified",
        type=Path,
        metavar="FILE",
        help="take the outcomes without us from here; write those that it lacks",
    )
    parser.add_argument(
        "--tcp-transport",
        default="tcpsvc.engine.transports.TCPServerTransport",
        metavar="NAME",
    )
    parser.add_argument(
        "--unix-transport",
        default="tcpsvc.engine.transports.UNIXServerTransport",
        metavar="NAME",
    )
    options = parser.parse_args()

    # Else the processes that it has started would go on.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    unmodified = Unmodified(options.unmodified)
    unmodified.load()
    transports = Transports(options.tcp_transport, options.unix_transport)
    judge = Judge(transports, unmodified, options.once)
    started = time.monotonic()
    say(VERSIONS)
    try:
        for group in groups(options.reactor or [], options.tests):
            judge.compare(group)
    except CannotJudgeError as problem:
        say(str(problem))
        return 2
    status = judge.verdict(everything=not (options.reactor or options.tests))
    say(f"{time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
