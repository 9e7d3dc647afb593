"""|w|: Han et al. 2015, arXiv:1506.02626."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEEDS: tuple[str, ...] = ()


def score(x: Tensor, seen: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    return x.abs()
