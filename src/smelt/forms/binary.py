"""A few signs for every element, each with a scale per tensor, channel or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.forms._parts import FLOATS, Claims, aligned, exactly, in_layout, kind, require, whole
from smelt.forms._sides import Sided


@dataclass(frozen=True)
class Binary(Sided):
    """x = sum over k < bases of scale[k] * (2 bit_k - 1), bit_k the k-th bit of the code; differentiable in scale.

    codes: uint8 in the tensor's layout, each below 2^bases.
    scale: float [bases, *side], with one entry of `side_shape(shape)` each.
    """

    bases: int = 1

    values: ClassVar[tuple[str, ...]] = ("codes",)
    aligned: ClassVar[tuple[str, ...]] = ("codes",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in float32 or wider."""
        codes, scale = parts["codes"], parts["scale"]
        in_layout(self, "codes", codes, shape)
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
        dense = torch.zeros((), dtype=scale.dtype, device=scale.device)
        for k in range(self.bases):
            signs = ((codes >> k & 1).to(torch.int8) * 2 - 1).to(scale.dtype)
            dense = dense + signs * self.spread(scale[k], shape)
        return dense

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        whole(self, "bases", self.bases, 1, 8)
        exactly(self, parts, shape, "codes", "scale")
        aligned(self, parts, "codes", (torch.uint8,), shape)
        require(dtype.is_floating_point, f"form 'binary' cannot store {dtype}")
        self.check_sides(parts, shape)
        found = kind(self, parts, "scale", FLOATS)
        fits = found == torch.Size((self.bases, *self.side_shape(shape)))
        require(fits, f"form 'binary': scales {list(found)} do not fit the tensor {list(shape)}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: a code of more bits than there are bases."""
        codes = encoded.parts["codes"]
        if isinstance(codes, Tensor) and codes.numel():
            most = int(codes.max())
            require(most < 1 << self.bases, f"form 'binary': code {most} for {self.bases} bases")
        return encoded
