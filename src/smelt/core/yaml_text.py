"""The text of a recipe: YAML <-> plain data, with the line of every key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from smelt.core.errors import RecipeError
from smelt.core.named import first_line

DEEPEST = 50  # levels of a YAML file; a recipe has about ten


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `on`, 2:4 and a date are words, 1e-4 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "int", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|0[xb][0-9a-fA-F_]+|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def to_yaml(plain: Any) -> str:
    """Plain data of a recipe, or of one step, as the YAML that `Recipe.of` reads."""
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None))


def read(path: str) -> tuple[str, str]:
    """(text, name) of a recipe file."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError
        return Path(path).read_text(encoding="utf-8"), Path(path).name
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not text; a recipe is a YAML file") from None
    except PermissionError:
        raise RecipeError(f"the recipe file {path!r} cannot be read: permission denied") from None
    except (OSError, ValueError):  # a name that no file can have, too
        raise RecipeError(f"no recipe file {short(path)}; give a path to a .yaml file, or YAML text") from None


def parse(text: str, name: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """Plain data and the line of every key."""
    lines: dict[tuple[Any, ...], int] = {}
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{at}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, RecursionError) as error:  # a scalar that is not what its tag says; brackets in brackets
        raise RecipeError(f"{name}: not valid YAML: {first_line(error)}") from None

    def walk(node: yaml.Node | None, path: tuple[Any, ...]) -> None:
        if node is not None:
            lines.setdefault(path, node.start_mark.line + 1)
        if len(path) > DEEPEST:
            raise RecipeError(f"{name}, line {lines[path]}: more than {DEEPEST} levels, or an alias within itself")
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    raise RecipeError(f"{name}, line {key.start_mark.line + 1}: the key {key.value!r} stands twice")
                seen.add(key.value)
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                walk(value, (*path, i))

    walk(root, ())
    return data, lines


def short(value: Any) -> str:
    """What a value looks like, for messages."""
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
