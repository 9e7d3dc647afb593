"""The range of values that an even grid spans, by the name of its kind: of weights, or of what passes a place in a
model, from what was gathered there (names on the shelf `statistics/`).

minmax          range, channel_ranges           all that was seen
average         ranges, channel_ranges          the ends of each batch, in a moving average (Jacob et al. 2018,
                                                arXiv:1712.05877, section 3.1)
percentile      histogram, channel_histogram    see `histogram`
mse, kl
lsq             histogram, channel_histogram    the start of a learned step, see `learned`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smelt.grids import histogram, learned, uniform
from smelt.grids.uniform import Range

RANGES = ("minmax", "average", "percentile", "mse", "kl", "lsq")


def statistic(kind: str, by_channel: bool) -> str:
    """What must be gathered for a range of this kind."""
    if kind in ("minmax", "average"):
        return "channel_ranges" if by_channel else "ranges" if kind == "average" else "range"
    return "channel_histogram" if by_channel else "histogram"


def calibrated(
    gathered: Any,
    kind: str,
    by_channel: bool,
    *,
    bits: int,
    symmetric: bool,
    whole: bool,
    percentile: float = 100.0,
    momentum: float = 0.9,
) -> Range:
    """(low, high) in float32: of one number each, or of the shape in which the statistic keeps the channels.

    Args:
        gathered: the result of `statistic(kind, by_channel)`.
        whole: whether 0 must be a level.
        momentum: what a new batch leaves of the average of those before.
    """
    first, second = gathered
    if kind == "minmax":
        found = (first.amin(0), second.amax(0)) if by_channel else (first, second)
    elif kind == "average":
        found = moving(first, momentum), moving(second, momentum)
    elif kind == "percentile":
        found = histogram.percentile(first, second, share=percentile, symmetric=symmetric)
    elif kind == "mse":
        found = histogram.mse(first, second, bits=bits, symmetric=symmetric, whole=whole)
    elif kind == "kl":
        found = histogram.kl(first, second, bits=bits, symmetric=symmetric, whole=whole)
    else:
        ends = histogram.minmax(first, second)
        found = learned.start(histogram.magnitude(first, second), *ends, bits=bits, symmetric=symmetric)
    return found[0].to(torch.float32), found[1].to(torch.float32)


def of_rows(
    rows: Tensor,
    where: Tensor | None,
    kind: str,
    *,
    bits: int,
    symmetric: bool,
    whole: bool,
    percentile: float = 100.0,
) -> Range:
    """(low, high), each [r], of rows [r, n] as in `uniform`; any kind but average.  One symmetric bit: +- mean |x|."""
    if symmetric and bits == 1:
        return uniform.magnitude(rows, where)
    if kind == "percentile":
        return uniform.percentile(rows, where, share=percentile, symmetric=symmetric)
    if kind == "mse":
        return uniform.mse(rows, where, bits=bits, symmetric=symmetric, whole=whole)
    if kind == "kl":
        return histogram.kl_of_rows(rows, where, bits=bits, symmetric=symmetric, whole=whole)
    if kind == "lsq":
        mean = uniform.magnitude(rows, where)[1]
        return learned.start(mean, *uniform.minmax(rows, where), bits=bits, symmetric=symmetric)
    return uniform.minmax(rows, where)


def moving(values: Tensor, momentum: float) -> Tensor:
    """The moving average along dimension 0, started at the first."""
    average = values[0]
    for value in values[1:]:
        average = momentum * average + (1 - momentum) * value
    return average
