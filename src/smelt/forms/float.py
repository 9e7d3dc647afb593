"""A tensor in a narrower floating dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Form
from smelt.forms._parts import BYTES, FLOATS, Claims, aligned, exactly, in_layout, require


@dataclass(frozen=True)
class Float(Form):
    """x = values, in the dtype of the tensor; differentiable.

    values: floating in the tensor's shape: fp16, bf16, fp8 e4m3 or e5m2, fp32, fp64; a leaf or a tree.
    """

    values: ClassVar[tuple[str, ...]] = ("values",)
    aligned: ClassVar[tuple[str, ...]] = ("values",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        in_layout(self, "values", parts["values"], shape)
        return parts["values"].to(dtype)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        exactly(self, parts, shape, "values")
        aligned(self, parts, "values", (*FLOATS, *BYTES), shape)
        require(dtype.is_floating_point, f"form 'float' cannot store {dtype}")
