"""Masks of one bit for each element, and the elements that they name, close together."""

from __future__ import annotations

import torch
from torch import Tensor

from smelt.forms.grouped import NATIVE, packed, unpacked
from smelt.native.rounding import functions


def above(x: Tensor, bound: float = 0.0) -> tuple[Tensor, int]:
    """(mask of x > bound, how many are) of floating values [n], contiguous; the mask is uint8 [ceil(n / 8)]."""
    compiled = functions() if x.device.type == "cpu" and x.dtype in NATIVE else None
    if compiled is None:
        where = x > bound
        return packed(where.to(torch.uint8), 1), int(where.sum())
    mask = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    return mask, compiled["mask_above"](x.data_ptr(), _wide(x), x.numel(), bound, mask.data_ptr())


def bits(where: Tensor) -> Tensor:
    """The mask of booleans [n]."""
    return packed(where.to(torch.uint8), 1)


def booleans(mask: Tensor, n: int) -> Tensor:
    """The inverse of `bits`."""
    return unpacked(mask, 1, n).bool()


def kept(x: Tensor, mask: Tensor, inside: bool = True) -> Tensor:
    """x [n], contiguous, with 0 where the mask does not name (or names) an element."""
    compiled = functions() if x.device.type == "cpu" and x.dtype in NATIVE else None
    if compiled is None:
        where = booleans(mask, x.numel())
        return x.masked_fill(~where if inside else where, 0)
    out = torch.empty_like(x)
    compiled["mask_keep"](x.data_ptr(), _wide(x), x.numel(), mask.data_ptr(), int(inside), out.data_ptr())
    return out


def gather(x: Tensor, mask: Tensor, count: int, inside: bool = True) -> Tensor:
    """The `count` elements of x [n], contiguous, that the mask names, or does not name (`inside` False), in order."""
    compiled = functions() if x.device.type == "cpu" and x.dtype in NATIVE else None
    if compiled is None:
        where = booleans(mask, x.numel())
        return x[where if inside else ~where]
    out = torch.empty(count + 1, dtype=x.dtype)
    compiled["mask_gather"](x.data_ptr(), _wide(x), x.numel(), mask.data_ptr(), int(inside), out.data_ptr())
    return out[:count]


def scatter(values: Tensor, mask: Tensor, out: Tensor, inside: bool = True) -> None:
    """Put values where the mask names (or does not name) elements of `out` [n], contiguous, of the same dtype."""
    compiled = functions() if out.device.type == "cpu" and out.dtype in NATIVE else None
    if compiled is None:
        where = booleans(mask, out.numel())
        out[where if inside else ~where] = values
        return
    if values.untyped_storage().nbytes() < (values.storage_offset() + values.numel() + 1) * values.itemsize:
        values = torch.cat((values, values.new_zeros(1)))  # one more is read
    compiled["mask_scatter"](values.data_ptr(), _wide(out), out.numel(), mask.data_ptr(), int(inside), out.data_ptr())


def _wide(x: Tensor) -> int:
    return int(x.dtype == torch.float32)
