"""
From the dotted name of a handler to the handler.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def load(name: str, app_dir: str) -> Any:
    """
    What a dotted name names, e.g. ``mod.fn``.

    :raises ValueError: it cannot be imported, or is not there.
    """
    app_dir = os.path.abspath(app_dir)
    if app_dir not in sys.path:
        sys.path.insert(0, app_dir)
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{name!r} is not of the form module.function")
    found: Any = None
    rest = parts
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise ValueError(
                    f"{name!r}: importing {module!r} failed: {error}"
                ) from error
            continue
        except BaseException as error:
            raise ValueError(
                f"{name!r}: importing {module!r} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        rest = parts[length:]
        break
    else:
        raise ValueError(
            f"{name!r}: no module named {parts[0]!r} in {app_dir} or on sys.path "
            "(see --app-dir)"
        )
    for attribute in rest:
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            raise ValueError(f"{name!r}: {error}") from error
        except Exception as error:
            raise ValueError(f"{name!r}: {type(error).__name__}: {error}") from error
    return found
