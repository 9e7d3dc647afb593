"""Ranges, each with its own even grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Codec, State, Stats, Values
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms import buckets
from smelt.grids import rows

# Rounds in which codes and the start and step of each bucket follow one another.
ROUNDS = 10


@dataclass(frozen=True)
class Buckets(Codec):
    """Splits the range of a tensor into buckets, each with its own start and step: x ~ start_b + step_b * offset.

    edges: `uniform`: ranges of equal length.  `frequency`: equally many values in each.
           `power`: at +-m / 2, +-m / 4, ..., with m = max |x|, and 0: fine steps near 0, as in floating point; an odd
           bucket goes to the middle, where there is then no edge at 0.
    The grid of a bucket spans its own values; then start and step by least squares, and codes, take turns while the
    error falls.  A code has log2(buckets) + bits bits.  Pruned weights do not count.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no
    needs training: below 4 bits in all
    good at: one table per tensor for values of very different sizes: long tails at 5 to 8 bits
    bad at: speed: dense kernels decode first; channels of very different sizes (quantize.affine with a scale for each)
    source: piecewise linear quantization, Fang et al. 2020, arXiv:2002.00104, with any number of pieces
    """

    buckets: int = setting(4, "number of ranges", low=1, high=256)
    bits: int = setting(4, "bits of the offset in its bucket; with that of the bucket at most 16", low=0, high=8)
    edges: str = setting("power", "where buckets meet", choices=("uniform", "frequency", "power"))
    scales: str = setting("float32", "how starts and steps are stored", choices=rows.DTYPES)

    def refuses(self, target: Target) -> str | None:
        return rows.refusal(target, "tensor", None)

    def fit(self, x: Tensor, stats: Stats) -> State:
        """edges: [buckets - 1], rising; start, step: [buckets]."""
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        kept = Values(wide, stats.where).kept()
        if not kept.numel():
            kept = wide.new_zeros(1)
        edges = self._edges(kept)
        bucket = _bucket(kept, edges)
        ends = torch.full((self.buckets,), torch.inf, dtype=kept.dtype, device=kept.device)
        low = ends.scatter_reduce(0, bucket, kept, "amin")
        high = (-ends).scatter_reduce(0, bucket, kept, "amax")
        empty = low > high
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        best = (low, (high - low) / max((1 << self.bits) - 1, 1))
        error = torch.inf
        start, step = best
        for _ in range(ROUNDS):
            start, step = (rows.stored(side, self.scales).to(kept.dtype) for side in (start, step))
            offset = self._offset(kept, bucket, start, step)
            now = float((start[bucket] + step[bucket] * offset - kept).square().sum())
            if now >= error:
                break
            best, error = (start, step), now
            start, step = _least_squares(kept, offset, bucket, start, step)
        return State(edges=edges, start=rows.stored(best[0], self.scales), step=rows.stored(best[1], self.scales))

    def _edges(self, x: Tensor) -> Tensor:
        inner = torch.arange(1, self.buckets, device=x.device)
        if self.edges == "frequency":
            return x.sort().values[inner * x.numel() // self.buckets]
        if self.edges == "uniform":
            low, high = x.aminmax()
            return low + (high - low) * (inner / self.buckets).to(x.dtype)
        odd = self.buckets % 2
        half = x.abs().max() * 0.5 ** torch.arange(1, (self.buckets + 1) // 2, device=x.device).to(x.dtype)
        return torch.cat((-half, half.new_zeros(1 - odd), half.flip(0)))

    def _offset(self, x: Tensor, bucket: Tensor, start: Tensor, step: Tensor) -> Tensor:
        tiny = torch.finfo(x.dtype).tiny
        return ((x - start[bucket]) / step.clamp_min(tiny)[bucket]).round().clamp(0, (1 << self.bits) - 1)

    def encode(self, x: Tensor, state: State) -> Encoded:
        dense = x.detach().to(torch.promote_types(x.dtype, torch.float32)).reshape(-1)
        start, step, edges = (state.get_buffer(k) for k in ("start", "step", "edges"))
        bucket = _bucket(dense, edges.to(dense.dtype))
        offset = self._offset(dense, bucket, start.to(dense.dtype), step.to(dense.dtype))
        width = math.ceil(math.log2(self.buckets)) + self.bits
        codes = ((bucket << self.bits) + offset.long()).reshape(x.shape)
        kind = torch.uint8 if width <= 8 else torch.int16 if width < 16 else torch.int32
        parts = {"codes": codes.to(kind), "start": start.clone(), "step": step.clone()}
        return Encoded(buckets.Buckets(self.bits), parts, x.shape, x.dtype)


def _bucket(x: Tensor, edges: Tensor) -> Tensor:
    """Which bucket each value is in; an edge belongs to the one above it."""
    return torch.bucketize(x, edges, right=True)


def _least_squares(x: Tensor, offset: Tensor, bucket: Tensor, start: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The best line through (offset, x) of each bucket; where all offsets are the same, only its height."""
    work, size = x.double(), len(start)

    def per(values: Tensor) -> Tensor:
        return values.new_zeros(size).index_add(0, bucket, values)

    count = per(torch.ones_like(work)).clamp_min(1)
    mean_x, mean_o = per(work) / count, per(offset.double()) / count
    apart = offset.double() - mean_o[bucket]
    spread, slope = per(apart.square()), per(apart * (work - mean_x[bucket]))
    some = per(torch.ones_like(work)) > 0
    step = torch.where(spread > 0, slope / spread.clamp_min(1e-300), step.double())
    start = torch.where(some, mean_x - step * mean_o, start.double())
    return start.to(x.dtype), step.to(x.dtype)
