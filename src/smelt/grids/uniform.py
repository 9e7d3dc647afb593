"""Evenly spaced levels: x ~ (code - zero) * scale with whole codes.

    range of the values  ->  (scale, zero)  ->  codes  ->  values
    minmax, percentile,      steps              quantize   dequantize
    mse, magnitude

Ranges are found over rows [r, n], one range per row: (low, high), each [r].  `where` [r, n] says which entries count
(None: all); a row of which nothing counts has the range (0, 0).

symmetric    codes -(2^(b-1) - 1) .. 2^(b-1) - 1, no zero: the range is +-max(|low|, |high|) and 0 is a level.  The
             code -2^(b-1) is left out, so that -x has the code of x negated and products fit narrow accumulators.
             With one bit the levels are +-max: codes 0 and 1, zero 1/2.
asymmetric   codes 0 .. 2^b - 1, zero = -low / scale, a float: both ends of the range are levels, which is the textbook
             map code = round((x - low) / (high - low) * (2^b - 1)).  A `whole` zero is rounded, after the range was
             widened to hold 0: then 0 (padding, ReLU, pruned weights) is a level, as integer kernels want it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Shrink factors that `mse` tries: 1, 1 - 1/80, ..., 1/80.
STEPS = 80
# Values that `mse` works on at a time, so that they stay in the cache.
BLOCK = 1 << 16

Range = tuple[Tensor, Tensor]


def minmax(rows: Tensor, where: Tensor | None = None) -> Range:
    """Smallest and largest value."""
    if where is None:
        low, high = rows.aminmax(dim=1)
        return low, high
    low = rows.masked_fill(~where, torch.inf).amin(1)
    high = rows.masked_fill(~where, -torch.inf).amax(1)
    some = where.any(1)
    return low.where(some, 0), high.where(some, 0)


def percentile(rows: Tensor, where: Tensor | None = None, *, share: float, symmetric: bool) -> Range:
    """The range that holds `share` percent of the values, what is cut being split evenly between the two ends.

    Quantiles are interpolated linearly, as in `numpy.quantile`.
    """
    ordered, count = _ordered(rows.abs() if symmetric else rows, where)
    if symmetric:
        high = _quantile(ordered, count, share / 100)
        return -high, high
    tail = (1 - share / 100) / 2
    return _quantile(ordered, count, tail), _quantile(ordered, count, 1 - tail)


def magnitude(rows: Tensor, where: Tensor | None = None) -> Range:
    """+- the mean of |x|: the best two levels +-a (Rastegari et al. 2016, arXiv:1603.05279, eq. 6)."""
    count = rows.shape[1] if where is None else where.sum(1).clamp_min(1)
    total = (rows if where is None else rows.where(where, 0)).abs().sum(1)
    return -(total / count), total / count


def mse(
    rows: Tensor,
    where: Tensor | None = None,
    *,
    bits: int,
    symmetric: bool,
    whole: bool = False,
    weight: Tensor | None = None,
) -> Range:
    """The range with the least sum of squared rounding errors, never worse than `minmax`.

    The whole range is shrunk towards 0 (symmetric) or the mean (asymmetric) on a grid of `STEPS` factors, then the best
    factor is refined, then (asymmetric) either end alone.

    Args:
        weight: [n], what the squared error of each column counts; None for 1.
    """
    if rows.numel() > BLOCK and len(rows) > 1:
        size = max(1, BLOCK // rows.shape[1])
        masks = [None] * len(rows) if where is None else where.split(size)
        parts = [
            mse(part, mask, bits=bits, symmetric=symmetric, whole=whole, weight=weight)
            for part, mask in zip(rows.split(size), masks, strict=False)
        ]
        return torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts])
    low, high = minmax(rows, where)
    if symmetric:
        high = torch.maximum(-low, high)
        low, middle = -high, torch.zeros_like(high)
    else:
        count = rows.shape[1] if where is None else where.sum(1).clamp_min(1)
        middle = (rows if where is None else rows.where(where, 0)).sum(1) / count
    search = _Search(rows, where, low, high, bits, symmetric, whole, weight)
    down, up = low - middle, high - middle
    for i in range(1, STEPS):
        error = search.try_(middle + (1 - i / STEPS) * down, middle + (1 - i / STEPS) * up)
        if bool((error >= 4 * search.error).all()):
            break  # from here on only more is cut
    best = (search.high - search.low) / (high - low).where(high > low, 1)
    for part in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75):
        factor = (best + part / STEPS).clamp(0, 1)
        search.try_(middle + factor * down, middle + factor * up)
    for scale in () if symmetric else (4, 2, 1):
        width = (high - low) * (scale / STEPS)
        for part in (-1, 1):
            search.try_(search.low + part * width, search.high)
            search.try_(search.low, search.high + part * width)
    return search.low, search.high


class _Search:
    """The best range so far of each row, and its error."""

    def __init__(
        self,
        rows: Tensor,
        where: Tensor | None,
        low: Tensor,
        high: Tensor,
        bits: int,
        symmetric: bool,
        whole: bool,
        weight: Tensor | None,
    ):
        self.weight = weight
        self.rows, self.where, self.bits, self.symmetric, self.whole = rows, where, bits, symmetric, whole
        self.low, self.high = low, high
        self.error = self._error(low, high)

    def try_(self, low: Tensor, high: Tensor) -> Tensor:
        """The error of a range, which is kept where it is better."""
        error = self._error(low, high)
        better = (error < self.error) & (low <= high)
        self.low, self.high = low.where(better, self.low), high.where(better, self.high)
        self.error = error.where(better, self.error)
        return error

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        scale, zero = steps(low, high, bits=self.bits, symmetric=self.symmetric, whole=self.whole)
        scale, zero = scale[:, None], None if zero is None else zero[:, None]
        codes = quantize(self.rows, scale, zero, bits=self.bits, symmetric=self.symmetric)
        error = dequantize(codes, scale, zero).sub_(self.rows).square_()
        if self.weight is not None:
            error *= self.weight
        return (error if self.where is None else error.where(self.where, 0)).sum(1)


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    if symmetric and bits > 1:
        return 1 - (1 << bits - 1), (1 << bits - 1) - 1
    return 0, (1 << bits) - 1


def steps(
    low: Tensor, high: Tensor, *, bits: int, symmetric: bool, whole: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) of ranges of any shape; zero is None for symmetric levels of two bits or more.

    A range of one value c is widened to 0, so that c is a level; scale is always positive.
    """
    lowest, highest = limits(bits, symmetric)
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    else:
        wide = torch.ones_like(low, dtype=torch.bool) if whole else low == high
        low, high = low.clamp_max(0).where(wide, low), high.clamp_min(0).where(wide, high)
    scale = high / (highest - lowest) - low / (highest - lowest)
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    if symmetric and bits > 1:
        return scale, None
    zero = torch.full_like(scale, 0.5) if symmetric else -low / scale
    return scale, zero.round().clamp(lowest, highest) if whole and not symmetric else zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, symmetric: bool) -> Tensor:
    """Codes (whole numbers in the dtype of the work, float32 or wider); scale and zero broadcast to `x`."""
    codes = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    return (codes if zero is None else codes.add_(zero)).round_().clamp_(*limits(bits, symmetric))


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return (codes if zero is None else codes - zero) * scale


def _ordered(rows: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows in rising order, what does not count last; and how many count."""
    if where is None:
        return rows.sort(1).values, torch.full((len(rows),), rows.shape[1], device=rows.device)
    return rows.masked_fill(~where, torch.inf).sort(1).values, where.sum(1)


def _quantile(ordered: Tensor, count: Tensor, share: float) -> Tensor:
    place = share * (count - 1).clamp_min(0).double()
    below = place.floor().long()
    above = place.ceil().long()
    a, b = (ordered.gather(1, i[:, None])[:, 0] for i in (below, above))
    value = a + (b - a) * (place - below).to(a.dtype)
    return value.where(count > 0, 0)
