"""Python scripts as processes, which answer when they are asked."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.support import PATIENCE

ROOT = Path(__file__).parent.parent


class Script(AbstractContextManager["Script"]):
    """
    A process that answers each line with a line, and ends when it is asked no more.
    It is killed where its ``with`` ends, if it still runs.
    """

    def __init__(self, text: str, *args: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", text, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert self.process.stdin and self.process.stdout
        self._in, self._out = self.process.stdin, self.process.stdout
        self._said = b""
        self._news = select.poll()
        self._news.register(self._out, select.POLLIN)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self._in.close()
        self._out.close()

    def line(self) -> str:
        """The next line that it says."""
        while b"\n" not in self._said:
            assert self._news.poll(PATIENCE * 1000), f"says nothing but {self._said!r}"
            data = os.read(self._out.fileno(), 65536)
            assert data, f"has ended, after {self._said!r}"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def told(self) -> dict[str, Any]:
        """The next line, which is JSON."""
        found: dict[str, Any] = json.loads(self.line())
        return found

    def tell(self, command: str) -> None:
        self._in.write(command.encode() + b"\n")
        self._in.flush()

    def ask(self, command: str = "report") -> dict[str, Any]:
        """Its answer to a line."""
        self.tell(command)
        return self.told()

    def end(self) -> int:
        """No more questions: its exit status."""
        self._in.close()
        return self.process.wait(PATIENCE)
