"""From a dotted name to the handler, or to one clear sentence (issue 2, section 3)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpsvc.loading import load

pytestmark = pytest.mark.whatever("engine", "reactor")


@pytest.fixture(autouse=True)
def imports_are_undone() -> Iterator[None]:
    """What a test imports, and from where, is forgotten after it."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str, str], None]:
    """``module(name, text)``: a module in the application's directory."""

    def module(name: str, text: str) -> None:
        path = tmp_path / name.replace(".", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)

    return module


def refusal(name: str, directory: Path) -> str:
    """What is said of a name that cannot be loaded."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        load(name, str(directory))
    return str(caught.value)


def test_a_function_of_a_module_in_the_directory(module: Any, tmp_path: Path) -> None:
    """--app-dir: it need not be on sys.path."""
    module("apples", "def fn(): return 'apple'")
    assert load("apples.fn", str(tmp_path))() == "apple"
    assert sys.path[0] == str(tmp_path)


def test_the_current_directory_is_the_default(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stays importable when twistd has changed the directory."""
    module("here", "def fn():\n    import here_later\n    return here_later.VALUE")
    module("here_later", "VALUE = 5")
    monkeypatch.chdir(tmp_path)
    found = load("here.fn", ".")
    monkeypatch.chdir("/")
    assert found() == 5


def test_the_directory_comes_before_what_is_installed(
    module: Any, tmp_path: Path
) -> None:
    """As with ``python script.py``."""
    module("this", "fn = 'ours'")
    assert "this" not in sys.modules
    assert load("this.fn", str(tmp_path)) == "ours"


def test_the_directory_is_put_on_the_path_once(module: Any, tmp_path: Path) -> None:
    """However many names are loaded."""
    module("apples", "a = 1; b = 2")
    assert [load(f"apples.{x}", str(tmp_path)) for x in "ab"] == [1, 2]
    assert sys.path.count(str(tmp_path)) == 1


def test_submodules_and_nested_attributes(module: Any, tmp_path: Path) -> None:
    """The longest part that is a module is imported; the rest are attributes."""
    module("pack.__init__", "")
    module("pack.deep.__init__", "")
    module("pack.deep.mod", "class C:\n    @staticmethod\n    def fn(): return 7")
    assert load("pack.deep.mod.C.fn", str(tmp_path))() == 7


def test_an_attribute_of_a_package_with_the_name_of_no_module(
    module: Any, tmp_path: Path
) -> None:
    """``pack.fn`` where pack is a package."""
    module("pack.__init__", "def fn(): return 8")
    assert load("pack.fn", str(tmp_path))() == 8


def test_a_ready_made_handler(tmp_path: Path) -> None:
    """What is installed is found too."""
    from tcpsvc.handlers import echo

    assert load("tcpsvc.handlers.echo", str(tmp_path)) is echo


@pytest.mark.parametrize(
    "name", ["", "fn", ".fn", "mod.", "a..b", "a b.c", "1.x", "a-b.c"]
)
def test_names_of_another_form(name: str, tmp_path: Path) -> None:
    """Nothing is imported."""
    assert "not of the form module.function" in refusal(name, tmp_path)


def test_no_such_module(tmp_path: Path) -> None:
    """It says where it has looked, and what to do."""
    said = refusal("no_such_module.fn", tmp_path)
    assert "no module named 'no_such_module'" in said
    assert str(tmp_path) in said
    assert "--app-dir" in said


def test_no_such_submodule_or_attribute(module: Any, tmp_path: Path) -> None:
    """The name that is missing is named."""
    module("pack.__init__", "")
    module("pack.mod", "class C: pass")
    assert "no_such" in refusal("pack.no_such.fn", tmp_path)
    assert "no_such" in refusal("pack.mod.no_such", tmp_path)
    assert "no_such" in refusal("pack.mod.C.no_such", tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def fn(:", "SyntaxError"),
        ("import no_such_thing", "no_such_thing"),
        ("from sys import no_such_thing", "ImportError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_a_module_that_fails_to_import(
    module: Any, tmp_path: Path, text: str, said: str
) -> None:
    """Its own error is told, and not taken for a module that is not there."""
    module("broken", text)
    refused = refusal("broken.fn", tmp_path)
    assert said in refused
    assert "importing 'broken' failed" in refused


def test_a_module_that_needs_a_missing_submodule_of_its_own(
    module: Any, tmp_path: Path
) -> None:
    """Not mistaken for an attribute that is not there."""
    module("pack.__init__", "from pack import missing_part")
    assert "missing_part" in refusal("pack.fn", tmp_path)
    module("park.__init__", "")
    module("park.mod", "import park.missing_part")
    said = refusal("park.mod.fn", tmp_path)
    assert "park.missing_part" in said
    assert "importing 'park.mod' failed" in said


def test_an_attribute_that_fails_when_looked_up(module: Any, tmp_path: Path) -> None:
    """A module's ``__getattr__`` may raise what it likes."""
    module("lazy", "def __getattr__(name):\n    raise RuntimeError('no luck')")
    assert "no luck" in refusal("lazy.fn", tmp_path)
