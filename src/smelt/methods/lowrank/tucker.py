from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.edit import Replace
from smelt.core.errors import RecipeError
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph import factors
from smelt.grids import tucker, variational
from smelt.grids.ranks import by_energy
from smelt.train.split import Ranks, Split


@dataclass(frozen=True)
class Tucker(Split):
    """A convolution becomes 1 x 1, a smaller kernel, and 1 x 1, by the Tucker-2 decomposition of its two channel modes.

        in channels -> s by 1 x 1;  s -> r by the kernel's size, with stride and padding;  r -> out channels by 1 x 1

    r and s are given by one of `ratio`, `rank`, `energy` and `variational`.  A 1 x 1 that would not get thinner is left
    out.  The parts come from higher-order orthogonal iteration; with weight: inputs they make the change of the layer's
    output on the calibration data small instead of that of the weight, and `ratio` chooses r and s by that.

    applies to: 1-D and 2-D convolution with groups = 1 and a kernel of more than one place
    needs a pretrained model: yes
    needs data: no; a few batches without labels for weight: inputs and keep: faster
    needs training: a little, to recover, below about half of the parameters
    good at: wide convolutions: fewer multiplications with an ordinary kernel in the middle
    bad at: thin layers, where three layers are slower than one (keep: faster leaves those)
    source: Kim et al. 2016, arXiv:1511.06530; De Lathauwer, De Moor, Vandewalle 2000 (HOOI)
    """

    ratio: float | None = setting(
        None, "share of each layer's parameters to keep; 0.5 where nothing else is given", low=0, high=1
    )
    rank: int | tuple[int, ...] | None = setting(None, "r = s, or [s, r]: channels before and after the kernel", low=1)
    energy: float | None = setting(None, "share of the sum of squares to keep in each mode", low=0, high=1)
    variational: bool = setting(False, "ranks by variational Bayes: what noise alone does not explain")
    multiple: int = setting(1, "ranks are a multiple of this, where they can be", low=1)
    rounds: int = setting(10, "iterations", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [
            name for name in ("ratio", "rank", "energy", "variational") if getattr(self, name) not in (None, False)
        ]
        if len(given) > 1:
            raise RecipeError(f"{self.name}: {' and '.join(given)} each fix the ranks; give one of them")
        if isinstance(self.rank, tuple) and (
            len(self.rank) != 2 or any(type(n) is not int or n < 1 for n in self.rank)
        ):
            raise RecipeError(f"{self.name}.rank is {list(self.rank)}; it takes two whole numbers from 1, or one")

    def refuses(self, target: Target) -> str | None:
        if reason := factors.refusal(target, (nn.Conv1d, nn.Conv2d)):
            return reason
        if target.tensor[0, 0].numel() == 1:
            return "its kernel has one place, so that the weight is a matrix; take lowrank.svd"
        return None

    def ranks(self, target: Target, w: Tensor, metric: Tensor | None) -> Ranks:
        """(s, r)"""
        full = w.shape[1], w.shape[0]
        if self.rank is not None:
            s, r = self.rank if isinstance(self.rank, tuple) else (self.rank, self.rank)
            return min(s, full[0]), min(r, full[1])
        out, into = tucker.spectra(w, metric)
        if self.energy is not None:
            return self._round(by_energy(into, self.energy), full[0]), self._round(by_energy(out, self.energy), full[1])
        if self.variational:
            s, r = (variational.rank(x, (len(x), w.numel() // len(x))) for x in (into, out))
            return self._round(s, full[0]), self._round(r, full[1])
        return self._within((0.5 if self.ratio is None else self.ratio) * w.numel(), w, out, into)

    def _round(self, rank: int, full: int) -> int:
        return min(full, max(1, self.multiple, rank // self.multiple * self.multiple))

    def _within(self, budget: float, w: Tensor, out: Tensor, into: Tensor) -> Ranks:
        """Of all pairs of at most `budget` parameters the one whose modes leave the least out (De Lathauwer: the sum
        bounds the squared error); the smallest where none is."""
        ours = [self._steps(w.shape[0]), self._steps(w.shape[1])]
        lost = [_tails(x)[n] for x, n in zip((out, into), ours, strict=True)]
        r, s = ours[0][:, None], ours[1][None]
        size = r * s * w[0, 0].numel() + r * (r < w.shape[0]) * w.shape[0] + s * (s < w.shape[1]) * w.shape[1]
        total = torch.where(size <= budget, lost[0][:, None] + lost[1][None], torch.inf)
        best = divmod(int(total.argmin()), total.shape[1]) if bool(torch.isfinite(total).any()) else (0, 0)
        return int(ours[1][best[1]]), int(ours[0][best[0]])

    def _steps(self, full: int) -> Tensor:
        return torch.tensor(sorted({self._round(n, full) for n in (*range(self.multiple, full, self.multiple), full)}))

    def shapes(self, target: Target, ranks: Ranks) -> list[Sequence[int]]:
        out, into, *kernel = target.tensor.shape
        s, r = ranks
        return [(out, r), (r, s, *kernel), (s, into)]

    def factors(self, target: Target, w: Tensor, ranks: Ranks, metric: Tensor | None, seed: int) -> Sequence[Tensor]:
        return tucker.tucker2(w, (ranks[1], ranks[0]), metric, self.rounds)

    def edit(self, target: Target, found: Sequence[Tensor]) -> Replace:
        module: Any = target.module
        last, core, first = found
        places = [1] * (core.dim() - 2)
        axes = range(len(places))
        if first.shape[0] == first.shape[1]:
            core, first = tucker.build(torch.eye(len(core)).to(core), core, first), first[:0]
        if last.shape[0] == last.shape[1]:
            core, last = torch.tensordot(last, core, dims=1), last[:0]
        parts = [factors.conv(module, first.reshape(*first.shape, *places))] if len(first) else []
        parts.append(factors.conv(module, core, axes))
        parts += [factors.conv(module, last.reshape(*last.shape, *places))] if len(last) else []
        return factors.chain(target, parts)


def _tails(squares: Tensor) -> Tensor:
    """What ranks 0, 1, ... leave out."""
    tails = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])
