"""How many parameters a model has, tied ones once."""

from __future__ import annotations

import torch
from torch import nn

UNIT = "parameters"


def parameters(model: nn.Module) -> int:
    """Elements of the unique parameters; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


def nonzeros(model: nn.Module) -> int:
    """Those of them that are not zero."""
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())
