"""
The log.
"""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger, LogLevel


class Log(Logger):
    """
    Twisted's logger, of which a daemon leaves out what is of interest to developers
    alone: the log of ``twistd`` has no levels, and clients bring such lines about.

    :ivar says_debug: whether it says what is at debug.
    """

    says_debug = True

    def emit(self, level: Any, format: str | None = None, **fields: Any) -> None:
        """Say something, unless nobody is to be bothered with it."""
        if level is not LogLevel.debug or self.says_debug:
            super().emit(level, format, **fields)


#: One for all. It is no attribute of a class, since that would put the object which has
#: it into every event as its source.
log = Log(namespace="tcpsvc")
