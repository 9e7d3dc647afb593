"""Sum over training steps of -w dL/dw: weights that move away from 0 are kept (Sanh et al. 2020, arXiv:2005.07683,
eq. 7, without the constant learning rate).  Known inside `train` only."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEEDS: tuple[str, ...] = ("movement",)


def score(x: Tensor, seen: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    return seen["movement"].to(x).expand_as(x)  # type: ignore[no-any-return]
