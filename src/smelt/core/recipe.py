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
and so do the words of choice.py.  A `Composite` is replaced by the steps that it stands for.  `recover: {...}` of a
step stands for a step `recover` after it.
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
from smelt.core.settings import Ramp, build, ramps
from smelt.core.train import Recover, Train
from smelt.core.yaml_text import parse, read, short, to_yaml


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
        return self.act.name

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
        if self.pieces and not (isinstance(self.act, Train) and _usual(self.act, self.pieces)):
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
        pieces = item.pieces or (item.act.pieces if isinstance(item.act, Train) else ())
        pieces = _all(pieces, where, replace(around, inside=True))
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
    if key in LOOPS:
        return _placed(_loop(LOOPS[key], given, here, around), here, around)
    if "recover" in given:
        after = given.pop("recover")
        return _recovered(key, given, {} if after is None else after, here, around)
    on = _selector(given.pop("on"), here / "on") if "on" in given else around.on
    at = given.pop("at", around.at)
    if str(key) not in (known := shelf.names("methods")):
        raise RecipeError(f"{here}: no method {str(key)!r}{nearest(str(key), [*known, *LOOPS])}")
    cls, choice = shelf.load("methods", str(key), Method), None
    if issubclass(cls, (Codec, Composite)):
        given, choice = taken(given, str(key), here)
    values = [given] if choice is None else [{**given, choice.name: value} for value in choice.values]
    acts = [_located(lambda v=v: make(str(key), v), here, given) for v in values]
    return _placed(Step(acts[0], on, at, choice=choice), here, around)


LOOPS: dict[str, type[Train]] = {"train": Train, "recover": Recover}


def _usual(act: Train, pieces: Sequence[Step]) -> bool:
    """Whether these are the pieces that such a step has when none are named."""
    return [piece.to_plain() for piece in pieces] == list(act.pieces)


def _loop(kind: type[Train], given: dict[str, Any], where: _Where, around: _Around) -> Step:
    inner = given.pop("with", None) or list(kind.pieces)
    if not isinstance(inner, Sequence) or isinstance(inner, str):
        raise RecipeError(f"{where / 'with'}: 'with' is a list of methods, not {short(inner)}")
    pieces = _all(inner, where / "with", replace(around, inside=True))
    return Step(_located(lambda: build(kind, given, kind.name), where, given), pieces=pieces)


def _recovered(key: Any, given: dict[str, Any], after: Any, where: _Where, around: _Around) -> tuple[Step, ...]:
    """The steps that are left of a step without its `recover`, and that one."""
    here = where / "recover"
    if not isinstance(after, Mapping):
        raise RecipeError(f"{here}: recover takes settings, as train does; {{}} for short ones, not {short(after)}")
    if around.inside:
        raise RuleError(f"{here}: inside train nothing is lost yet; put recover after train")
    steps = _step({key: given}, _Where(where.name, where.lines, where.path[:-1]), around)
    if all(isinstance(step.act, Codec) and step.act.lossless for step in steps):
        raise RuleError(f"{here}: {key} loses nothing, so there is nothing to recover")
    return (*steps, *_placed(_loop(Recover, dict(after), here, _Around()), here, _Around()))


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
        raise RecipeError(f"{where}: a {act.name} step cannot stand inside another")
    if isinstance(act, Train) and act.scope == "block":
        _check_blocks(step, where)
    if isinstance(act, Train) or (isinstance(act, Objective) and not act.needs_weights and around.on):
        step = replace(step, on=())  # who inherits a selector need not look at weights
    step = replace(step, place=step.place or str(where), origin=step.origin or around.origin)
    if isinstance(act, Method) or step.choice is not None:
        _check_place(step, where, around.inside)
    return (step,)


def _check_blocks(step: Step, where: _Where) -> None:
    for piece in step.pieces:
        if not isinstance(piece.act, Codec) or piece.at == "saved":
            what = f"{piece.key} at saved" if piece.at == "saved" else piece.key
            raise RuleError(f"{where}: scope: block trains with codecs only; {what} needs scope: model")


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
    if step.at == "saved" and not inside:
        raise RuleError(f"{where}: {step.key} at saved stores what a training step keeps; put it under train: with:")


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
