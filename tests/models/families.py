"""What the tests of the model families share."""

import torch
from torch import nn


def lively(model: nn.Module) -> nn.Module:
    """With norms and biases that matter, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5, generator=generator)
    return model.eval()
