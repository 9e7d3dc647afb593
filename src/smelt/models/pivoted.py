"""A layer of low rank that gives some of its outputs, and the others as combinations of these.

y = [a, C a], in another order, with a = R x.  With R [r, n] and C [m - r, r] that is r (m + n - r) numbers and
multiplications, r^2 fewer than the two factors of rank r (Zhao et al. 2025, PIFA, arXiv:2501.19090).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.errors import ModelError
from smelt.models import layer

# Dimension of the outputs, from the end, and the argument that says how many there are.
KINDS = {
    "Linear": (-1, "out_features"),
    "Embedding": (-1, "embedding_dim"),
    "Conv1d": (-2, "out_channels"),
    "Conv2d": (-3, "out_channels"),
}
LEAST = ("Linear", {"in_features": 1, "out_features": 1})


def build(first: Sequence[Any] = LEAST, rest: Sequence[Any] = LEAST) -> nn.Module:
    """`first` gives a, `rest` takes it to C a; `order`, a buffer: output i is number order[i] of [a, C a].

    Args:
        first, rest: [class, {argument: value}] of torch.nn layers; classes are those in `KINDS`.

    Raises:
        ModelError: not two such layers.
    """
    count, parts = 0, []
    for name, entry in (("first", first), ("rest", rest)):
        plain = isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)
        if not plain or entry[0] not in KINDS:
            raise ModelError(
                f'pivoted: {name} is {entry!r}; it takes ["Linear", {{"in_features": 4, "out_features": 2}}]'
            )
        parts.append(layer.build(entry[0], entry[1]))
        count += int(entry[1][KINDS[entry[0]][1]])
    return Pivoted(parts[0], parts[1], KINDS[rest[0]][0], count)


class Pivoted(nn.Module):
    order: Tensor

    def __init__(self, first: nn.Module, rest: nn.Module, dim: int, count: int):
        super().__init__()
        self.first, self.rest, self.dim = first, rest, dim
        self.register_buffer("order", torch.arange(count, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        some = self.first(x)
        return torch.cat([some, self.rest(some)], self.dim).index_select(self.dim, self.order)
