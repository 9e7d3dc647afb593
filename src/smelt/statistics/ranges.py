"""Smallest and largest value of each call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smelt.core.statistic import Statistic
from smelt.statistics.range import ends


class Ranges(Statistic):
    """`result()` is (lows [calls], highs [calls]), in the order in which the module was called."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        self.seen.append(ends(x))

    def result(self) -> tuple[Tensor, Tensor]:
        return torch.stack([low for low, _ in self.seen]), torch.stack([high for _, high in self.seen])
