"""
Everything that CI checks, over every version: ``nox -l`` lists it.

Interpreters that are not installed are skipped, and nox says so. With pyenv, name
those to use: ``PYENV_VERSION=3.10.13:3.11.7:3.12.1:3.13.0 nox``.
"""

from __future__ import annotations

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

#: What docs and types are checked with.
PYTHON = "3.11"

#: The oldest Twisted that setup.py allows, and the newest that the suite has seen.
TWISTEDS = ["24.7.0", "26.10.0"]

REACTORS = ["default", "asyncio"]

#: What serves the connections; tests/conftest.py has the option.
ENGINES = ["auto", "reactor"]


@nox.session(python=PYTHONS)
@nox.parametrize("twisted", TWISTEDS)
@nox.parametrize("reactor", REACTORS)
@nox.parametrize("engine", ENGINES)
def tests(session: nox.Session, engine: str, reactor: str, twisted: str) -> None:
    """The suite, on one engine, one reactor and one Twisted."""
    session.install("-e", ".[test]", f"twisted[tls]=={twisted}")
    session.run(
        "python",
        "-m",
        "pytest",
        f"--reactor={reactor}",
        f"--engine={engine}",
        *session.posargs,
    )


@nox.session(python=PYTHONS)
@nox.parametrize("twisted", TWISTEDS)
def trial(session: nox.Session, twisted: str) -> None:
    """The suite that shows the package from a user's trial tests."""
    session.install("-e", ".[test]", f"twisted[tls]=={twisted}")
    session.run("python", "-m", "twisted.trial", "tests.trial_suite")


@nox.session(python=PYTHON)
def conformance(session: nox.Session) -> None:
    """Twisted's own tests, with the engine's transports in its ports."""
    session.install("-e", ".[conformance]", f"twisted[tls]=={TWISTEDS[-1]}")
    session.run("python", "-m", "tests.conformance", *session.posargs)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Style and layout."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """Annotations; pyproject.toml says which files, and that they are strict."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """The documentation, with every warning an error."""
    session.install("-e", ".[dev]")
    session.run("sphinx-build", "-n", "-W", "docs", "docs/_build")
