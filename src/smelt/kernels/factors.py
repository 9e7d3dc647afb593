"""Linear layers whose weight is stored as a product of two thin matrices: two thin products."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.encoded import Encoded
from smelt.core.kernel import Layer, Served

DEVICES = ("cpu", "cuda")


def build(layer: Layer) -> Served | None:
    module, tree = layer.module, layer.weight
    if type(module) is not nn.Linear or tree is None or tree.form.name != "factors" or len(tree.shape) != 2:
        return None
    dense = (p.decode() if isinstance(p, Encoded) else p for p in (tree.parts["left"], tree.parts["right"]))
    left, right = (p.detach().to(module.weight.device, module.weight.dtype) for p in dense)
    return Factors(left, right, module.bias)


class Factors(Served):
    """y = (x right^T) left^T + bias."""

    left: Tensor
    right: Tensor
    bias: Tensor | None

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.right), self.left, self.bias)

    def dense(self) -> Tensor:
        return torch.matmul(self.left, self.right)
