"""A recipe is an ordered list of steps; YAML <-> plain data <-> Recipe.

    steps:
      - train:
          epochs: 8
          with:                                    # acting together in one loop
            - distill.logits: {temperature: 4}
            - prune.weights: {ratio: {ramp: [0, 0.9]}}
      - share.kmeans: {clusters: 16, on: "fc*"}
      - code.entropy: {}

Key = name on the shelf `methods/`; mapping = its settings; `on` (a selector) and `at` belong to the step,
and so do the words of choice.py.  A `Composite` is replaced by the steps that it stands for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from smelt.core import shelf
from smelt.core.choice import Choice, merged, taken
from smelt.core.errors import RecipeError, RuleError, nearest
from smelt.core.method import Codec, Composite, Method, Objective, make
from smelt.core.settings import Ramp, build, check, ramps, setting
from smelt.core.yaml_text import parse, read, short, to_yaml

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "constant", "linear")


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
    """One act: a method or a `train`, where it acts, and (train) the steps that act inside it.

    origin: name of the composite that it comes from, or ''.
    choice: of a setting of its codec, for each tensor; `act` has the first value.
    """

    act: Method | Train
    on: tuple[str, ...] = ()
    at: str = "weight"
    pieces: tuple[Step, ...] = ()
    place: str = ""
    origin: str = ""
    choice: Choice | None = None

    @property
    def key(self) -> str:
        return self.act.name if isinstance(self.act, Method) else "train"

    @property
    def title(self) -> str:
        """The key, and where it comes from: 'quantize.affine (quantize.awq)'."""
        return f"{self.key} ({self.origin})" if self.origin else self.key

    def to_plain(self) -> Any:
        settings: dict[str, Any] = {}
        for f in fields(self.act):  # type: ignore[arg-type]
            value = getattr(self.act, f.name)
            if f.default is MISSING or value != f.default:
                settings[f.name] = _plain(value)
        if self.choice is not None:
            settings[self.choice.name] = {"allocate": list(self.choice.values)}
            settings |= self.choice.words()
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
                text, name = read(text)
            data, lines = parse(text, name)
            return Recipe(_steps(data, _Where(name, lines)), name.removesuffix(".yaml"))
        return Recipe(_steps({"steps": what} if not isinstance(what, Mapping) else what, _Where("recipe", {})))


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
        raise RecipeError(f"{where}: a recipe is a mapping with the key 'steps', not {short(data)}")
    for key in data:
        if key != "steps":
            raise RecipeError(f"{where / key}: unknown key {key!r}{nearest(str(key), ['steps'])}")
    steps = data["steps"]
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise RecipeError(f"{where / 'steps'}: 'steps' is a list of one step or more, not {short(steps)}")
    return _all(steps, where / "steps", _Around())


@dataclass(frozen=True)
class _Around:
    """What stands around a step: a `train`, or a composite with its `on` and `at`."""

    inside: bool = False
    on: tuple[str, ...] = ()
    at: str = "weight"
    origin: str = ""


def _all(items: Sequence[Any], where: _Where, around: _Around) -> tuple[Step, ...]:
    return tuple(step for i, item in enumerate(items) for step in _step(item, where / i, around))


def _step(item: Any, where: _Where, around: _Around) -> tuple[Step, ...]:
    """The step that an item says; several, where it is a composite."""
    if isinstance(item, (Method, Train)):
        item = Step(item)
    if isinstance(item, Step):
        pieces = _all(item.pieces, where, replace(around, inside=True))
        at = around.at if item.at == "weight" else item.at
        return _placed(replace(item, on=item.on or around.on, at=at, pieces=pieces), where, around)
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise RecipeError(
            f"{where}: a step is one key with its settings, such as share.kmeans: {{clusters: 16}}, not {short(item)}"
        )
    key, settings = next(iter(item.items()))
    here = where / key
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise RecipeError(f"{here}: the settings of {key} are a mapping, not {short(settings)}")
    given = dict(settings)
    if key == "train":
        inner = given.pop("with", None) or []
        if not isinstance(inner, Sequence) or isinstance(inner, str):
            raise RecipeError(f"{here / 'with'}: 'with' is a list of methods, not {short(inner)}")
        pieces = _all(inner, here / "with", replace(around, inside=True))
        return _placed(Step(_located(lambda: build(Train, given, "train"), here, given), pieces=pieces), here, around)
    if key in ("recover",):
        raise RecipeError(f"{here}: {key!r} is a reserved word; write train with distill.logits to recover accuracy")
    on = _selector(given.pop("on"), here / "on") if "on" in given else around.on
    at = given.pop("at", around.at)
    if str(key) not in (known := shelf.names("methods")):
        raise RecipeError(f"{here}: no method {str(key)!r}{nearest(str(key), [*known, 'train'])}")
    cls, choice = shelf.load("methods", str(key), Method), None
    if issubclass(cls, (Codec, Composite)):
        given, choice = taken(given, str(key), here)
    values = [given] if choice is None else [{**given, choice.name: value} for value in choice.values]
    acts = [_located(lambda v=v: make(str(key), v), here, given) for v in values]
    return _placed(Step(acts[0], on, at, choice=choice), here, around)


def _placed(step: Step, where: _Where, around: _Around) -> tuple[Step, ...]:
    """The step as the recipe holds it, checked; of a composite, the steps that it stands for."""
    act = step.act
    if isinstance(act, Composite):
        within = _Around(around.inside, step.on, step.at, around.origin or step.key)
        if (choice := step.choice) is None:
            return _expanded(act, where, within)
        acts: list[Any] = [replace(act, **{choice.name: v}) for v in choice.values]  # type: ignore[type-var]
        variants = [_expanded(a, where, within) for a in acts]
        steps = merged(variants, choice, step.key, where)
        for one in steps:
            _check_place(one, where, around.inside)
        return steps
    if isinstance(act, Train) and around.inside:
        raise RecipeError(f"{where}: a train step cannot stand inside another")
    if isinstance(act, Train) or (isinstance(act, Objective) and not act.needs_weights and around.on):
        step = replace(step, on=())  # who inherits a selector need not look at weights
    step = replace(step, place=step.place or str(where), origin=step.origin or around.origin)
    if isinstance(act, Method) or step.choice is not None:
        _check_place(step, where, around.inside)
    return (step,)


def _expanded(act: Composite, where: _Where, around: _Around) -> tuple[Step, ...]:
    inner = _located(act.steps, where, {})
    if not inner:
        raise RecipeError(f"{where}: {act.name} stands for no step")
    return _all(inner, where, around)


def _selector(on: Any, where: _Where) -> tuple[str, ...]:
    patterns = [on] if isinstance(on, str) else on
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise RecipeError(f"{where}: 'on' is a pattern or a list of patterns, not {short(on)}")
    return tuple(patterns)


def _check_place(step: Step, where: _Where, inside: bool) -> None:
    act = step.act
    if step.choice is not None:
        step.choice.check(act, step.at, inside, where)
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


def _located(make_it: Any, where: _Where, given: Mapping[str, Any]) -> Any:
    """Run a constructor and put the line of the setting it complains about before its message."""
    try:
        return make_it()
    except RecipeError as error:
        text = str(error)
        key = next((k for k in given if f".{k} " in text or f".{k}:" in text or f"setting {k!r}" in text), None)
        raise type(error)(f"{where / key if key else where}: {text}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Ramp):
        default = Ramp(value.start, value.end)
        if value == default:
            return {"ramp": [value.start, value.end]}
        return {"ramp": {f.name: getattr(value, f.name) for f in fields(Ramp)}}
    return list(value) if isinstance(value, tuple) else value
