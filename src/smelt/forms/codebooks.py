"""A few shared values for every channel or group, and for every element the index of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, numel
from smelt.forms._parts import FLOATS, Claims, aligned, exactly, in_layout, kind, require
from smelt.forms._sides import Sided


@dataclass(frozen=True)
class Codebooks(Sided):
    """x = codebooks[index, side of x]; with `zero`, index 0 is the value 0 and index i means codebooks[i - 1].

    codebooks: float [k, *side], k >= 1, with a side of `side_shape(shape)`.  indices: uint8 in the tensor's layout.
    Differentiable in the codebooks.
    """

    zero: bool = False

    values: ClassVar[tuple[str, ...]] = ("indices",)
    aligned: ClassVar[tuple[str, ...]] = ("indices",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in the dtype of the codebooks."""
        indices, books = parts["indices"], parts["codebooks"]
        in_layout(self, "indices", indices, shape)
        if self.zero:
            books = torch.cat((torch.zeros_like(books[:1]), books))
        side = books[0].numel()
        owner = self.spread(torch.arange(side, device=books.device).reshape(books.shape[1:]), shape)
        return books.reshape(-1).take(indices.long() * side + owner)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        require(isinstance(self.zero, bool), f"form 'codebooks': zero is {self.zero!r}")
        exactly(self, parts, shape, "codebooks", "indices")
        self.check_sides(parts, shape)
        books = kind(self, parts, "codebooks", FLOATS)
        fits = len(books) > 0 and books[0] >= 1 and books[1:] == self.side_shape(shape)
        require(fits, f"form 'codebooks': codebooks {list(books)} do not fit the tensor {list(shape)}")
        aligned(self, parts, "indices", (torch.uint8,), shape)
        require(dtype.is_floating_point, f"form 'codebooks' cannot store {dtype}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: an index is not in the codebooks."""
        books, indices = encoded.parts["codebooks"], encoded.parts["indices"]
        if isinstance(indices, Tensor) and numel(indices.shape):
            most, size = int(indices.max()), books.shape[0] + self.zero
            require(most < size, f"form 'codebooks': index {most} for {size} values")
        return encoded
