"""Second moments of the gradient of the task's loss by what a layer gives, with one another."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic


class Slopes(Statistic):
    """`result()`: float64 [groups, out / groups, out / groups], on the device of the outputs: the mean over batches of
    the sum of g g^T over samples and positions, g the gradient at one position.

    With H the Gram matrix of the inputs, tr(result E H E^T) / 2 estimates what a change E of the weight adds to the
    loss, up to a factor that is the same for all layers (K-FAC: Martens & Grosse 2015, arXiv:1503.05671; convolution:
    Grosse & Martens 2016, arXiv:1602.01407).  Labels that are classes are drawn from the model's outputs, so that it
    estimates the Fisher matrix and not the empirical one, which is near 0 where the model is right.
    """

    of: ClassVar[str] = "slopes"

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.total: Tensor | None = None
        self.number = 0

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = 1
        if isinstance(self.module, _ConvNd):
            groups, x = self.module.groups, x.movedim(-1 - len(self.module.kernel_size), -1)
        rows = x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)
        total = (rows.mT @ rows).double()
        if not bool(torch.isfinite(total).all()):
            raise DataError("there are NaN or infinite values in a gradient")
        self.total = total if self.total is None else self.total.add_(total)
        self.number += 1

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.number
