"""Things named in plain text: 'lenet(hidden=100)', 'module:function'; and what is said when that fails."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from smelt.core.errors import SmeltError, nearest


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def parse_call(spec: str, error: type[SmeltError]) -> tuple[str, dict[str, Any]]:
    """'lenet(hidden=100)' -> ('lenet', {'hidden': 100}); a bare name has no arguments.

    Raises:
        error: arguments that are not keyword=literal.
    """
    if not spec.endswith(")"):
        return spec, {}
    name, _, rest = spec.partition("(")
    try:
        call = ast.parse(f"_({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        if len(given) < len(call.keywords):
            raise ValueError
        return name.strip(), given
    except (SyntaxError, ValueError, TypeError):
        raise error(f"cannot read {spec!r}; arguments are keywords with plain values: name(size=8)") from None


def function_at(spec: str, error: type[SmeltError]) -> Callable[..., Any]:
    """The function that 'module:function' names; modules of the current directory come first.

    Raises:
        error: no such module or function (with the nearest), or a module that fails while it is imported.
    """
    path, _, name = spec.partition(":")
    if not path or not name.isidentifier() or not all(part.isidentifier() for part in path.split(".")):
        raise error(f"{spec!r} is not module:function")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(path)
    except Exception as problem:
        if isinstance(problem, ModuleNotFoundError) and f"{path}.".startswith(f"{problem.name}."):
            raise error(f"{spec!r}: no module {problem.name!r}, neither in {here} nor installed") from None
        what = f"{type(problem).__name__}: {first_line(problem)}"
        raise error(f"{spec!r}: importing {path!r} failed: {what}") from problem
    if not callable(function := getattr(module, name, None)):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise error(f"{spec!r}: {path!r} has no function {name!r}{nearest(name, known)}")
    return function  # type: ignore[no-any-return]


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """What a function takes, by name; None = anything, or unknown (written in C)."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in known.values()) else known


def check_arguments(function: Callable[..., Any], given: Iterable[str], where: str, error: type[SmeltError]) -> None:
    """Raise `error` for an argument that a function does not take, with the nearest that it does, or one it lacks."""
    known, variadic = parameters_of(function), inspect.Parameter.VAR_POSITIONAL
    if known is None:
        return
    for key in given:
        if key not in known or known[key].kind in (inspect.Parameter.POSITIONAL_ONLY, variadic):
            raise error(f"{where} has no argument {key!r}{nearest(key, known)}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and parameter.kind is not variadic and key not in given:
            raise error(f"{where} needs the argument {key!r}")
