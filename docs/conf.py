"""How the documentation is built: ``sphinx-build -n -W docs docs/_build``."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.roles import XRefRole
from sphinx.util import import_object
from sphinx.util.docutils import SphinxDirective
from zope.interface.interface import InterfaceClass, Method

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tcpsvc

project = "tcpsvc"
author = "The tcpsvc developers"
copyright = "the tcpsvc developers"
version = release = tcpsvc.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {
    "description": "TCP and UNIX-socket servers for Twisted",
    "page_width": "1100px",
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# The build needs no network, so there are no inventories of Python's and Twisted's
# own documentation to link to. What is theirs is named here; everything of ours
# must resolve.
nitpick_ignore_regex = [
    ("py:.*", r"(twisted|asyncio|collections\.abc|os|socket|zope)\..*"),
    # The same, as the signatures say them.
    ("py:class", r"Deferred|IProtocolFactory|AsyncIterator"),
    # As ``:raises CannotListenError:`` says it.
    ("py:exc", r"CannotListenError"),
    # Type variables and aliases of signatures; the reference explains them.
    ("py:class", r"(tcpsvc\.where\.)?(AddressT|ListeningOnT)"),
    ("py:class", r"OnHandlerError|StreamHandler|SockHandler|Places|How"),
    # What a signature names and only the inside uses.
    ("py:class", r"(tcpsvc\.connection\.)?Connection|tcpsvc\.listeners\.Listeners"),
    ("py:class", r"tcpsvc\.writer\.Output|tcpsvc\.testing\.ports\._HasCleanup"),
]

# In annotations an interface shows as its name, not as <InterfaceClass name>.
InterfaceClass.__repr__ = lambda self: self.__identifier__


class Clause(XRefRole):
    """``:clause:`H3``` links to that clause of spec.rst."""

    def process_link(
        self, env: Any, refnode: Any, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        refnode["refdomain"], refnode["reftype"] = "std", "ref"
        refnode["refexplicit"] = True
        return title, f"clause-{target.lower()}"


class AutoInterface(SphinxDirective):
    """``.. autointerface:: tcpsvc.IReader``: a zope interface, which autodoc skips."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        interface = import_object(self.arguments[0])
        lines = [f".. py:class:: {self.arguments[0]}", ""]
        lines += [
            f"   {line}" for line in inspect.cleandoc(interface.__doc__).split("\n")
        ]
        for name, member in interface.namesAndDescriptions():
            if isinstance(member, Method):
                head = f"   .. py:method:: {name}{member.getSignatureString()}"
            else:
                head = f"   .. py:attribute:: {name}"
            lines += ["", head, "      :no-index:", "", f"      {member.__doc__}"]
        return self.parse_text_to_nodes("\n".join(lines))


# Docstrings cite clauses as "(spec H3)", "(S1 to S3)", "(D)".
_CITATION = re.compile(
    r"\((?:spec )?[WAHEDSPXILZ]\d*(?:(?:, | to | and )[WAHEDSPXILZ]\d*)*\)"
)
_CLAUSE = re.compile(r"[WAHEDSPXILZ]\d*")


def _link_clauses(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    def linked(citation: re.Match[str]) -> str:
        inside = citation[0].replace("spec ", "", 1)
        prefix = "(spec " if "spec " in citation[0] else "("
        return prefix + _CLAUSE.sub(lambda c: f":clause:`{c[0]}`", inside[1:])

    lines[:] = [_CITATION.sub(linked, line) for line in lines]


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_role("clause", Clause())
    app.add_directive("autointerface", AutoInterface)
    app.connect("autodoc-process-docstring", _link_clauses)
