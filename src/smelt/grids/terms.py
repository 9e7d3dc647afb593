"""A matrix as a sum of few terms, each a column times a row of a given kind, closest in a given metric.

    E = |(W - L R) H^(1/2)|^2        W [m, n], L [m, r], R [r, n], H [n, n]

With H the second moments of a layer's inputs, E is the expected squared error of its output.  Row after row is
exchanged for the best of its kind, given all others, and its column for the best given the row; after each turn all
columns are fitted together.  No step makes E larger (hierarchical alternating least squares).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to the diagonal of what is inverted, a share of its mean.
RIDGE = 1e-9


class Rows(ABC):
    """The rows of R: where they start, and the best of their kind."""

    @abstractmethod
    def start(self) -> Tensor:
        """[r, n]"""

    @abstractmethod
    def best(self, j: int, row: Tensor, slope: Tensor, size: float) -> Tensor:
        """The row u of term j for which size u H u^T - 2 slope u^T is least, or no larger than for `row`."""


class Supported(Rows):
    """Rows that are 0 outside of some positions.

    Args:
        rows: [r, n], to start from.
        support: for each row, which of the positions `places` it may use; rows with the same one share their solution.
        places: [supports, size], positions.
    """

    def __init__(self, metric: Tensor, rows: Tensor, support: Sequence[int], places: Tensor):
        self.rows, self.support, self.places = rows, support, places
        self.factors = [torch.linalg.cholesky(_ridged(metric[own][:, own])) for own in places]

    def start(self) -> Tensor:
        return self.rows.clone()

    def best(self, j: int, row: Tensor, slope: Tensor, size: float) -> Tensor:
        own = self.support[j]
        found = torch.zeros_like(row)
        at = self.places[own]
        found[at] = torch.cholesky_solve(slope[at, None], self.factors[own])[:, 0] / size
        return found


class Outer(Rows):
    """Rows b x k, flattened: b over channels [r, c], k over the taps of a kernel [r, taps], n = c * taps."""

    def __init__(self, metric: Tensor, b: Tensor, k: Tensor):
        self.b, self.k = b.clone(), k.clone()
        self.metric = metric.contiguous()

    def start(self) -> Tensor:
        return (self.b[:, :, None] * self.k[:, None]).flatten(1)

    def best(self, j: int, row: Tensor, slope: Tensor, size: float) -> Tensor:
        channels, taps = self.b.shape[1], self.k.shape[1]
        slope, k = slope.reshape(channels, taps), self.k[j]
        seen = (k @ self.metric.reshape(channels, taps, -1)).reshape(channels, channels, taps) @ k
        b = torch.linalg.solve(_ridged(seen * size), slope @ k)
        seen = b @ (b @ self.metric.reshape(channels, -1)).reshape(taps, channels, taps)
        k = torch.linalg.solve(_ridged(seen * size), b @ slope)
        norm = k.norm()
        if norm > 0:
            b, k = b * norm, k / norm
        self.b[j], self.k[j] = b, k
        return torch.outer(b, k).flatten()


@dataclass(frozen=True)
class Fitted:
    """left [m, r], right [r, n], and their error E."""

    left: Tensor
    right: Tensor
    error: float


def columns(w: Tensor, metric: Tensor, right: Tensor) -> Tensor:
    """The L [m, r] with the least error."""
    seen = right @ metric
    found: Tensor = torch.linalg.solve(_ridged(seen @ right.T), seen @ w.T).T
    return found


def error(w: Tensor, metric: Tensor, made: Tensor) -> float:
    """Of `made`, in place of w."""
    rest = w - made
    return float(((rest @ metric) * rest).sum())


def fit(
    w: Tensor, metric: Tensor, rows: Rows, left: Tensor | None = None, *, turns: int = 20, tolerance: float = 1e-3
) -> Fitted:
    """The terms, from where `rows` start; float64 throughout.

    Args:
        left: [m, r], held fast; None: fitted too.
        turns: at most; fewer where one lowers the error by less than `tolerance` of itself.
    """
    w, metric = w.double(), metric.double()
    right = rows.start()
    free = left is None
    made = columns(w, metric, right) if left is None else left.double().clone()
    now = error(w, metric, made @ right)
    for _ in range(turns):
        _turn(w, metric, made, right, rows, free)
        if free:
            made = columns(w, metric, right)
        before, now = now, error(w, metric, made @ right)
        if now >= before * (1 - tolerance):
            break
    return Fitted(made, right, now)


def _turn(w: Tensor, metric: Tensor, left: Tensor, right: Tensor, rows: Rows, free: bool) -> None:
    """Exchange each row, and its column where that is free, in place."""
    missed = (w - left @ right) @ metric
    for j in range(len(right)):
        a, seen = left[:, j].clone(), right[j] @ metric
        size = float(a @ a)
        if size == 0:
            continue
        missed.addr_(a, seen)
        right[j] = rows.best(j, right[j], a @ missed, size)
        seen = right[j] @ metric
        own = float(seen @ right[j])
        if free and own > 0:
            left[:, j] = missed @ right[j] / own
        missed.addr_(left[:, j], seen, alpha=-1)


def _ridged(square: Tensor) -> Tensor:
    found = square.clone()
    diagonal = found.diagonal()
    diagonal += RIDGE * diagonal.mean() + torch.finfo(found.dtype).tiny
    return found
