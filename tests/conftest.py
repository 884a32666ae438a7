"""The fixtures of :mod:`tests.support`, for every test, and the choice of an engine."""

from __future__ import annotations

import inspect

import pytest

from tcpsvc.options import ENGINES, Settings
from tests.anywhere import scene
from tests.support import (
    connect,
    logs,
    nothing_left_behind,
    serve,
    what_is_there_stays,
)

__all__ = [
    "connect",
    "logs",
    "nothing_left_behind",
    "scene",
    "serve",
    "what_is_there_stays",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--engine``: the default of ``engine=`` in the tests' own process."""
    parser.addoption(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what serves the connections of servers that do not say it themselves",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Every server takes its defaults from here, whoever makes it."""
    init = Settings.__init__
    with_default = [
        p.name
        for p in inspect.signature(init).parameters.values()
        if p.default is not p.empty
    ]
    defaults = dict(zip(with_default, init.__defaults__ or (), strict=True))
    assert "engine" in defaults
    defaults["engine"] = config.getoption("--engine")
    init.__defaults__ = tuple(defaults.values())


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is tested."""
    return f"engine: {config.getoption('--engine')}"
