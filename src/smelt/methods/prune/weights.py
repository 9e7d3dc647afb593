from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats, Values
from smelt.core.settings import Ramp, setting
from smelt.core.statistic import Statistic
from smelt.core.target import Target
from smelt.forms.sparse import Sparse
from smelt.scores._choose import kept_of, n_of_m, top

RATIO = 0.5  # where nothing else is given
EVERY = 100  # steps between two updates of a mask that regrows
UNTIL = 0.75  # share of the loop in which it does
MOVEMENT = "movement"


@dataclass(frozen=True)
class Weights(Codec):
    """Zero the least important weights.

    What is zeroed is said by one of
        ratio       the share of zeros in each row (`scope: row`; a row is what gives one output, [out, in * kernel]),
                    in each tensor (local), or in all tensors together (global)
        threshold   every weight whose score is below it
        pattern     N:M keeps the best N of every M consecutive weights along the last dimension (of the flattened
                    kernel for convolutions)
    With `block: [r, c]`, blocks of r x c of the matrix [out, in * kernel] are zeroed or kept as a whole, by the sum of
    their scores; -1 stands for all rows or columns.  Weights that earlier steps zeroed count as zeros and stay so; with
    `zeros: true` those do that are 0 already, whoever zeroed them (`ratio: 0, zeros: true` takes over a pruned model).

    Scores: magnitude |w|, random, taylor |w g|, hessian w^2 F / 2, activation |w| sqrt(E x^2) (Wanda, which has `scope:
    row`), movement (in `train` only; until anything has moved, |w|).

    Under `train`, pruned weights get no gradient; `ratio` and `threshold` may ramp (gradual pruning), and the mask is
    updated every `every` steps for the first three quarters of the loop, or until the ramp has arrived.  With `regrow`
    the share a of the kept weights, a = regrow / 2 (1 + cos(pi t / 0.75)) at progress t, is exchanged at each update:
    the lowest scores go, and those with the largest gradient come, at 0 and with the optimizer's moments at 0 (RigL).

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: yes, or ramps or regrowth from scratch inside train
    needs data: for the scores taylor and hessian (and the task's loss), and activation
    needs training: above about 50 % zeros, to recover
    good at: small files (sparse, then coded); 2:4 runs faster on some GPUs
    bad at: speed and memory of dense hardware, which the zeros do not help
    source: Han et al. 2015, arXiv:1506.02626; ramp: arXiv:1710.01878; regrow: Evci et al. 2020, arXiv:1911.11134
    """

    settles = True

    ratio: float | Ramp = setting(RATIO, "share of weights to zero", low=0, high=1)
    score: str = setting("magnitude", "how important a weight is")
    scope: str = setting(
        "local", "rank within each row (output), each tensor, or over all", choices=("row", "local", "global")
    )
    threshold: float | Ramp | None = setting(None, "zero scores below this, in place of a ratio", low=0)
    pattern: str | None = setting(None, "N:M, keep N of every M, in place of a ratio")
    block: tuple[int, ...] | None = setting(None, "[rows, columns] of blocks that go as a whole; -1: all")
    zeros: bool = setting(False, "weights that are 0 count as pruned, and stay so")
    regrow: float = setting(0.0, "inside train, share of the kept weights exchanged at the first update", low=0, high=1)
    every: int | None = setting(
        None, f"inside train, steps between updates of the mask; nothing: train.refresh, or {EVERY} to regrow", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(shelf.module("scores", self.score), "score"):
            raise RecipeError(
                f"prune.weights.score: {self.score!r} says how important whole units are, not single weights"
            )
        for name in ("pattern", "threshold"):
            if getattr(self, name) is not None and (self.ratio != RATIO or self.scope != "local"):
                given = getattr(self, name)
                raise RecipeError(f"prune.weights.{name} {given!r} fixes the ratio; take ratio and scope out")
        if self.pattern is not None:
            n_of_m(self.pattern, "prune.weights.pattern")
            others = [n for n in ("threshold", "block", "regrow") if getattr(self, n)]
            if others:
                raise RecipeError(
                    f"prune.weights.pattern {self.pattern!r} goes with no {others[0]}; take one of them out"
                )
        if self.regrow and self.threshold is not None:
            raise RecipeError("prune.weights.regrow keeps a number of weights; take threshold out and give a ratio")
        if self.block is not None and (
            len(self.block) != 2 or any(type(n) is not int or not (n > 0 or n == -1) for n in self.block)
        ):
            raise RecipeError(
                f"prune.weights.block is {list(self.block)}; it is [rows, columns], such as [4, 1] or [1, -1]"
            )

    def refuses(self, target: Target) -> str | None:
        shape, layer = target.tensor.shape, type(target.module)
        row = shape[1:].numel() if shape else 1
        if self.pattern is not None:
            n, m = n_of_m(self.pattern, "")
            if row % m:
                return f"its rows of {row} weights do not divide into groups of {m} ({n}:{m})"
        if self.block is not None:
            matrix = [shape[0] if shape else 1, row]
            sizes = [all_ if n == -1 else n for n, all_ in zip(self.block, matrix, strict=True)]
            if any(not n or all_ % n for n, all_ in zip(sizes, matrix, strict=True)):
                return f"as a matrix it is {matrix}, which does not divide into blocks of {sizes}"
        if self.scope == "row":
            if len(shape) < 2:
                return "it has one dimension, and so no rows to rank within"
            if issubclass(layer, nn.modules.conv._ConvTransposeNd):
                return "its outputs lie along dimension 1, not 0; take scope: local"
        if self._weighs_inputs():
            known = issubclass(layer, (nn.Linear, nn.modules.conv._ConvNd)) and target.places[0][1] == "weight"
            if not known:
                return f"score {self.score!r} weighs the inputs of linear and convolution layers; it is no such weight"
        return None

    def needs_at(self, place: str) -> tuple[str, ...]:
        needs: tuple[str, ...] = shelf.module("scores", self.score).NEEDS
        if place == "weight":
            return tuple(name for name in needs if name != MOVEMENT)
        if place == "training":
            return tuple(name for name in needs if name == MOVEMENT) + (("slope",) if self.regrow else ())
        return ()

    def order(self) -> str | None:
        """Scores of inputs are taken block by block, as Wanda's are."""
        return "block" if self.scope != "global" and self._weighs_inputs() else None

    def _weighs_inputs(self) -> bool:
        needs = self.needs_at("weight")
        return bool(needs) and all(shelf.load("statistics", name, Statistic).of == "values" for name in needs)

    def period(self) -> int | None:
        return self.every or (EVERY if self.regrow else None)

    def plan(
        self, tensors: Mapping[str, Values], scout: Mapping[str, Any], cost: Callable[[Encoded], int]
    ) -> dict[str, Codec]:
        if self.scope != "global" or len(tensors) < 2:
            return dict.fromkeys(tensors, self)
        units = {
            name: self._units(self._scores(v.x, self._where(v.x, v.where), scout.get(name, {}), i)).flatten()
            for i, (name, v) in enumerate(tensors.items())
        }
        everything = torch.cat([u.cpu() for u in units.values()])
        mask = top(everything, kept_of(everything.numel(), _now(self.ratio)))
        lost = [int((~part).sum()) / part.numel() for part in mask.split([u.numel() for u in units.values()])]
        return {name: replace(self, ratio=part, scope="local") for name, part in zip(units, lost, strict=True)}

    def _where(self, x: Tensor, where: Tensor | None) -> Tensor | None:
        if not self.zeros:
            return where
        return x != 0 if where is None else where & (x != 0)

    def _scores(self, x: Tensor, where: Tensor | None, seen: Mapping[str, Any], seed: int) -> Tensor:
        """Of the shape of x; -inf for what is pruned already."""
        score = "magnitude" if self.score == MOVEMENT and MOVEMENT not in seen else self.score
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        found: Tensor = shelf.module("scores", score).score(wide, seen, torch.Generator().manual_seed(seed))
        return found if where is None else found.masked_fill(~where, -math.inf)

    def _units(self, scores: Tensor) -> Tensor:
        """[rows, columns] of what is kept or zeroed as a whole: weights, or the sums over blocks."""
        matrix = scores.reshape(len(scores) if scores.dim() else 1, -1)
        if self.block is None:
            return matrix
        r, c = self._block(matrix)
        blocks = matrix.reshape(len(matrix) // r, r, -1, c)
        gone = (blocks == -math.inf).all(3).all(1)
        return blocks.masked_fill(blocks == -math.inf, 0).sum((1, 3)).masked_fill(gone, -math.inf)

    def _block(self, matrix: Tensor) -> tuple[int, int]:
        r, c = self.block or (1, 1)
        return len(matrix) if r == -1 else r, matrix.shape[1] if c == -1 else c

    def _spread(self, units: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_units` for a mask."""
        if self.block is not None:
            r, c = self._block(like.reshape(len(like) if like.dim() else 1, -1))
            units = units.repeat_interleave(r, 0).repeat_interleave(c, 1)
        return units.reshape(like.shape)

    def fit(self, x: Tensor, stats: Stats) -> State:
        inside = stats.inside
        seen = {**stats.gathered, **(inside.seen if inside is not None else {})}
        for name in shelf.module("scores", self.score).NEEDS:
            if name == MOVEMENT and inside is None:
                raise RuleError(
                    "prune.weights: score 'movement' is known in training only; put the step under train: with:"
                )
            if name != MOVEMENT and name not in seen:
                raise RuleError(
                    f"prune.weights: score {self.score!r} needs the {name} of each weight, which is not known"
                )
        where = self._where(x, stats.where)
        scores = self._scores(x, where, seen, stats.seed)
        if self.pattern is not None:
            n, m = n_of_m(self.pattern, "")
            mask = top(scores.reshape(-1, m), n).reshape(x.shape)
        else:
            units = self._units(scores)
            groups = units if self.scope == "row" else units.reshape(1, -1)
            if self.threshold is not None:
                chosen = groups >= _now(self.threshold)
            elif self.regrow and inside is not None and inside.before is not None and "slope" in seen:
                before = self._units(inside.before.get_buffer("mask").float()).reshape(groups.shape) > 0
                slopes = self._units(_masked(seen["slope"].abs().to(scores), where)).reshape(groups.shape)
                chosen = self._exchange(groups, before, slopes, inside.progress)
            else:
                chosen = top(groups, kept_of(groups.shape[1], _now(self.ratio)))
            mask = self._spread(chosen.reshape(units.shape), x)
        return State(mask=mask if where is None else mask & where)

    def _exchange(self, scores: Tensor, before: Tensor, slopes: Tensor, progress: float) -> Tensor:
        """[groups, n]: what is kept after the lowest scores went and the largest slopes came."""
        kept = kept_of(scores.shape[1], _now(self.ratio))
        share = self.regrow / 2 * (1 + math.cos(math.pi * min(1.0, progress / UNTIL)))
        survivors = top(scores.masked_fill(~before, -math.inf), kept - round(share * kept)) & before
        # as many as survive are placed on top, so that all groups end with `kept`
        return top(slopes.masked_fill(survivors, math.inf), kept)

    def restarts(self, before: State | None, now: State) -> Tensor | None:
        if not self.regrow or before is None:
            return None
        return now.get_buffer("mask") & ~before.get_buffer("mask")

    def encode(self, x: Tensor, state: State) -> Encoded:
        mask = state.get_buffer("mask")
        return Encoded(Sparse(), {"mask": mask.clone(), "values": torch.where(mask, x, 0)}, x.shape, x.dtype)

    def simulate(self, x: Tensor, state: State) -> Tensor:
        return x * state.get_buffer("mask").to(x.dtype)


def _masked(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else x.masked_fill(~where, -math.inf)


def _now(value: float | Ramp) -> float:
    """A ramp that was not resolved is at its end."""
    return value.end if isinstance(value, Ramp) else value
