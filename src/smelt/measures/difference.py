"""How far outputs are from those of a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNIT = "dB"


def difference(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[float, float]:
    """(largest difference over the largest value of the reference, signal-to-noise ratio in dB) over all outputs.

    (nan, nan) where their number or shapes differ, or one is NaN or infinite.
    """
    if [x.shape for x in reference] != [x.shape for x in outputs]:
        return math.nan, math.nan
    x, y = (torch.cat([t.detach().double().flatten() for t in several]) for several in (reference, outputs))
    noise = y - x
    if not bool(torch.isfinite(noise).all()):
        return math.nan, math.nan
    largest, power = float(x.abs().max()), float(noise.square().sum())
    error = float(noise.abs().max()) / largest if largest else math.inf if power else 0.0
    signal = float(x.square().sum())
    return error, math.inf if not power else 10 * math.log10(signal / power) if signal else -math.inf
