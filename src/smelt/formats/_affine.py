"""Even grids of matrices as integer kernels and files take them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.forms.affine import Affine
from smelt.forms.sparse import Sparse


@dataclass(frozen=True)
class Grid:
    """x = (codes - zero) * scale of a matrix [m, k], with scale and zero for every `run` neighbours of a row.

    codes: int32 [m, k], low..high as its bits allow.  scale, zero: float [m, k / run]; zero is all 0 if symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    run: int
    symmetric: bool

    @property
    def whole(self) -> bool:
        return bool((self.zero == self.zero.round()).all())

    def spread(self, side: Tensor) -> Tensor:
        """Scale or zero for every element."""
        return side.repeat_interleave(self.run, 1)

    def split(self, run: int) -> Grid:
        """The same with sides for every `run`, which divides what they are for now."""
        times = self.run // run
        scale, zero = (side.repeat_interleave(times, 1) for side in (self.scale, self.zero))
        return Grid(self.codes, scale, zero, run, self.symmetric)


def grid_of(tree: Encoded | None) -> Grid | None:
    """The grid of a stored matrix; None where it is stored otherwise.  Pruned elements have the code of 0."""
    kept: Tensor | None = None
    while tree is not None and isinstance(tree.form, Sparse) and not tree.form.packed:
        mask, values = tree.parts["mask"], tree.parts["values"]
        if not isinstance(mask, Tensor) or not isinstance(values, Encoded):
            return None
        kept = mask if kept is None else kept & mask
        tree = values
    if tree is None or not isinstance(tree.form, Affine) or len(tree.shape) != 2 or not math.prod(tree.shape):
        return None
    form, (rows, columns) = tree.form, tree.shape
    codes = tree.parts["codes"]
    if not isinstance(codes, Tensor) or (run := _run(form, columns)) is None:
        return None
    scale = _read(tree.parts["scale"])
    sides = [scale.to(torch.promote_types(scale.dtype, torch.float32)) / form.top]
    sides.append(torch.zeros_like(sides[0]) if form.symmetric else _read(tree.parts["zero"]).to(sides[0].dtype))
    spread = [form.spread(side, tree.shape).expand(rows, columns)[:, ::run].contiguous().cpu() for side in sides]
    grid = Grid(codes.cpu().to(torch.int32), spread[0], spread[1], run, form.symmetric)
    if kept is None or bool(kept.all()):
        return grid
    if not grid.whole:
        return None
    return replace(grid, codes=torch.where(kept.cpu(), grid.codes, grid.spread(grid.zero).int()))


def _run(form: Affine, columns: int) -> int | None:
    """Neighbours of a row that certainly share their sides; None where sides follow the columns."""
    if form.axis not in (None, 0):
        return None
    return math.gcd(min(form.group, columns) if form.axis == 0 else form.group, columns) if form.group else columns


def _read(side: Tensor | Encoded) -> Tensor:
    return (side.decode() if isinstance(side, Encoded) else side).detach()
