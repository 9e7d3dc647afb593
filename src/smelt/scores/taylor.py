"""|w g|: what the loss changes by, to first order, when w becomes 0; g is the mean gradient over the calibration data.

Mozer & Smolensky 1989; as the "connection sensitivity" of Lee et al. 2019, arXiv:1810.02340.  Summed over a group it
is its L1 norm, which does not let changes of opposite sign cancel (Molchanov et al. 2017, arXiv:1611.06440).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEEDS: tuple[str, ...] = ("gradient",)
LOSS = True  # an estimate of what the loss changes by, so tensors can be compared


def score(x: Tensor, seen: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    found: Tensor = (x * seen["gradient"].to(x)).abs()
    return found
