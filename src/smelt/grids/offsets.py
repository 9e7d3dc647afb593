"""Rounding that learns: an offset in steps for each value, and the ends of each range (Cheng et al. 2023,
arXiv:2309.05516, eq. 3 to 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from smelt.grids import uniform

# What is left, in steps, to the end of the cell in which a value starts, and of a range's width at the least.
EDGE = 0.05
LEAST = 0.01


def start(x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int) -> Tensor:
    """Offsets v with which x / scale + zero + v rounds to the codes of `values`, as small as that allows.

    scale and zero broadcast to x; zero is None for symmetric levels.
    """
    first, last = uniform.limits(bits, zero is None)
    place = x / scale if zero is None else x / scale + zero
    codes = uniform.quantize(values, scale, zero, bits=bits, symmetric=zero is None)
    most = 0.5 - EDGE
    found = codes + (place - codes).clamp(-most, most)
    beyond = ((codes == first) & (place < first - 0.5)) | ((codes == last) & (place > last + 0.5))
    return torch.where(beyond, place, found) - place


def sides(scale: Tensor, zero: Tensor | None, ends: Tensor, *, bits: int, fixed: bool) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) of ranges whose lower and upper end have moved by ends[0] and ends[1], in widths of the range.

    ends: [2, ...] of the shape of scale.
    fixed: the zero stays, as that of symmetric levels does.
    """
    wide = (1 + ends[1] - ends[0]).clamp_min(LEAST)
    if zero is None or fixed:
        return scale * wide, zero
    return scale * wide, (zero - uniform.limits(bits, False)[1] * ends[0]) / wide
