"""Which layers are not only called: others read their weights, so nothing else can take their place."""

from __future__ import annotations

import torch
from torch import nn

from smelt.graph.chains import _parts

# Modules of torch that read the weights of their children.
READERS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


@torch.no_grad()
def outside(model: nn.Module) -> dict[str, str]:
    """Module path -> who reads its tensors from outside, as in F.linear(x, self.fc.weight).

    Found by `torch.fx` tracing, where that is possible, and by the type of the parent.
    """
    found: dict[str, str] = {}
    for part in _parts(model, ""):
        reason = f"the forward of {part.prefix[:-1] or type(model).__name__} reads its weights"
        found |= {f"{part.prefix}{path}": reason for path in part.read if path}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, READERS):
            reason = f"the {type(module).__name__} around it reads its weights"
            found |= {f"{path}.{name}" if path else name: reason for name, _ in module.named_children()}
    return found
