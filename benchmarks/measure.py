"""
One measurement: a server is started, kept busy by load.c, and stopped.

The figure is the CPU time of the server's process, user and system, for each
operation. It depends less on what else the machine does than throughput does, and it
is what a server costs who is not the only one on its machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.catalog import Peer, Work
from benchmarks.servers import HOST

HERE = Path(__file__).resolve().parent

#: Seconds that a server may take to listen or to answer, and that the load may take
#: beyond the time that it is given.
PATIENCE = 20.0

#: Seconds that the idle connections may take, PATIENCE of load.c included.
IDLE_PATIENCE = 60.0


class Unmeasured(Exception):
    """There is no figure; the message says why."""


@dataclass(frozen=True, slots=True)
class Sample:
    """
    What one measurement saw.

    :ivar figure: µs of CPU time for an operation, or bytes of a connection.
    :ivar failed: connections that were lost.
    :ivar server_busy: the part of the time that the server had a core, 0 to 1.
    :ivar seen: all that the load told.
    """

    figure: float
    failed: int
    server_busy: float | None
    seen: dict[str, float]


class Bench:
    """
    What is needed for measuring: programs that are compiled, and cores.

    :param compiler: of C.
    :param directory: for what is compiled.
    :param seconds: of each measurement.
    :param most_connections: that a process can have.
    """

    def __init__(
        self, compiler: str, directory: Path, seconds: float, most_connections: int
    ) -> None:
        self._directory = directory
        self._seconds = seconds
        self._most_connections = most_connections
        self._server_core, self._load_core = machine.cores()
        for source in (HERE / "load.c", HERE / "servers" / "with_epoll.c"):
            program = str(directory / source.stem)
            subprocess.run([compiler, "-O2", "-o", program, str(source)], check=True)

    def connections(self, work: Work) -> int:
        """How many connections a work has here."""
        return min(work.connections, self._most_connections)

    def measure(self, peer: Peer, work: Work) -> Sample:
        """
        Measure one server at one work, once.

        :raises Unmeasured: it did not start, answered wrongly, or lost connections
            until nothing was left.
        """
        with self._server(peer, work.kind) as (pid, port):
            _check_echo(port, ends=work.kind == "oneshot")
            seen = self._load(work, port, pid)
        if work.is_idle:
            return Sample(
                seen["memory_bytes"] / seen["connections"],
                int(seen["failed"]),
                None,
                seen,
            )
        if not seen["operations"]:
            raise Unmeasured("no operation was finished")
        cpu = seen["server_cpu_seconds"]
        return Sample(
            cpu / seen["operations"] * 1e6,
            int(seen["failed"]),
            cpu / seen["seconds"],
            seen,
        )

    def _command(self, peer: Peer, kind: str) -> list[str]:
        if peer.is_compiled:
            return [str(self._directory / peer.module), kind]
        module = f"benchmarks.servers.{peer.module}"
        return [sys.executable, "-m", module, kind, *peer.arguments]

    @contextlib.contextmanager
    def _server(self, peer: Peer, kind: str) -> Iterator[tuple[int, int]]:
        """A server that runs: its process and its port."""
        with tempfile.TemporaryFile() as errors:
            with machine.pinned_to(self._server_core):
                process = subprocess.Popen(
                    self._command(peer, kind),
                    cwd=HERE.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
            try:
                yield process.pid, _port(process, errors)
            finally:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()

    def _load(self, work: Work, port: int, pid: int) -> dict[str, float]:
        """Keep a server busy. What load.c tells of it."""
        arguments = [port, self.connections(work), work.size, self._seconds, pid]
        with machine.pinned_to(self._load_core):
            process = subprocess.Popen(
                [str(self._directory / "load"), work.load, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        patience = IDLE_PATIENCE if work.is_idle else 2 * self._seconds + PATIENCE
        try:
            output, errors = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            raise Unmeasured("the load did not come to its end") from None
        finally:
            # An end by Ctrl-C, too, leaves nothing behind.
            process.kill()
            process.wait()
        if process.returncode != 0:
            raise Unmeasured(_last_line(errors) or f"exit status {process.returncode}")
        seen: dict[str, float] = json.loads(output)
        return seen


def _port(process: subprocess.Popen[bytes], errors: Any) -> int:
    """The port that a server prints when it listens."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([descriptor], [], [], PATIENCE)[0]:
            raise Unmeasured("the server did not start in time")
        read = os.read(descriptor, 100)
        if not read:
            errors.seek(0)
            why = _last_line(errors.read().decode(errors="replace"))
            raise Unmeasured(f"the server did not start: {why}")
        line += read
    return int(line)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _check_echo(port: int, *, ends: bool) -> None:
    """See that a server does what it is to be measured at."""
    line = b"a line\n"
    try:
        with socket.create_connection((HOST, port), PATIENCE) as client:
            client.sendall(line)
            with client.makefile("rb") as reader:
                answer = reader.readline()
                if ends:
                    answer += reader.read()
    except OSError as error:
        raise Unmeasured(f"the server does not answer: {error}") from error
    if answer != line:
        raise Unmeasured(f"the server answered {answer!r} to {line!r}")
