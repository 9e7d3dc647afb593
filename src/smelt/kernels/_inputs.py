"""Inputs that are rounded to 256 levels, as a codec at a layer's input says or, where that is allowed, of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smelt.core.kernel import Layer
from smelt.grids import uniform


@dataclass(frozen=True)
class Levels:
    """x ~ (code - zero) * step, codes 0..255.

    step: 0 where the levels span x and 0 at run time: each sample of its own (`apart`) or all together.
    """

    step: float = 0.0
    zero: float = 0.0
    apart: bool = False

    def rounded(self, x: Tensor) -> Tensor:
        step, zero = x.new_tensor(self.step), x.new_tensor(self.zero)
        if not self.step:
            low, high = x.aminmax() if not self.apart else x.aminmax(dim=-1, keepdim=True)
            step, found = uniform.steps(low, high, bits=8, symmetric=False, whole=True)
            zero = zero if found is None else found
        return uniform.dequantize(uniform.quantize(x, step, zero, bits=8, symmetric=False), step, zero)


def levels_of(layer: Layer) -> Levels | None:
    """What the input of a layer is rounded to; None where it is not to be, or not to such levels."""
    if layer.at_input is None:
        return Levels(apart=True) if layer.rounds else None
    codec: Any = layer.at_input.codec
    if codec.name != "quantize.affine" or codec.bits != 8 or codec.symmetric or codec.zero not in (None, "whole"):
        return None
    state: Any = layer.at_input.state
    scale, zero = getattr(state, "scale", None), getattr(state, "zero", None)
    if scale is None:
        known = codec.range == "minmax" and codec.per in (None, "tensor", "token") and codec.dynamic and not codec.learn
        return Levels(apart=codec.per == "token") if known and codec.scales == "float32" else None
    if zero is None or scale.numel() != 1 or zero.numel() != 1 or zero.dtype not in (torch.int32, torch.uint8):
        return None
    return Levels(float(codec._scale(scale)), float(zero))
