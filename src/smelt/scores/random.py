"""Uniform noise: the baseline every other score has to beat."""

import torch
from torch import Tensor


def score(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator).to(x.device)
