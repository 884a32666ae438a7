"""
How tcpsvc is built. It is a ``setup.py`` because of ``twisted/plugins``: see
``package_dir`` and ``packages`` below, and tests/test_packaging.py, which proves
both.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# The oldest Twisted that the test suite is run with (see noxfile.py). Before it,
# inlineCallbacks does not wait for a coroutine that is yielded, as a read is.
LOWEST_TWISTED = "24.7.0"

TLS = [f"twisted[tls]>={LOWEST_TWISTED}"]

TEST = [
    *TLS,
    "hypothesis",
    "pytest",
    "pytest-twisted",
    # Builds wheels by itself from this version on; tests/test_packaging.py builds
    # without isolation.
    "setuptools>=70.1",
]

# What Twisted's own tests need beside what ours do, for tests/conformance.
CONFORMANCE = [
    *TEST,
    # Its matchers are in twisted.test.test_tcp and test_ssl.
    "pyhamcrest>=2",
    # twisted.web.test.test_http2 imports it, as a client of HTTP/2.
    "httpx[http2]>=0.27",
    # twisted.web speaks HTTP/2 by it, and the tests make frames with it. The limits
    # are Twisted's.
    "h2>=3.2,<5",
    # twisted.web orders the streams of HTTP/2 by it.
    "priority>=1.1,<2",
]

DEV = [
    *CONFORMANCE,
    "build",
    "furo",
    "mypy",
    "mypy-zope",
    "nox",
    "ruff",
    "sphinx",
    "towncrier",
]


def version() -> str:
    """The version, read and not imported: Twisted may not be installed yet."""
    text = (HERE / "tcpsvc" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("tcpsvc/__init__.py has no __version__ line")
    return found.group(1)


setup(
    name="tcpsvc",
    version=version(),
    description="A TCP and UNIX-socket server for Twisted that bounds its clients",
    long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    author="The tcpsvc developers",
    license="MIT",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Twisted",
        "Intended Audience :: Developers",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: Implementation :: CPython",
        "Topic :: Internet",
        "Typing :: Typed",
    ],
    # Said although it is the default: with it an editable install is a plain
    # path entry. Without it setuptools makes an import hook, through which
    # Twisted does not see the plugin.
    package_dir={"": "."},
    # twisted.plugins is named because no finder finds it: it is a directory
    # without __init__.py, which is what lets it add to Twisted's own.
    packages=[*find_packages(include=["tcpsvc", "tcpsvc.*"]), "twisted.plugins"],
    package_data={"tcpsvc": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[f"twisted>={LOWEST_TWISTED}", "zope.interface"],
    extras_require={"tls": TLS, "test": TEST, "conformance": CONFORMANCE, "dev": DEV},
)
