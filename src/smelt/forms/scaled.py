"""Values, narrow or coded, times a scale per tensor, channel or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.forms._parts import BYTES, FLOATS, Claims, aligned, exactly, in_layout, kind, require
from smelt.forms._sides import Sided


@dataclass(frozen=True)
class Scaled(Sided):
    """x = values * (scale / top); differentiable in values and scale.

    With the largest possible value as `top`, scales are as large as what is stored and train as it does.

    values: floating in the tensor's shape, a leaf (of 8 bits, too) or a tree.
    scale: float of `side_shape(shape)`, or a tree.
    """

    top: float = 1

    values: ClassVar[tuple[str, ...]] = ("values",)
    aligned: ClassVar[tuple[str, ...]] = ("values",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in float32 or in float64 if the scale is."""
        in_layout(self, "values", parts["values"], shape)
        work = torch.promote_types(parts["scale"].dtype, torch.float32)
        return parts["values"].to(work) * self.spread(parts["scale"].to(work) / self.top, shape)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        self.check_top(self.top)
        exactly(self, parts, shape, "values", "scale")
        aligned(self, parts, "values", (*FLOATS, *BYTES), shape)
        kind(self, parts, "scale", FLOATS)
        require(dtype.is_floating_point, f"form 'scaled' cannot store {dtype}")
        self.check_sides(parts, shape, "scale")
