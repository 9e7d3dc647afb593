"""Step and zero point found without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms.affine import Affine
from smelt.grids import rows, uniform

# Values that are worked on at a time, so that they stay in the cache.
BLOCK = 1 << 16
# Shares of the range that `solve: search` tries: 1, 1 - 1/40, ..., 0.4, and rounds from each.
SHARES, FEW = tuple(1 - i / 40 for i in range(25)), 2


@dataclass(frozen=True)
class Hqq(Codec):
    """Asymmetric whole numbers of `bits` bits whose zero points (and scales) are fitted to the values alone.

    half-quadratic: the error is split into e, sparse, and the rest: minimize |e|_p^p + beta / 2 |x - dequantized - e|^2
    by turns: e by generalized soft thresholding, the zero point in closed form, beta times kappa.  The step is that of
    the range.  Each row keeps what gave it the least squared error.
    search: the range is shrunk towards the mean in 24 steps, codes and zero point take turns for each, and each row
    keeps what gave it the least sum of |error|^norm.  A norm above 2 cuts off few large values.
    With `scale` the scale follows by least squares, too, wherever the zero point does.

    Pruned weights do not count.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: yes
    needs data: no
    needs training: at 2 bits
    good at: 3 and 4 bits without data, in seconds
    bad at: 2 bits without training, least with solve: search; quantize.gptq, which has data, is better
    source: Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models
    """

    bits: int = setting(4, "bits per value", low=1, high=8)
    per: str = setting("group", "what has its own scale", choices=("group", "channel", "tensor"))
    axis: int | None = setting(
        None, "dimension of the channels (per: channel); nothing: 0; 1 for transposed convolutions", low=0
    )
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    solve: str = setting("half-quadratic", "how they are found", choices=("half-quadratic", "search"))
    p: float = setting(0.7, "norm of the sparse error", low=0.01, high=1)
    beta: float = setting(10.0, "weight of the quadratic part at the start", low=1e-6)
    kappa: float = setting(1.01, "factor of beta in each iteration", low=1)
    iterations: int = setting(20, "turns of e and the zero point", low=0, high=10_000)
    norm: float = setting(3.0, "solve: search, power of the error", low=0.1, high=16)
    scale: bool = setting(False, "fit the scale as well")
    scales: str = setting("float32", "how scales and zero points are stored", choices=(*rows.DTYPES, "int8"))

    def refuses(self, target: Target) -> str | None:
        return rows.refusal(target, self.per, self.axis)

    def fit(self, x: Tensor, stats: Stats) -> State:
        """scale, zero: shaped as in the form, as they will be when they are read."""
        place = self._place(x)
        values, mask = rows.split(x, stats.where, place)
        size = max(1, BLOCK // values.shape[1])
        masks = [None] * len(values) if mask is None else mask.split(size)
        found = [self._fit(part, own) for part, own in zip(values.split(size), masks, strict=False)]
        side = Affine(*place).side_shape(x.shape)
        scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
        scale = _read(self._stored(scale.reshape(side))).to(values.dtype).reshape(-1, 1)
        if self.scales != "float32":  # the zero points make up for what rounding did to the scales
            zero = torch.cat(
                [
                    _zero(part, own, s, _codes(part, s, z, self.bits))
                    for part, own, s, z in zip(
                        values.split(size), masks, scale.split(size), zero.split(size), strict=False
                    )
                ]
            )
        zero = _read(self._stored(zero.reshape(side))).to(values.dtype)
        return State(scale=scale.reshape(side), zero=zero)

    def _place(self, x: Tensor) -> rows.Layout:
        return rows.layout(x, self.per, self.axis, self.group)

    def _fit(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(scale, zero), each [rows, 1]."""
        low, high = uniform.minmax(values, mask)
        if self.solve == "search":
            return self._search(values, mask, low, high)
        scale, zero = _range(low, high, self.bits)
        best, beta = _Best(values, mask, self.bits, 2.0, scale, zero), self.beta
        for _ in range(self.iterations):
            near = _shrunk(values - (best.codes - zero) * scale, beta, self.p).neg_().add_(values)  # x - e
            scale, zero = self._closer(near, mask, scale, best.codes)
            best.offer(scale, zero)
            beta *= self.kappa
        return best.scale, best.zero

    def _search(self, values: Tensor, mask: Tensor | None, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        middle = _mean(values, mask)[:, 0]
        best = _Best(values, mask, self.bits, self.norm, *_range(low, high, self.bits))
        for share in SHARES:
            scale, zero = _range(middle + share * (low - middle), middle + share * (high - middle), self.bits)
            for _ in range(FEW):
                scale, zero = self._closer(values, mask, scale, _codes(values, scale, zero, self.bits))
            best.offer(scale, zero)
        return best.scale, best.zero

    def _closer(self, x: Tensor, mask: Tensor | None, scale: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return _line(x, mask, scale, codes) if self.scale else (scale, _zero(x, mask, scale, codes))

    def _stored(self, side: Tensor) -> Tensor | Encoded:
        if self.scales != "int8":
            return rows.stored(side, self.scales)
        step, zero = uniform.steps(*uniform.minmax(side.reshape(1, -1)), bits=8, symmetric=False)
        assert zero is not None
        step, zero = step[0], zero[0]
        codes = uniform.quantize(side, step, zero, bits=8, symmetric=False).to(torch.uint8)
        parts = {"codes": codes, "scale": step, "zero": zero}
        return Encoded(Affine(None, 0, 8, False), parts, side.shape, side.dtype)

    def encode(self, x: Tensor, state: State) -> Encoded:
        scale, zero = (self._stored(state.get_buffer(k).clone()) for k in ("scale", "zero"))
        form = Affine(*self._place(x), self.bits, False)
        sides = [form.spread(_read(side).to(state.get_buffer("scale").dtype), x.shape) for side in (scale, zero)]
        codes = uniform.quantize(x.detach(), *sides, bits=self.bits, symmetric=False).to(torch.uint8)
        return Encoded(form, {"codes": codes, "scale": scale, "zero": zero}, x.shape, x.dtype)


class _Best:
    """What gave each row the least sum of |error|^norm so far; `codes` are those of the last offer."""

    def __init__(self, values: Tensor, mask: Tensor | None, bits: int, norm: float, scale: Tensor, zero: Tensor):
        self.values, self.mask, self.bits, self.norm = values, mask, bits, norm
        self.scale, self.zero = scale, zero
        self.error = torch.full_like(scale, torch.inf)
        self.offer(scale, zero)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        self.codes = _codes(self.values, scale, zero, self.bits)
        error = (self.codes - zero).mul_(scale).sub_(self.values).abs_()
        error = error.mul_(error) if self.norm == 2 else error.pow_(self.norm)
        error = (error if self.mask is None else error.mul_(self.mask)).sum(1, keepdim=True)
        better = error < self.error
        self.error = error.where(better, self.error)
        self.scale, self.zero = scale.where(better, self.scale), zero.where(better, self.zero)


def _range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale, zero = uniform.steps(low, high, bits=bits, symmetric=False)
    assert zero is not None
    return scale[:, None], zero[:, None]


def _codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return uniform.quantize(x, scale, zero, bits=bits, symmetric=False)


def _read(side: Tensor | Encoded) -> Tensor:
    return side.decode() if isinstance(side, Encoded) else side


def _shrunk(error: Tensor, beta: float, p: float) -> Tensor:
    """sign(e) max(0, |e| - |e|^(p - 1) / beta)."""
    size = error.abs().clamp_min_(1e-12)
    return size.sub_(size.pow(p - 1).div_(beta)).clamp_min_(0).copysign_(error)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(1, keepdim=True)
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)


def _zero(x: Tensor, mask: Tensor | None, scale: Tensor, codes: Tensor) -> Tensor:
    """The zero point with the least squared error."""
    return _mean(codes - x / scale, mask)


def _line(x: Tensor, mask: Tensor | None, scale: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero point with the least squared error; the scale as it was where codes do not tell."""
    mean_c, mean_x = _mean(codes, mask), _mean(x, mask)
    apart = codes - mean_c
    slope = _mean(apart * (x - mean_x), mask) / _mean(apart.square(), mask).clamp_min(1e-20)
    scale = slope.where(slope > 0, scale)
    return scale, mean_c - mean_x / scale
