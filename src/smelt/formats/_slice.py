"""Part of a tensor of a file, without decoding the rest."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


class Slice:
    """What safetensors' `get_slice` gives: a tensor that is read where it is indexed.

    Indexing means what it means for a tensor.  Ints and slices along the first dimension choose what is read.

    Args:
        rows: gives elements [begin, end) along the first dimension.
        finish: makes of the indexed tensor what is given out.
    """

    def __init__(
        self, shape: torch.Size, dtype: str, rows: Callable[[int, int], Tensor], finish: Callable[[Tensor], Any]
    ):
        self._shape, self._dtype, self._rows, self._finish = shape, dtype, rows, finish

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        """As safetensors has it: 'F32', 'BF16', ..."""
        return self._dtype

    def __getitem__(self, index: Any) -> Any:
        items = [_tensor(i) if isinstance(i, list) else i for i in (index if isinstance(index, tuple) else (index,))]
        begin, end, first = 0, self._shape[0] if self._shape else 1, items[0] if items else ...
        if self._shape and isinstance(first, Integral) and not isinstance(first, bool):
            at = int(first) + (end if first < 0 else 0)
            if not 0 <= at < end:
                raise IndexError(f"index {int(first)} is out of bounds for dimension 0 with size {end}")
            begin, end, items[0] = at, at + 1, 0
        elif self._shape and isinstance(first, slice):
            begin, stop, step = first.indices(end)
            if step < 0:
                raise ValueError("step must be greater than zero")
            end, items[0] = max(begin, stop), slice(None, None, step)
        return self._finish(self._rows(begin, end)[tuple(items)])


def _tensor(numbers: list[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=None if numbers else torch.long)
