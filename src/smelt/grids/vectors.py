"""k-means of vectors under weighted errors: centers, which one a vector is nearest to, and with what factor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TABLE = 1 << 22  # entries of the table of vectors and centers that are in memory at a time
SAMPLE = 64  # vectors per center that the first centers are drawn from, at most
DRAWS = 16  # rounds in which they are drawn
ROUNDS = 100
TURNS, STILL = 50, 1e-5  # of factors and centers in turn, between two rounds, and the change at which they end


@dataclass(frozen=True)
class Vectors:
    """Vectors x [s, n, d], and what an error e = x - f c of one, at the center c [d] with the factor f, costs.

    weight: None, e^T e; or [s, n, d], sum of weight * e^2.
    moments: None, or [s, d, d], positive definite: e^T moments[s] e.
    factor: 'none', f = 1; or the best f for each vector, 'positive' (>= 0) or 'signed'.
    """

    x: Tensor
    weight: Tensor | None = None
    moments: Tensor | None = None
    factor: str = "none"

    def nearest(self, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every vector (index of its center, its factor, what its error costs), each [s, n]."""
        n = self.x.shape[:2]
        index = torch.empty(n, dtype=torch.int64, device=self.x.device)
        factor, cost = self.x.new_empty(n), self.x.new_empty(n)
        for at in self._pieces(len(centers)):
            cross, square = self._products(at, centers)
            if self.factor == "none":
                saved, own = (2 * cross - square).max(-1)
                factor[at] = 1
            else:
                cross = cross if self.factor == "signed" else cross.clamp_min(0)
                best = cross / square.where(square > 0, 1)
                saved, own = (best * cross).max(-1)
                factor[at] = best.gather(-1, own[..., None])[..., 0]
            index[at], cost[at] = own, (self._all(at) - saved).clamp_min(0)
        return index, factor, cost

    def factors(self, index: Tensor, centers: Tensor) -> Tensor:
        """The best factor of every vector, [s, n], for the center that it has."""
        each = centers[index]
        if self.moments is not None:
            square = ((each @ self.moments) * each).sum(-1)
        else:
            square = (each.square() if self.weight is None else each.square() * self.weight).sum(-1)
        cross = (self._dual() * each).sum(-1)
        found = cross / square.where(square > 0, 1)
        return found if self.factor == "signed" else found.clamp_min(0)

    def means(self, index: Tensor, factor: Tensor, before: Tensor) -> Tensor:
        """The centers [k, d] of least cost; those of no vector stay as they were."""
        k, d = before.shape
        flat, scaled = index.flatten(), factor.flatten()[:, None]
        total = before.new_zeros(k, d).index_add_(0, flat, self._dual().reshape(-1, d) * scaled)
        if self.moments is not None:
            own = (torch.arange(len(index), device=index.device)[:, None] * k + index).flatten()
            mass = before.new_zeros(len(index) * k).index_add_(0, own, scaled[:, 0].square()).reshape(-1, k)
            square, met = torch.einsum("sk,sde->kde", mass, self.moments), mass.sum(0) > 0
            found = before.clone()
            found[met] = torch.linalg.solve(square[met], total[met][..., None])[..., 0]
        else:
            weight = torch.ones_like(self.x) if self.weight is None else self.weight
            mass = before.new_zeros(k, d).index_add_(0, flat, weight.reshape(-1, d) * scaled.square())
            found = torch.where(mass > 0, total / mass.where(mass > 0, 1), before)
        if self.factor == "none":
            return found
        norm = found.norm(dim=1, keepdim=True)
        return torch.where(norm > 0, found / norm.where(norm > 0, 1), before)

    def _pieces(self, k: int) -> Iterator[tuple[slice, slice]]:
        s, n, _ = self.x.shape
        rows = max(1, min(n, TABLE // k))
        sets = max(1, TABLE // (k * rows)) if rows == n else 1
        for i in range(0, s, sets):
            for j in range(0, n, rows):
                yield slice(i, i + sets), slice(j, j + rows)

    def _dual(self, at: tuple[slice, slice] = (slice(None), slice(None))) -> Tensor:
        """What a center is multiplied by for its product with a vector."""
        x = self.x[at]
        if self.moments is not None:
            return x @ self.moments[at[0]]
        return x if self.weight is None else x * self.weight[at]

    def _products(self, at: tuple[slice, slice], centers: Tensor) -> tuple[Tensor, Tensor]:
        """(x . c, c . c) for all vectors of a piece and all centers, the second broadcastable."""
        cross = self._dual(at) @ centers.T
        if self.moments is not None:
            square = ((centers @ self.moments[at[0]]) * centers).sum(-1)[:, None]
        elif self.weight is not None:
            square = self.weight[at] @ centers.square().T
        else:
            square = centers.square().sum(1).expand(1, 1, -1)
        return cross, square

    def _all(self, at: tuple[slice, slice]) -> Tensor:
        """x . x of the vectors of a piece."""
        return (self._dual(at) * self.x[at]).sum(-1)


def kmeans(vectors: Vectors, k: int, seed: int, start: Tensor | None = None, rounds: int = ROUNDS) -> Tensor:
    """Centers [at most k, d] of small cost by Lloyd's rounds, until no vector changes its center.

    They begin at `start`, or at vectors drawn with a probability that grows with their cost (k-means++ of Arthur &
    Vassilvitskii 2007, many at a time); a center of no vector moves to the costliest one.  With a factor the centers
    have the length 1.  No more centers than vectors.
    """
    k = min(k, vectors.x.shape[0] * vectors.x.shape[1])
    if vectors.weight is not None:  # what does not count is not where centers begin
        vectors = replace(vectors, x=vectors.x.where(vectors.weight > 0, 0))
    centers = _drawn(vectors, k, seed) if start is None else start.to(vectors.x.dtype)
    before: Tensor | None = None
    for _ in range(rounds):
        index, factor, cost = vectors.nearest(centers)
        if before is not None and torch.equal(index, before):
            break
        before = index
        for _ in range(TURNS if vectors.factor != "none" else 1):
            last, centers = centers, vectors.means(index, factor, centers)
            if vectors.factor == "none" or float((centers - last).abs().max()) < STILL:
                break
            factor = vectors.factors(index, centers)
        empty = (index.flatten().bincount(minlength=len(centers)) == 0).nonzero()[:, 0]
        if len(empty) and bool((cost > 0).any()):
            worst = cost.flatten().topk(min(len(empty), cost.numel())).indices
            moved = vectors.x.reshape(-1, centers.shape[1])[worst]
            centers[empty[: len(worst)]] = _unit(moved) if vectors.factor != "none" else moved
    return centers


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    found: Tensor = x / norm.where(norm > 0, 1)
    return found


def _drawn(vectors: Vectors, k: int, seed: int) -> Tensor:
    """First centers, each one of the vectors."""
    generator = torch.Generator().manual_seed(seed & 2**63 - 1)
    flat = vectors.x.flatten(0, 1)
    some = torch.randperm(len(flat), generator=generator)[: SAMPLE * k].to(flat.device)
    weight = vectors.weight
    if vectors.moments is not None:  # to draw by, their diagonals do
        weight = vectors.moments.diagonal(dim1=1, dim2=2)[:, None].expand_as(vectors.x)
    sample = Vectors(
        flat[some][None], None if weight is None else weight.reshape(flat.shape)[some][None], None, vectors.factor
    )
    pool = _unit(sample.x[0]) if vectors.factor != "none" else sample.x[0]
    chosen = torch.zeros(0, dtype=torch.int64)
    cost = torch.ones(len(some), dtype=torch.float64)
    while len(chosen) < k:
        cost[chosen] = 0
        open_ = int((cost > 0).sum())
        if not open_:  # every vector is a center already: any other ones
            cost = torch.ones_like(cost)
            cost[chosen] = 0
            open_ = len(cost) - len(chosen)
        number = min(k - len(chosen), open_, max(1, -(-k // DRAWS)) if len(chosen) else 1)
        chosen = torch.cat((chosen, torch.multinomial(cost, number, generator=generator)))
        cost = sample.nearest(pool[chosen.to(pool.device)])[2][0].double().cpu()
    return pool[chosen.to(pool.device)].clone()
