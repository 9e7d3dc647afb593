"""Groups: units (channels, neurons, heads ...) that can be cut, and everything that goes with each of them.

found, reasons = groups(model, example)
found[0].parts          what its units take from which tensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smelt.core.data import describe, tensors
from smelt.core.edit import Edit, Keep
from smelt.core.errors import ModelError
from smelt.core.named import first_line
from smelt.core.target import targets
from smelt.graph.labels import Axis, Ids
from smelt.graph.solve import Classes, components, unite
from smelt.graph.trace import Trace, TraceError, trace, twin

_KINDS = ("heads", "groups", "head dims", "group channels", "channels")


@dataclass(frozen=True, eq=False)
class Part:
    """What a group takes from one dimension of one tensor.

    tensor: name of the target.
    index: [units, k], or a tuple of vectors where units differ in k: the coordinates along `dim` that go with unit u.
    role: 'out' (the slices that produce the unit), 'in' (those that read it), 'along' (scales, shifts, statistics).
    """

    tensor: str
    dim: int
    index: Tensor | tuple[Tensor, ...]
    role: str


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind, each of which can be cut alone.

    name: the first tensor that produces them, with the kind behind it where that is not enough.
    sets: [size] the set of each unit; every set must keep equally many.  None where units are free.
    kind: 'channels'; 'heads' and 'head dims', the two factors of a dimension that is viewed as such; 'groups' of a
        grouped convolution, and 'group channels', those of one place in every group.
    fixed: coordinates beside them in the dimension that `name` produces, which cannot go.
    exact: cutting a unit has the same effect as zeros where it is read.  Not so where a norm, softmax, or mean runs
        over the units: what is left is then normalised without them.
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    sets: Tensor | None
    kind: str
    fixed: int
    exact: bool
    units: Ids = field(repr=False)
    graph: Graph = field(repr=False)


class Graph:
    """What the trace of a model says, solved."""

    def __init__(self, found: Trace, out: Any, narrow: bool, shapes: Mapping[str, tuple[int, ...]]):
        self.trace, self.out, self.few = found, out, narrow
        self.labels = found.labels
        self.shapes = dict(shapes)
        self.classes = Classes(found.labels)
        self._made, self._read = (self._flags(ids) for ids in (found.labels.made, found.labels.read))
        counted = [found.labels.sizes.get(n, "") if isinstance(n, tuple) else n for n in found.numbers]
        inexact = [*found.labels.inexact, *[axis for axis in counted if not isinstance(axis, str)]]
        self._inexact = np.zeros(found.labels.n, dtype=bool)
        for ids in inexact:
            self._inexact[self.classes.leaves(ids)[1]] = True
        self.groups = self._groups()

    def _flags(self, marked: Sequence[Ids]) -> NDArray[np.bool_]:
        """Which labels are marked, or a factor or product of marked ones."""
        flags = np.zeros(self.labels.n, dtype=bool)
        for ids in marked:
            flags[ids] = True
        for p in self.labels.products:
            if flags[p.x].any():
                flags[p.a] = flags[p.b] = True
            elif flags[p.a].any() or flags[p.b].any():
                flags[p.x] = True
        return flags

    def role(self, name: str, dim: int) -> str:
        axes = self.trace.parameters[self.trace.like.get(name, name)]
        made = [not isinstance(axis, str) and bool(self._made[axis].any()) for axis in axes]
        axis = axes[dim]
        if isinstance(axis, str) or sum(not isinstance(a, str) for a in axes) < 2 or not any(made):
            return "along"
        return "out" if made[dim] else "in" if self._read[axis].any() else "along"

    def _groups(self) -> list[Group]:
        rows = []  # [class, tensor and dimension, coordinate]
        places: list[tuple[str, int]] = []
        for name, axes in self.trace.parameters.items():
            for dim, axis in enumerate(axes):
                if not isinstance(axis, str) and name in self.trace.used:
                    place, classes = self.classes.leaves(axis)
                    rows.append(np.stack([classes, np.full_like(classes, len(places)), place]))
                    places.append((name, dim))
        if not rows:
            return []
        classes, where, coordinate = np.concatenate(rows, 1)
        team = self._teams(classes, where, len(places))
        found = []
        order = np.lexsort((coordinate, classes, where, team[classes]))
        classes, where, coordinate = classes[order], where[order], coordinate[order]
        bounds = np.flatnonzero(np.diff(team[classes])) + 1
        for part in np.split(np.arange(len(classes)), bounds):
            made = self._group(classes[part], where[part], coordinate[part], places)
            if made is not None:
                first = next(p for p in made.parts if p.role == "out")
                key = (places.index((first.tensor, first.dim)), _KINDS.index(made.kind), int(first.index[0][0]))
                found.append((*key, made))
        found.sort(key=lambda item: item[:3])
        return _named([group for *_, group in found])

    def _teams(self, classes: Ids, where: Ids, n: int) -> Ids:
        """class -> its group: the same for classes that stand in the same places, or must keep equally many."""
        labels, root = self.labels, self.classes.root
        rng = np.random.default_rng(0)
        marks = rng.integers(1 << 62, size=n + len(labels.vectors))
        key = np.zeros(labels.n, dtype=np.int64)
        origin = np.repeat(np.arange(len(labels.vectors)), [size for _, size, _ in labels.vectors])
        pairs = np.concatenate([np.stack([classes, where]), np.stack([root, n + origin])], 1)
        pairs = np.unique(pairs, axis=1)
        np.bitwise_xor.at(key, pairs[0], marks[pairs[1]])
        _, team = np.unique(key, return_inverse=True)
        even = self.classes.teams >= 0
        team[even] = team.max() + 1 + self.classes.teams[even]
        return team

    def _group(self, classes: Ids, where: Ids, coordinate: Ids, places: list[tuple[str, int]]) -> Group | None:
        units, number = np.unique(classes, return_inverse=True)
        # Units in the order of their coordinates in the first place.
        first = np.full(len(units), np.iinfo(np.int64).max)
        np.minimum.at(first, number, coordinate + where * (1 << 32))
        order = np.argsort(first, kind="stable")
        units, number = units[order], np.argsort(order)[number]
        _, piece = np.unique(self.classes.sets[units], return_inverse=True)
        sets = torch.from_numpy(piece) if piece.any() else None
        if len(units) < 2 or (sets is not None and int(sets.bincount().max()) < 2):
            return None
        parts = []
        for place in np.unique(where):
            name, dim = places[place]
            own = where == place
            parts.append(Part(name, dim, _by_unit(number[own], coordinate[own], len(units)), self.role(name, dim)))
        parts.sort(key=lambda p: list(self.trace.parameters).index(p.tensor))
        makers = [p for p in parts if p.role == "out"]
        if not makers:
            return None
        kinds = {kind for start, _, kind in self._vectors(units)}
        kind = next((k for k in ("heads", "head dims", "groups", "group channels") if k in kinds), "channels")
        axis = self.trace.parameters[makers[0].tensor][makers[0].dim]
        return Group(
            name=makers[0].tensor,
            size=len(units),
            parts=tuple(parts),
            sets=sets,
            kind=kind,
            fixed=0 if isinstance(axis, str) else int(self.classes.fixed(axis).sum()),
            exact=not bool(self._inexact[units].any()),
            units=units,
            graph=self,
        )

    def _vectors(self, units: Ids) -> list[tuple[int, int, str]]:
        members = np.flatnonzero(self.classes.root == units[0])
        starts = np.array([start for start, _, _ in self.labels.vectors])
        return [self.labels.vectors[i] for i in np.unique(np.searchsorted(starts, members, side="right") - 1)]

    def compare(self, other: Trace, changes: Sequence[Edit], gone: Ids) -> None:
        """Raise TraceError where in the trace of the model without the classes `gone` coordinates meet that did not
        meet in this one."""
        flags, before = self.classes.cut(gone), self.classes.root.copy()
        for p in self.labels.products:  # a factor of which one is left is none
            a, b = ~flags[p.a], ~flags[p.b]
            if len(np.unique(before[p.a[a]])) == 1:
                unite(before, p.x[np.ix_(a, b)].ravel(), np.tile(p.b[b], a.sum()))
            if len(np.unique(before[p.b[b]])) == 1:
                unite(before, p.x[np.ix_(a, b)].ravel(), np.repeat(p.a[a], b.sum()))
        kept = {(e.tensor, e.dim): np.array(e.index) for e in changes if isinstance(e, Keep)}
        own, theirs, names = [], [], []
        for name, axes in other.parameters.items():
            for dim, axis in enumerate(axes):
                old = self.trace.parameters[name][dim]
                if isinstance(axis, str) or isinstance(old, str):
                    continue
                old = old[kept[name, dim]] if (name, dim) in kept else old
                own.append(before[old])
                theirs.append(axis)
                names += [name] * len(axis)
        if not own:
            return
        root = components(other.labels.n, other.labels.pairs)
        mine, new = np.concatenate(own), root[np.concatenate(theirs)]
        first = np.full(other.labels.n, -1)
        first[new[::-1]] = mine[::-1]
        wrong = np.flatnonzero(first[new] != mine)
        if len(wrong):
            raise TraceError(f"coordinates of {names[wrong[0]]} would meet others than before")

    def reasons(self, model: nn.Module) -> dict[str, str]:
        """For each weight none of whose outputs can be cut, why."""
        able = {p.tensor for group in self.groups for p in group.parts if p.role != "in"}
        found = {}
        for target in targets(model):
            if not target.is_weight or target.name in able:
                continue
            if target.name not in self.trace.used:
                found[target.name] = "the model did not use it on the example"
                continue
            axes = self.trace.parameters[target.name]
            made = [axis for d, axis in enumerate(axes) if self.role(target.name, d) == "out"] or axes
            found[target.name] = self._reason(made)
        return found

    def _reason(self, axes: list[Axis]) -> str:
        for axis in axes:
            if isinstance(axis, str):
                continue
            if len(fixed := axis[self.classes.fixed(axis)]):
                return self.classes.reason(int(fixed[0]))
            return "its outputs can only go all together"
        return "it has one output"


def _by_unit(number: Ids, coordinate: Ids, units: int) -> Tensor | tuple[Tensor, ...]:
    order = np.lexsort((coordinate, number))
    number, coordinate = number[order], coordinate[order]
    counts = np.bincount(number, minlength=units)
    if len(counts) and (counts == counts[0]).all():
        return torch.from_numpy(coordinate.reshape(units, -1).copy())
    return tuple(torch.from_numpy(c.copy()) for c in np.split(coordinate, np.cumsum(counts)[:-1]))


def _named(found: list[Group]) -> list[Group]:
    seen: dict[str, int] = {}
    made = []
    for group in found:
        name = group.name
        if name in seen:
            name = f"{group.name} ({group.kind})"
        while name in seen:
            seen[group.name] += 1
            name = f"{group.name} ({group.kind} {seen[group.name]})"
        seen.setdefault(name, 1)
        made.append(replace(group, name=name))
    return made


def graph(model: nn.Module, example: Any) -> Graph:
    """Trace and solve.

    Raises:
        ModelError: the model cannot be copied, or fails on the example.
    """
    return Graph(*_run(model, example), {t.name: tuple(t.tensor.shape) for t in targets(model, transient=True)})


def _run(model: nn.Module, example: Any) -> tuple[Trace, Any, bool]:
    try:
        copied = twin(model)
    except Exception as error:  # a module may hold anything
        raise ModelError(f"the model cannot be copied to be looked at: {first_line(error)}") from error
    try:
        return (*trace(copied, few(example)), True)
    except TraceError:
        pass
    try:
        return (*trace(twin(model), example), False)
    except TraceError as error:
        raise ModelError(f"the model fails when it is looked at, given {describe(example)}: {error}") from error


def few(example: Any) -> Any:
    """The first two samples, where all tensors have equally many."""
    found = list(tensors(example))
    if any(t.dim() == 0 for t in found) or len({len(t) for t in found}) != 1:
        return example
    return _first(example)


def _first(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree[:2]
    if isinstance(tree, Mapping):
        return {k: _first(v) for k, v in tree.items()}
    return tuple(_first(v) for v in tree) if isinstance(tree, (tuple, list)) else tree


def groups(model: nn.Module, example: Any) -> tuple[list[Group], dict[str, str]]:
    """(the groups in the order of the model, for each weight none of whose outputs can be cut the reason).

    Args:
        example: what `core.data.forward` takes; the model runs on it once, in evaluation mode.

    Raises:
        ModelError: the model cannot be copied, or fails on the example.
    """
    made = graph(model, example)
    return made.groups, made.reasons(model)
