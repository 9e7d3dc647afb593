"""Powers of two: scales that only shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form
from smelt.forms._parts import Claims, aligned, exactly, in_layout, require

LOWEST = -127  # as in E8M0: -127..127


@dataclass(frozen=True)
class Exponent(Form):
    """x = 2^exponents, exactly.

    exponents: int8 in the tensor's shape, in -127..127.
    """

    values: ClassVar[tuple[str, ...]] = ("exponents",)
    aligned: ClassVar[tuple[str, ...]] = ("exponents",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        in_layout(self, "exponents", parts["exponents"], shape)
        return power(parts["exponents"])

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        exactly(self, parts, shape, "exponents")
        aligned(self, parts, "exponents", (torch.int8,), shape)
        wide = dtype in (torch.float32, torch.float64, torch.bfloat16)
        require(wide, f"form 'exponent' cannot store {dtype}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: an exponent is -128."""
        exponents = encoded.parts["exponents"]
        if isinstance(exponents, Tensor) and exponents.numel():
            require(int(exponents.min()) >= LOWEST, f"form 'exponent': exponents below {LOWEST}")
        return encoded


def power(exponents: Tensor) -> Tensor:
    """2^exponents, float32, exact for whole numbers in -127..127."""
    whole = exponents.to(torch.int32)
    bits = torch.where(whole > LOWEST, (whole + 127) << 23, 1 << 22)  # 2^-127 is subnormal
    return bits.view(torch.float32)
