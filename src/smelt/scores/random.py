"""Uniform noise: the baseline every other score has to beat."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEEDS: tuple[str, ...] = ()


def score(x: Tensor, seen: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator).to(x.device)
