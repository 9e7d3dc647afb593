"""Settings are the fields of a frozen dataclass; this is how a field is declared and checked.

    @dataclass(frozen=True)
    class KMeans(Codec):
        clusters: int = setting(16, "number of shared values", low=1, high=65536)

The same declaration checks recipes and Python calls, and writes `smelt methods share.kmeans`.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from smelt.core.errors import RecipeError, nearest

T = TypeVar("T")


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A dataclass field with its documentation and the values it may take (both ends included)."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Ramp:
    """A number that moves from `start` to `end` while a training loop runs.

    v(t) = end + (start - end) (1 - s)^p,  s = clip((t - begin) / (finish - begin), 0, 1),
    with p = 3 for 'cubic' (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1) and p = 1 for 'linear'.
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 0.75
    shape: str = "cubic"

    def __post_init__(self) -> None:
        for name in ("start", "end", "begin", "finish"):
            if not _finite(value := getattr(self, name)):
                raise RecipeError(f"ramp: {name} is {value!r}; it takes a finite number")
        if self.shape not in ("cubic", "linear"):
            raise RecipeError(f"ramp: shape {self.shape!r} is neither 'cubic' nor 'linear'")
        if not 0 <= self.begin < self.finish <= 1:
            raise RecipeError(f"ramp: 0 <= begin < finish <= 1 must hold, not begin {self.begin}, finish {self.finish}")

    def at(self, t: float) -> float:
        """The value at progress `t` in 0..1 of the loop."""
        s = min(1.0, max(0.0, (t - self.begin) / (self.finish - self.begin)))
        return self.end + (self.start - self.end) * (1 - s) ** (3 if self.shape == "cubic" else 1)

    @staticmethod
    def parse(value: Any, where: str) -> Ramp:
        """From recipe data: [start, end], or a mapping of the fields."""
        try:
            if isinstance(value, (list, tuple)) and len(value) == 2:
                made = Ramp(*value)
                return replace(made, start=float(made.start), end=float(made.end))
            if isinstance(value, Mapping):
                known = {f.name for f in fields(Ramp)}
                for key in value:
                    if key not in known:
                        raise RecipeError(f"ramp has no setting {key!r}{nearest(key, known)}")
                if {"start", "end"} <= set(value):
                    return Ramp(**value)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        raise RecipeError(f"{where}: a ramp is [start, end] or {{start, end, begin, finish, shape}}, not {value!r}")


def resolve(settings: T, progress: float) -> T:
    """The same settings with every ramp replaced by its value at `progress` (integers are rounded)."""
    moving = ramps(settings)
    if not moving:
        return settings
    hints = _hints(type(settings))
    values = {k: r.at(progress) for k, r in moving.items()}
    return replace(settings, **{k: round(v) if _plain(hints[k]) is int else v for k, v in values.items()})  # type: ignore[type-var]


_HINTS: dict[type, dict[str, Any]] = {}  # a file may have a form for each of a hundred thousand tensors


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def ramps(settings: Any) -> dict[str, Ramp]:
    return {f.name: v for f in fields(settings) if isinstance(v := getattr(settings, f.name), Ramp)}


def build(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of a settings class from plain data; unknown keys get the nearest name.

    Raises:
        RecipeError: naming `where`, the key, the value and what would be right.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise RecipeError(f"{where} has no setting {key!r}{nearest(str(key), known)}")
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in given:
            raise RecipeError(f"{where} needs the setting {name!r}: {f.metadata.get('doc', '')}")
    values = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and len(value) == 1 and (special := next(iter(value))) in SPECIAL:
            if special == "ramp":
                value = Ramp.parse(value["ramp"], f"{where}.{key}")
            else:
                needs = (
                    "a codec of a recipe's step, with a budget"
                    if special == "allocate"
                    else "the search, which this version does not have"
                )
                raise RecipeError(f"{where}.{key}: {special!r} needs {needs}; give one value")
        values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


SPECIAL = ("ramp", "choose", "allocate")


def check(settings: Any, where: str) -> None:
    """Raise RecipeError for a value of the wrong type or out of range."""
    hints = _hints(type(settings))
    for f in fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, Ramp):
            if _plain(hints[f.name]) not in (int, float):
                raise RecipeError(f"{where}.{f.name} is not a number and cannot ramp")
            _check_range(value.start, f, where)
            _check_range(value.end, f, where)
            continue
        _check_type(value, hints[f.name], f, where)
        _check_range(value, f, where)


def _check_type(value: Any, hint: Any, f: Field[Any], where: str) -> None:
    allowed = typing.get_args(hint) if _is_union(hint) else (hint,)
    for kind in allowed:
        origin = typing.get_origin(kind) or kind
        if origin is typing.Any or (kind is type(None) and value is None):
            return
        if origin is float and _finite(value):
            return
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return
        if origin not in (int, float, type(None)) and isinstance(origin, type) and isinstance(value, origin):
            return
    names = " or ".join("nothing" if k is type(None) else getattr(k, "__name__", str(k)) for k in allowed)
    raise RecipeError(f"{where}.{f.name} is {value!r}; it takes {names}: {f.metadata.get('doc', '')}")


def _check_range(value: Any, f: Field[Any], where: str) -> None:
    low, high, choices = (f.metadata.get(k) for k in ("low", "high", "choices"))
    if choices is not None and value is not None and value not in choices:
        if isinstance(value, str):
            hint = nearest(value, [c for c in choices if isinstance(c, str)])
        else:
            hint = f"; there is {', '.join(map(str, choices))}"
        raise RecipeError(f"{where}.{f.name}: no choice {value!r}{hint}")
    if _number(value) and ((low is not None and value < low) or (high is not None and value > high)):
        span = (
            f"{low}..{high}" if low is not None and high is not None else f">= {low}" if high is None else f"<= {high}"
        )
        raise RecipeError(f"{where}.{f.name} is {value}, outside {span}: {f.metadata.get('doc', '')}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union or type(hint).__name__ == "UnionType"


def _plain(hint: Any) -> Any:
    if _is_union(hint):
        kinds = [k for k in typing.get_args(hint) if k not in (type(None), Ramp)]
        return kinds[0] if kinds else None
    return hint


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    """A number that a float can hold."""
    try:
        return _number(value) and math.isfinite(value)
    except OverflowError:
        return False
