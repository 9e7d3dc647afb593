"""Second moments of what the weights of a layer multiply, with what they multiplied before the model was changed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic
from smelt.statistics.gram import geometry, unfolded


class Cross(Statistic):
    """`result()`: float64 [groups, k, k], on the device of the inputs: the mean of x0 x^T.

    x is what one output of the layer is a weighted sum of, as in `statistics.gram`, and x0 the same in the model as it
    was before the step that asks for it.  Then w C H^-1, with C this and H the Gram matrix, is the row that comes
    closest to what w gave before (least squares).  Where nobody knows x0 it is x.
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
            raise DataError("a transposed convolution has no such moments; take it out of the step")
        both = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (before[0] if before else x, x)]
        pieces = [
            unfolded(self.module, t) if isinstance(self.module, _ConvNd) else [t.reshape(1, -1, t.shape[-1])]
            for t in both
        ]
        for old, new in zip(*pieces, strict=True):
            total = (old.mT @ new).double()
            if not bool(torch.isfinite(total).all()):
                raise DataError("there are NaN or infinite values in a calibration batch")
            self.total = total if self.total is None else self.total.add_(total)
            self.number += new.shape[1]

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.number
