"""A form of version 2 whose checks are loose and whose decoding fails when it is told to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form


@dataclass(frozen=True)
class Tiny(Form):
    factor: float = 1.0
    fail: str = ""
    pair: tuple[int, ...] = (1, 2)

    version: ClassVar[int] = 2
    values: ClassVar[tuple[str, ...]] = ("x",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self.fail == "decode":
            raise IndexError("out of\nrange")
        return parts["x"].reshape(shape).to(dtype) * self.factor

    def check(self, parts: Mapping[str, Any], shape: torch.Size, dtype: torch.dtype) -> None:
        if self.fail == "check":
            raise KeyError("x")

    def awake(self, encoded: Encoded) -> Encoded | Tensor:
        if self.fail == "awake":
            raise RuntimeError("no")
        return torch.zeros(3) if self.fail == "shape" else encoded
