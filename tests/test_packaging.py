"""
What users install: the wheel, the sdist and the editable install bring the
``twistd tcpsvc`` command, and take it away again.

The command comes from a file that is installed into Twisted's own
``twisted/plugins``. It is easily lost: a finder of packages passes it by, and some
ways of installing hide it. So each kind is really built and installed, into a
virtualenv that has copies of Twisted and its dependencies and nothing else: the
environment of the tests, where tcpsvc may be installed, is out of its sight.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.whatever("engine", "reactor")

ROOT = Path(__file__).parent.parent

#: What the environment has in common with the one of the tests: what tcpsvc
#: needs, and what an editable install is built with.
NEEDED = ["twisted", "zope.interface", "setuptools"]

TWISTD = "from twisted.scripts.twistd import run; run()"

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def run(*command: object, cwd: Path) -> str:
    """Run a command to its end; what it printed. The test fails if it does."""
    # What the tests run with is not what the command shall find.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
    return done.stdout


def copy_source(to: Path) -> Path:
    """
    A copy of the source as a fresh checkout has it: builds leave things behind,
    and must find nothing of an earlier one.
    """
    shutil.copytree(
        ROOT,
        to,
        ignore=shutil.ignore_patterns(
            ".*", "_*.tmp", "*.egg-info", "__pycache__", "build", "dist", "_build"
        ),
    )
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source to build from."""
    return copy_source(tmp_path_factory.mktemp("packaging") / "source")


def build(source: Path, hook: str, to: Path) -> Path:
    """Call a hook of the build backend, as pip and build do; what it has made."""
    to.mkdir()
    output = run(sys.executable, "-c", BUILD, hook, to, cwd=source)
    return to / output.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    """The sdist, built from the source."""
    return build(source, "build_sdist", source.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from what the sdist holds: so nothing is missing there."""
    unpacked = sdist.parent.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked)
    [source] = unpacked.iterdir()
    return build(source, "build_wheel", sdist.parent.parent / "wheel")


def closure(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of these names and of all that they need, extras aside."""
    found: dict[str, importlib.metadata.Distribution] = {}
    names = list(names)
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Not for this Python; pip looks whether all is there.
        for requirement in found[name].requires or []:
            if "extra ==" not in requirement:
                match = re.match(r"[\w.-]+", requirement)
                assert match is not None, requirement
                names.append(match.group())
    return found


class Environment:
    """A virtualenv with Twisted, its dependencies, and setuptools."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.elsewhere = path / "elsewhere"
        venv.create(path, with_pip=False, symlinks=True)
        self.elsewhere.mkdir()
        self.python = path / "bin" / "python"
        self.site = Path(
            self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        )
        for distribution in closure(NEEDED).values():
            self._copy(distribution)

    def _copy(self, distribution: importlib.metadata.Distribution) -> None:
        assert distribution.files is not None, f"{distribution} lists no files"
        for file in distribution.files:
            if ".." not in file.parts and not {"test", "tests"} & {*file.parts}:
                source = Path(str(distribution.locate_file(file)))
                if source.exists():  # Compiled files may be out of date.
                    to = self.site / file
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, to)

    def run(self, *arguments: object) -> str:
        """Run its Python, from where nothing is to be imported; what it prints."""
        return run(self.python, *arguments, cwd=self.elsewhere).strip()

    def pip(self, *arguments: object) -> str:
        """Run the tests' pip on it, without the network."""
        return run(
            sys.executable, "-m", "pip", "--python", self.python, *arguments,
            cwd=self.elsewhere,
        )  # fmt: skip

    def install(self, *what: object) -> None:
        """Install tcpsvc. Its requirements have to be there already."""
        self.pip("install", "--no-index", "--no-build-isolation", *what)

    def twistd_help(self) -> str:
        """What ``twistd --help`` prints: its commands, among others."""
        return self.run("-c", TWISTD, "--help")

    def has_command(self) -> bool:
        """Whether ``twistd`` offers ``tcpsvc``. Twisted's own must be there."""
        lines = [line.split() for line in self.twistd_help().splitlines()]
        commands = {words[0] for words in lines if words}
        assert "web" in commands, "twistd has lost Twisted's own commands"
        return "tcpsvc" in commands


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """
    One for all: each that is installed must find it without the command, and leave it
    so.
    """
    return Environment(tmp_path_factory.mktemp("packaging") / "environment")


def check_comes_and_goes(environment: Environment, *what: object) -> str:
    """
    Install, and look; uninstall, and look again. Where tcpsvc was imported from.
    """
    assert not environment.has_command(), "it was there before"
    environment.install(*what)
    imported = environment.run("-c", "import tcpsvc; print(tcpsvc.__file__)")
    assert environment.has_command()
    # The plugin names its module; only a run imports it.
    assert "tcpsvc" in environment.run("-c", TWISTD, "tcpsvc", "--help")
    environment.pip("uninstall", "-y", "tcpsvc")
    assert not environment.has_command(), "it was left behind"
    return imported


def test_wheel_holds_the_package_and_the_plugin_and_nothing_else(
    wheel: Path, source: Path
) -> None:
    """Every module, the plugin, the marker of types; no tests, no docs."""
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    expected = {
        str(path.relative_to(source))
        for path in source.joinpath("tcpsvc").rglob("*.py")
    }
    assert names == {
        *expected,
        "tcpsvc/py.typed",
        "twisted/plugins/tcpsvc_plugin.py",
    }


def test_wheel_needs_twisted_and_zope_interface_only(wheel: Path) -> None:
    """What else there is is an extra."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = importlib.metadata.PathDistribution(
            zipfile.Path(archive, name).parent
        )
        requires = metadata.requires or []
    needed = [r for r in requires if "extra ==" not in r]
    assert sorted(re.split("[>=]", r)[0] for r in needed) == [
        "twisted",
        "zope.interface",
    ]


def test_wheel_brings_the_command_and_takes_it_away(
    environment: Environment, wheel: Path
) -> None:
    """``pip install tcpsvc``, ``twistd``, ``pip uninstall tcpsvc``."""
    imported = check_comes_and_goes(environment, wheel)
    assert Path(imported).is_relative_to(environment.path)
    assert not list(environment.site.rglob("*tcpsvc*.py"))


def test_sdist_brings_the_command_and_takes_it_away(
    environment: Environment, sdist: Path
) -> None:
    """As the wheel, for those who build it themselves."""
    imported = check_comes_and_goes(environment, sdist)
    assert Path(imported).is_relative_to(environment.path)


def test_editable_install_brings_the_command_and_takes_it_away(
    environment: Environment, tmp_path: Path
) -> None:
    """
    ``pip install -e .``, whose default for a flat layout is an import hook that
    hides the plugin from Twisted.
    """
    source = copy_source(tmp_path / "source")
    imported = check_comes_and_goes(environment, "-e", source)
    assert Path(imported).is_relative_to(source)
