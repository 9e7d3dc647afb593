"""Integer codes on an even grid, with a step and a zero point per tensor, channel or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.forms._parts import FLOATS, INTEGERS, Claims, aligned, exactly, in_layout, kind, require, whole

CODES = (torch.uint8, torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Affine(Form):
    """x = (codes - zero) * scale; differentiable in scale and in a floating zero.

    codes: integers in the tensor's shape, of `bits` bits: all in -2^(bits-1)..2^bits - 1.
    scale: float of `side_shape(shape)`.  zero: float or integer of the same shape, absent when `symmetric`.

    axis: the channel dimension with its own scale; None for one scale per tensor.
    group: 0, or the length of the groups with their own scale, which run along the flattened remaining
        dimensions of each channel (axis 0); the last group of a channel may be short.
    """

    axis: int | None = None
    group: int = 0
    bits: int = 8
    symmetric: bool = True

    values: ClassVar[tuple[str, ...]] = ("codes",)
    aligned: ClassVar[tuple[str, ...]] = ("codes",)

    def side_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of scale and zero: [] per tensor, [channels], or [channels, groups]."""
        if self.axis is None:
            return torch.Size()
        if not self.group:
            return shape[self.axis : self.axis + 1]
        return torch.Size((shape[0], -(-numel(shape[1:]) // self.group)))

    def spread(self, side: Tensor, shape: torch.Size) -> Tensor:
        """Scale or zero, broadcastable to the tensor."""
        if self.axis is None:
            return side
        if not self.group:
            return side.reshape([-1 if d == self.axis else 1 for d in range(len(shape))])
        rest = numel(shape[1:])
        return side.repeat_interleave(min(self.group, max(rest, 1)), 1)[:, :rest].reshape(shape)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in float32 or wider (codes of 16 bits do not fit half precision)."""
        in_layout(self, "codes", parts["codes"], shape)
        work = torch.promote_types(parts["scale"].dtype, torch.float32)
        dense = parts["codes"].to(work)
        if not self.symmetric:
            dense = dense - self.spread(parts["zero"].to(work), shape)
        return dense * self.spread(parts["scale"].to(work), shape)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        require(isinstance(self.symmetric, bool), f"form 'affine': symmetric is {self.symmetric!r}")
        whole(self, "bits", self.bits, 1, 16)
        whole(self, "group", self.group, 0, 2**62)
        if self.axis is not None:
            whole(self, "axis", self.axis, 0, len(shape) - 1)
        require(not self.group or self.axis == 0, "form 'affine': groups run within the channels of axis 0")
        exactly(self, parts, shape, "codes", "scale", *(() if self.symmetric else ("zero",)))
        aligned(self, parts, "codes", CODES, shape)
        require(dtype.is_floating_point, f"form 'affine' cannot store {dtype}")
        sides = [kind(self, parts, "scale", FLOATS)]
        if not self.symmetric:
            sides.append(kind(self, parts, "zero", (*FLOATS, *INTEGERS)))
        for side in sides:
            fits = side == self.side_shape(shape)
            require(fits, f"form 'affine': scales {list(side)} do not fit the tensor {list(shape)}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: a code has more bits than the form says."""
        codes = encoded.parts["codes"]
        if isinstance(codes, Tensor) and codes.numel():
            low, high = (int(n) for n in codes.aminmax())
            fits = -(1 << self.bits - 1) <= low and high < 1 << self.bits
            require(fits, f"form 'affine': codes {low}..{high} do not fit {self.bits} bits")
        return encoded
