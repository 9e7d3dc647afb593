"""Linear layers of symmetric codes of up to 8 bits, one scale a row, whose inputs are rounded to 8 bits, by oneDNN's
integer products: for many samples."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.errors import ModelError
from smelt.core.kernel import Layer, Served
from smelt.kernels._codes import affine
from smelt.kernels._inputs import Levels, levels_of
from smelt.native import matvec

DEVICES = ("cpu",)


def build(layer: Layer) -> Served | None:
    module, levels = layer.module, levels_of(layer)
    if type(module) is not nn.Linear or levels is None or (levels.apart and layer.at_input is not None):
        return None
    if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return None
    found = affine(layer.weight)
    if found is None or found.zero is not None or not -128 <= found.low <= found.high < 128:
        return None
    if found.group < found.codes.shape[1] or "onednn" not in torch.backends.quantized.supported_engines:
        return None
    return Int8Linear(found.codes.to(torch.int8), found.scale[:, 0].contiguous(), module.bias, levels)


class Int8Linear(Served):
    """y = x W^T + bias; one range for all of x, where it is found at run time."""

    takes_input = True
    codes: Tensor
    scale: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, levels: Levels):
        super().__init__()
        self.levels = replace(levels, apart=False)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("zeros", torch.zeros(len(codes), dtype=torch.int32))
        self.packed: Any = torch.ops.onednn.qlinear_prepack(codes, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:  # what is packed cannot be copied
        codes, scale, bias = (copy.deepcopy(part, memo) for part in (self.codes, self.scale, self.bias))
        assert codes is not None and scale is not None
        made = Int8Linear(codes, scale, bias, self.levels)
        made.most = self.most
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ModelError(f"the input is {x.dtype} on {x.device}, not float32 on cpu")
        if (x.requires_grad and torch.is_grad_enabled()) or not x.numel():
            return functional.linear(self.levels.rounded(x), self.weight, self.bias)
        found, step, zero = matvec.as_bytes(x.detach().contiguous().numpy(), self.levels.step, self.levels.zero)
        codes = torch.from_numpy(found).view(-1, x.shape[-1])
        sides: Any = (self.packed, self.scale, self.zeros, self.bias, 1.0, 0, torch.float32, "none", [], "")
        y: Tensor = torch.ops.onednn.qlinear_pointwise(codes, step, zero, *sides)
        return y.view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        return self.codes * self.scale[:, None]
