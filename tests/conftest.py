"""The fixtures of :mod:`tests.support`, for every test."""

from tests.support import (
    connect,
    logs,
    nothing_left_behind,
    serve,
    what_is_there_stays,
)

__all__ = ["connect", "logs", "nothing_left_behind", "serve", "what_is_there_stays"]
