"""
``python -m benchmarks``: that it runs, measures tcpsvc and writes what it says. What
it measures is not judged here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine

pytestmark = pytest.mark.whatever("engine", "reactor")

ROOT = Path(__file__).parent.parent

#: Seconds; only a failing test waits so long.
PATIENCE = 120.0


@pytest.mark.skipif(machine.compiler() is None, reason="there is no C compiler, cc")
def test_a_short_run_measures_tcpsvc_and_writes_the_report(tmp_path: Path) -> None:
    """One kind of work, one server, one round."""
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks", "--work=lines", "--only=tcpsvc",
            "--rounds=1", "--seconds=0.2", f"--output={tmp_path}",
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    head, row = done.stdout.splitlines()
    assert head.split() == ["lines"]
    name, figure = row.split()
    assert name == "tcpsvc"
    assert float(figure.replace("\N{NO-BREAK SPACE}", "")) > 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"performance.txt", "performance.svg", "performance.json"}
    assert "tcpsvc" in (tmp_path / "performance.txt").read_text(encoding="utf-8")
    json.loads((tmp_path / "performance.json").read_text(encoding="utf-8"))
