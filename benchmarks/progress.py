"""
What is going on, on stderr: a status line that is rewritten on a terminal, elsewhere
a line for each measurement.
"""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """
    Tells how far it is.

    :param total: the number of measurements.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._rewrites = sys.stderr.isatty()

    def begin(self, what: str) -> None:
        """A measurement begins."""
        if self._rewrites:
            self._status(f"{what} ...{self._time_left()}")

    def end(self, what: str, result: str) -> None:
        """A measurement has ended; what came out."""
        self._done += 1
        if self._rewrites:
            self._status(f"{what}: {result}{self._time_left()}")
        else:
            self._write(f"[{self._done}/{self._total}] {what}: {result}\n")

    def note(self, text: str) -> None:
        """Something that is to stay on the screen."""
        self._write(f"\r\x1b[K{text}\n" if self._rewrites else f"{text}\n")

    def close(self) -> None:
        """All is done: the status line goes away."""
        if self._rewrites:
            self._write("\r\x1b[K")

    def _status(self, text: str) -> None:
        line = f"[{self._done}/{self._total}] {text}"
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r\x1b[K{line[:width]}")

    def _time_left(self) -> str:
        if not self._done:
            return ""
        each = (time.monotonic() - self._began) / self._done
        return f" (about {each * (self._total - self._done):.0f} s left)"

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
