"""A linear layer over a packed matrix (native/matvec.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.errors import ModelError
from smelt.core.kernel import Layer, Served
from smelt.kernels._inputs import Levels
from smelt.native import matvec


def plain(layer: Layer) -> nn.Linear | None:
    """The layer, if it is an ordinary linear one in float32 on the CPU, and the library is there."""
    module = layer.module
    if type(module) is not nn.Linear or matvec.functions() is None:
        return None
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    return module if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) else None


class MatVec(Served):
    """y = x W^T + bias for a few samples at a time; for more than `most`, W is decoded and multiplied as usual.

    levels: what the input is rounded to, for a matrix of bytes.
    """

    few = True
    bias: Tensor | None

    def __init__(self, matrix: matvec.Matrix, bias: Tensor | None, levels: Levels | None = None):
        super().__init__()
        self.call: matvec.Call = matvec.Call(matrix)
        self.levels = levels
        self.rounding = () if levels is None else (levels.step, levels.zero, levels.apart)
        self.takes_input = levels is not None
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.register_buffer("bias", None if bias is None else bias.detach().clone().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        columns, call, bias = self.in_features, self.call, self.bias
        if x.shape[-1] != columns or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ModelError(
                f"the input is {x.dtype} {list(x.shape)} on {x.device}, not float32 [..., {columns}] on cpu"
            )
        samples = x.numel() // columns
        if (self.most is not None and samples > self.most) or (x.requires_grad and torch.is_grad_enabled()):
            return functional.linear(x if self.levels is None else self.levels.rounded(x), self.weight, bias)
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        if samples:
            at = None if bias is None else bias.data_ptr()
            call(x.data_ptr(), samples, at, y.data_ptr(), *self.rounding)
        return y

    def dense(self) -> Tensor:
        return torch.from_numpy(matvec.values(self.call.matrix))

    def extra_repr(self) -> str:
        m = self.call.matrix
        return f"{m.columns} -> {m.rows}, {m.coding}, groups of {m.group}, {m.nbytes} bytes"


def settle(model: nn.Module) -> None:
    """Put the matrices of a model side by side in memory."""
    found = [module for module in model.modules() if isinstance(module, MatVec)]
    matrices = matvec.together([module.call.matrix for module in found]) if found else []
    for module, matrix in zip(found, matrices, strict=True):
        module.call = matvec.Call(matrix)
