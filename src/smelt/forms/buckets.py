"""Ranges of values, each with its own start and step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form
from smelt.forms._parts import FLOATS, Claims, aligned, exactly, in_layout, kind, require, whole

CODES = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Buckets(Form):
    """x = start[b] + step[b] * offset with b, offset = divmod(code, 2^bits); differentiable in start and step.

    codes: in the tensor's layout, uint8, int16 or int32, each in 0..B 2^bits - 1.  start, step: float [B], B >= 1.
    """

    bits: int = 4

    values: ClassVar[tuple[str, ...]] = ("codes",)
    aligned: ClassVar[tuple[str, ...]] = ("codes",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in float32 or wider."""
        in_layout(self, "codes", parts["codes"], shape)
        codes = parts["codes"].int()
        start, step = (parts[k].to(torch.promote_types(parts[k].dtype, torch.float32)) for k in ("start", "step"))
        bucket = (codes >> self.bits).reshape(-1)
        offset = (codes & (1 << self.bits) - 1).to(start.dtype)
        return start.index_select(0, bucket).reshape(shape) + step.index_select(0, bucket).reshape(shape) * offset

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        whole(self, "bits", self.bits, 0, 16)
        exactly(self, parts, shape, "codes", "start", "step")
        aligned(self, parts, "codes", CODES, shape)
        require(dtype.is_floating_point, f"form 'buckets' cannot store {dtype}")
        start, step = (kind(self, parts, k, FLOATS) for k in ("start", "step"))
        fits = len(start) == 1 and start[0] >= 1 and start == step
        require(fits, f"form 'buckets': starts {list(start)} and steps {list(step)} are not one per bucket")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: a code of a bucket that does not exist."""
        codes, count = encoded.parts["codes"], encoded.parts["start"].shape[0]
        if isinstance(codes, Tensor) and codes.numel():
            low, high = (int(n) for n in codes.aminmax())
            fits = low >= 0 and high >> self.bits < count
            require(fits, f"form 'buckets': codes {low}..{high} for {count} buckets of {self.bits} bits")
        return encoded
