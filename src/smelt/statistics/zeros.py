"""Share of zeros in what a layer takes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.statistic import Statistic


class Zeros(Statistic):
    """`result()`: float64, on the CPU, of a shape that broadcasts to the module's weight: [in] for a linear layer,
    [in / groups, 1, ...] for a convolution, [in, 1, 1, ...] for a transposed one; groups are averaged."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.total: Tensor | None = None
        self.number = 0

    def update(self, x: Tensor) -> None:
        dims = len(self.module.kernel_size) if isinstance(self.module, _ConvNd) else 0
        flat = (x.movedim(x.dim() - 1 - dims, -1) == 0).reshape(-1, x.shape[x.dim() - 1 - dims])
        total = flat.sum(0, dtype=torch.float64).cpu()
        self.total = total if self.total is None else self.total + total
        self.number += len(flat)

    def result(self) -> Tensor:
        assert self.total is not None
        mean = self.total / self.number
        if not isinstance(self.module, _ConvNd):
            return mean
        ones = [1] * len(self.module.kernel_size)
        if isinstance(self.module, _ConvTransposeNd):
            return mean.reshape(-1, 1, *ones)
        return mean.reshape(self.module.groups, -1).mean(0).reshape(-1, *ones)
