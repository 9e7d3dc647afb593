"""A tensor whose channels were rotated; the rotation follows from a seed and costs no bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Form, numel
from smelt.forms._parts import FLOATS, Claims, exactly, kind, require, whole


@dataclass(frozen=True)
class Rotated(Form):
    """x = values Q^T along the flattened rest of each slice of dimension 0 (a tensor of one dimension is one slice).

    values: float, in the tensor's shape, a leaf or a tree.  Differentiable.

    Q is orthogonal, of n = the length of the rest.  With p the largest power of two up to n, x -> x Q does `rounds`
    times: coordinates in a random order, with random signs, then the first p of them times the Hadamard matrix of p
    (Sylvester's order) / sqrt(p).  Where n is a power of two one round does; else two reach every coordinate.
    Random numbers are those of `scrambled`, round j with the seed `seed` + j: the order sorts (stably) numbers
    0..n-1 of the sequence, but after the first round what that left alone, p..n-1, comes first as it is; the sign is -
    where number n + i is odd.
    """

    seed: int = 0
    rounds: int = 1

    values: ClassVar[tuple[str, ...]] = ("values",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in float32 or wider."""
        return self.back(parts["values"])

    def turn(self, x: Tensor) -> Tensor:
        """x Q, in float32 or wider."""
        rows = _rows(x)
        for order, signs in map(self._round, range(self.rounds), [rows.shape[1]] * self.rounds):
            mixed = rows[:, order.to(x.device)] * signs.to(x.device)
            rows = _mix(mixed)
        return rows.reshape(x.shape)

    def back(self, x: Tensor) -> Tensor:
        """x Q^T, the inverse of `turn`."""
        rows = _rows(x)
        for order, signs in map(self._round, reversed(range(self.rounds)), [rows.shape[1]] * self.rounds):
            inverse = order.argsort().to(x.device)
            rows = (_mix(rows) * signs.to(x.device))[:, inverse]
        return rows.reshape(x.shape)

    def _round(self, index: int, n: int) -> tuple[Tensor, Tensor]:
        """(order, signs), each [n]."""
        numbers = scrambled(self.seed + index, 2 * n)
        order = np.argsort(numbers[:n], kind="stable")
        if index:
            late = order >= 1 << max(n.bit_length() - 1, 0)
            order = np.concatenate((np.sort(order[late]), order[~late]))
        signs = 1 - 2 * (numbers[n:] & np.uint64(1)).astype(np.float32)
        return torch.from_numpy(order), torch.from_numpy(signs)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        whole(self, "seed", self.seed, 0, 2**63 - 1)
        whole(self, "rounds", self.rounds, 1, 4)
        exactly(self, parts, shape, "values")
        require(dtype.is_floating_point, f"form 'rotated' cannot store {dtype}")
        found = kind(self, parts, "values", FLOATS)
        require(found == shape, f"form 'rotated': its part 'values' is {list(found)}, the tensor {list(shape)}")


def rounds(shape: torch.Size) -> int:
    """How many rounds reach every coordinate of a tensor's channels."""
    n = numel(shape[1:]) if len(shape) > 1 else numel(shape)
    return 1 if n & (n - 1) == 0 else 2


def scrambled(seed: int, count: int) -> np.ndarray:
    """The first numbers of the sequence SplitMix64 (Steele et al. 2014, OOPSLA), uint64 [count]."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + step * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def _rows(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.reshape(x.shape[0] if x.dim() > 1 else 1, numel(x.shape[1:]) if x.dim() > 1 else x.numel())


def _mix(rows: Tensor) -> Tensor:
    """The first coordinates, a power of two of them, times the Hadamard matrix; its own inverse."""
    n = rows.shape[1]
    if n < 2 or not len(rows):
        return rows
    p = 1 << n.bit_length() - 1
    x, half = rows[:, :p], 1
    while half < p:
        pairs = x.unflatten(1, (-1, 2, half))
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x, half = torch.stack((a + b, a - b), 2).flatten(1), 2 * half
    return torch.cat((x * p**-0.5, rows[:, p:]), 1)
