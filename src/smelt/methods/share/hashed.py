"""Weights that share a few values by a hash of their places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.store import NODE_BYTES
from smelt.core.target import Target
from smelt.forms.hashed import MOST, places
from smelt.forms.hashed import Hashed as HashedForm
from smelt.forms.scaled import Scaled

# Rounds in which values and scales of the rows are fitted in turn, and the change of the error at which they end.
ROUNDS, TOLERANCE = 50, 1e-6
LEAST = 1e-3  # of the mean square of scales per value, below which a value does not count in full


@dataclass(frozen=True)
class Hashed(Codec):
    """The hashing trick: a hash of a weight's place says which of a few shared values it has, another one its sign.

    The file holds the values and a seed, no indices.  A weight w[i, j] of the tensor as [dimension 0, rest] becomes
    sign(i, j) * v[h(i, j)], with `rows` also times a scale s[i].  At first every value is the least-squares mean of
    what falls to it,

        v[h] = sum of sign * s[i] * w[i, j] / sum of s[i]^2     over the (i, j) with h(i, j) = h

    and, in turn, every scale the best for its row.  Pruned weights do not count.  The mean of n unlike weights is
    about sqrt(n) times smaller than they are: with `start: norm` the values are then multiplied so that
    the tensor has the norm that it had.  Values and scales are floating leaves, so training tunes them:
    the gradient of a value is the sum over its places.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: no; inside or before train, values are learned anew
    needs data: no
    needs training: yes; hashing alone destroys a trained network below about one value per two weights
    good at: files of 1/8 to 1/64 and less: one number per value and no index, and any codec can store it narrower
    bad at: speed: dense kernels decode first; without training
    source: Chen et al. 2015, arXiv:1504.04788
    """

    share: float = setting(0.25, "shared values per weight", low=1 / MOST, high=1)
    rows: bool = setting(False, "a scale for each slice of dimension 0")
    signs: bool = setting(True, "a second hash gives the sign")
    start: str = setting("mean", "what is kept at first: the weights, or the norm of all", choices=("mean", "norm"))
    scales: str = setting("float32", "how scales are stored", choices=("float32", "float16", "bfloat16"))

    def refuses(self, target: Target) -> str | None:
        x = target.tensor
        if not x.is_floating_point():
            return f"it is {x.dtype}; only floating tensors can share values"
        if not x.dim() or not x.numel():
            return "it has no dimension to hash" if not x.dim() else "it is empty"
        rows = (NODE_BYTES + len(x) * getattr(torch, self.scales).itemsize) if self.rows else 0
        need, dense = NODE_BYTES + self._count(x, None) * x.element_size() + rows, x.numel() * x.element_size()
        return f"its shared values would need {need:,} bytes, it has {dense:,}" if need >= dense else None

    def _count(self, x: Tensor, where: Tensor | None) -> int:
        """Shared values: a share of the weights that count, enough for what the form allows."""
        kept = x.numel() if where is None else int(where.sum())
        return max(1, round(self.share * kept), -(-x.numel() // MOST))

    def fit(self, x: Tensor, stats: Stats) -> State:
        """seed: of the hash, int64 []; count: of the values, int64 []; scale: [rows] or None; where: as in `Stats`."""
        seed, count = torch.tensor(stats.seed & 0xFFFFFFFF), torch.tensor(self._count(x, stats.where))
        state = State(seed=seed, count=count, scale=None, where=stats.where)
        if self.rows:
            state.scale = self._scales(self._buckets(x, state)).to(getattr(torch, self.scales))
        return state

    def _buckets(self, x: Tensor, state: Any) -> _Buckets:
        count = int(state.count)
        return _Buckets(x, state.where, count, places(x.shape, count, int(state.seed), self.signs, x.device))

    def _scales(self, buckets: _Buckets) -> Tensor:
        """[rows] by alternating least squares."""
        scale: Tensor = buckets.x.norm(dim=1)
        before = math.inf
        for _ in range(ROUNDS):
            mean = scale.square().mean().sqrt()  # scales of mean square 1 leave the values as large as the weights are
            scale = scale / mean if mean > 0 else torch.ones_like(scale)
            each = buckets.spread(buckets.values(scale))
            square = each.square().sum(1)
            scale = (each * buckets.x).sum(1) / square.where(square > 0, 1)
            error = float((buckets.x - each * scale[:, None]).square().sum())
            if error >= before * (1 - TOLERANCE):
                break
            before = error
        return scale

    def encode(self, x: Tensor, state: State) -> Encoded:
        """The least-squares values for `x`, given the scales that were found."""
        known: Any = state
        buckets = self._buckets(x, state)
        scale = torch.ones_like(buckets.x[:, 0]) if known.scale is None else known.scale.to(buckets.x.dtype)
        values = buckets.values(scale)
        if self.start == "norm":
            now = (buckets.spread(values) * scale[:, None]).norm()
            values = values * (buckets.x.norm() / now if now > 0 else 1)
        inner = Encoded(HashedForm(int(known.seed), self.signs), {"values": values.to(x.dtype)}, x.shape, x.dtype)
        if known.scale is None:
            return inner
        return Encoded(Scaled(axis=0), {"values": inner, "scale": known.scale.clone()}, x.shape, x.dtype)


class _Buckets:
    """A tensor as [rows, rest], 0 where it does not count, and the places of its values.

    where: mask of what counts, or None.  at: of `places`; places beyond `count` are those of negative signs.
    """

    def __init__(self, x: Tensor, where: Tensor | None, count: int, at: Tensor):
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        self.x = (wide if where is None else wide.where(where, 0)).reshape(len(x), -1)
        self.where = None if where is None else where.reshape(len(x), -1)
        self.count, self.at = count, at.reshape(-1)

    def values(self, scale: Tensor) -> Tensor:
        """[count]: the least-squares values at these scales [rows]; 0 where nothing falls to one.

        A value that only rows with scales of almost 0 share would be huge and say nothing: it is kept small.
        """
        weight = scale.square()[:, None].expand_as(self.x)
        weight = weight if self.where is None else weight * self.where
        above, minus = self._sums(self.x * scale[:, None])
        below, also = self._sums(weight)
        square = below + also
        values: Tensor = (above - minus) / square.clamp(min=max(LEAST * float(square.mean()), 1e-30))
        return values

    def _sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What falls to each value with the sign +, and with -."""
        sums = x.new_zeros(2 * self.count).index_add_(0, self.at, x.reshape(-1))
        return sums[: self.count], sums[self.count :]

    def spread(self, values: Tensor) -> Tensor:
        """The values in their places, [rows, rest], 0 where nothing counts."""
        each = torch.cat((values, -values)).index_select(0, self.at).reshape(self.x.shape)
        return each if self.where is None else each * self.where
