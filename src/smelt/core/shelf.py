"""One small loader for every shelf.

A shelf is a plural folder of smelt; a thing on it is one file, named by its path, holding one public class
of the shelf's kind (or a function named like the file's `build`).  Other packages put things on a shelf by
an entry point of the group `smelt.<shelf>`, e.g. in their pyproject.toml:

    [project.entry-points."smelt.methods"]
    "prune.mine" = "my_package.mine"
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from smelt.core.errors import RecipeError, nearest

ROOT = Path(__file__).parent.parent
_registered: dict[str, dict[str, str]] = {}


def register(shelf: str, name: str, module: str) -> None:
    """Put an importable module on a shelf for this process only (tests, notebooks, single-file methods)."""
    _registered.setdefault(shelf, {})[name] = module


def names(shelf: str) -> list[str]:
    """Every name on a shelf, e.g. names('methods') -> ['code.bits', ..., 'share.kmeans']."""
    return sorted(_modules(shelf))


def _modules(shelf: str) -> dict[str, str]:
    return _own(shelf) | _foreign(shelf) | _registered.get(shelf, {})


@cache
def _own(shelf: str) -> dict[str, str]:
    folder = ROOT / shelf
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = ".".join(("smelt", shelf, *parts))
    return found


@cache
def _foreign(shelf: str) -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=f"smelt.{shelf}")}


def module(shelf: str, name: str) -> ModuleType:
    """The module behind a name.

    Raises:
        RecipeError: no such name; the nearest one is given.
        ImportError: the file is broken; never swallowed.
    """
    known = _modules(shelf)
    if name not in known:
        raise RecipeError(f"no {shelf.rstrip('s')} {name!r}{nearest(name, known)}")
    path = known[name]
    return sys.modules.get(path) or importlib.import_module(path)


def load(shelf: str, name: str, kind: type) -> Any:
    """The one class of `kind` that a file on a shelf defines."""
    found = module(shelf, name)
    classes = [
        c
        for c in vars(found).values()
        if isinstance(c, type)
        and issubclass(c, kind)
        and c.__module__ == found.__name__
        and not c.__name__.startswith("_")
    ]
    if len(classes) != 1:
        raise TypeError(f"{found.__name__} must define one public {kind.__name__}, it defines {len(classes)}")
    return classes[0]
