"""Where a scale, or a rotation, of units goes: who makes them, who reads them, and what stands between.

    relu(W1 x) W2       scale: rows of W1 times s, columns of W2 by s, for any s > 0
    norm(x) W1, W2      scale: the norm's gain times s, columns of W1 and of W2 by s
    E x + f(norm(x))    rotate: all that adds to the stream, and all that reads it behind norms without a gain

The model runs once, and each coordinate of each activation carries the label of the coordinate of the weight that
made it.  Operators that let a factor (kind 'scale') or an orthogonal matrix ('rotate') pass hand labels on; additions
unite them; layers read them and make new ones; what lets nothing pass fixes them, with a reason.  Classes of labels
that stand in the same places make a `Team`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from smelt.core.data import forward_or_raise, tensors
from smelt.core.target import Target, targets
from smelt.graph import carry_ops
from smelt.graph.groups import few
from smelt.graph.labels import Ids
from smelt.graph.norms import Norm, norms
from smelt.graph.owners import Owners
from smelt.graph.solve import components
from smelt.graph.team import ANY, FIXED, Place, Team
from smelt.graph.trace import main, plainly, twin

# Different vectors of labels along one dimension that are still made one.
_KINDS = 64


@dataclass(frozen=True)
class Carried:
    """teams; reasons: name of a tensor -> why what it reads or makes cannot be changed; norms: by path."""

    teams: list[Team]
    reasons: dict[str, str]
    norms: dict[str, Norm]


def carried(model: nn.Module, example: Any, kind: str = "scale", stuck: Mapping[str, str] | None = None) -> Carried:
    """Run the model on the example, in evaluation mode, and solve.

    Args:
        kind: 'scale' or 'rotate'.
        stuck: path of a norm -> why no rotation passes it.

    Raises:
        ModelError: the model fails on the example.
    """
    example, found = few(example), norms(model, few(example))
    made = Carry(twin(model).eval(), kind, found, stuck or {})
    made.run(example)
    return made.solved()


class Carry(TorchDispatchMode):
    """The pass.  `ops` in `carry_ops.py` say what each operator does."""

    def __init__(self, model: nn.Module, kind: str, leaves: Mapping[str, Norm], stuck: Mapping[str, str]):
        super().__init__()
        self.model, self.kind, self.leaves, self.stuck = model, kind, leaves, stuck
        self.n = 0
        self.sides: dict[Place, tuple[int, int]] = {}
        self.pairs: list[tuple[Ids, Ids]] = []
        self.fixed: list[tuple[Ids, str]] = []
        self.bent: list[Ids] = []  # only positive factors pass
        self.moved: list[Ids] = []  # shifts do not arrive as such
        self.parted: list[tuple[Ids, Ids]] = []  # label -> those of one number may be mixed
        self.spoiled: dict[str, str] = {}
        self.by_name = {t.name: t for t in targets(model)}
        self._owners = Owners(self.by_name.values())
        self._labels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._why: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._inside = 0
        self._stack = [""]

    def run(self, example: Any) -> None:
        with torch.no_grad(), plainly(), torch.random.fork_rng(devices=[]), ExitStack() as stack:
            for path, module in list(self.model.named_modules()):
                enter, leave = self._hooks(path, self.leaves.get(path))
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            with self:
                out = forward_or_raise(self.model, example, "while it is looked at")
            for tensor in tensors(main(out)):
                self.fix(self.labels(tensor), "it leaves the model")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._inside:
            carry_ops.seen(self, func, args, kwargs, out)
        return out

    def _hooks(self, path: str, norm: Norm | None) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(path)
            self._inside += norm is not None

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._stack.pop()
            if norm is not None:
                self._inside -= 1
                if not self._inside:
                    self._normed(norm, args[0], out)

        return enter, leave

    @property
    def where(self) -> str:
        return self._stack[-1] or type(self.model).__name__

    def _normed(self, norm: Norm, x: Tensor, out: Tensor) -> None:
        dim = 1 if norm.kind == "batch" else x.dim() - 1
        found, size = self.labels(x), x.shape[dim]
        along = None if found is None else self.vector(found, dim)
        if self.kind == "rotate":
            why = self.stuck.get(norm.path) or ("no rotation passes a batch norm" if norm.kind == "batch" else "")
            if why or along is None or found is None:
                self.fix(found, why or f"{norm.path} runs over part of it")
                return
            self.part(along[None])
            self.meet(along, self.side(Place(norm.path, 0, "norm"), size))
            self.put(out, found)
            return
        if norm.kind == "batch" and along is not None:
            self.meet(along, self.side(Place(norm.path, 0, "norm"), size))
        else:
            self.fix(found, f"{norm.path} divides by what all of it amounts to")
        if norm.gain:
            made = self.side(Place(norm.gain, 0, "out"), size)
            if norm.bias:
                self.meet(made, self.side(Place(norm.bias, 0, "out"), size))
            self.put(out, self.spread(made, dim, out.shape))
        else:
            self._why[out] = f"{norm.path} has no gain"

    # Labels of tensors ----------------------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Tensor | None:
        """int64, of the tensor's shape; None: it carries none."""
        found = self._labels.get(tensor)
        return found if found is not None and found.shape == tensor.shape else None

    def put(self, tensor: Tensor, found: Tensor | None) -> None:
        if found is not None:
            self._labels[tensor] = found.expand(tensor.shape)

    def lose(self, tensor: Tensor, why: str) -> None:
        self._labels.pop(tensor, None)
        self._why[tensor] = why

    def why(self, tensor: Tensor) -> str:
        """Why a tensor carries no labels."""
        return self._why.get(tensor) or "it is an input, or does not come from the model's layers"

    def side(self, place: Place, size: int, start: int = 0, length: int | None = None) -> Tensor:
        """Labels of a side of a tensor, or of `length` coordinates of it from `start` on."""
        if place not in self.sides:
            self.sides[place] = (self.n, size)
            self.n += size
        first = self.sides[place][0]
        return torch.arange(first + start, first + start + (size - start if length is None else length))

    def spread(self, vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
        """A vector along one dimension of a shape."""
        view = [1] * len(shape)
        view[dim] = len(vector)
        return vector.view(view).expand(*shape)

    def vector(self, found: Tensor, dim: int) -> Tensor | None:
        """The labels along a dimension, None where they are too many: those at one place of it become the same."""
        rows = found.movedim(dim, 0).reshape(found.shape[dim], -1)
        if not rows.shape[1]:
            return None
        vector = rows[:, 0].clone()
        if not bool((rows == rows[:, :1]).all()):
            rows = rows.unique(dim=1)
            if rows.shape[1] > _KINDS:
                return None
            for other in rows.T:
                vector = self.meet(vector, other)
        return vector

    def constant(self, found: Tensor, dims: Iterable[int]) -> bool:
        """Whether labels do not depend on these dimensions."""
        return all(bool((found == found.narrow(d, 0, 1)).all()) for d in dims if found.shape[d])

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of one shape are the same."""
        apart = a != b
        if bool(apart.any()):
            pair = torch.stack([a[apart], b[apart]]).unique(dim=1)
            for one, other in ((0, 1), (1, 0)):
                self.fix(pair[one][pair[other] == FIXED], "it is added to what is not scaled, or rotated, with it")
            pair = pair[:, (pair >= 0).all(0)]
            if pair.shape[1]:
                self.pairs.append((pair[0].numpy(), pair[1].numpy()))
        return torch.where(a == ANY, b, torch.where(b == FIXED, b, a))

    def fix(self, found: Tensor | None, reason: str) -> None:
        if found is not None and bool((found >= 0).any()):
            ids = found.unique()
            self.fixed.append((ids[ids >= 0].numpy(), reason))

    def note(self, where: list[Ids], found: Tensor) -> None:
        ids = found.unique()
        where.append(ids[ids >= 0].numpy())

    def part(self, rows: Tensor) -> None:
        """Only labels of one row [rows, n] may be mixed; rows that hold the same are one."""
        number = torch.arange(len(rows))[:, None].expand(rows.shape)
        ids, at = rows.reshape(-1).unique(return_inverse=True)
        least = torch.full_like(ids, len(rows)).scatter_reduce_(0, at, number.reshape(-1), "amin")
        self.parted.append((ids[ids >= 0].numpy(), least[ids >= 0].numpy()))

    # Parameters -----------------------------------------------------------------------------------------------------

    def owner(self, tensor: Tensor) -> Target | None:
        """The target that a tensor is, or is a view of."""
        return None if self.labels(tensor) is not None else self._owners.owner(tensor)

    def of(self, tensor: Tensor, dim: int) -> tuple[Target, int, int] | None:
        """As `Owners.of`."""
        return None if self.labels(tensor) is not None else self._owners.of(tensor, dim)

    def parameter(self, tensor: Tensor, dim: int, role: str) -> Tensor | None:
        """Labels of a side of the weight that a tensor is, or None."""
        found = self.of(tensor, dim)
        if found is None:
            return None
        own, d, start = found
        return self.side(Place(own.name, d, role), own.tensor.shape[d], start, tensor.shape[dim])

    def spoil(self, tensor: Tensor, reason: str) -> None:
        own = self.owner(tensor)
        if own is not None:
            self.spoiled.setdefault(own.name, reason)

    # What came of it ------------------------------------------------------------------------------------------------

    def solved(self) -> Carried:
        for place in [*self.sides]:
            other = Place(place.tensor, place.dim, "in" if place.role == "out" else "out", place.groups)
            own = self.side(place, self.sides[place][1])
            if place.tensor in self.spoiled:
                self.fix(own, self.spoiled[place.tensor])
            elif place.role == "out" and other in self.sides:
                if self.kind == "rotate":
                    self.meet(own, self.side(other, len(own)))
                else:
                    self.fix(torch.cat([own, self.side(other, len(own))]), "its weight is tied: it makes and reads")
        root = components(self.n, self.pairs)
        why: dict[int, str] = {}
        for ids, reason in self.fixed:
            for r in np.unique(root[ids]).tolist():
                why.setdefault(r, reason)
        key = np.zeros(self.n, dtype=np.int64)
        rng = np.random.default_rng(0)
        for first, size in self.sides.values():
            key[np.unique(root[first : first + size])] += rng.integers(1 << 60)
        for ids, numbers in self.parted:
            marks = rng.integers(1 << 60, size=int(numbers.max(initial=0)) + 1)
            pairs = np.unique(np.stack([root[ids], numbers]), axis=1)
            np.add.at(key, pairs[0], marks[pairs[1]])
        free = np.ones(self.n, dtype=bool)
        free[list(why)] = False
        groups: dict[int, list[int]] = {}
        for r in np.unique(root).tolist():
            if free[r]:
                groups.setdefault(int(key[r]), []).append(r)
        bent, moved = (set(root[np.concatenate([*v, []]).astype(int)].tolist()) for v in (self.bent, self.moved))
        teams = [self._team(np.array(units), root, bent, moved) for units in groups.values()]
        order = list(self.by_name)
        kept = sorted((t for t in teams if t is not None), key=lambda t: order.index(t.name))
        return Carried(kept, self._reasons(root, why), dict(self.leaves))

    def _team(self, units: Ids, root: Ids, bent: set[int], moved: set[int]) -> Team | None:
        places = {}
        for place, (first, size) in self.sides.items():
            own = root[first : first + size]
            at = np.searchsorted(units, own).clip(max=len(units) - 1)
            if (hit := units[at] == own).any():
                places[place] = torch.from_numpy(np.where(hit, at, -1))
        roles = {place.role for place in places}
        if not {"out", "in"} <= roles and not {"out", "norm"} <= roles:
            return None
        name = next((p.tensor for p in places if p.role == "out" and self.by_name[p.tensor].is_weight), "")
        name = name or next(p.tensor for p in places if p.role == "out")
        members = set(units.tolist())
        return Team(name, len(units), places, members.isdisjoint(moved), members.isdisjoint(bent))

    def _reasons(self, root: Ids, why: Mapping[int, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for place, (first, size) in sorted(self.sides.items(), key=lambda item: item[0].role != "out"):
            fixed = [r for r in root[first : first + size].tolist() if r in why]
            if fixed and place.role != "norm":
                found.setdefault(place.tensor, why[fixed[0]])
        return found
