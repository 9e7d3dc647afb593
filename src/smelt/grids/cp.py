"""Canonical polyadic decomposition: a tensor as a sum of outer products."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TINY = 1e-12  # of a penalty, so that terms that are equal can be solved for
TRIAL = 10  # sweeps after which the best of several starts goes on alone


def cp(
    tensor: Tensor,
    rank: int,
    *,
    penalty: float = 1e-2,
    starts: int = 3,
    sweeps: int = 100,
    enough: float = 1e-4,
    seed: int = 0,
) -> list[Tensor]:
    """Factors [n_1, rank], [n_2, rank], ...: the sum over r of the outer products of their columns r.

    Alternating least squares from the singular vectors of the unfoldings, filled up at random, and from random
    starts.  The norms of the terms are held down by `penalty`: without it terms grow without bound and cancel each
    other where there is no best approximation (degeneracy: De Silva, Lim 2008), and such a chain of layers does not
    train.  What gets smaller with every sweep is

        |T - sum of the terms|^2 + penalty . sum of |term|^2

    Args:
        penalty: 0 or more.
        starts: how many; the best after a few sweeps goes on.
        sweeps: at most; they end where one gains less than the share `enough`.
    """
    x = tensor.double()
    scale = float(x.norm()) or 1.0
    x = x / scale
    generator = torch.Generator().manual_seed(seed)
    trials = [_start(x, rank, generator, own=not i) for i in range(starts)]
    runs = [sweep(x, factors, penalty) for factors in trials]
    found = [[next(run) for _ in range(min(TRIAL, sweeps))][-1] for run in runs]
    best = min(range(starts), key=lambda i: found[i][1])
    factors, error = found[best]
    for _ in range(sweeps - TRIAL):
        before = error
        factors, error = next(runs[best])
        if error >= (1 - enough) * before:
            break
    return balanced(factors, scale)


def sweep(x: Tensor, factors: Sequence[Tensor], penalty: float) -> Iterator[tuple[list[Tensor], float]]:
    """(factors, what gets smaller) after each sweep; all columns but the last factor's have norm 1."""
    found = [_unit(f)[0] for f in factors]
    grams = [f.mT @ f for f in found]
    ridge = max(penalty, TINY) * torch.eye(found[0].shape[1], dtype=x.dtype, device=x.device)
    whole = float(x.square().sum())
    while True:
        for n in range(len(found)):
            others = torch.stack([g for m, g in enumerate(grams) if m != n]).prod(0)
            seen = _against(x, found, n)
            full = torch.linalg.solve(others + ridge, seen, left=False)
            found[n] = _unit(full)[0]
            grams[n] = found[n].mT @ found[n]
        fit = whole - 2 * float((seen * full).sum()) + float((full.mT @ full * (others + ridge)).sum())
        yield [*found[:-1], full], fit


def build(factors: Sequence[Tensor]) -> Tensor:
    """The tensor that the factors stand for."""
    first, *others = factors
    rows = others[0]
    for factor in others[1:]:
        rows = (rows[:, None] * factor).flatten(0, 1)
    return (first @ rows.mT).reshape([len(f) for f in factors])


def balanced(factors: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
    """`scale` times the same, the norm of each term shared evenly among its columns."""
    units, norms = zip(*(_unit(f) for f in factors), strict=True)
    share = (scale * torch.stack(norms).prod(0)) ** (1 / len(factors))
    return [u * share for u in units]


def _against(x: Tensor, factors: Sequence[Tensor], n: int) -> Tensor:
    """[n_n, rank]: the tensor contracted with the columns of all factors but one, the longest first."""
    letters = list(string.ascii_lowercase[: x.dim()])
    order = sorted((m for m in range(x.dim()) if m != n), key=lambda m: -x.shape[m])
    now, names = x, "".join(letters)
    for m in order:
        rest = names.replace(letters[m], "").replace("z", "")
        now = torch.einsum(f"{names},{letters[m]}z->{rest}z", now, factors[m])
        names = rest + "z"
    return now


def _start(x: Tensor, rank: int, generator: torch.Generator, own: bool) -> list[Tensor]:
    found = []
    for n, size in enumerate(x.shape):
        factor = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(x.device)
        if own:
            side = x.transpose(0, n).flatten(1)
            vectors = torch.linalg.eigh(side @ side.mT)[1].flip(1)[:, :rank]
            factor[:, : vectors.shape[1]] = vectors
        found.append(factor)
    return found


def _unit(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of norm 1, and their norms."""
    norms = factor.norm(dim=0)
    return factor / norms.clamp_min(1e-300), norms
