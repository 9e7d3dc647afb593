"""Linear layers with two zeros in every four neighbours, on GPUs whose tensor cores skip them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import to_sparse_semi_structured

from smelt.core.kernel import Layer, Served

DEVICES = ("cuda",)


def build(layer: Layer) -> Served | None:
    module = layer.module
    if type(module) is not nn.Linear or not fits(module.weight):
        return None
    if torch.cuda.get_device_capability(module.weight.device) < (8, 0):
        return None
    try:
        return SemiStructured(module.weight.detach(), module.bias)
    except (RuntimeError, ValueError):  # a build of PyTorch without these kernels
        return None


def fits(weight: Tensor) -> bool:
    """A matrix of half precision, of which every four neighbours in a row have two zeros at least."""
    if weight.dim() != 2 or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    if weight.shape[0] % 32 or weight.shape[1] % 64:  # the tiles of the kernels
        return False
    return bool((weight.detach().reshape(-1, 4).count_nonzero(1) <= 2).all())


class SemiStructured(Served):
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.sparse = to_sparse_semi_structured(weight)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.sparse, self.bias)

    def dense(self) -> Tensor:
        found: Tensor = self.sparse.to_dense()
        return found
