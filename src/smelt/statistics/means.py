"""Means of what the weights of a layer multiply, before the model was changed and now."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic
from smelt.statistics.gram import geometry, unfolded


class Means(Statistic):
    """`result()`: float64 [2, groups, k], on the device of the inputs: the means of x0 and of x.

    x and x0 are as in `statistics.cross`: what one output of the layer is a weighted sum of, now, and in the model as
    it was before the step that asks for it.
    """

    of: ClassVar[str] = "pairs"

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.total: Tensor | None = None
        self.number = 0

    @classmethod
    def kind(cls, module: nn.Module) -> Hashable:
        return geometry(module)

    def update(self, x: Tensor, *before: Tensor) -> None:
        """Raises DataError: NaN or infinite values, or a transposed convolution, whose weights share no places."""
        if isinstance(self.module, _ConvTransposeNd):
            raise DataError("a transposed convolution has no such means; take it out of the step")
        sums = []
        for seen in (before[0] if before else x, x):
            wide = seen.to(torch.promote_types(seen.dtype, torch.float32))
            pieces = unfolded(self.module, wide) if isinstance(self.module, _ConvNd) else [wide.flatten(0, -2)[None]]
            found = [(piece.sum(1, dtype=torch.float64), piece.shape[1]) for piece in pieces]
            sums.append(torch.stack([total for total, _ in found]).sum(0))
        total = torch.stack(sums)
        if not bool(torch.isfinite(total).all()):
            raise DataError("there are NaN or infinite values in a calibration batch")
        self.total = total if self.total is None else self.total.add_(total)
        self.number += sum(number for _, number in found)

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.number
