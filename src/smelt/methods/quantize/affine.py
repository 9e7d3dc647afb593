from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats, straight_through
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms import affine
from smelt.grids import uniform

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Affine(Codec):
    """Whole numbers of `bits` bits on an even grid: x ~ (code - zero) * scale.

    Settings that are left open follow the place.  Weights: symmetric, a scale per channel.  Activations (`at: input` or
    `output`): asymmetric with a whole zero, a scale per tensor, whose range is that of each batch or, with `dynamic:
    false`, that of the calibration data.  `per: token` gives every row along the last dimension its own range at run
    time.  Groups run along the flattened rest of each channel of dimension 0.

    The map q = round((x - min) / (max - min) * (2^bits - 1)) is `symmetric: false, per: tensor`.  One symmetric bit is
    +-a with a = mean |x|.  Pruned weights do not count for the range and stay 0.  Inside `train` values are rounded
    straight-through; with `learn` the scale is learned too, its gradient multiplied by 1 / sqrt(N Qmax) with N values
    per scale (the paper starts it at 2 mean|x| / sqrt(Qmax), here it starts from `range`).

    applies to: every floating tensor; linear, convolution, embedding; inputs and outputs of layers
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no; a few batches for dynamic: false at inputs and outputs
    needs training: below 4 bits for weights or 6 for activations
    good at: 8 bits without loss, integer kernels on every runtime; 4 bits with range: mse or per: group
    bad at: 2 and 1 bit, and tensors with a few very large values
    source: Jacob et al. 2018, arXiv:1712.05877; learn: Esser et al. 2020, arXiv:1902.08153
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
        None, "dimension of the channels (per: channel); nothing: 0; 1 for transposed convolutions", low=0
    )
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    range: str = setting(
        "minmax", "range that the levels span: all, a percentile, least error", choices=("minmax", "percentile", "mse")
    )
    percentile: float = setting(99.9, "percent of the values inside the range (range: percentile)", low=50, high=100)
    zero: str | None = setting(
        None,
        "of asymmetric levels: float (both ends of the range are levels) or whole (0 is one); "
        "nothing: float for unpruned weights",
        choices=("float", "whole"),
    )
    scales: str = setting("float32", "how scales are stored", choices=tuple(_DTYPES))
    dynamic: bool = setting(True, "activations: take the range from each batch, not from calibration data")
    learn: bool = setting(False, "inside train, learn the scale; activations are then calibrated, not dynamic")

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
        if place == "weight":
            return ()
        if self.per in ("channel", "group"):
            raise RecipeError(f"{self.name}: per {self.per!r} is for weights; activations take tensor or token")
        if self.dynamic and not self.learn:
            return ()
        if self.per == "token" or self.range != "minmax":
            wrong = "per: token" if self.per == "token" else f"range: {self.range}"
            raise RecipeError(
                f"{self.name}: {wrong} at {place} is known at run time only; take dynamic: true, learn: false"
            )
        return ("range",)

    def fit(self, x: Tensor, stats: Stats) -> State:
        """State(scale, zero, gain), shaped as in the form; gain: what a learned scale's gradient is multiplied by.

        With (low, high) gathered, those are the range; `x` then may be empty.  An empty `x` alone gives an empty
        state, which means dynamic.
        """
        if "range" in stats.gathered:
            low, high = stats.gathered["range"]
            scale, zero = self._steps(low, high, symmetric=bool(self.symmetric), whole=self.zero != "float")
            return State(scale=scale, zero=zero, learn=("scale",) if self.learn else ())
        if not x.numel():
            if not self.dynamic or self.learn:
                raise RuleError(f"{self.name}: no range was gathered; calibrate with data, or take dynamic: true")
            return State()
        if self.per == "token":
            raise RecipeError(f"{self.name}: per 'token' is for activations; weights take channel, tensor or group")
        pruned = stats.where is not None
        whole = self.zero == "whole" or (self.zero is None and pruned)
        scale, zero = self._fit(x, stats.where, self.per or "channel", self.symmetric is not False, whole)
        if not self.learn:
            return State(scale=scale, zero=zero)
        top = uniform.limits(self.bits, zero is None)[1]
        gain = scale.new_tensor(1 / math.sqrt(x.numel() / scale.numel() * top))
        return State(scale=scale, zero=zero, gain=gain, learn=("scale",))

    def encode(self, x: Tensor, state: State) -> Encoded:
        state = self._known(x, state)
        form, scale, zero = (
            self._form(x, state),
            self._scale(state.scale).detach().clone(),
            getattr(state, "zero", None),
        )
        codes = self._codes(x, form, scale, zero)
        signed, high = zero is None, uniform.limits(self.bits, zero is None)[1]
        small = torch.int8 if signed else torch.uint8
        dtype = small if high <= torch.iinfo(small).max else torch.int16 if high < 1 << 15 else torch.int32
        parts = {"codes": codes.to(dtype), "scale": scale.to(self._stored(scale))}
        if zero is not None:
            parts["zero"] = zero.clone() if zero.is_floating_point() else zero.to(dtype, copy=True)
        return Encoded(form, parts, x.shape, x.dtype)

    def simulate(self, x: Tensor, state: State) -> Tensor:
        if not x.numel():
            return x
        state = self._known(x, state)
        form, scale, zero = self._form(x, state), self._scale(state.scale), getattr(state, "zero", None)
        if isinstance(state.scale, torch.nn.Parameter):
            return self._learned(x, form, scale, zero, state)
        with torch.no_grad():
            side = None if zero is None else form.spread(zero, x.shape)
            rounded = uniform.dequantize(self._codes(x, form, scale, zero), form.spread(scale, x.shape), side)
        return straight_through(x, rounded.to(x.dtype))

    def _learned(self, x: Tensor, form: affine.Affine, scale: Tensor, zero: Tensor | None, state: State) -> Tensor:
        """Esser et al. 2020, eq. 1-5; for activations N is what one sample has, as in their section 2.2."""
        low, high = uniform.limits(self.bits, zero is None)
        gain = getattr(state, "gain", None)
        gain = 1 / math.sqrt(max(x[:1].numel(), 1) * high) if gain is None else gain
        scale = form.spread(scale * gain + (scale - scale * gain).detach(), x.shape)
        side = 0 if zero is None else form.spread(zero, x.shape)
        exact = (x.to(scale.dtype) / scale + side).clamp(low, high)
        codes = exact + (exact.round() - exact).detach()
        return ((codes - side) * scale).to(x.dtype)

    def _known(self, x: Tensor, state: State) -> State:
        """The state, or for an empty one that of this batch."""
        if hasattr(state, "scale"):
            return state
        if self.per in ("channel", "group"):
            raise RecipeError(f"{self.name}: per {self.per!r} is for weights; activations take tensor or token")
        scale, zero = self._fit(x.detach(), None, self.per or "tensor", bool(self.symmetric), self.zero != "float")
        return State(scale=scale, zero=zero)

    def _fit(
        self, x: Tensor, where: Tensor | None, per: str, symmetric: bool, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        axis, group = self._layout(x, per)
        form = affine.Affine(axis, group, self.bits, symmetric)
        rows = _rows(x.to(torch.promote_types(x.dtype, torch.float32)), axis, group, 0)
        ragged = where is None and group and rows.numel() != x.numel()
        counts = torch.ones_like(x, dtype=torch.bool) if ragged else where
        mask = None if counts is None else _rows(counts, axis, group, False)
        if symmetric and self.bits == 1:
            low, high = uniform.magnitude(rows, mask)
        elif self.range == "percentile":
            low, high = uniform.percentile(rows, mask, share=self.percentile, symmetric=symmetric)
        elif self.range == "mse":
            low, high = uniform.mse(rows, mask, bits=self.bits, symmetric=symmetric, whole=whole)
        else:
            low, high = uniform.minmax(rows, mask)
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

    def _form(self, x: Tensor, state: State) -> affine.Affine:
        scale: Any = state.scale
        group = 0 if scale.dim() < 2 else x.shape[-1] if self.per == "token" else self.group
        axis = (None, self.axis or 0, 0)[scale.dim()]
        return affine.Affine(axis, group, self.bits, getattr(state, "zero", None) is None)

    def _codes(self, x: Tensor, form: affine.Affine, scale: Tensor, zero: Tensor | None) -> Tensor:
        side = None if zero is None else form.spread(zero, x.shape)
        return uniform.quantize(x, form.spread(scale, x.shape), side, bits=self.bits, symmetric=zero is None)

    def _stored(self, scale: Tensor) -> torch.dtype:
        return scale.dtype if self.scales == "float32" else _DTYPES[self.scales]

    def _scale(self, raw: Any) -> Tensor:
        """Positive, and rounded to how it is stored."""
        kind = self._stored(raw)
        least = max(torch.finfo(kind).smallest_normal / 1024, torch.finfo(torch.float32).tiny)
        scale: Tensor = raw.abs().clamp(least, torch.finfo(kind).max)
        return scale.detach().to(kind).to(scale.dtype) + (scale - scale.detach())


def _rows(x: Tensor, axis: int | None, group: int, fill: float | bool) -> Tensor:
    """[channels or groups, values]; the short last group of a channel is filled up."""
    if axis is None:
        return x.reshape(1, -1)
    rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    if not group:
        return rows
    group = min(group, max(rows.shape[1], 1))
    return functional.pad(rows, (0, -rows.shape[1] % group), value=fill).reshape(-1, group)
