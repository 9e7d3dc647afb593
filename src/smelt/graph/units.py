"""Arithmetic over the units of groups: what belongs to each, what it costs, in which order they go."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.data import evaluating, forward
from smelt.core.target import Target
from smelt.graph.groups import Group, Part

_LAYERS = (nn.Linear, _ConvNd)


def coordinates(part: Part) -> tuple[Tensor, Tensor]:
    """(coordinates along the part's dimension, the unit of each), both flat."""
    if isinstance(part.index, Tensor):
        units = torch.arange(len(part.index)).repeat_interleave(part.index.shape[1])
        return part.index.reshape(-1), units
    lengths = torch.tensor([len(one) for one in part.index])
    return torch.cat(part.index), torch.arange(len(part.index)).repeat_interleave(lengths)


def sums(values: Tensor, part: Part, dim: int | None = None) -> Tensor:
    """[units, ...]: `values`, of the shape of the part's tensor, summed over what each unit takes of it.

    Args:
        dim: of `values`, where it is not laid out like the tensor: then the other dimensions stay.
    """
    at, unit = (t.to(values.device) for t in coordinates(part))
    if dim is None:
        along = values.movedim(part.dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
    else:
        along = values.movedim(dim, 0)
    return along.new_zeros(len(part.index), *along.shape[1:]).index_add_(0, unit, along[at])


def rows(values: Tensor, part: Part) -> Tensor:
    """[units, n]: what each unit takes of `values`, flat; zeros where it takes less than others."""
    along = values.movedim(part.dim, 0).flatten(1) if values.dim() > 1 else values[:, None]
    at, unit = (t.to(values.device) for t in coordinates(part))
    counts = unit.bincount(minlength=len(part.index))
    place = torch.arange(len(unit), device=unit.device) - (counts.cumsum(0) - counts)[unit]
    found = along.new_zeros(len(part.index), int(counts.max()), along.shape[1])
    found[unit, place] = along[at]
    return found.flatten(1)


def structure(group: Group, by_name: Mapping[str, Target]) -> Hashable:
    """Equal for groups of like kinds that run through like layers in the same way (Fang et al. 2024,
    arXiv:2407.04616)."""
    parts = [(type(by_name[p.tensor].module).__name__, by_name[p.tensor].places[0][1], p.role) for p in group.parts]
    return (group.kind, tuple(parts))


def positions(model: nn.Module, example: Any) -> dict[str, float]:
    """Module path of each linear or convolution layer that is called -> times that each of its weights multiplies."""
    found: dict[str, float] = {}

    def count(path: str, module: Any, args: Any, out: Any) -> None:
        x = args[0] if isinstance(module, _ConvTransposeNd) else out
        found[path] = found.get(path, 0.0) + x.numel() / module.weight.shape[0]

    with evaluating(model):
        hooks = [
            module.register_forward_hook(lambda module, args, out, path=path: count(path, module, args, out))
            for path, module in model.named_modules()
            if isinstance(module, _LAYERS)
        ]
        try:
            forward(model, example)
        finally:
            for hook in hooks:
                hook.remove()
    return found


def costs(group: Group, by_name: Mapping[str, Target], places: Mapping[str, float] | None = None) -> Tensor:
    """[units], float64: how many parameters go with each unit; with `places` (see `positions`), weighted by how often
    they multiply, as often as on average where that is not known."""
    total = torch.zeros(group.size, dtype=torch.float64)
    mean = sum(places.values()) / max(1, len(places)) if places else 1.0
    for part in group.parts:
        target = by_name[part.tensor]
        if not target.parameter or (places is not None and not target.is_weight):
            continue
        each = target.tensor.numel() / target.tensor.shape[part.dim]
        times = 1.0 if places is None else places.get(target.places[0][0], mean)
        at, unit = coordinates(part)
        total.index_add_(0, unit, torch.full((len(at),), each * times, dtype=torch.float64))
    return total.clamp_min_(1)


@dataclass(frozen=True, eq=False)
class Order:
    """In which order the units of a group go.

    steps: units that go together (one of each set), the least important first.
    when: [steps], rising: the share of all at which each goes; a step whose time is at most t goes at the share t.
    size: units of the group before anything was cut.
    """

    steps: list[list[int]]
    when: Tensor
    size: int

    def gone(self, t: float, most: float, multiple: int) -> list[int]:
        """The units that go at the share `t`: never more than the share `most`, and at least one step stays; what
        stays is rounded to a multiple of `multiple` units."""
        together, n = len(self.steps[0]), len(self.steps)
        step = math.lcm(together, multiple) // together
        least = max(1, math.ceil((1 - most) * self.size / together - 1e-9))
        left = n - int((self.when <= t + 1e-9).sum())
        if left < n:
            left = max(round(left / step) * step, math.ceil(least / step) * step)
        return [unit for one in self.steps[: max(0, n - left)] for unit in one]


def steps_of(group: Group, score: Tensor) -> list[list[int]]:
    """Units that go together, the lowest score first; of each set, the lowest goes with the lowest of the others."""
    order = score.argsort(stable=True).tolist()
    if group.sets is None:
        return [[unit] for unit in order]
    sets: dict[int, list[int]] = {}
    for unit in order:
        sets.setdefault(int(group.sets[unit]), []).append(unit)
    return [list(units) for units in zip(*sets.values(), strict=False)]


def orders(
    found: Sequence[Group],
    scores: Mapping[Group, Tensor],
    classes: Mapping[Group, Hashable] | None,
    worth: Mapping[Group, Tensor],
    sizes: Mapping[str, int],
) -> dict[Group, Order]:
    """The order of every group, where those of one class are ranked together by score / worth.

    Args:
        scores: [units] each; larger stays.
        classes: None where every group is ranked alone.
        worth: [units] each, what cutting a unit gains.
        sizes: name of a group -> its units before anything was cut.
    """
    ranked: dict[Group, Order] = {}
    teams: dict[Hashable, list[tuple[Group, list[list[int]], Tensor]]] = {}
    for group in found:
        steps = steps_of(group, scores[group])
        before = 1 - len(steps) * len(steps[0]) / sizes[group.name]  # share that has gone already
        if classes is None:
            when = before + torch.arange(1, len(steps) + 1, dtype=torch.float64) * len(steps[0]) / sizes[group.name]
            ranked[group] = Order(steps, when, sizes[group.name])
            continue
        together = torch.tensor(steps)
        value = scores[group].double()[together].sum(1) / worth[group].double()[together].sum(1)
        teams.setdefault(classes[group], []).append((group, steps, value.cummax(0).values))
    for team in teams.values():
        values = torch.cat([value for _, _, value in team])
        weights = torch.cat([torch.full((len(s),), float(len(s[0])), dtype=torch.float64) for _, s, _ in team])
        total = sum(sizes[group.name] for group, _, _ in team)
        order = values.argsort(stable=True)
        when = torch.empty_like(values)
        when[order] = weights[order].cumsum(0) / total + 1 - float(weights.sum()) / total
        for (group, steps, _), own in zip(team, when.split([len(s) for _, s, _ in team]), strict=True):
            ranked[group] = Order(steps, own, sizes[group.name])
    return ranked
