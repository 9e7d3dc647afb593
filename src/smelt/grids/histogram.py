"""Ranges of an even grid (see `uniform`) chosen from a histogram.

counts [..., bins] and edges [..., bins + 1], as `numpy.histogram` gives them, both float64; within a bin values are
taken to be spread evenly, and a bin without width is one value.  Found are (low, high), each [...].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smelt.grids.uniform import Range, limits, steps

# Shrink factors that are tried: 1, 1 - 1/128, ..., 1/128.
STEPS = 128
# Bins over the range of a row of which a histogram is made here.
BINS = 2048
# Rows whose histograms are looked at together.
TOGETHER = 32
# Share of the range below which a bin counts as one value.
NARROW = 1e-9


def histogram(rows: Tensor, where: Tensor | None = None, bins: int = BINS) -> tuple[Tensor, Tensor]:
    """(counts, edges) of rows [r, n], in bins of equal width from the smallest to the largest value that counts."""
    x = rows.double()
    low = (x if where is None else x.where(where, torch.inf)).amin(1)
    high = (x if where is None else x.where(where, -torch.inf)).amax(1)
    low, high = low.where(low <= high, 0), high.where(low <= high, 0)
    width = ((high - low) / bins).clamp_min(torch.finfo(x.dtype).tiny)
    place = ((x - low[:, None]) / width[:, None]).nan_to_num(0).clamp(0, bins - 1).long()
    weight = torch.ones_like(x) if where is None else where.double()
    counts = x.new_zeros(len(x), bins).scatter_add_(1, place, weight)
    part = torch.linspace(0, 1, bins + 1, dtype=x.dtype, device=x.device)
    return counts, torch.lerp(low[:, None], high[:, None], part)


def kl_of_rows(rows: Tensor, where: Tensor | None = None, *, bits: int, symmetric: bool, whole: bool = False) -> Range:
    """`kl` of the histograms of rows [r, n], in the dtype of the rows: (low, high), each [r]."""
    masks = [None] * len(rows) if where is None else where.split(TOGETHER)
    parts = [
        kl(*histogram(part, mask), bits=bits, symmetric=symmetric, whole=whole)
        for part, mask in zip(rows.split(TOGETHER), masks, strict=False)
    ]
    return torch.cat([low for low, _ in parts]).to(rows.dtype), torch.cat([high for _, high in parts]).to(rows.dtype)


def minmax(counts: Tensor, edges: Tensor) -> Range:
    """The outermost edges."""
    return edges[..., 0], edges[..., -1]


def magnitude(counts: Tensor, edges: Tensor) -> Tensor:
    """Mean of |x|."""
    a, b = edges[..., :-1], edges[..., 1:]
    across = (a < 0) & (b > 0)  # such a bin holds both signs
    mean = torch.where(across, (a.square() + b.square()) / (2 * (b - a)), ((a + b) / 2).abs())
    return (counts * mean).sum(-1) / counts.sum(-1).clamp_min(1)


def percentile(counts: Tensor, edges: Tensor, *, share: float, symmetric: bool) -> Range:
    """The range that holds `share` percent of the values: what is cut is split evenly between the two ends, or, where
    `symmetric`, the range is the shortest +-t."""
    tail = (1 - share / 100) / 2
    if not symmetric:
        return _quantile(counts, edges, tail), _quantile(counts, edges, 1 - tail)
    low, high = torch.zeros_like(edges[..., 0]), torch.maximum(-edges[..., 0], edges[..., -1])
    for _ in range(60):
        middle = (low + high) / 2
        enough = _below(counts, edges, middle) - _below(counts, edges, -middle) >= share / 100 * counts.sum(-1)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return -high, high


def mse(counts: Tensor, edges: Tensor, *, bits: int, symmetric: bool, whole: bool = False) -> Range:
    """The range with the least sum of squared rounding errors, each bin's integrated exactly."""
    lowest, highest = limits(bits, symmetric)
    width = edges.diff()
    narrow = width <= NARROW * (edges[..., -1:] - edges[..., :1])
    density = counts / width.where(~narrow, 1)

    def error(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = _steps(low, high, bits, symmetric, whole)
        place = edges / scale[..., None] + zero[..., None]
        code = place.round().clamp_(lowest, highest)
        off = place.sub_(code)
        # The integral of (u - code(u))^2 from 0 to u is code / 12 + (u - code)^3 / 3.
        spread = code.div_(12).add_(off.pow(3), alpha=1 / 3).diff() * scale[..., None]
        return (torch.where(narrow, counts * off[..., :-1].square(), density * spread)).sum(-1) * scale.square()

    return _least(error, counts, edges, symmetric, whole)


def kl(counts: Tensor, edges: Tensor, *, bits: int, symmetric: bool, whole: bool = False) -> Range:
    """The range whose rounded values tell least from the values (Migacz 2017, "8-bit inference with TensorRT").

    P: the bins within the range, what lies beyond added to the outermost of them.  Q: the bins within the range without
    that; what falls to one level is spread evenly over those of its bins where P is not 0.  Both are normalised; the
    sum of P log(P / Q) is the least, of equals for the widest range that holds as many bins as there are levels.  Bins
    without width (exact zeros) do not count.
    """
    wide = edges.diff() > 0
    counts = counts.where(wide, 0)
    centres = (edges[..., 1:] + edges[..., :-1]) / 2
    lowest, highest = limits(bits, symmetric)
    bins = torch.arange(counts.shape[-1], device=counts.device)

    def divergence(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = _steps(low, high, bits, symmetric, whole)
        inside = (centres >= low[..., None]) & (centres <= high[..., None])
        held = counts.where(inside, 0)
        first = bins.where(inside, len(bins) - 1).amin(-1, keepdim=True)
        last = bins.where(inside, 0).amax(-1, keepdim=True)
        below = counts.where(centres < low[..., None], 0).sum(-1, keepdim=True)
        above = counts.where(centres > high[..., None], 0).sum(-1, keepdim=True)
        p = held.scatter_add(-1, first, below).scatter_add_(-1, last, above)
        code = (centres / scale[..., None] + zero[..., None]).round_().clamp_(lowest, highest).sub_(lowest).long()
        levels = counts.new_zeros(*counts.shape[:-1], highest - lowest + 1)
        number = levels.scatter_add(-1, code, (p > 0).double())
        mass = levels.scatter_add(-1, code, held)
        q = (mass / number.clamp_min(1)).gather(-1, code).where(p > 0, 0)
        p = p / p.sum(-1, keepdim=True).clamp_min(1)
        q = q / q.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
        found = torch.xlogy(p, p / q).where(p > 0, 0).sum(-1)  # infinite where Q lacks what P has
        enough = (inside & wide).sum(-1) >= (wide.sum(-1)).clamp_max(highest - lowest + 1)
        return found.where(enough, torch.inf)

    return _least(divergence, counts, edges, symmetric, whole)


def _steps(low: Tensor, high: Tensor, bits: int, symmetric: bool, whole: bool) -> tuple[Tensor, Tensor]:
    scale, zero = steps(low, high, bits=bits, symmetric=symmetric, whole=whole)
    return scale, torch.zeros_like(scale) if zero is None else zero


def _least(
    error: Callable[[Tensor, Tensor], Tensor], counts: Tensor, edges: Tensor, symmetric: bool, whole: bool
) -> Range:
    """The range with the least error: all of it shrunk towards 0 (towards the mean, where 0 need not be a level) on a
    grid of `STEPS` factors, then, where the ends are free, each moved alone while that helps."""
    low, high = minmax(counts, edges)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    middle = torch.zeros_like(low).clamp(low, high)
    if not (symmetric or whole):
        middle = (counts * (edges[..., 1:] + edges[..., :-1]) / 2).sum(-1) / counts.sum(-1).clamp_min(1)
    found = error(low, high)
    best = [low, high]

    def attempt(a: Tensor, b: Tensor) -> bool:
        nonlocal found
        now = error(a, b)
        better = (now < found) & (a <= b)
        found = now.where(better, found)
        best[:] = a.where(better, best[0]), b.where(better, best[1])
        return bool(better.any())

    for i in range(1, STEPS):
        factor = 1 - i / STEPS
        attempt(middle + factor * (low - middle), middle + factor * (high - middle))
    one_sided = whole and bool(((low >= 0) | (high <= 0)).all())
    for step in () if symmetric or one_sided else (8, 4, 2, 1):
        width = (high - low) * (step / STEPS)
        for _ in range(STEPS // step):
            moved = [
                attempt(*(end + sign * width * (i == side) for i, end in enumerate(best)))
                for side in (0, 1)
                for sign in (-1, 1)
            ]
            if not any(moved):
                break
    return best[0], best[1]


def _below(counts: Tensor, edges: Tensor, x: Tensor) -> Tensor:
    """How many values are at most `x`."""
    a, b = edges[..., :-1], edges[..., 1:]
    part = ((x[..., None] - a) / (b - a).where(b > a, 1)).clamp(0, 1)
    return (counts * torch.where(b > a, part, (a <= x[..., None]).double())).sum(-1)


def _quantile(counts: Tensor, edges: Tensor, share: float) -> Tensor:
    """The least value such that `share` of all are at most as large."""
    total = counts.cumsum(-1)
    wanted = share * total[..., -1:]
    at = (total < wanted).sum(-1, keepdim=True).clamp_max(counts.shape[-1] - 1)
    count = counts.gather(-1, at)
    part = ((wanted - total.gather(-1, at) + count) / count.where(count > 0, 1)).clamp(0, 1)
    a, b = edges.gather(-1, at), edges.gather(-1, at + 1)
    return (a + part * (b - a))[..., 0]
