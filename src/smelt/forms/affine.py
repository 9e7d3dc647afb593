"""Integer codes on an even grid, with a step and a zero point per tensor, channel or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.forms._parts import FLOATS, INTEGERS, Claims, aligned, exactly, in_layout, kind, require, whole
from smelt.forms._sides import Sided

CODES = (torch.uint8, torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Affine(Sided):
    """x = (codes - zero) * (scale / top); differentiable in scale and in a floating zero.

    codes: integers in the tensor's shape, of `bits` bits: all in -2^(bits-1)..2^bits - 1.
    scale: float of `side_shape(shape)`, or a tree.  zero: float or integer of the same shape, absent when `symmetric`.
    top: 1, so that scales are steps; or the number of steps that they stand for, so that they train as values do.
    """

    bits: int = 8
    symmetric: bool = True
    top: float = 1

    values: ClassVar[tuple[str, ...]] = ("codes",)
    aligned: ClassVar[tuple[str, ...]] = ("codes",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in float32 or wider (codes of 16 bits do not fit half precision)."""
        in_layout(self, "codes", parts["codes"], shape)
        work = torch.promote_types(parts["scale"].dtype, torch.float32)
        dense = parts["codes"].to(work)
        if not self.symmetric:
            dense = dense - self.spread(parts["zero"].to(work), shape)
        return dense * self.spread(parts["scale"].to(work) / self.top, shape)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        require(isinstance(self.symmetric, bool), f"form 'affine': symmetric is {self.symmetric!r}")
        whole(self, "bits", self.bits, 1, 16)
        self.check_top(self.top)
        exactly(self, parts, shape, "codes", "scale", *(() if self.symmetric else ("zero",)))
        aligned(self, parts, "codes", CODES, shape)
        require(dtype.is_floating_point, f"form 'affine' cannot store {dtype}")
        kind(self, parts, "scale", FLOATS)
        if not self.symmetric:
            kind(self, parts, "zero", (*FLOATS, *INTEGERS))
        self.check_sides(parts, shape, "scale", *(() if self.symmetric else ("zero",)))

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: a code has more bits than the form says."""
        codes = encoded.parts["codes"]
        if isinstance(codes, Tensor) and codes.numel():
            low, high = (int(n) for n in codes.aminmax())
            fits = -(1 << self.bits - 1) <= low and high < 1 << self.bits
            require(fits, f"form 'affine': codes {low}..{high} do not fit {self.bits} bits")
        return encoded
