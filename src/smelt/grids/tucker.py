"""Tucker decomposition of a weight in its two channel modes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smelt.grids.multilinear import loss, solve

Parts = tuple[Tensor, Tensor, Tensor]


def spectra(weight: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared singular values, falling, of the weight [out, in, ...] unfolded along out [out] and along in [in].

    With a `metric` G [in * kernel, in * kernel] those of W G^1/2; along in, of the mean of G over the kernel's places.
    """
    w = weight.double()
    root, rows = w.transpose(0, 1).flatten(1), w.flatten(1)
    if metric is not None:
        root = torch.linalg.cholesky(channels(metric, w.shape[1])).mT @ root
    return _values(rows @ (rows if metric is None else rows @ metric).mT), _values(root @ root.mT)


def tucker2(weight: Tensor, ranks: tuple[int, int], metric: Tensor | None = None, rounds: int = 10) -> Parts:
    """(last [out, r], core [r, s, ...], first [s, in]): the weight [out, in, ...] is about last . core . first.

    Higher-order orthogonal iteration (De Lathauwer et al. 2000) from the truncated higher-order SVD.  With the second
    moment of the inputs as `metric` what gets smaller is the mean squared change of the layer's output: for given
    `first`, `last` and the core are the exact optimum (a regression of that rank); then `first` is solved for.

    Args:
        ranks: (r, s), at most (out, in).
        metric: float64 [in * kernel, in * kernel], positive definite.
        rounds: iterations; they end earlier where nothing is gained.
    """
    best: Parts | None = None
    error = 0.0
    steps = iterate(weight.double(), ranks, metric)
    for _ in range(1 + rounds):
        found, now = next(steps)
        if best is not None and now >= (1 - 1e-6) * error:
            break
        best, error = found, now
    assert best is not None
    return best


def iterate(w: Tensor, ranks: tuple[int, int], metric: Tensor | None = None) -> Iterator[tuple[Parts, float]]:
    """The parts and their squared error, from the first guess on; the error never grows."""
    r, s = ranks
    side = w.transpose(0, 1).flatten(1)
    if metric is None:
        into = _leading(side, s)
        while True:
            thin = _inner(w, into.mT)
            last = _leading(thin.flatten(1), r)
            core = _outer(thin, last.mT)
            yield (last, core, into.mT), loss(w, build(last, core, into.mT))
            into = _leading(_outer(w, last.mT).transpose(0, 1).flatten(1), s)
    root = torch.linalg.cholesky(channels(metric, w.shape[1]))
    first = torch.linalg.solve_triangular(root.mT, _leading(root.mT @ side, s), upper=True).mT
    while True:
        last, core = _regress(w, first, r, metric)
        yield (last, core, first), loss(w, build(last, core, first), metric)
        aim = _outer(w, last.mT)  # last is orthonormal: what lies beyond it is the same for every first
        first = solve(aim, [core, first], 1, lambda core, first: _inner(core, first.mT), metric)


def build(last: Tensor, core: Tensor, first: Tensor) -> Tensor:
    """The weight [out, in, ...] that the parts stand for."""
    return _inner(_outer(core, last), first.mT)


def _outer(w: Tensor, matrix: Tensor) -> Tensor:
    """Along dimension 0: [a, ...] with [b, a] -> [b, ...]."""
    found: Tensor = torch.tensordot(matrix, w, dims=1)
    return found


def _inner(w: Tensor, matrix: Tensor) -> Tensor:
    """Along dimension 1: [o, a, ...] with [b, a] -> [o, b, ...]."""
    found: Tensor = torch.tensordot(matrix, w, dims=([1], [1])).transpose(0, 1)
    return found


def _regress(w: Tensor, first: Tensor, rank: int, metric: Tensor) -> tuple[Tensor, Tensor]:
    """last [out, rank], orthonormal, and the core [rank, s, ...] that are best for this `first` [s, in]."""
    kernel = w[0, 0].numel()
    places = torch.eye(kernel, dtype=w.dtype, device=w.device)
    rows = torch.kron(first, places)  # [s * kernel, in * kernel]: what the core sees of an input
    seen = rows @ metric
    root = torch.linalg.cholesky(seen @ rows.mT)
    aim = torch.linalg.solve_triangular(root, seen @ w.flatten(1).mT, upper=False).mT
    last = _leading(aim, rank)
    core = torch.linalg.solve_triangular(root.mT, (last.mT @ aim).mT, upper=True).mT
    return last, core.reshape(rank, first.shape[0], *w.shape[2:])


def channels(metric: Tensor, channels: int) -> Tensor:
    """[in, in]: the mean of [in * kernel, in * kernel] over the places of the kernel."""
    return metric.reshape(channels, metric.shape[0] // channels, channels, -1).diagonal(dim1=1, dim2=3).mean(-1)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """[m, rank]: the left singular vectors of the largest singular values of [m, n]."""
    found: Tensor = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)[:, :rank]
    return found


def _values(gram: Tensor) -> Tensor:
    found: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return found
