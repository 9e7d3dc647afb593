"""Smallest and largest value seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic


class Range(Statistic):
    """`result()` is (low, high): float32 tensors without dimensions (float64 if the activations are)."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.seen: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        low, high = ends(x)
        if self.seen is not None:
            low, high = torch.minimum(low, self.seen[0]), torch.maximum(high, self.seen[1])
        self.seen = low, high

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.seen is not None
        return self.seen


def ends(x: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """(low, high) of all of `x` or along `dim`, float32 or wider.  Raises DataError: NaN or infinite values."""
    low, high = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in x.aminmax(dim=dim))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise DataError("there are NaN or infinite values in a calibration batch")
    return low, high
