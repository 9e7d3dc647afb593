"""Integers in as few bits as they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.core.errors import FileError
from smelt.forms._parts import Claims, as_tensor, exactly, kind, require, whole

BLOCK = 1 << 19  # elements unpacked at a time; a multiple of 8, so that blocks begin at a byte


@dataclass(frozen=True)
class Bits(Form):
    """Lossless: element = offset + an unsigned number of `bits` bits, the first element in the highest bits.

    packed: uint8 [ceil(numel * bits / 8)], bits 1..16; the last byte is filled with zeros.
    Where `bits` is the dtype's own width (any dtype but bool), `packed` holds the bytes as they are in
    memory, little-endian, and offset is 0.
    """

    bits: int = 1
    offset: int = 0

    values: ClassVar[tuple[str, ...]] = ("packed",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The leaf, exactly.  Raises FileError: what `check` finds, or an element beyond the dtype's range."""
        packed = parts["packed"]
        self.check({"packed": (packed.shape, packed.dtype)}, shape, dtype)
        count, source = numel(shape), packed.detach().cpu().contiguous().numpy()
        if self.bits == 8 * dtype.itemsize and dtype is not torch.bool:
            return as_tensor(source.copy(), shape, dtype).to(packed.device)
        top = 1 if dtype is torch.bool else torch.iinfo(dtype).max
        dense = torch.empty(count, dtype=dtype)
        for begin in range(0, count, BLOCK):
            size = min(BLOCK, count - begin)
            block = unpack(source[begin * self.bits // 8 :], size, self.bits)
            if int(block.max()) + self.offset > top:
                raise FileError(f"form 'bits': an element is beyond the range of {dtype}")
            dense[begin : begin + size] = torch.from_numpy(block.astype(np.int64) + self.offset)
        return dense.reshape(shape).to(packed.device)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        exactly(self, parts, shape, "packed")
        own = 0 if dtype is torch.bool else 8 * dtype.itemsize
        whole(self, "bits", self.bits, 1, max(16, own))
        if self.bits == own:
            whole(self, "offset", self.offset, 0, 0)
        else:
            integral = dtype is torch.bool or not (dtype.is_floating_point or dtype.is_complex)
            require(integral and self.bits <= 16, f"form 'bits' cannot store {dtype} in {self.bits} bits")
            low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
            whole(self, "offset", self.offset, max(low, -(2**63)), min(high, 2**62))
        size = kind(self, parts, "packed", (torch.uint8,))
        fits = len(size) == 1 and size[0] == -(-numel(shape) * self.bits // 8)
        require(fits, f"form 'bits': {list(size)} bytes are not {list(shape)} elements of {self.bits} bits")

    def awake(self, encoded: Encoded) -> Tensor:
        return encoded.decode()


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers below 2^bits, flat, as bytes: bits 1..16, the first number in the highest bits."""
    width = 1 if bits <= 8 else 2
    digits = np.unpackbits(numbers.astype(f">u{width}").view(np.uint8)).reshape(-1, 8 * width)
    return np.packbits(digits[:, 8 * width - bits :])


def unpack(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack`: the first `count` numbers, unsigned."""
    width = 1 if bits <= 8 else 2
    digits = np.zeros((count, 8 * width), np.uint8)
    digits[:, 8 * width - bits :] = np.unpackbits(packed[: -(-count * bits // 8)], count=count * bits).reshape(-1, bits)
    return np.packbits(digits).view(f">u{width}")
