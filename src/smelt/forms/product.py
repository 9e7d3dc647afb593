"""Vectors that parts of a tensor share: a codebook, and for every part the index of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from smelt.core.encoded import Encoded, Form, numel
from smelt.core.errors import FileError
from smelt.forms._parts import FLOATS, Claims, exactly, kind, require, whole
from smelt.forms.codebook import INDICES, lookup

# Elements of the tensor that a number in the file may stand for, so that a small file claims no huge tensor.
MOST = 2048


@dataclass(frozen=True)
class Product(Form):
    """x = the vectors codebook[indices], laid end to end along the lines of x; differentiable in the codebook.

    A line runs along dimension `axis`, one for every position in the others (dimension after dimension, the last
    fastest); for None it is the flattened rest of a slice of dimension 0, or a tensor of one dimension.

    codebook: float [k, length], k >= 1.
    indices: uint8, int16 or int32 [lines, ceil(n / length)] for lines of n elements, each in 0..k-1; what the last
        vector of a line has too many is cut off.
    place: int16 or int32 [entries of dimension 1], or absent: entry j of dimension 1 is the place[j]-th of what the
        vectors make up; a permutation.
    """

    axis: int | None = None

    values: ClassVar[tuple[str, ...]] = ("indices",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in the codebook's dtype.  Raises FileError: an index is not in the codebook (on the CPU)."""
        try:
            x = joined(lookup(parts["codebook"], parts["indices"]), shape, self.axis)
        except IndexError:
            raise FileError("form 'product': an index is not in the codebook") from None
        return x.index_select(1, parts["place"].int()) if "place" in parts else x

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        names = ("codebook", "indices", "place") if "place" in parts else ("codebook", "indices")
        exactly(self, parts, shape, *names)
        require(dtype.is_floating_point, f"form 'product' cannot store {dtype}")
        require(len(shape) > 0 and numel(shape) > 0, f"form 'product' cannot store {list(shape)}")
        if self.axis is not None:
            whole(self, "axis", self.axis, 0, len(shape) - 1)
        book, indices = kind(self, parts, "codebook", FLOATS), kind(self, parts, "indices", INDICES)
        lines, n = lines_of(shape, self.axis)
        fits = len(book) == 2 and book[0] >= 1 and 1 <= book[1] <= n
        require(fits, f"form 'product': codebook {list(book)} does not fit lines of {n}")
        fits = indices == torch.Size((lines, -(-n // book[1])))
        require(fits, f"form 'product': indices {list(indices)} of vectors of {book[1]} are not {list(shape)}")
        small = numel(shape) <= MOST * (numel(book) + numel(indices))
        require(small, f"form 'product': {list(indices)} indices are too few for {list(shape)}")
        if "place" in parts:
            place = kind(self, parts, "place", (torch.int16, torch.int32))
            require(len(shape) > 1 and place == shape[1:2], f"form 'product': {list(place)} places for {list(shape)}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: an index is not in the codebook, or the places are no permutation."""
        book, indices, place = (encoded.parts.get(name) for name in ("codebook", "indices", "place"))
        if book is not None and isinstance(indices, Tensor):
            low, high = (int(n) for n in indices.aminmax())
            good = low >= 0 and high < book.shape[0]
            require(good, f"form 'product': indices {low}..{high} for {book.shape[0]} vectors")
        if isinstance(place, Tensor):
            every = torch.arange(len(place), device=place.device, dtype=place.dtype)
            require(torch.equal(place.sort().values, every), "form 'product': its places are no permutation")
        return encoded


def lines_of(shape: torch.Size, axis: int | None) -> tuple[int, int]:
    """(number of lines, elements of a line); axis as in `Product`."""
    n = shape[axis] if axis is not None else numel(shape[1:]) if len(shape) > 1 else shape[0]
    return numel(shape) // max(n, 1), n


def cut(x: Tensor, axis: int | None, length: int, fill: float = 0) -> Tensor:
    """The vectors of a tensor, [lines, vectors, length]; the short last one of a line is filled up."""
    lines, n = lines_of(x.shape, axis)
    flat = (x if axis is None else x.movedim(axis, -1)).reshape(lines, n)
    return functional.pad(flat, (0, -n % length), value=fill).reshape(lines, -1, length)


def joined(vectors: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    """The inverse of `cut`."""
    flat = vectors.flatten(1)[:, : lines_of(shape, axis)[1]]
    if axis is None:
        return flat.reshape(shape)
    return flat.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]).movedim(-1, axis)
