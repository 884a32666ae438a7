"""How the documentation is built: ``sphinx-build -n -W docs docs/_build``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tcpsvc

project = "tcpsvc"
author = "The tcpsvc developers"
copyright = "the tcpsvc developers"
version = release = tcpsvc.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "TCP and UNIX-socket servers for Twisted"}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
