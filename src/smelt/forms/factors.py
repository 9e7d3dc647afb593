"""A product of two factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Form, numel
from smelt.forms._parts import FLOATS, Claims, exactly, kind, require

# Elements of the tensor that an element of a factor may stand for, so that a small file claims no huge tensor.
MOST = 2048


@dataclass(frozen=True)
class Factors(Form):
    """x = (left @ right) in the tensor's shape [m, ...]; differentiable in both.

    left: float [m, r], right: float [r, numel / m], each a leaf or a tree, r >= 1; a product in float32 or wider.
    """

    values: ClassVar[tuple[str, ...]] = ("left", "right")

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        left, right = parts["left"], parts["right"]
        work = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        return (left.to(work) @ right.to(work)).reshape(shape)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        exactly(self, parts, shape, "left", "right")
        require(dtype.is_floating_point, f"form 'factors' cannot store {dtype}")
        left, right = (kind(self, parts, k, FLOATS) for k in ("left", "right"))
        matrices = len(shape) > 1 and len(left) == len(right) == 2 and left[1] == right[0] >= 1
        fits = matrices and left[0] == shape[0] and left[0] * right[1] == numel(shape)
        require(fits, f"form 'factors': {list(left)} times {list(right)} is not {list(shape)}")
        small = numel(shape) <= MOST * (numel(left) + numel(right))
        require(small, f"form 'factors': {list(left)} and {list(right)} are too few numbers for {list(shape)}")
