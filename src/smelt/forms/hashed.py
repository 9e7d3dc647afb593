"""A few shared values; which of them an element has, and its sign, follow from a hash of its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Form, numel
from smelt.forms._parts import FLOATS, Claims, exactly, kind, require, whole
from smelt.forms.codebook import lookup

# Elements of the tensor that a value may stand for, so that a small file claims no huge tensor.
MOST = 2048
# Elements up to which the places of a tensor that is trained are kept between two forward passes (4 bytes each).
KEPT = 1 << 24
# The primes of xxHash32.
_P2, _P3, _P4, _P5 = 2246822519, 3266489917, 668265263, 374761393


@dataclass(frozen=True)
class Hashed(Form):
    """x[i, j] = sign(i, j) * values[h(i, j) mod n], with x as [dimension 0, flattened rest]; differentiable in values.

    values: float [n], n >= 1.
    h is xxHash32 with `seed` of the eight bytes i, j (each 32 bits, little-endian).  With `signs`, the sign is - where
    the lowest bit of the same hash with the seed + 1 (modulo 2^32) is set; else +.
    (Chen et al. 2015, arXiv:1504.04788, equations 3 and 7.)
    """

    seed: int = 0
    signs: bool = True

    values: ClassVar[tuple[str, ...]] = ("values",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in the dtype of the values."""
        values = parts["values"]
        find = _kept if values.requires_grad and numel(shape) <= KEPT else places
        found = find(shape, len(values), self.seed, self.signs, values.device)
        return lookup(torch.cat((values, -values)) if self.signs else values, found)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        whole(self, "seed", self.seed, 0, 2**32 - 1)
        require(isinstance(self.signs, bool), f"form 'hashed': signs is {self.signs!r}")
        exactly(self, parts, shape, "values")
        require(dtype.is_floating_point, f"form 'hashed' cannot store {dtype}")
        size = kind(self, parts, "values", FLOATS)
        require(len(size) == 1 and 1 <= size[0] < 2**30, f"form 'hashed': values are not {list(size)}")
        sane = len(shape) > 0 and numel(shape) <= MOST * size[0]
        require(sane, f"form 'hashed': {size[0]} values are too few for {list(shape)}")


def places(shape: torch.Size, count: int, seed: int, signs: bool, device: torch.device) -> Tensor:
    """int32, of the shape: the place of every element's value; `count` more where its sign is -."""
    first = torch.arange(shape[0], dtype=torch.int32, device=device)[:, None]
    second = torch.arange(numel(shape[1:]), dtype=torch.int32, device=device)
    found = (xxhash32(first, second, seed).long() & 0xFFFFFFFF).remainder_(count).int()
    if signs:
        found += (xxhash32(first, second, seed + 1 & 0xFFFFFFFF) & 1).mul_(count)
    return found.reshape(shape)


_kept = lru_cache(maxsize=32)(places)


def xxhash32(first: Tensor, second: Tensor, seed: int) -> Tensor:
    """xxHash32 of two 32-bit words (little-endian bytes of the first, then of the second), with a seed in 0..2^32-1.

    Args and result are int32 that stand for the unsigned number of the same bits; the two are broadcast.
    """
    h: Tensor | int = _signed(seed + _P5 + 8)
    for word in (first, second):
        h = h + word * _signed(_P3)
        h = (h << 17 | _right(h, 15)) * _signed(_P4)
    assert isinstance(h, Tensor)
    h = (h ^ _right(h, 15)) * _signed(_P2)
    h = (h ^ _right(h, 13)) * _signed(_P3)
    return h ^ _right(h, 16)


def _right(h: Tensor, bits: int) -> Tensor:
    """The logical shift."""
    return h >> bits & (1 << 32 - bits) - 1


def _signed(number: int) -> int:
    """The number of the same 32 bits in -2^31..2^31-1."""
    return (number + 2**31) % 2**32 - 2**31
