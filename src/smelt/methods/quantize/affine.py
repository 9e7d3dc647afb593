from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats, straight_through
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms import affine
from smelt.forms._sides import rows
from smelt.grids import learned, uniform
from smelt.grids.calibrated import RANGES, calibrated, of_rows, statistic

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Added to the standard deviation that a weight is divided by.
EPSILON = 1e-5


@dataclass(frozen=True)
class Affine(Codec):
    """Whole numbers of `bits` bits on an even grid: x ~ (code - zero) * scale.

    Settings that are left open follow the place.  Weights: symmetric, a scale per channel.  Activations (`at: input` or
    `output`): asymmetric with a whole zero, a scale per tensor, whose range is that of each batch or, with `dynamic:
    false`, found once from the calibration data.  `per: token` gives every row along the last dimension its own range
    at run time; `per: channel` each feature (dimension 1 of what convolutions take in, else the last) one that is found
    once.  For weights groups run along the flattened rest of each channel of dimension 0.

    The map q = round((x - min) / (max - min) * (2^bits - 1)) is `symmetric: false, per: tensor`.  One symmetric bit is
    +-a with a = mean |x|.  Pruned weights do not count for the range and stay 0.

    range      minmax, all values; average, the ends of each batch in a moving average; percentile; mse, the least
               squared error; kl, the least divergence of the histogram (Migacz 2017); lsq, a scale of
               2 mean|x| / sqrt(Qmax), where a learned one starts in its paper

    Inside `train` values are rounded straight-through.  With `learn` the scale is learned, too, its gradient multiplied
    by 1 / sqrt(N Qmax) with N values per scale; with `zero: learned` (LSQ+) also where the levels begin.  With
    `standardize` a weight w becomes (w - mean) / std of its tensor, times its first std, before it is rounded; a batch
    norm after the layer makes up for the mean.  What is stored is what was rounded last.

    applies to: every floating tensor; linear, convolution, embedding; inputs and outputs of layers
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no; a few batches for dynamic: false at inputs and outputs
    needs training: below 4 bits for weights or 6 for activations
    good at: 8 bits without loss, integer kernels on every runtime; 4 bits with range: mse or per: group
    bad at: 2 and 1 bit, and tensors with a few very large values
    source: Jacob et al. 2018, arXiv:1712.05877; learn: Esser et al. 2020, arXiv:1902.08153; zero: learned: Bhalgat et \
al. 2020, arXiv:2004.09576; standardize: Li et al. 2020, arXiv:1909.13144, section 2.3
    """

    places: ClassVar[tuple[str, ...]] = ("weight", "input", "output")

    bits: int = setting(8, "bits per value", low=1, high=16)
    symmetric: bool | None = setting(None, "levels mirrored at 0; nothing: yes for weights, no for activations")
    per: str | None = setting(
        None,
        "what has its own scale; nothing: channel for weights, tensor for activations",
        choices=("channel", "tensor", "group", "token"),
    )
    axis: int | None = setting(
        None, "dimension of the channels of a weight (per: channel); nothing: 0; 1 for transposed convolutions", low=0
    )
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    range: str = setting("minmax", "range that the levels span, or at first if it is learned", choices=RANGES)
    percentile: float = setting(99.9, "percent of the values inside the range (range: percentile)", low=50, high=100)
    momentum: float = setting(0.9, "what a batch leaves of the average of those before (range: average)", low=0, high=1)
    zero: str | None = setting(
        None,
        "of asymmetric levels: float (both ends of the range are levels), whole (0 is one) or learned (float, with "
        "learn: true); nothing: float for unpruned weights, else whole",
        choices=("float", "whole", "learned"),
    )
    scales: str = setting("float32", "how scales are stored", choices=tuple(_DTYPES))
    dynamic: bool = setting(True, "activations: take the range from each batch, not from calibration data")
    learn: bool = setting(False, "inside train, learn the scale; activations are then calibrated, not dynamic")
    standardize: bool = setting(False, "inside train, normalise weights to the mean 0 before they are rounded")

    def refuses(self, target: Target) -> str | None:
        if not target.tensor.is_floating_point():
            return f"it is {target.tensor.dtype}; only floating tensors can be stored in fewer bits"
        if not target.tensor.numel():
            return "it is empty"
        dims = target.tensor.dim()
        if self.per in (None, "channel") and dims > 1 and (self.axis or 0) >= dims:
            return f"it has {dims} dimensions, counted from 0, and none is axis {self.axis}"
        return None

    def needs_at(self, place: str) -> tuple[str, ...]:
        if self.zero == "learned" and (not self.learn or self.symmetric):
            raise RecipeError(f"{self.name}: zero: learned goes with learn: true and asymmetric levels")
        if place not in ("input", "output"):
            return ()
        fixed = self.learn or not self.dynamic
        wrong = None
        if self.per == "group" or self.standardize:
            wrong = f"{'standardize' if self.standardize else f'per {self.per!r}'} is for weights"
        elif self.per == "token" and fixed:
            wrong = "per 'token' is known at run time only; take dynamic: true, learn: false"
        elif not fixed and (self.per == "channel" or self.range in ("average", "lsq")):
            known = "per 'channel'" if self.per == "channel" else f"range {self.range!r}"
            wrong = f"{known} is found from calibration data; take dynamic: false"
        if wrong:
            raise RecipeError(f"{self.name} at {place}: {wrong}")
        return (statistic(self.range, self.per == "channel"),) if fixed else ()

    def fit(self, x: Tensor, stats: Stats) -> State:
        """State(scale, zero or offset, gain, std), shaped as in the form; for features of activations as calibrated.

        gain: what a learned scale's gradient is multiplied by; offset: -zero * scale, where that is learned; std: of a
        standardized weight, at first.  With what `needs_at` asks for gathered, `x` may be empty.  An empty `x` alone
        gives an empty state, which means dynamic.
        """
        name = statistic(self.range, self.per == "channel")
        if name in stats.gathered:
            return self._calibrated(stats.gathered[name])
        if not x.numel():
            if not self.dynamic or self.learn:
                raise RuleError(f"{self.name}: no range was gathered; calibrate with data, or take dynamic: true")
            return State()
        if self.per == "token" or self.range == "average":
            wrong = "per 'token'" if self.per == "token" else "range 'average'"
            raise RecipeError(f"{self.name}: {wrong} is for activations")
        std = self._first_std(x, stats) if self.standardize else None
        pruned = stats.where is not None
        whole = self.zero == "whole" or (self.zero is None and pruned)
        seen = x if std is None else _standardized(x, std)
        scale, zero = self._fit(seen, stats.where, self.per or "channel", self.symmetric is not False, whole)
        if not self.learn:
            return State(scale=scale, zero=zero, std=std)
        top = uniform.limits(self.bits, zero is None)[1]
        gain = scale.new_tensor(1 / math.sqrt(x.numel() / scale.numel() * top))
        return self._learning(scale, zero, gain=gain, std=std)

    def _calibrated(self, gathered: Any) -> State:
        symmetric, whole = bool(self.symmetric), self.zero in (None, "whole")
        low, high = calibrated(
            gathered,
            self.range,
            self.per == "channel",
            bits=self.bits,
            symmetric=symmetric,
            whole=whole,
            percentile=self.percentile,
            momentum=self.momentum,
        )
        scale, zero = self._steps(low, high, symmetric, whole)
        return self._learning(scale, zero) if self.learn else State(scale=scale, zero=zero)

    def _learning(self, scale: Tensor, zero: Tensor | None, **more: Tensor | None) -> State:
        if self.zero != "learned" or zero is None:
            return State(scale=scale, zero=zero, learn=("scale",), **more)
        return State(scale=scale, offset=-zero * scale, learn=("scale", "offset"), **more)

    def encode(self, x: Tensor, state: State) -> Encoded:
        x, state = self._known(x, state)
        scale = self._scale(state.scale).detach().clone()
        zero = self._zero(state, scale)
        form = self._form(x, state, zero is None)
        codes = self._codes(x, form, scale, zero)
        signed, high = zero is None, uniform.limits(self.bits, zero is None)[1]
        small = torch.int8 if signed else torch.uint8
        dtype = small if high <= torch.iinfo(small).max else torch.int16 if high < 1 << 15 else torch.int32
        parts = {"codes": codes.to(dtype), "scale": _flat(scale, form).to(self._stored(scale))}
        if zero is not None:
            whole = not zero.is_floating_point()
            parts["zero"] = _flat(zero.detach(), form).to(dtype if whole else zero.dtype, copy=True)
        return Encoded(form, parts, x.shape, x.dtype)

    def simulate(self, x: Tensor, state: State) -> Tensor:
        if not x.numel():
            return x
        x, state = self._known(x, state)
        scale = self._scale(state.scale)
        if isinstance(state.scale, torch.nn.Parameter):
            return self._learned(x, scale, state)
        with torch.no_grad():
            zero = self._zero(state, scale)
            form = self._form(x, state, zero is None)
            side = None if zero is None else form.spread(_flat(zero, form), x.shape)
            rounded = uniform.dequantize(
                self._codes(x, form, scale, zero), form.spread(_flat(scale, form), x.shape), side
            )
        return straight_through(x, rounded.to(x.dtype))

    def _learned(self, x: Tensor, scale: Tensor, state: State) -> Tensor:
        """For activations N is what one sample has, as in section 2.2 of Esser et al. 2020."""
        gain = getattr(state, "gain", None)
        symmetric = getattr(state, "offset", None) is None and getattr(state, "zero", None) is None
        if gain is None:
            high = uniform.limits(self.bits, symmetric)[1]
            gain = 1 / math.sqrt(max(x[:1].numel() / scale.numel(), 1) * high)
        scale = scale * gain + (scale - scale * gain).detach()
        zero = self._zero(state, scale, gain)
        form = self._form(x, state, symmetric)
        side = None if zero is None else form.spread(_flat(zero, form), x.shape).to(scale.dtype)
        spread = form.spread(_flat(scale, form), x.shape)
        return learned.rounded(x, spread, side, bits=self.bits, symmetric=symmetric)

    def _zero(self, state: State, scale: Tensor, gain: Any = 1.0) -> Tensor | None:
        offset: Tensor | None = getattr(state, "offset", None)
        zero: Tensor | None = getattr(state, "zero", None)
        if offset is None:
            return zero
        found: Tensor = -(offset * gain + (offset - offset * gain).detach()) / scale
        return found

    def _known(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """(what is rounded, the state, or for an empty one that of this batch)"""
        std: Any = getattr(state, "std", None)
        if std is not None:
            x = _standardized(x, std)
        if hasattr(state, "scale"):
            return x, state
        if self.per in ("channel", "group"):
            raise RecipeError(f"{self.name}: per {self.per!r} at run time; dynamic activations take tensor or token")
        scale, zero = self._fit(x.detach(), None, self.per or "tensor", bool(self.symmetric), self.zero != "float")
        return x, State(scale=scale, zero=zero)

    def _first_std(self, x: Tensor, stats: Stats) -> Tensor:
        if stats.inside is None:
            raise RuleError(
                f"{self.name}: standardize changes the weights, so it acts inside train; put the step there"
            )
        if stats.where is not None:
            raise RuleError(f"{self.name}: standardize would move the zeros of a pruned tensor; take it out")
        before: Any = getattr(stats.inside.before, "std", None)
        return x.detach().std(unbiased=False) if before is None else before

    def _fit(
        self, x: Tensor, where: Tensor | None, per: str, symmetric: bool, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        axis, group = self._layout(x, per)
        form = affine.Affine(axis, group, self.bits, symmetric)
        each = rows(x.to(torch.promote_types(x.dtype, torch.float32)), axis, group)
        ragged = where is None and group and each.numel() != x.numel()
        counts = torch.ones_like(x, dtype=torch.bool) if ragged else where
        mask = None if counts is None else rows(counts, axis, group, False)
        settings: dict[str, Any] = {"symmetric": symmetric, "whole": whole, "percentile": self.percentile}
        low, high = of_rows(each, mask, self.range, bits=self.bits, **settings)
        side = form.side_shape(x.shape)
        return self._steps(low.reshape(side), high.reshape(side), symmetric, whole)

    def _steps(self, low: Tensor, high: Tensor, symmetric: bool, whole: bool) -> tuple[Tensor, Tensor | None]:
        scale, zero = uniform.steps(low, high, bits=self.bits, symmetric=symmetric, whole=whole)
        if zero is not None and whole and not symmetric:
            zero = zero.to(torch.int32)
        return self._scale(scale), zero

    def _layout(self, x: Tensor, per: str) -> tuple[int | None, int]:
        """(axis, group) of the form; a tensor of one dimension (a bias) always has one scale."""
        if per == "tensor" or x.dim() < 2:
            return None, 0
        return (self.axis or 0, 0) if per == "channel" else (0, self.group if per == "group" else x.shape[-1])

    def _form(self, x: Tensor, state: State, symmetric: bool) -> affine.Affine:
        scale: Any = state.scale
        if self.per == "channel" and scale.dim() > 1:
            return affine.Affine(x.dim() - scale.dim() + 1, 0, self.bits, symmetric)
        group = 0 if scale.dim() < 2 else x.shape[-1] if self.per == "token" else self.group
        axis = (None, self.axis or 0, 0)[scale.dim()]
        return affine.Affine(axis, group, self.bits, symmetric)

    def _codes(self, x: Tensor, form: affine.Affine, scale: Tensor, zero: Tensor | None) -> Tensor:
        side = None if zero is None else form.spread(_flat(zero, form), x.shape)
        spread = form.spread(_flat(scale, form), x.shape)
        return uniform.quantize(x, spread, side, bits=self.bits, symmetric=zero is None)

    def _stored(self, scale: Tensor) -> torch.dtype:
        return scale.dtype if self.scales == "float32" else _DTYPES[self.scales]

    def _scale(self, raw: Any) -> Tensor:
        """Positive, and rounded to how it is stored."""
        kind = self._stored(raw)
        least = max(torch.finfo(kind).smallest_normal / 1024, torch.finfo(torch.float32).tiny)
        scale: Tensor = raw.abs().clamp(least, torch.finfo(kind).max)
        return scale.detach().to(kind).to(scale.dtype) + (scale - scale.detach())


def _flat(side: Tensor, form: affine.Affine) -> Tensor:
    """Scale or zero in the shape of the form: that of activations has a dimension for each they have."""
    return side.flatten() if form.axis is not None and not form.group else side


def _standardized(x: Tensor, std: Tensor) -> Tensor:
    """Of mean 0, with the standard deviation `std`."""
    centred = x - x.mean()
    return centred / (x.std(unbiased=False) + EPSILON) * std
