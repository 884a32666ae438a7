"""The fixtures of :mod:`tests.support`, for every test, and the choice of an engine."""

from __future__ import annotations

import inspect
import signal

import pytest

from tcpsvc.settings import ENGINES, Settings
from tests.anywhere import scene
from tests.daemons import start
from tests.drains import serving
from tests.kinds import full, staying
from tests.streams import hold
from tests.support import (
    clock,
    connect,
    logs,
    nothing_left_behind,
    serve,
    the_reactor,
    what_is_there_stays,
)

__all__ = [
    "clock",
    "connect",
    "full",
    "hold",
    "logs",
    "nothing_left_behind",
    "scene",
    "serve",
    "serving",
    "start",
    "staying",
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
    config.addinivalue_line(
        "markers",
        "whatever(*options): shows the same whatever these options are: --engine is "
        "for servers of the tests' own process that do not say theirs, and some tests "
        "need no reactor. It runs with their defaults only.",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """
    A reactor that was stopped runs no further test: say so, and by what. SIGTERM, of
    ``timeout``, say, shows as "illegal switch in blockon" in whatever test there is.
    """

    def stopped() -> None:
        number = getattr(the_reactor(), "_exitSignal", None)
        by = "reactor.stop()" if number is None else signal.Signals(number).name
        session.shouldstop = f"the reactor was stopped by {by}"

    the_reactor().addSystemEventTrigger("before", "shutdown", stopped)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out what would show the same again."""
    defaults = {"engine": ENGINES[0], "reactor": "default"}
    others = {name for name in defaults if config.getoption(name) != defaults[name]}

    def is_new(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("whatever")
        return mark is None or others.isdisjoint(mark.args)

    config.hook.pytest_deselected(items=[i for i in items if not is_new(i)])
    items[:] = [i for i in items if is_new(i)]


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is tested."""
    return f"engine: {config.getoption('--engine')}"
