"""
The machine that is measured on: its cores, its limits, what it is.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

#: As many open files as any work needs, and some.
OPEN_FILES = 16_384

#: What a process has open beside its connections, at most.
OTHER_FILES = 200


def cores() -> tuple[int, int]:
    """
    The core of the server and that of the load. They are no two threads of one core
    where that can be helped; with a single core they are the same.
    """
    usable = sorted(os.sched_getaffinity(0))
    of_server = usable[0]
    others = [core for core in usable if core != of_server]
    apart = [core for core in others if core not in _siblings(of_server)]
    return of_server, (apart or others or usable)[0]


def _siblings(core: int) -> set[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        parts = path.read_text(encoding="ascii").strip().split(",")
        ranges = [[int(end) for end in part.split("-")] for part in parts]
    except (OSError, ValueError):
        return set()
    return {core for ends in ranges for core in range(ends[0], ends[-1] + 1)}


@contextlib.contextmanager
def pinned_to(core: int) -> Iterator[None]:
    """Processes that are started within run on one core, and stay there."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def allow_open_files() -> int:
    """
    Raise the limit of open files, for this process and those it starts.

    :returns: how many connections a process can have.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit - OTHER_FILES


def compiler() -> str | None:
    """The C compiler's path, or ``None``."""
    return shutil.which("cc")


def compiler_version(path: str) -> str:
    """What a C compiler calls itself."""
    done = subprocess.run(
        [path, "--version"], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[0]


def description() -> dict[str, str]:
    """What the machine is: names of properties, and their values."""
    server, load = cores()
    return {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores to the system",
        "Cores": f"server on {server}, load on {load}",
        "Kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            name, _, value = line.partition(":")
            if name.strip().lower() in ("model name", "cpu model", "hardware"):
                return value.strip()
    return platform.machine()
