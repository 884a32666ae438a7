"""
Measure tcpsvc and others on this machine, and write a table and a chart.

The figure is the CPU time of the server, user and system, for an operation. Server
and clients have a core each. All servers are measured in turn within a round, and
the medians of the rounds are told. It is best to leave the machine alone meanwhile.

A C compiler is needed. What benchmarks/requirements.txt names and is not installed
is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import machine
from benchmarks.catalog import PEERS, WORKS, installed_version
from benchmarks.chart import as_svg
from benchmarks.measure import Bench, Unmeasured
from benchmarks.progress import Progress
from benchmarks.report import as_rest, as_text, digits
from benchmarks.results import Results

ROOT = Path(__file__).resolve().parent.parent


def _choice(known: Collection[str], given: list[str] | None) -> list[str]:
    """What is asked for, in the catalog's order; by default all of it."""
    wanted = [name.strip() for text in given or [] for name in text.split(",")]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--work",
        action="append",
        metavar="NAMES",
        help=f"kinds of work, with commas between: {', '.join(WORKS)} (default: all)",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAMES",
        help=f"servers, with commas between: {', '.join(PEERS)} (default: all)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="how long each measurement is (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs",
        metavar="DIRECTORY",
        help="where performance.txt (the tables), performance.svg (the chart) and "
        "performance.json (all that was seen) are written; by default they take "
        "the place of those of the documentation",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be above 0")
    options.work = _choice(WORKS, options.work)
    options.only = _choice(PEERS, options.only)
    return options


def run(options: argparse.Namespace, compiler: str) -> Results:
    """Measure what is asked for."""
    most_connections = machine.allow_open_files()
    results = Results(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        machine=machine.description(),
        versions={},
        rounds=options.rounds,
        seconds=options.seconds,
        works=options.work,
        connections={},
    )
    peers = []
    for peer in (PEERS[name] for name in options.only):
        if peer.package is None:
            found: str | None = machine.compiler_version(compiler)
        else:
            found = installed_version(peer.package)
        if found is None:
            results.left_out.append(f"{peer.name}, which is not installed")
            continue
        peers.append(peer)
        results.versions[peer.package or "C compiler"] = found
    plan = [
        (WORKS[work], peer)
        for work in options.work
        for _ in range(options.rounds)
        for peer in peers
        if WORKS[work].kind in peer.kinds
    ]
    progress = Progress(len(plan))
    for text in results.left_out:
        progress.note(f"left out: {text}")
    given_up = set()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        bench = Bench(compiler, Path(directory), options.seconds, most_connections)
        results.connections = {w: bench.connections(WORKS[w]) for w in options.work}
        for work, peer in plan:
            what = f"{work.name}, {peer.name}"
            if what in given_up:
                progress.end(what, "left out")
                continue
            progress.begin(what)
            try:
                sample = bench.measure(peer, work)
            except Unmeasured as error:
                given_up.add(what)
                results.leave_out(work.name, peer.name, str(error))
                progress.note(f"left out: {results.left_out[-1]}")
                progress.end(what, "left out")
            else:
                results.add(work.name, peer.name, sample)
                progress.end(what, f"{digits(sample.figure)} {work.unit}")
    progress.close()
    return results


def write(results: Results, directory: Path) -> None:
    """Write tables, chart and JSON, and print the figures."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {
        "performance.txt": as_rest(results),
        "performance.svg": as_svg(results),
        "performance.json": json.dumps(results.as_dict(), indent=1) + "\n",
    }
    for name, text in written.items():
        (directory / name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{as_text(results)}\n")
    sys.stderr.write(f"written to {directory}: {', '.join(written)}\n")


def main() -> None:
    """The command."""
    options = parse(sys.argv[1:])
    compiler = machine.compiler()
    if compiler is None:
        raise SystemExit("a C compiler, cc, is needed: the clients are written in C")
    try:
        results = run(options, compiler)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted: nothing is written") from None
    if not results.peers():
        raise SystemExit("nothing could be measured: nothing is written")
    write(results, options.output)


if __name__ == "__main__":
    main()
