"""Tensor trains: a tensor as a product of cores, one for each of its dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor


def spectra(tensor: Tensor) -> list[Tensor]:
    """Squared singular values, falling, of the tensor cut after its dimension 1, 2, ...: one entry for each cut."""
    x, rows, found = tensor.double(), 1, []
    for size in x.shape[:-1]:
        rows *= size
        side = x.reshape(rows, -1)
        gram = side @ side.mT if side.shape[0] <= side.shape[1] else side.mT @ side
        found.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0))
    return found


def tt_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Cores [1, n_1, r_1], [r_1, n_2, r_2], ..., [r_d-1, n_d, 1] (Oseledets 2011, algorithm 1).

    The error is at most the root of the sum, over the cuts, of the squared singular values that a rank leaves out
    (theorem 2.2), which is at most sqrt(d - 1) times the least error of these ranks.

    Args:
        ranks: r_1, ..., r_d-1; each is brought down to what its cut can have.
    """
    rest, cores, rank = tensor.double(), [], 1
    for size, wanted in zip(tensor.shape[:-1], ranks, strict=True):
        u, s, v = torch.linalg.svd(rest.reshape(rank * size, -1), full_matrices=False)
        kept = min(wanted, len(s))
        cores.append(u[:, :kept].reshape(rank, size, kept))
        rest, rank = s[:kept, None] * v[:kept], kept
    return [*cores, rest.reshape(rank, tensor.shape[-1], 1)]


def leaving(spectra: Sequence[Tensor], most: float) -> tuple[int, ...]:
    """The least rank of each cut, from 1, whose squared singular values left out add up to at most `most`."""
    return tuple(max(1, int((_tails(squares) > most).sum())) for squares in spectra)


def within(spectra: Sequence[Tensor], size: Callable[[Sequence[int]], int], budget: float) -> tuple[int, ...]:
    """The ranks that leave out the least, the same at each cut, with `size` of them in the budget; 1 where none is."""
    levels = [0.0, *torch.cat([_tails(squares) for squares in spectra]).unique().tolist()]
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(leaving(spectra, levels[middle])) <= budget else (middle + 1, high)
    return leaving(spectra, levels[high])


def _tails(squares: Tensor) -> Tensor:
    """What ranks 0, 1, ... leave out."""
    return squares.flip(0).cumsum(0).flip(0)


def build(*cores: Tensor) -> Tensor:
    """The tensor that the cores stand for."""
    found = cores[0]
    for core in cores[1:]:
        found = torch.tensordot(found, core, dims=1)
    return found.squeeze(-1).squeeze(0)


def even(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor from cores whose entries are of one size on average, so that all of them train alike."""
    sizes = [float(core.square().mean().sqrt()) or 1.0 for core in cores]
    share = torch.tensor(sizes, dtype=torch.float64).log().mean().exp().item()
    return [core * (share / size) for core, size in zip(cores, sizes, strict=True)]


def matrix_modes(matrix: Tensor, outs: Sequence[int], ins: Sequence[int]) -> Tensor:
    """[out, in], padded with zeros to the products -> [out_1 * in_1, out_2 * in_2, ...] (Novikov et al. 2015)."""
    d = len(outs)
    full = matrix.new_zeros(_product(outs), _product(ins))
    full[: matrix.shape[0], : matrix.shape[1]] = matrix
    order = [axis for k in range(d) for axis in (k, d + k)]
    return full.reshape(*outs, *ins).permute(order).reshape([o * i for o, i in zip(outs, ins, strict=True)])


def from_modes(tensor: Tensor, outs: Sequence[int], ins: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The inverse of `matrix_modes`: [out, in] = `shape`."""
    d = len(outs)
    pairs = [n for pair in zip(outs, ins, strict=True) for n in pair]
    order = [*range(0, 2 * d, 2), *range(1, 2 * d, 2)]
    return tensor.reshape(pairs).permute(order).reshape(_product(outs), _product(ins))[: shape[0], : shape[1]]


@cache
def split(size: int, parts: int, slack: float = 0.1) -> tuple[int, ...]:
    """`parts` factors, falling, of `size` or of a number up to `slack` above it: those of the least sum of factors,
    times what is too many.

    >>> split(4096, 4)
    (8, 8, 8, 8)
    >>> split(10, 2)
    (5, 2)
    """
    best = min(
        (f for n in range(size, int(size * (1 + slack)) + 1) for f in _splits(n, parts)),
        key=lambda f: (sum(f) * _product(f), _product(f)),
    )
    return tuple(sorted(best, reverse=True))


def _splits(size: int, parts: int) -> list[tuple[int, ...]]:
    """Of each number of factors the one whose first is nearest to the root, and so on; and (size, 1, ...)."""
    if parts == 1:
        return [(size,)]
    root = round(size ** (1 / parts))
    first = next(n for n in range(max(1, root), 0, -1) if size % n == 0)
    return [(first, *rest) for rest in _splits(size // first, parts - 1)]


def _product(numbers: Sequence[int]) -> int:
    found = 1
    for n in numbers:
        found *= n
    return found
