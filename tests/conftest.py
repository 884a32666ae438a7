"""The fixtures of :mod:`tests.support`, for every test."""

from tests.support import connect, logs, nothing_left_behind, serve

__all__ = ["connect", "logs", "nothing_left_behind", "serve"]
