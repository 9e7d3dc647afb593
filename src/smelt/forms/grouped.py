"""Values packed in a few bits each, with the least value and the step of every group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Form, numel
from smelt.forms._parts import Claims, exactly, kind, require, whole
from smelt.native.rounding import functions

NATIVE = (torch.float32, torch.bfloat16)  # what the compiled loops read and write


@dataclass(frozen=True)
class Grouped(Form):
    """x = low[g] + step[g] * code, for the values of the flattened tensor in groups of `group`, g = index // group.

    codes: uint8 [ceil(numel / 8) * bits]; `bits` (1..8) for each value, the first in the lowest bits of the first byte.
    low, step: bfloat16 [ceil(numel / group)]; `group` is a multiple of 8.
    """

    bits: int = 2
    group: int = 256

    values: ClassVar[tuple[str, ...]] = ("codes",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in bfloat16 or float32; differentiable in low and step."""
        codes, low, step, n = parts["codes"], parts["low"], parts["step"], numel(shape)
        stored = low.dtype == step.dtype == torch.bfloat16  # what trains is wider
        if stored and codes.device.type == "cpu" and n and (compiled := functions()) is not None:
            self.check({k: (p.shape, p.dtype) for k, p in parts.items()}, shape, dtype)
            codes, low, step = (t.contiguous() for t in (codes, low, step))
            out = torch.empty(n + 1, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)[:n]
            pointers = (codes.data_ptr(), low.data_ptr(), step.data_ptr())
            compiled["round_decode"](*pointers, n, self.bits, self.group, out.data_ptr(), int(dtype != torch.bfloat16))
            return out.view(shape)
        found = torch.nn.functional.pad(unpacked(codes, self.bits, n), (0, -n % self.group)).view(-1, self.group)
        return (found * step.float()[:, None] + low.float()[:, None]).flatten()[:n].reshape(shape)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        whole(self, "bits", self.bits, 1, 8)
        whole(self, "group", self.group, 8, 1 << 31)
        require(self.group % 8 == 0, f"form 'grouped': groups of {self.group}, which is no multiple of 8")
        exactly(self, parts, shape, "codes", "low", "step")
        require(dtype.is_floating_point, f"form 'grouped' cannot store {dtype}")
        n = numel(shape)
        sizes = {"codes": -(-n // 8) * self.bits, "low": -(-n // self.group), "step": -(-n // self.group)}
        for name, size in sizes.items():
            found = kind(self, parts, name, (torch.uint8,) if name == "codes" else (torch.bfloat16,))
            require(found == torch.Size((size,)), f"form 'grouped': {name} {list(found)} of a tensor {list(shape)}")


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n] below 2^bits as uint8 [ceil(n / 8) * bits]: the layout of `Grouped`."""
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 8))
    if bits == 8:
        return codes
    word = codes.view(torch.int64)
    for width in (8, 16, 32):  # two fields of `width` bits each, of which few are used, become one
        field = _fields(width, 2 * width)
        word = (word & field) | ((word >> width & field) << bits * width // 8)
    return word[:, None].view(torch.uint8)[:, :bits].flatten().contiguous()


def unpacked(codes: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `packed`."""
    if bits == 8:
        return codes[:n]
    word = torch.nn.functional.pad(codes.view(-1, bits), (0, 8 - bits)).view(torch.int64).flatten()
    for width in (32, 16, 8):
        used = bits * width // 8
        field = _fields(used, 2 * width)
        word = (word & field) | ((word >> used & field) << width)
    return word.view(torch.uint8)[:n]


def _fields(width: int, every: int) -> int:
    """A word with ones in the lowest `width` of every so many bits."""
    return sum(((1 << width) - 1) << at for at in range(0, 64, every))
