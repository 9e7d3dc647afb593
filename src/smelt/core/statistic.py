"""Statistics of what passes a module, and of the gradients of its weights, while calibration batches run.

A statistic is one file in `statistics/` with one class; `gather` collects all that are asked for in one pass, and
`of_weights` asks for them by weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.data import batch, evaluating, forward_or_raise, move, tensors
from smelt.core.edit import submodule
from smelt.core.errors import DataError
from smelt.core.gradient import Gradients, Loss, singly
from smelt.core.target import Target

PLACES = ("input", "output")
# Samples whose gradients are taken one by one, at most.
SAMPLES = 1024

Wanted = Mapping[str, Sequence[tuple[str, str]]]
Found = dict[str, dict[tuple[str, str], Any]]


class Statistic(ABC):
    """Something known of the floating tensors at one place; made anew for each module and place.

    module: whose input or output it watches, for those that must know how it uses them.
    of: what `update` takes in: 'values' that pass the place; 'pairs' of those and of what passed there before the step
        began to change the model (the same, where nobody knows); the 'gradient' of the task's loss by a weight; its
        'slopes' by what passes the place.
    apart: gradients of single samples, instead of those of whole batches.
    """

    of: ClassVar[str] = "values"
    apart: ClassVar[bool] = False

    def __init__(self, module: nn.Module):
        self.module = module

    @classmethod
    def kind(cls, module: nn.Module) -> Hashable:
        """Modules of equal kinds that see the same values find the same; None: nothing can be said."""
        return None

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in what one call of the module saw, or one gradient.  Raises DataError for values it cannot use.

        Of pairs what it saw before follows, as a second argument.
        """

    @abstractmethod
    def result(self) -> Any:
        """What was found; asked for once, after at least one `update`."""


class Watch:
    """Context in which statistics take in what the modules of a model see.

    Args:
        wanted: module path -> (place, name on the shelf `statistics/`); the place is 'input', 'output', or the name
            of a parameter of the module for statistics of its gradient, which `updates` hands on.

    Raises:
        RecipeError: no such statistic.
        ModelError: no such module.
        ValueError: no such place for such a statistic.
    """

    def __init__(self, model: nn.Module, wanted: Wanted):
        self.wanted = wanted
        self.paused = False
        self.before: dict[str, list[Tensor]] = {}  # path -> what its next calls saw at their input, before
        self._found: dict[tuple[str, str, str], Statistic] = {}
        self._reached: set[tuple[str, str, str]] = set()
        self._modules = {path: submodule(model, path) for path in wanted}
        self._hooks = ExitStack()
        for path, asked in wanted.items():
            for place, name in asked:
                cls = shelf.load("statistics", name, Statistic)
                module = self._modules[path]
                if cls.of != "gradient" and place not in PLACES:
                    raise ValueError(f"{place!r} is no place of a module; there is {', '.join(PLACES)}")
                if cls.of == "gradient" and module._parameters.get(place) is None:
                    raise ValueError(f"{path!r} has no parameter {place!r} to take the {name} of")
                self._found[path, place, name] = cls(module)

    def __enter__(self) -> Watch:
        for path, place in {key[:2]: None for key, s in self._found.items() if s.of != "gradient"}:
            if place == "input":
                handle = self._modules[path].register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: self._see(path, "input", (args, kwargs)), with_kwargs=True
                )
            else:
                handle = self._modules[path].register_forward_hook(
                    lambda _, args, out, path=path: self._gave(path, out)
                )
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._hooks.close()

    def _see(self, path: str, place: str, values: Any) -> None:
        x = next((t for t in tensors(values) if t.is_floating_point()), None)
        if x is None or not x.numel() or self.paused:
            return
        before = [self.before[path].pop(0)] if place == "input" and self.before.get(path) else [x.detach()]
        with torch.no_grad():
            for key, statistic in self._found.items():
                if key[:2] == (path, place) and statistic.of in ("values", "pairs"):
                    self._update(key, x.detach(), *(before if statistic.of == "pairs" else ()))

    def _gave(self, path: str, out: Any) -> Any:
        """Take in an output; where its slopes are asked for, what takes its place has a gradient."""
        self._see(path, "output", out)
        keys = [k for k, s in self._found.items() if k[:2] == (path, "output") and s.of == "slopes"]
        x = next((t for t in tensors(out) if t.is_floating_point()), None)
        if x is None or not keys or self.paused or not torch.is_grad_enabled():
            return None
        given = None
        if not x.requires_grad and isinstance(out, Tensor):
            given = x = x.requires_grad_() * 1  # what follows may change it in place
        if x.requires_grad:
            for key in keys:
                x.register_hook(lambda g, key=key: self._update(key, g.detach()))
        return given

    def _update(self, key: tuple[str, str, str], *x: Tensor) -> None:
        self._reached.add(key)
        try:
            self._found[key].update(*x)
        except DataError as error:
            place = f"{key[1]} of {key[0]!r}" if key[1] in PLACES else f"gradient of {key[0]}.{key[1]}"
            raise DataError(f"{place}: {error}") from None

    def asks(self, of: str, apart: bool = False) -> bool:
        return any((s.of, s.apart) == (of, apart) for s in self._found.values())

    def updates(self, apart: bool) -> list[tuple[Tensor, Callable[[Tensor], None]]]:
        """For each gradient that is asked for: the parameter, and who takes it in."""
        return [
            (self._modules[key[0]]._parameters[key[1]], lambda g, key=key: self._update(key, g))  # type: ignore[misc]
            for key, s in self._found.items()
            if s.of == "gradient" and s.apart == apart
        ]

    def result(self) -> Found:
        """module path -> (place, name) -> what was found.  Raises DataError for a place that nothing reached."""
        result: Found = {path: {} for path in self.wanted}
        for (path, place, name), statistic in self._found.items():
            if (path, place, name) not in self._reached:
                where = f"the {place} of {path!r}" if place in PLACES else f"{path}.{place} with a gradient"
                raise DataError(
                    f"no calibration batch reaches {where}, so its {name} is not known; "
                    f"take it out of the step with on: ['*', '!{path}']"
                )
            result[path][place, name] = statistic.result()
        return result


def gather(
    model: nn.Module,
    wanted: Wanted,
    batches: Iterable[Any],
    limit: int | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Found:
    """Run calibration batches through the model once and return what was asked for.

    >>> gather(model, {"fc1": [("input", "range")]}, batches)
    {'fc1': {('input', 'range'): (tensor(-1.3), tensor(2.0))}}

    The model runs in evaluation mode, on its own device.  Of several tensors at a place the first floating one
    counts.  Gradients of single samples cost a forward and backward pass each, of 1024 samples at most.

    Args:
        wanted: as for `Watch`.
        batches: what a loader yields; labels are used for gradients only, and drawn from the outputs where there
            are none, and for slopes where they are classes (see `Gradients.backward`).
        limit: number of batches to use; None for all.
        loss: of the task, (outputs, labels) -> scalar; for gradients.

    Raises:
        RecipeError, ModelError, ValueError: as for `Watch`; a forward that fails.
        DataError: a place that no batch reaches, or values that a statistic refuses, naming the module; no loss.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    watch = Watch(model, wanted)
    whole, single = watch.updates(apart=False), watch.updates(apart=True)
    slopes = watch.asks("slopes")
    if (whole or single or slopes) and loss is None:
        raise DataError("gradients need the task's loss; give one")
    left, generator = SAMPLES, torch.Generator().manual_seed(seed)
    with evaluating(model), watch:
        for item in islice(batches, limit):
            inputs, labels = move(batch(item), device)
            if slopes:
                assert loss is not None
                with Gradients(model, [], loss, generator) as gradients:
                    gradients.backward(inputs, labels, draw=True)
                watch.paused = True  # it has seen all but gradients
            if whole:
                assert loss is not None
                with Gradients(model, whole, loss, generator) as gradients:
                    gradients.backward(inputs, labels)
            elif not slopes and (watch.asks("values") or watch.asks("pairs")):
                forward_or_raise(model, inputs, "while statistics are gathered")
            watch.paused = True
            for one in islice(singly(inputs, labels), left if single else 0):
                assert loss is not None
                with Gradients(model, single, loss, generator) as gradients:
                    gradients.backward(*one)
                left -= 1
            watch.paused = False
    return watch.result()


def of_weights(
    model: nn.Module,
    members: Sequence[Target],
    names: Sequence[str],
    batches: Iterable[Any],
    loss: Loss | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Statistics of weights: target name -> name on the shelf `statistics/` -> what was found.

    Those of values are taken at the input of the target's (first) module, slopes at its output, those of gradients at
    the target itself.
    Arguments and errors as for `gather`.
    """
    found = gather(model, wanted_of(members, names), batches, limit, loss, seed)
    return {t.name: taken(found, t, names) for t in members}


def wanted_of(members: Sequence[Target], names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """What to ask `gather` for, to know `names` of each member."""
    wanted: dict[str, dict[tuple[str, str], None]] = {}
    for target in members:
        wanted.setdefault(target.places[0][0], {}).update(dict.fromkeys((_place(target, name), name) for name in names))
    return {path: list(asked) for path, asked in wanted.items()}


def taken(found: Found, target: Target, names: Sequence[str]) -> dict[str, Any]:
    """What `gather` found of one target."""
    return {name: found[target.places[0][0]][_place(target, name), name] for name in names}


def _place(target: Target, name: str) -> str:
    of = shelf.load("statistics", name, Statistic).of
    return {"gradient": target.places[0][1], "slopes": "output"}.get(of, "input")
