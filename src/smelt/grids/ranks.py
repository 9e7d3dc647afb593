"""Ranks: of one matrix by the share of its energy, of many under one budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smelt.core.budget import choose

# Ranks of one matrix that a budget chooses from, at most.
OPTIONS = 96


def by_energy(squares: Tensor, share: float) -> int:
    """The least rank that keeps `share` of the sum of the squared singular values, falling."""
    tails = squares.flip(0).cumsum(0)  # what is lost by leaving out the last 1, 2, ...
    return max(1, len(squares) - int((tails <= (1 - share) * tails[-1]).sum()))


def by_size(size: Callable[[int], int], most: int, budget: float) -> int:
    """The largest rank, from 1 to `most`, of which `size`, that rises with it, is at most `budget`; 1 where none is."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle - 1)
    return low


def rounded(rank: int, multiple: int, full: int, up: bool) -> int:
    """The next multiple of `multiple`, at most `full`."""
    return min(full, max(multiple, (rank + (multiple - 1) * up) // multiple * multiple))


@dataclass(frozen=True)
class Item:
    """A matrix whose rank is chosen.

    squares: what leaving out each rank costs, falling; size: of a rank; dense: size of the matrix as it is.
    """

    squares: Tensor
    size: Callable[[int], int]
    dense: int

    def options(self, multiple: int) -> list[int]:
        """Ranks that are smaller than the matrix, in equal steps, the smallest multiple of `multiple` first."""
        full = len(self.squares)
        able = [r for r in range(multiple, full + 1, multiple) if self.size(r) < self.dense]
        if len(able) <= OPTIONS:
            return able
        picked = torch.linspace(0, len(able) - 1, OPTIONS, dtype=torch.float64).round().long().unique()
        return [able[i] for i in picked.tolist()]


def under(items: Sequence[Item], budget: float, multiple: int = 1) -> list[int | None]:
    """The rank of each, or None where it stays as it is, so that the costs add up to the least within the budget.

    Raises:
        ValueError: no choice keeps the budget; with the least size as its argument.
    """
    tables = [[None, *item.options(multiple)] for item in items]
    widest = max(map(len, tables))
    costs, sizes = np.zeros((len(items), widest)), np.zeros((len(items), widest), np.int64)
    for i, (item, table) in enumerate(zip(items, tables, strict=True)):
        lost = [*item.squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # of each rank from 0
        table += [None] * (widest - len(table))
        costs[i] = [0.0 if rank is None else lost[rank] for rank in table]
        sizes[i] = [item.dense if rank is None else item.size(rank) for rank in table]
    if sizes.min(1).sum() > budget:
        raise ValueError(int(sizes.min(1).sum()))
    picks = choose(costs, sizes, int(budget))
    return [table[pick] for table, pick in zip(tables, picks.tolist(), strict=True)]
