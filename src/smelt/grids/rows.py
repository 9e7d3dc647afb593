"""How the values of a tensor fall into rows that each have one scale, as the form `affine` has it.

tensor   one row of everything: axis None
channel  a row for each slice along dimension `axis`
group    rows of `group` values, along the flattened rest of each slice of dimension 0; axis 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from smelt.core.encoded import numel
from smelt.core.target import Target
from smelt.forms import _sides

Layout = tuple[int | None, int]
DTYPES = ("float32", "float16", "bfloat16")


def layout(x: Tensor, per: str, axis: int | None = None, group: int = 0) -> Layout:
    """(axis, group) of the form; a tensor of fewer than two dimensions (a bias) always is one row."""
    if per == "tensor" or x.dim() < 2:
        return None, 0
    return (0, group) if per == "group" else (axis or 0, 0)


def split(x: Tensor, where: Tensor | None, place: Layout) -> tuple[Tensor, Tensor | None]:
    """(rows [r, n] in float32 or wider, bool [r, n] of what counts, or None for all); the rest of the rows is 0.

    The short last group of a channel is filled up with entries that do not count.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if where is not None:
        x = x.where(where, 0)
    rows = _sides.rows(x, *place)
    counts = torch.ones_like(x, dtype=torch.bool) if where is None and rows.numel() != x.numel() else where
    return rows, None if counts is None else _sides.rows(counts, *place, False)


def join(rows: Tensor, shape: torch.Size, place: Layout) -> Tensor:
    """The inverse of `split`: entries of rows in the layout of a tensor."""
    axis, group = place
    if axis is None:
        return rows.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    rest = numel(moved[1:])
    if group:
        rows = rows.reshape(moved[0], -1)[:, :rest]
    return rows.reshape(moved).movedim(0, axis).contiguous()


def refusal(target: Target, per: str, axis: int | None) -> str | None:
    """Why a tensor has no such rows, or None."""
    x = target.tensor
    if not x.is_floating_point():
        return f"it is {x.dtype}; only floating tensors can be stored in fewer bits"
    if not x.numel():
        return "it is empty"
    if per == "channel" and x.dim() > 1 and (axis or 0) >= x.dim():
        return f"it has {x.dim()} dimensions, counted from 0, and none is axis {axis}"
    return None


def stored(side: Tensor, dtype: str) -> Tensor:
    """Scales in the dtype they are stored in, within its range; differentiable.  'float32' leaves wider ones."""
    kind = side.dtype if dtype == "float32" else getattr(torch, dtype)
    most = torch.finfo(kind).max
    return side.clamp(-most, most).to(kind)
