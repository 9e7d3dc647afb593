"""A setting of a codec that takes one of several values for each tensor, under a budget of the step.

    - quantize.affine: {bits: {allocate: [2, 3, 4, 8]}, budget: 100 kB, by: hessian}

`budget`, `by` and `together` are words of the step, beside `on` and `at`.  How values are chosen is in allocate.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from smelt.core.budget import Budget
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, Method
from smelt.core.settings import check, setting
from smelt.core.yaml_text import short

BY = ("error", "output", "hessian", "kl")
TOGETHER = ("nothing", "input", "block")
S = TypeVar("S")  # a step


@dataclass(frozen=True)
class Choice:
    """The words of such a step, and which setting takes which values."""

    name: str = ""
    values: tuple[Any, ...] = ()
    budget: str = setting("", "'100 kB' of the file, '4.5 bits' per value or '0.15x' of fp32; goes with allocate")
    by: str = setting(
        "error",
        "what allocate holds low: squared error of the values; output of the layer (data); hessian, the rise of the "
        "loss to second order (data); kl, divergence of the model's outputs, measured (data, slow)",
        choices=BY,
    )
    together: str = setting(
        "nothing", "tensors that allocate gives one value: those that share their input, or a block", choices=TOGETHER
    )

    def words(self) -> dict[str, Any]:
        """Those that are not at their default."""
        return {k: v for k in WORDS if (v := getattr(self, k)) != getattr(Choice, k)}

    def check(self, act: Any, at: str, inside: bool, where: Any) -> None:
        """Raise RecipeError or RuleError unless a step with this act can choose so."""
        key = getattr(act, "name", "train")
        if not isinstance(act, Codec) or act.lossless:
            raise RuleError(
                f"{where}: {key}.{self.name} cannot be allocated; what can is a setting of a codec that loses"
            )
        if inside:
            raise RuleError(
                f"{where}: {key}.{self.name} cannot be allocated inside train, where sizes are not known; put {key} "
                "before train, which tunes what is stored"
            )
        if at != "weight":
            raise RuleError(f"{where}: {key}.{self.name} cannot be allocated at {at}, where nothing is stored")
        check(self, f"{where}: {key}")
        Budget.parse(self.budget, f"{where}: {key}")


WORDS = ("budget", "by", "together")


def taken(given: Mapping[str, Any], key: str, where: Any) -> tuple[dict[str, Any], Choice | None]:
    """(settings with the first of the values to choose from, the choice) of the data of a step.

    Args:
        where: the step; `where / name` is a setting of it, for messages.
    """
    words = {k: given[k] for k in WORDS if k in given}
    given = {k: v for k, v in given.items() if k not in WORDS}
    special = {name: next(iter(v)) for name, v in given.items() if isinstance(v, Mapping) and len(v) == 1}
    chosen = [n for n, word in special.items() if word == "allocate" or (word == "choose" and "budget" in words)]
    if not chosen:
        if words:
            word = next(iter(words))
            raise RecipeError(
                f"{where / word}: {word!r} goes with a setting to choose: {key}: {{bits: {{allocate: [2, 4]}}}}"
            )
        return given, None
    if len(chosen) > 1:
        raise RecipeError(f"{where / chosen[1]}: {' and '.join(chosen)} cannot both be allocated in one step")
    name = chosen[0]
    values = given[name][special[name]]
    if not isinstance(values, (list, tuple)) or len(values) < 2 or any(v in values[:i] for i, v in enumerate(values)):
        raise RecipeError(f"{where / name}: allocate takes a list of two different values or more, not {short(values)}")
    if "budget" not in words:
        raise RecipeError(
            f"{where / name}: {key}.{name} is allocated without a budget; add budget: 100 kB, 4.5 bits or 0.15x"
        )
    return {**given, name: values[0]}, Choice(name, tuple(values), **words)


def merged(variants: Sequence[Sequence[S]], choice: Choice, key: str, where: Any) -> tuple[S, ...]:
    """The steps of a composite, of which there is one variant for each value: one codec, that differs, has the choice.

    Raises:
        RuleError: more or something else than one setting of one codec depends on the choice.
    """
    what = f"{where}: {key}.{choice.name} cannot be allocated"
    if len({len(steps) for steps in variants}) > 1:
        raise RuleError(f"{what}: it changes which steps {key} stands for")
    found, changed = list(variants[0]), []
    for i, same in enumerate(zip(*variants, strict=True)):
        if all(step == same[0] for step in same):
            continue
        acts: list[Method] = [step.act for step in same]  # type: ignore[attr-defined]
        names = [f.name for f in fields(acts[0]) if len({repr(getattr(a, f.name, None)) for a in acts}) > 1]  # type: ignore[arg-type]
        alike = len({type(a) for a in acts}) == 1 and all(replace(s, act=acts[0]) == same[0] for s in same)  # type: ignore[type-var]
        if not alike or len(names) != 1:
            raise RuleError(f"{what}: {acts[0].name} in it does not depend on it by one setting alone")
        changed.append(acts[0].name)
        values = tuple(getattr(a, names[0]) for a in acts)
        found[i] = replace(same[0], choice=replace(choice, name=names[0], values=values))  # type: ignore[type-var]
    if len(changed) != 1:
        raise RuleError(f"{what}: {' and '.join(changed) or 'no step'} of {key} depends on it, and it must be one")
    return tuple(found)
