"""Edits that cut units of groups, tried on a copy of the model before anybody gets them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smelt.core.data import tensors
from smelt.core.edit import Edit, Keep, Set, put
from smelt.core.errors import ModelError
from smelt.core.target import targets
from smelt.graph.groups import Graph, Group, few
from smelt.graph.labels import Ids
from smelt.graph.trace import TraceError, main, trace, twin

# Forward passes that the search for guilty groups may take.
BUDGET = 60


def cut(model: nn.Module, example: Any, keep: Mapping[Group, Sequence[int]]) -> tuple[list[Edit], dict[str, str]]:
    """Edits that leave these units of these groups, and why other groups were left alone.

    Everything is cut in a copy, which then runs: it must give outputs of the same shapes, and nothing may meet that
    did not meet before.  Where it fails, the groups are halved until the guilty ones are found.

    Args:
        keep: group of `groups(model, example)` -> the units that stay, at least one.

    Returns:
        (Keep and Set edits, at most one Keep per dimension of a tensor; name of a group -> reason).

    Raises:
        ModelError: the groups are those of another model, or a unit does not exist.
    """
    chosen = {group: gone for group, kept in keep.items() if len(gone := _gone(group, kept))}
    if not chosen:
        return [], {}
    graph = next(iter(chosen)).graph
    shapes = {t.name: tuple(t.tensor.shape) for t in targets(model, transient=True)}
    if shapes != graph.shapes or any(group.graph is not graph for group in chosen):
        raise ModelError("the groups were found in a model of other shapes; find them again")
    return _Search(model, example, graph, chosen).found()


def _gone(group: Group, kept: Sequence[int]) -> Ids:
    index = np.unique(np.asarray(list(kept), dtype=np.int64))
    if not len(index) or index[0] < 0 or index[-1] >= group.size:
        raise ModelError(f"{group.name} has units 0 to {group.size - 1}, of which at least one must be kept")
    if group.sets is not None:
        left = np.bincount(group.sets.numpy()[index], minlength=int(group.sets.max()) + 1)
        if (left != left[0]).any():
            raise ModelError(f"{group.name}: every set of its units must keep equally many, not {left.tolist()}")
    return np.delete(group.units, index)


def edits(graph: Graph, model: nn.Module, gone: Ids) -> list[Edit]:
    """What must be done where these classes go."""
    flags = graph.classes.cut(gone)
    found: list[Edit] = []
    shapes: dict[str, list[int]] = {}
    for name, axes in graph.trace.parameters.items():
        shapes[name] = list(graph.shapes[name])
        for dim, axis in enumerate(axes):
            if not isinstance(axis, str) and flags[axis].any():
                index = np.flatnonzero(~flags[axis])
                if not len(index):
                    raise TraceError(f"nothing is left of {name} along dimension {dim}")
                found.append(Keep(name, dim, tuple(index.tolist())))
                shapes[name][dim] = len(index)
    values: dict[tuple[str, str], Any] = {}
    for (path, attribute, place), axis in graph.labels.sizes.items():
        if isinstance(axis, str) or not flags[axis].any():
            continue
        old = values.get((path, attribute), getattr(model.get_submodule(path), attribute))
        new = int((~flags[axis]).sum())
        values[path, attribute] = new if place < 0 else (*old[:place], new, *old[place + 1 :])
    _convolutions(model, shapes, values)
    return found + [Set(path, attribute, value) for (path, attribute), value in values.items()]


def _convolutions(model: nn.Module, shapes: Mapping[str, Sequence[int]], values: dict[tuple[str, str], Any]) -> None:
    """Their numbers of channels, which depend on that of the groups."""
    names = {place: t.name for t in targets(model) for place in t.places}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and (path, "weight") in names:
            groups = values.get((path, "groups"), module.groups)
            first, second = shapes[names[path, "weight"]][:2]
            first, second = (first, second * groups) if module.transposed else (second * groups, first)
            if module.transposed:
                first, second = shapes[names[path, "weight"]][0], shapes[names[path, "weight"]][1] * groups
            for attribute, new in (("in_channels", first), ("out_channels", second)):
                if getattr(module, attribute) != new:
                    values[path, attribute] = new


def applied(model: nn.Module, changes: Sequence[Edit]) -> nn.Module:
    """A copy with these edits, sharing all tensors that they leave alone."""
    made = twin(model)
    known = {t.name: t for t in targets(made, transient=True)}
    done: dict[str, Tensor] = {}
    for edit in changes:
        if isinstance(edit, Keep):
            tensor = done.get(edit.tensor, known[edit.tensor].tensor.detach())
            done[edit.tensor] = tensor.index_select(edit.dim, torch.tensor(edit.index, device=tensor.device))
        else:
            edit.apply(made)
    for name, tensor in done.items():
        put(made, known[name], tensor)
    return made


class _Search:
    def __init__(self, model: nn.Module, example: Any, graph: Graph, chosen: Mapping[Group, Ids]):
        self.model, self.graph, self.chosen = model, graph, chosen
        self.example = few(example) if graph.few else example
        self.accepted: list[Group] = []
        self.refused: dict[str, str] = {}
        self.edits: list[Edit] = []
        self.left = BUDGET

    def found(self) -> tuple[list[Edit], dict[str, str]]:
        self.search(list(self.chosen))
        return self.edits, self.refused

    def search(self, batch: list[Group]) -> None:
        """Accept of these groups what goes together with what was accepted."""
        if not batch:
            return
        reason = self.attempt([*self.accepted, *batch])
        if reason is None:
            self.accepted += batch
        elif len(batch) == 1:
            self.refused[batch[0].name] = reason
        else:
            half = len(batch) // 2
            self.search(batch[:half])
            suspects = {_family(name): why for name, why in self.refused.items()}
            alike = [g for g in batch[half:] if _family(g.name) in suspects]
            self.search([g for g in batch[half:] if _family(g.name) not in suspects])
            if alike and (reason := self.attempt([*self.accepted, *alike])) is None:
                self.accepted += alike
            elif len(alike) == 1 or self.left <= 0:
                self.refused |= {g.name: str(reason) for g in alike}
            elif alike:
                self.search(alike[:1])
                if alike[0].name in self.refused:
                    self.refused |= {g.name: f"like {alike[0].name}: {self.refused[alike[0].name]}" for g in alike[1:]}
                else:
                    self.search(alike[1:])

    def attempt(self, batch: Sequence[Group]) -> str | None:
        """Why the model with these groups cut does not work, or None; then their edits are kept."""
        self.left -= 1
        if self.left < 0:
            return "the model with it cut did not work together with others, and there were too many to try"
        try:
            gone = np.concatenate([self.chosen[group] for group in batch])
            changes = edits(self.graph, self.model, gone)
            found, out = trace(applied(self.model, changes), self.example)
            old = [tuple(t.shape) for t in tensors(main(self.graph.out))]
            new = [tuple(t.shape) for t in tensors(main(out))]
            if old != new:
                raise TraceError(f"the outputs would change from {old} to {new}")
            if found.untrained and not self.graph.trace.untrained:
                raise TraceError(found.untrained)
            self.graph.compare(found, changes, gone)
        except (TraceError, ModelError) as error:
            return f"cut, {error}"
        self.edits = changes
        return None


def _family(name: str) -> str:
    """The same for the like places of repeated blocks."""
    return re.sub(r"\d+", "#", name)
