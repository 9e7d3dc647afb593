"""Mean squared gradient of the task's loss on single samples: the diagonal of the empirical Fisher matrix."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic


class Fisher(Statistic):
    """`result()`: float32 (float64 if the weight is), on the weight's device and of its shape.

    With labels it is the empirical Fisher matrix; without, labels are drawn from the model's outputs, and it estimates
    the Fisher matrix itself (Kunstner et al. 2019, arXiv:1905.12558, section 2).
    """

    of: ClassVar[str] = "gradient"
    apart: ClassVar[bool] = True

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.total: Tensor | None = None
        self.number = 0

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        if not bool(torch.isfinite(x).all()):
            raise DataError("there are NaN or infinite values in a gradient")
        self.total = x if self.total is None else self.total.add_(x)
        self.number += 1

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.number
