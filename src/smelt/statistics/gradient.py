"""Mean gradient of the task's loss by a weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic


class Gradient(Statistic):
    """`result()`: float32 (float64 if the weight is), on the weight's device and of its shape; batches count alike."""

    of: ClassVar[str] = "gradient"

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.total: Tensor | None = None
        self.number = 0

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not bool(torch.isfinite(x).all()):
            raise DataError("there are NaN or infinite values in a gradient")
        self.total = x.clone() if self.total is None else self.total.add_(x)
        self.number += 1

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.number
