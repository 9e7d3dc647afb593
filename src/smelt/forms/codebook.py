"""A few shared values, and for every element the index of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.core.errors import FileError
from smelt.forms._parts import FLOATS, Claims, aligned, exactly, in_layout, kind, require

INDICES = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Codebook(Form):
    """x = codebook[indices].

    codebook: float [k], k >= 1.  indices: uint8, int16 or int32 in the tensor's layout, each in 0..k-1.
    Differentiable in the codebook; autograd keeps the small indices, nothing dense.
    """

    values: ClassVar[tuple[str, ...]] = ("indices",)
    aligned: ClassVar[tuple[str, ...]] = ("indices",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in the codebook's dtype.  Raises FileError: an index is not in the codebook (on the CPU)."""
        in_layout(self, "indices", parts["indices"], shape)
        try:
            return lookup(parts["codebook"], parts["indices"])
        except IndexError:
            raise FileError("form 'codebook': an index is not in the codebook") from None

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        exactly(self, parts, shape, "codebook", "indices")
        book = kind(self, parts, "codebook", FLOATS)
        require(len(book) == 1 and book[0] >= 1, f"form 'codebook': a codebook is not {list(book)}")
        aligned(self, parts, "indices", INDICES, shape)
        require(dtype.is_floating_point, f"form 'codebook' cannot store {dtype}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: an index is not in the codebook (looked for here, once, for every device)."""
        book, indices = encoded.parts["codebook"], encoded.parts["indices"]
        if isinstance(indices, Tensor) and indices.numel():
            low, high = (int(n) for n in indices.aminmax())
            size = numel(book.shape)
            require(low >= 0 and high < size, f"form 'codebook': indices {low}..{high} for {size} values")
        return encoded


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook[indices], of a codebook [k, ...] on the CPU with IndexError for an index that it does not have."""
    found: Tensor = _Lookup.apply(codebook, indices)
    return found


class _Lookup(torch.autograd.Function):
    """Plain indexing would keep 64-bit copies of the indices for backward."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.dtype = codebook.shape, codebook.dtype
        return codebook.index_select(0, indices.reshape(-1).int()).view(indices.shape + codebook.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        grad = grads[0].reshape(-1, *ctx.shape[1:]).to(wide)
        return grad.new_zeros(ctx.shape).index_add(0, indices.reshape(-1).int(), grad).to(ctx.dtype), None
