"""A recipe is an ordered list of steps; YAML <-> plain data <-> Recipe.

    steps:
      - train:
          epochs: 8
          with:                                    # acting together in one loop
            - distill.logits: {temperature: 4}
            - prune.weights: {ratio: {ramp: [0, 0.9]}}
      - share.kmeans: {clusters: 16, on: "fc*"}
      - code.entropy: {}

Key = name on the shelf `methods/`; mapping = its settings; `on` (a selector) and `at` belong to the step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from smelt.core import shelf
from smelt.core.errors import RecipeError, RuleError, nearest
from smelt.core.method import Codec, Method, Objective, make
from smelt.core.named import first_line
from smelt.core.settings import Ramp, build, check, ramps, setting

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "constant", "linear")
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


@dataclass(frozen=True)
class Train:
    """Tune the floating leaves of what is stored, and all that is not, with the pieces under `with` acting together."""

    epochs: int = setting(5, "passes over the training data", low=1)
    lr: float = setting(1e-3, "peak learning rate", low=0)
    optimizer: str = setting("adam", "optimizer", choices=OPTIMIZERS)
    momentum: float = setting(0.9, "momentum (sgd) or beta1 (adam)", low=0, high=1)
    weight_decay: float = setting(0.0, "weight decay of the optimizer", low=0)
    schedule: str = setting("cosine", "learning rate over the loop, from the peak to zero", choices=SCHEDULES)
    warmup: float = setting(0.0, "share of the loop in which the rate rises from zero", low=0, high=1)
    clip: float | None = setting(None, "largest gradient norm", low=0)
    precision: str = setting(
        "float32", "arithmetic of the forward passes, the teacher's too", choices=("float32", "bfloat16")
    )
    hold_out: float = setting(0.1, "share of the training data held out for selection", low=0, high=0.5)
    keep: str = setting("best", "which weights are kept: best on the held-out split, or last", choices=("best", "last"))
    patience: int | None = setting(None, "epochs without improvement before it stops", low=1)
    refresh: float = setting(0.01, "share of the loop between two updates of what ramps", low=0, high=1)
    hard: float = setting(1.0, "weight of the task's own loss on the labels", low=0)

    def __post_init__(self) -> None:
        for name in ramps(self):
            raise RecipeError(f"train.{name} cannot ramp; what ramps is a setting of a method under 'with'")
        check(self, "train")
        if self.momentum >= 1 and self.optimizer != "sgd":
            raise RecipeError(f"train.momentum is {self.momentum}; {self.optimizer} takes it as beta1, below 1")


@dataclass(frozen=True)
class Step:
    """One act: a method or a `train`, where it acts, and (train) the steps that act inside it."""

    act: Method | Train
    on: tuple[str, ...] = ()
    at: str = "weight"
    pieces: tuple[Step, ...] = ()
    place: str = ""

    @property
    def key(self) -> str:
        return self.act.name if isinstance(self.act, Method) else "train"

    def to_plain(self) -> Any:
        settings: dict[str, Any] = {}
        for f in fields(self.act):  # type: ignore[arg-type]
            value = getattr(self.act, f.name)
            if f.default is MISSING or value != f.default:
                settings[f.name] = _plain(value)
        if self.on:
            settings["on"] = self.on[0] if len(self.on) == 1 else list(self.on)
        if self.at != "weight":
            settings["at"] = self.at
        if self.pieces:
            settings["with"] = [piece.to_plain() for piece in self.pieces]
        return {self.key: settings}


@dataclass(frozen=True)
class Recipe:
    steps: tuple[Step, ...]
    name: str = "recipe"

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def to_plain(self) -> dict[str, Any]:
        return {"steps": [step.to_plain() for step in self.steps]}

    def to_yaml(self) -> str:
        return to_yaml(self.to_plain())

    def prefix_hash(self, length: int) -> str:
        """A hash of the first `length` steps: what a cached state after them depends on."""
        text = json.dumps([step.to_plain() for step in self.steps[:length]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @staticmethod
    def of(what: Recipe | Method | Mapping[str, Any] | Sequence[Any] | str | Path) -> Recipe:
        """A recipe from a file path, YAML text (with a newline), plain data, or a list of methods and steps.

        Raises:
            RecipeError: with file and line where they are known, and the nearest right name.
        """
        if isinstance(what, Recipe):
            return what
        if isinstance(what, Method):
            what = [what]
        if isinstance(what, (str, Path)):
            text, name = str(what), "recipe"
            if "\n" not in text:
                text, name = _read(text)
            data, lines = _parse(text, name)
            return Recipe(_steps(data, _Where(name, lines)), name.removesuffix(".yaml"))
        return Recipe(_steps({"steps": what} if not isinstance(what, Mapping) else what, _Where("recipe", {})))


def to_yaml(plain: Any) -> str:
    """Plain data of a recipe, or of one step, as the YAML that `Recipe.of` reads."""
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None))


def _read(path: str) -> tuple[str, str]:
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
        raise RecipeError(f"no recipe file {_short(path)}; give a path to a .yaml file, or YAML text") from None


@dataclass(frozen=True)
class _Where:
    """Where in a recipe we are, for errors: 'demo.yaml, line 7' or 'recipe, step 2'."""

    name: str
    lines: Mapping[tuple[Any, ...], int]
    path: tuple[Any, ...] = ()

    def __truediv__(self, key: Any) -> _Where:
        return _Where(self.name, self.lines, (*self.path, key))

    def __str__(self) -> str:
        for end in range(len(self.path), -1, -1):
            if self.path[:end] in self.lines:
                return f"{self.name}, line {self.lines[self.path[:end]]}"
        steps = [str(key + 1) for key in self.path if isinstance(key, int)]
        return f"{self.name}, step {'.'.join(steps)}" if steps else self.name


def _steps(data: Any, where: _Where) -> tuple[Step, ...]:
    if not isinstance(data, Mapping) or "steps" not in data:
        raise RecipeError(f"{where}: a recipe is a mapping with the key 'steps', not {_short(data)}")
    for key in data:
        if key != "steps":
            raise RecipeError(f"{where / key}: unknown key {key!r}{nearest(str(key), ['steps'])}")
    steps = data["steps"]
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise RecipeError(f"{where / 'steps'}: 'steps' is a list of one step or more, not {_short(steps)}")
    return tuple(_step(item, where / "steps" / i, inside=False) for i, item in enumerate(steps))


def _step(item: Any, where: _Where, *, inside: bool) -> Step:
    if isinstance(item, Step):
        return item
    if isinstance(item, (Method, Train)):
        return _check_place(Step(item, place=str(where)), where, inside)
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise RecipeError(
            f"{where}: a step is one key with its settings, such as share.kmeans: {{clusters: 16}}, not {_short(item)}"
        )
    key, settings = next(iter(item.items()))
    here = where / key
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise RecipeError(f"{here}: the settings of {key} are a mapping, not {_short(settings)}")
    given = dict(settings)
    if key == "train":
        if inside:
            raise RecipeError(f"{here}: a train step cannot stand inside another")
        pieces = given.pop("with", None) or []
        if not isinstance(pieces, Sequence) or isinstance(pieces, str):
            raise RecipeError(f"{here / 'with'}: 'with' is a list of methods, not {_short(pieces)}")
        inner = tuple(_step(p, here / "with" / i, inside=True) for i, p in enumerate(pieces))
        return Step(_located(lambda: build(Train, given, "train"), here, given), pieces=inner, place=str(here))
    if key in ("recover",):
        raise RecipeError(f"{here}: {key!r} is a reserved word; write train with distill.logits to recover accuracy")
    on, at = _selector(given.pop("on"), here / "on") if "on" in given else (), given.pop("at", "weight")
    if str(key) not in (known := shelf.names("methods")):
        raise RecipeError(f"{here}: no method {str(key)!r}{nearest(str(key), [*known, 'train'])}")
    act = _located(lambda: make(str(key), given), here, given)
    return _check_place(Step(act, on, at, place=str(here)), here, inside)


def _selector(on: Any, where: _Where) -> tuple[str, ...]:
    patterns = [on] if isinstance(on, str) else on
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise RecipeError(f"{where}: 'on' is a pattern or a list of patterns, not {_short(on)}")
    return tuple(patterns)


def _check_place(step: Step, where: _Where, inside: bool) -> Step:
    act = step.act
    if isinstance(act, Objective) and not inside:
        raise RuleError(f"{where}: {step.key} adds to a training loss; put it under train: with:")
    if isinstance(act, Codec) and act.lossless and inside:
        raise RuleError(
            f"{where}: {step.key} codes files without loss and does nothing in training; put it after train"
        )
    if not inside and ramps(act):
        raise RuleError(
            f"{where}: {step.key}.{next(iter(ramps(act)))} ramps, which only means something under train: with:"
        )
    if isinstance(act, Objective) and step.on and not act.needs_weights:
        raise RecipeError(f"{where}: {step.key} looks at no weights; take 'on' out")
    places = act.places if isinstance(act, Codec) else ("weight",)
    if step.at not in places:
        raise RecipeError(f"{where}: {step.key} does not act at {step.at!r}{nearest(str(step.at), places)}")
    return step


def _located(make_it: Any, where: _Where, given: Mapping[str, Any]) -> Any:
    """Run a constructor and put the line of the setting it complains about before its message."""
    try:
        return make_it()
    except RecipeError as error:
        text = str(error)
        key = next((k for k in given if f".{k} " in text or f".{k}:" in text or f"setting {k!r}" in text), None)
        raise type(error)(f"{where / key if key else where}: {text}") from None


def _parse(text: str, name: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
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


def _plain(value: Any) -> Any:
    if isinstance(value, Ramp):
        default = Ramp(value.start, value.end)
        if value == default:
            return {"ramp": [value.start, value.end]}
        return {"ramp": {f.name: getattr(value, f.name) for f in fields(Ramp)}}
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
