from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smelt.core import shelf
from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import Codec, State, Stats, Values
from smelt.core.settings import Ramp, setting
from smelt.core.target import Target
from smelt.forms.sparse import Sparse

RATIO = 0.5  # where nothing else is given


@dataclass(frozen=True)
class Weights(Codec):
    """Zero the least important weights.

    `ratio` is the share of zeros in each tensor (scope local) or in all of them together (scope global); weights
    that earlier steps zeroed count as zeros and stay so.  `pattern: N:M` keeps the best N of every M consecutive
    weights along the last dimension (of the flattened kernel for convolutions).  Under `train`, `ratio` may ramp
    (gradual pruning); pruned weights get no gradient.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: yes, or ramps from scratch inside train
    needs data: no
    needs training: above about 50 % zeros, to recover
    good at: small files (sparse, then coded); 2:4 runs faster on some GPUs
    bad at: speed and memory of dense hardware, which the zeros do not help
    source: Han et al. 2015, arXiv:1506.02626; ramp: Zhu & Gupta 2017, arXiv:1710.01878
    """

    settles = True

    ratio: float | Ramp = setting(RATIO, "share of weights to zero", low=0, high=1)
    score: str = setting("magnitude", "how important a weight is")
    scope: str = setting("local", "rank within each tensor, or over all", choices=("local", "global"))
    pattern: str | None = setting(None, "N:M, keep N of every M in place of a ratio")

    def __post_init__(self) -> None:
        super().__post_init__()
        shelf.module("scores", self.score)
        if self.pattern is not None:
            self._pattern()
            if self.ratio != RATIO or self.scope == "global":
                raise RecipeError(f"prune.weights.pattern {self.pattern!r} fixes the ratio; take ratio and scope out")

    def _pattern(self) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise RecipeError(f"prune.weights.pattern is {self.pattern!r}; it is N:M with 0 < N < M, such as 2:4")
        return int(match[1]), int(match[2])

    def refuses(self, target: Target) -> str | None:
        if self.pattern is not None:
            n, m = self._pattern()
            row = target.tensor[0].numel() if target.tensor.dim() else 1
            if row % m:
                return f"its rows of {row} weights do not divide into groups of {m} ({n}:{m})"
        return None

    def plan(
        self, tensors: Mapping[str, Values], scout: Mapping[str, Any], cost: Callable[[Encoded], int]
    ) -> dict[str, Codec]:
        if self.scope == "local" or len(tensors) < 2:
            return dict.fromkeys(tensors, self)
        scores = {name: self._scores(v.x, v.where, i) for i, (name, v) in enumerate(tensors.items())}
        everything = torch.cat([s.flatten() for s in scores.values()])
        kept = _kept(everything.numel(), self.ratio)
        mask = _top(everything, kept)
        shares = [part.float().mean().item() for part in mask.split([s.numel() for s in scores.values()])]
        return {
            name: replace(self, ratio=min(1.0, max(0.0, 1 - share)), scope="local")
            for name, share in zip(scores, shares, strict=True)
        }

    def _scores(self, x: Tensor, where: Tensor | None, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        score: Tensor = shelf.module("scores", self.score).score(x.detach().float(), generator)
        return score if where is None else score.masked_fill(~where, -math.inf)

    def fit(self, x: Tensor, stats: Stats) -> State:
        scores = self._scores(x, stats.where, stats.seed)
        if self.pattern is not None:
            n, m = self._pattern()
            groups = scores.reshape(-1, m)
            index = groups.topk(n, dim=1).indices
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, index, True).reshape(x.shape)
        else:
            mask = _top(scores.flatten(), _kept(x.numel(), self.ratio)).reshape(x.shape)
        return State(mask=mask if stats.where is None else mask & stats.where)

    def encode(self, x: Tensor, state: State) -> Encoded:
        mask = state.get_buffer("mask")
        return Encoded(Sparse(), {"mask": mask.clone(), "values": torch.where(mask, x, 0)}, x.shape, x.dtype)

    def simulate(self, x: Tensor, state: State) -> Tensor:
        return x * state.get_buffer("mask").to(x.dtype)


def _kept(n: int, ratio: float | Ramp) -> int:
    """How many of n stay; the zeros are counted as torch.nn.utils.prune does, round(ratio * n)."""
    if isinstance(ratio, Ramp):
        ratio = ratio.end
    return n - round(ratio * n)


def _top(scores: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest; ties are broken as topk breaks them."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    dropped = scores.numel() - kept
    if dropped:
        mask[scores.topk(dropped, largest=False).indices] = False
    return mask
