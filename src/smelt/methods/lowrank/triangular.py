from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smelt.core.edit import Edit, Note
from smelt.core.errors import RecipeError
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph import factors
from smelt.graph.reads import outside
from smelt.grids import ranks

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class Triangular(Rewrite):
    """A layer becomes two thinner ones, by a triangular decomposition with pivoting, cut off at a rank.

        by: qr    W P = Q R with columns in the order in which each adds most to those before it; W' = Q_r R_r P^T is W
                  projected onto r of its own columns, so the squared error is that of the rest of R
        by: lu    P W Q = L U with the largest element left as each pivot (complete pivoting); W' = P^T L_r U_r Q^T

    W is the weight as [out, in * kernel], [width, entries] of an embedding.  The error is larger than that of
    lowrank.svd, for some tenths of the time.  With `form: pivoted` the layer gives r of its outputs, and combines the
    others from these: r (m + n - r) numbers in place of r (m + n).

    applies to: linear; 1-D and 2-D convolution with groups = 1; embedding
    needs a pretrained model: yes
    needs data: no
    needs training: a little, to recover
    good at: matrices of low rank up to rounding, which it finds exactly; large ones, for which an SVD takes long
    bad at: the least error of a rank, which lowrank.svd has
    source: Businger & Golub 1965 (QR); Golub & Van Loan, Matrix Computations, 3.4.8 (LU); pivoted: arXiv:2501.19090
    """

    ratio: float | None = setting(
        None, "share of each layer's parameters to keep; 0.5 where nothing else is given", low=0, high=1
    )
    rank: int | None = setting(None, "columns, or pivots, to keep", low=1)
    energy: float | None = setting(None, "share of the sum of squared weights to keep", low=0, high=1)
    by: str = setting("qr", "the decomposition", choices=("qr", "lu"))
    form: str = setting("factors", "what a layer becomes", choices=("factors", "pivoted"))
    keep: str = setting("smaller", "which are split: what gets smaller, or also faster", choices=("smaller", "faster"))

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", "rank", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{self.name}: {' and '.join(given)} each fix the rank; give one of them")

    def refuses(self, target: Target) -> str | None:
        return factors.refusal(target, KINDS)

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        read = outside(model)
        reasons = {t.name: self.refuses(t) or read.get(t.places[0][0]) for t in targets}
        able = [t for t in targets if not reasons[t.name]]
        speed = None
        if self.keep == "faster" and able:
            example = known.example(model, "to measure layers (keep: faster)")
            speed = factors.Speed(model, [t.places[0][0] for t in able], example)
        edits: list[Edit] = [Note(name, reason) for name, reason in reasons.items() if reason]
        return [*edits, *(self._split(target, speed) for target in able)]

    def _split(self, target: Target, speed: factors.Speed | None) -> Edit:
        w = factors.matrix(target.module, target.tensor.detach()).double()
        full, dense = min(w.shape), w.numel()

        def size(rank: int) -> int:
            return rank * (sum(w.shape) - (rank if self.form == "pivoted" else 0))

        rank = min(full, self.rank or full)
        if self.rank is None and self.energy is None:
            rank = ranks.by_size(size, full, (0.5 if self.ratio is None else self.ratio) * dense)
        if self.energy is None and (reason := factors.larger(target, size(rank), f"rank {rank}")):
            return Note(target.name, reason)
        left, right = (_qr if self.by == "qr" else _lu)(w, rank, 1.0 if self.energy is None else self.energy)
        rank = left.shape[1]
        if reason := factors.larger(target, size(rank), f"rank {rank}"):
            return Note(target.name, reason)
        if self.form == "pivoted":
            edit = factors.pivoted(target, left, right)
        else:
            edit = factors.chain(target, factors.pair(target, left, right))
        if speed is not None and (reason := speed.slower(edit)):
            return Note(target.name, f"with rank {rank} {reason}")
        return edit


def _qr(w: Tensor, most: int, energy: float) -> tuple[Tensor, Tensor]:
    """left [m, r] with orthonormal columns and right [r, n], r at most `most`, less where that keeps the energy."""
    from scipy.linalg import qr

    q, r, order = qr(w.cpu().numpy(), mode="economic", pivoting=True)
    left, right = torch.from_numpy(q).to(w), torch.empty_like(w[: q.shape[1]])
    right[:, torch.from_numpy(order).long()] = torch.from_numpy(r).to(w)
    rank = most if energy == 1 else min(most, ranks.by_energy(right.square().sum(1), energy))
    return left[:, :rank], right[:rank]


def _lu(w: Tensor, most: int, energy: float) -> tuple[Tensor, Tensor]:
    """left [m, r] and right [r, n]: after k steps the rows and columns of the k pivots are met exactly."""
    rest, left, right = w.clone(), [], []
    allowed = (1 - energy) * float(w.square().sum())
    for _ in range(most):
        at = int(rest.abs().argmax())
        i, j = divmod(at, w.shape[1])
        pivot = rest[i, j].clone()
        if not bool(pivot):
            break
        left.append(rest[:, j] / pivot)
        right.append(rest[i].clone())
        rest -= torch.outer(left[-1], right[-1])
        if energy < 1 and float(rest.square().sum()) <= allowed:
            break
    if not left:  # of zeros
        left, right = [w.new_zeros(len(w))], [w.new_zeros(w.shape[1])]
    return torch.stack(left, 1), torch.stack(right)
