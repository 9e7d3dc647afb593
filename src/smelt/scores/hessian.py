"""F w^2 / 2: optimal brain damage (LeCun et al. 1989), the diagonal of the Hessian taken as that of the empirical
Fisher matrix, F = mean over samples of the squared gradient (Theis et al. 2018, arXiv:1801.05787, eq. 7)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEEDS: tuple[str, ...] = ("fisher",)
LOSS = True  # an estimate of what the loss changes by, so tensors can be compared


def score(x: Tensor, seen: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    found: Tensor = x.square() * seen["fisher"].to(x) / 2
    return found
