"""Statistics of what passes a module while calibration batches run through the model.

A statistic is one file in `statistics/` with one class; `gather` collects all that are asked for in one pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.data import batch, evaluating, forward_or_raise, move, tensors
from smelt.core.edit import submodule
from smelt.core.errors import DataError

PLACES = ("input", "output")


class Statistic(ABC):
    """Something known of the floating tensors at one place; made anew for each module and place.

    module: whose input or output it watches, for those that must know how it uses them.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in what one call of the module saw, without gradients.  Raises DataError for values it cannot use."""

    @abstractmethod
    def result(self) -> Any:
        """What was found; asked for once, after at least one `update`."""


def gather(
    model: nn.Module,
    wanted: Mapping[str, Sequence[tuple[str, str]]],
    batches: Iterable[Any],
    limit: int | None = None,
) -> dict[str, dict[tuple[str, str], Any]]:
    """Run calibration batches through the model once and return what was asked for.

    >>> gather(model, {"fc1": [("input", "range")]}, batches)
    {'fc1': {('input', 'range'): (tensor(-1.3), tensor(2.0))}}

    The model runs in evaluation mode, on its own device.  Of several tensors at a place the first floating one
    counts.

    Args:
        wanted: module path -> (place, name on the shelf `statistics/`), place 'input' or 'output'.
        batches: what a loader yields; labels are not used.
        limit: number of batches to use; None for all.

    Raises:
        RecipeError: no such statistic.
        ModelError: no such module, or a forward that fails.
        DataError: a place that no batch reaches, or values that a statistic refuses; naming the module.
    """
    found: dict[tuple[str, str, str], Statistic] = {}
    reached: set[tuple[str, str, str]] = set()
    for path, asked in wanted.items():
        for place, name in asked:
            if place not in PLACES:
                raise ValueError(f"{place!r} is no place of a module; there is {', '.join(PLACES)}")
            found[path, place, name] = shelf.load("statistics", name, Statistic)(submodule(model, path))

    def see(path: str, place: str, values: Any) -> None:
        x = next((t for t in tensors(values) if t.is_floating_point()), None)
        for key, statistic in found.items():
            if key[:2] == (path, place) and x is not None and x.numel():
                reached.add(key)
                try:
                    statistic.update(x.detach())
                except DataError as error:
                    raise DataError(f"{place} of {path!r}: {error}") from None

    with evaluating(model), ExitStack() as hooks:
        for path, place in {key[:2]: None for key in found}:
            module = submodule(model, path)
            if place == "input":
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: see(path, "input", (args, kwargs)), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(lambda _, args, out, path=path: see(path, "output", out))
            hooks.callback(handle.remove)
        device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
        for item in islice(batches, limit):
            forward_or_raise(model, move(batch(item)[0], device), "while statistics are gathered")
    result: dict[str, dict[tuple[str, str], Any]] = {path: {} for path in wanted}
    for (path, place, name), statistic in found.items():
        if (path, place, name) not in reached:
            raise DataError(
                f"no calibration batch reaches the {place} of {path!r}, so its {name} is not known; "
                f"take it out of the step with on: ['*', '!{path}']"
            )
        result[path][place, name] = statistic.result()
    return result
