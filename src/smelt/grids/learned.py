"""A grid whose step, and zero, learn by gradient (Esser et al. 2020, arXiv:1902.08153; LSQ+: Bhalgat et al. 2020,
arXiv:2004.09576)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from smelt.grids.uniform import Range, limits


def start(mean: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> Range:
    """The range whose step is 2 mean|x| / sqrt(Qmax), where the paper starts.

    Asymmetric levels lie over (low, high) shrunk or stretched about 0: from 0 up for what is never negative.
    """
    lowest, highest = limits(bits, symmetric)
    span = 2 * mean / math.sqrt(highest) * (highest - lowest)
    if symmetric:
        return -span / 2, span / 2
    factor = span / (high - low).where(high > low, 1)
    return factor * low, factor * high


def rounded(
    x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, symmetric: bool, beyond: float = 0.0
) -> Tensor:
    """`x` on the levels (code - zero) * scale, in the dtype of `x`; scale and zero broadcast to it.

    With v = x / scale + zero the gradients are those of the paper (eq. 3): by x, 1 where v is within the levels; by
    scale, round(v) - v there and code - zero elsewhere; by zero, 0 there and -scale elsewhere.

    Args:
        beyond: how far outside of the levels, in steps, v still counts as within.
    """
    low, high = limits(bits, symmetric)
    return _Rounded.apply(x, scale, torch.zeros_like(scale) if zero is None else zero, low, high, beyond)  # type: ignore[no-any-return]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, beyond: float) -> Tensor:
        place = (x.to(scale.dtype) / scale).add_(zero)
        codes = place.clamp(low, high)
        inside = (codes - place).abs() <= beyond if beyond else codes == place
        codes.round_()
        # What the gradients need is kept as it is found, which is less work than to find it again from x.
        by_scale = codes.sub(torch.where(inside, place, zero)).to(x.dtype) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(scale, zero, inside, by_scale)
        return codes.sub_(zero).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        scale, zero, inside, slope = ctx.saved_tensors
        given = gradients[0]
        by_scale = by_zero = None
        if slope is not None:
            by_scale = (slope * given).to(scale.dtype).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            by_zero = (given.to(scale.dtype) * scale).masked_fill_(inside, 0).neg_().sum_to_size(zero.shape)
        return given * inside, by_scale, by_zero, None, None, None
