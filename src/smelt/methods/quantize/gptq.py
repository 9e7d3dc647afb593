from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.encoded import Encoded, numel
from smelt.core.errors import RuleError
from smelt.core.method import Codec, State, Stats, straight_through
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms import _sides as sides
from smelt.forms.affine import Affine
from smelt.grids import feedback, learned, offsets, uniform
from smelt.statistics.gram import aimed, damped, rows

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GPTQ(Codec):
    """Whole numbers of `bits` bits, rounded column by column so that each makes up for the errors of those before.

    Minimised is e H e^T over every row of a layer's weight [out, k], with e its error and H = E x x^T of the layer's
    inputs (plus `damp` times its mean diagonal); with `error: loss` tr(G e H e^T) over all rows together, G = E g g^T
    of the loss's slopes at its outputs, so that weights make up for the errors of those in their column, too.

    A group's range is found where the rounding arrives at it, on weights that have taken over the errors so far; with
    `columns: loud` all are found at the start.  Then (error: outputs) every weight is rounded again given all others,
    `rounds` times (coordinate descent), which never raises the error.

    Statistics are gathered in the order in which the model runs, of a `block` of the model at a time (as published) or
    of a `layer` (`gather`), on outputs of what is already stored; with `original` the outputs aimed at are those of the
    model before this step.  Pruned weights stay 0.

    Inside `train` weights are rounded after what this moved them by at the last fit was added.  With `learn` that, in
    steps, learns for each weight, and so do the ends of each range, in widths of it, all straight-through; the weights
    themselves stay.  With `scope: block` and signed gradients that is AutoRound, from a better start.

    applies to: linear; convolution, grouped too
    needs a pretrained model: yes
    needs data: yes, a few thousand positions per layer; no labels (error: loss draws them where there are none)
    needs training: no, down to 3 bits in groups; learn: true with scope: block for 2
    good at: 4 and 3 bits in seconds, with the layout of every integer kernel
    bad at: layers with fewer calibration positions than inputs; 2 bits and less
    source: Frantar et al. 2022, arXiv:2210.17323; rounds: arXiv:2309.01885; original: 2504.02692; loss: \
2505.22988; learn: Cheng et al. 2023, 2309.05516
    """

    bits: int = setting(4, "bits per value", low=1, high=8)
    symmetric: bool = setting(False, "levels mirrored at 0")
    per: str = setting("group", "what has its own scale", choices=("channel", "tensor", "group"))
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    range: str = setting("mse", "range that the levels span: all, or least error", choices=("minmax", "mse"))
    zero: str = setting(
        "float", "of asymmetric levels: float (any) or whole (0 is a level)", choices=("float", "whole")
    )
    scales: str = setting("float16", "how scales and float zeros are stored", choices=tuple(_DTYPES))
    columns: str = setting(
        "plain", "which are rounded first: as they stand, or those of the loudest inputs", choices=("plain", "loud")
    )
    rounds: int = setting(3, "times that every column is rounded again", low=0)
    error: str = setting(
        "outputs", "what is minimised: the change of the layer's outputs, or of the loss", choices=("outputs", "loss")
    )
    spread: float = setting(0.3, "share of the mean diagonal of G added to its diagonal", low=1e-8, high=10)
    original: bool = setting(True, "aim at the outputs of the model before this step, not at those on inputs as now")
    gather: str = setting("block", "what is rounded between two runs of the data", choices=("block", "layer"))
    damp: float = setting(0.01, "share of the mean diagonal of H added to its diagonal", low=1e-8, high=1)
    learn: bool = setting(False, "inside train, learn where each weight is rounded, and the ranges")

    def refuses(self, target: Target) -> str | None:
        module = target.module
        if not isinstance(module, (nn.Linear, _ConvNd)) or target.places[0][1] != "weight":
            return f"it is no weight of a linear or convolution layer but of {type(module).__name__}"
        if isinstance(module, _ConvTransposeNd):
            return "the weights of a transposed convolution share no inputs; take quantize.affine"
        return None if target.tensor.numel() else "it is empty"

    def needs_at(self, place: str) -> tuple[str, ...]:
        if place == "plan":
            return ("slopes",) if self.error == "loss" else ()
        return (("gram", "cross") if self.original else ("gram",)) if place == "weight" else ()

    def order(self) -> str | None:
        return self.gather

    def fit(self, x: Tensor, stats: Stats) -> State:
        """State(scale, zero, shift): sides as in the form; rounding x + shift to the nearest gives what was found.

        With `learn`, inside train: State(scale, zero, offset, ends), as in `grids.offsets`.
        """
        if "gram" not in stats.gathered:
            raise RuleError(f"{self.name} needs the second moments of the layer's inputs, which are not known")
        gram: Tensor = stats.gathered["gram"].to(x.device)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        where = torch.ones_like(x, dtype=torch.bool) if stats.where is None else stats.where
        wide = wide.masked_fill(~where, 0)
        whole = self._range(wide.reshape(1, -1), where.reshape(1, -1)) if self.per == "tensor" else None
        cross = stats.gathered["cross"].to(x.device) if self.original and "cross" in stats.gathered else gram
        slopes = stats.gathered["slopes"].to(x.device) if "slopes" in stats.gathered else [None] * len(gram)
        parts = []
        groups = zip(rows(wide, len(gram)), rows(where, len(gram)), gram, cross, slopes, strict=True)
        for w, keep, now, before, slope in groups:
            h = damped(now, self.damp)
            g = None if slope is None else damped(slope, self.spread)
            parts.append(self._rounded(w if before is now else aimed(w, h, before, now), keep, h, g, whole))
        shape = sides.side_shape(x.shape, *self._layout())
        values, scale, zero = (
            None if part[0] is None else torch.cat([p for p in part if p is not None])
            for part in zip(*parts, strict=True)
        )
        assert values is not None and scale is not None
        scale, zero = (None if s is None else s.flatten()[: numel(shape)].reshape(shape) for s in (scale, zero))
        assert scale is not None
        values = values.reshape(x.shape)
        if not self.learn or stats.inside is None:
            return State(scale=scale, zero=zero, shift=values - wide)
        offset = offsets.start(wide, values, *self._spread(scale, zero, x.shape), bits=self.bits)
        ends = scale.new_zeros(2, *scale.shape)
        return State(scale=scale, zero=zero, offset=offset, ends=ends, learn=("offset", "ends"))

    def _layout(self) -> tuple[int | None, int]:
        """Axis and group of the form."""
        return None if self.per == "tensor" else 0, self.group if self.per == "group" else 0

    def _rounded(
        self, w: Tensor, keep: Tensor, h: Tensor, g: Tensor | None, whole: _Side | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(values [out, k], scale and zero [out, groups]) of the rows that see the same inputs."""
        k = w.shape[1]
        length = min(self.group, k) if self.per == "group" else k
        first = torch.arange(k, device=w.device)
        if self.columns == "loud":
            first = h.diagonal().argsort(descending=True, stable=True)
        feed, cost = (part.to(w.dtype) for part in feedback.factor(h[first][:, first]))
        moving = self.columns == "plain" and whole is None
        found: list[_Side] = []  # of each group
        if not moving:
            groups, loud = [slice(i, i + length) for i in range(0, k, length)], h.diagonal().to(w.dtype)
            found = [whole or self._range(w[:, at], keep[:, at], loud[at]) for at in groups]
        lines, kept = first.tolist(), keep.T.contiguous()

        def round_(column: int, wanted: Tensor) -> Tensor:
            return self._nearest(wanted, *found[column // length], kept[column])

        def reached(now: slice, wanted: Tensor) -> None:
            if moving:
                found.append(self._range(wanted, keep[:, now], cost[now]))

        def down(now: slice, wanted: Tensor) -> feedback.Round:
            reached(now, wanted)
            return lambda c, wanted: round_(lines[c], wanted)

        def across(now: slice, wanted: Tensor) -> feedback.Across:
            reached(now, wanted)
            own = [found[c // length] for c in lines[now]]
            scale, mask = torch.stack([s.expand(len(w)) for s, _ in own], 1), keep[:, first[now]].contiguous()
            zeros = [z.expand(len(w)) for _, z in own if z is not None]
            zero = torch.stack(zeros, 1) if zeros else None
            return lambda line, x: self._nearest(x, line(scale), None if zero is None else line(zero), line(mask))

        values, width, near = torch.empty_like(w), length if moving else feedback.WIDTH, h.to(w.dtype)
        if g is not None:
            rows_ = feedback.factor(g)[0].to(w.dtype)
            values[:, first] = feedback.woven(w[:, first], rows_, feed, across, width)
        else:
            values[:, first] = feedback.carried(w[:, first], feed, down, width)
        for _ in range(self.rounds if g is None else 0):
            values = feedback.descended(w, near, values, round_)
        scale = torch.stack([scale.expand(len(w)) for scale, _ in found], 1)
        zero = [zero.expand(len(w)) for _, zero in found if zero is not None]
        return values, scale, torch.stack(zero, 1) if zero else None

    def _nearest(self, x: Tensor, scale: Tensor, zero: Tensor | None, keep: Tensor) -> Tensor:
        codes = uniform.quantize(x, scale, zero, bits=self.bits, symmetric=self.symmetric)
        return uniform.dequantize(codes, scale, zero).where(keep, 0)

    def _range(self, x: Tensor, where: Tensor, weight: Tensor | None = None) -> _Side:
        """(scale [r], zero [r]) of rows [r, n], as they are stored."""
        whole = self.zero == "whole"
        if self.symmetric and self.bits == 1:
            low, high = uniform.magnitude(x, where)
        elif self.range == "mse":
            low, high = uniform.mse(x, where, bits=self.bits, symmetric=self.symmetric, whole=whole, weight=weight)
        else:
            low, high = uniform.minmax(x, where)
        return self._as_stored(*uniform.steps(low, high, bits=self.bits, symmetric=self.symmetric, whole=whole))

    def _as_stored(self, scale: Tensor, zero: Tensor | None) -> _Side:
        kind = _DTYPES[self.scales]
        scale = scale.detach().clamp(torch.finfo(kind).smallest_normal, torch.finfo(kind).max).to(kind).to(scale.dtype)
        if zero is None or self.symmetric:
            return scale, zero
        if self.zero == "whole":
            return scale, zero.detach().round().clamp(*uniform.limits(self.bits, False))
        near = zero.detach().to(kind).to(zero.dtype)
        return scale, near.where((near - zero).abs() < 0.25, zero.detach())

    def encode(self, x: Tensor, state: State) -> Encoded:
        (scale, zero), kind = (None if s is None else s.detach() for s in self._sides(state)), _DTYPES[self.scales]
        assert scale is not None
        form = Affine(*self._layout(), self.bits, zero is None)
        step, side = self._spread(scale, zero, x.shape)
        codes = uniform.quantize(self._wanted(x, step, state), step, side, bits=self.bits, symmetric=zero is None)
        parts = {"codes": codes.to(torch.int8 if zero is None else torch.uint8), "scale": scale.to(kind)}
        if zero is not None:
            narrow = torch.uint8 if self.zero == "whole" and not self.symmetric else kind
            exact = torch.equal(zero.to(narrow).to(zero.dtype), zero)
            parts["zero"] = zero.to(narrow if exact else zero.dtype, copy=True)
        return Encoded(form, parts, x.shape, x.dtype)

    def simulate(self, x: Tensor, state: State) -> Tensor:
        if not hasattr(state, "ends"):
            return super().simulate(x, state)
        step, side = self._spread(*self._sides(state), x.shape)
        wanted = self._wanted(x.detach(), step, state)
        return learned.rounded(wanted, step, side, bits=self.bits, symmetric=side is None, beyond=0.5).to(x.dtype)

    def _wanted(self, x: Tensor, step: Tensor, state: Any) -> Tensor:
        """What is rounded to the nearest level."""
        moved: Tensor = state.offset * step if hasattr(state, "ends") else state.shift
        return x + moved

    def _sides(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) as they are stored, with the gradients of what learns."""
        scale, zero = state.scale, getattr(state, "zero", None)
        if not hasattr(state, "ends"):
            return scale, zero
        now, at = offsets.sides(scale, zero, state.ends, bits=self.bits, fixed=self.symmetric)
        near = self._as_stored(now, at)
        return straight_through(now, near[0]), at if at is None or near[1] is None else straight_through(at, near[1])

    def _spread(self, scale: Tensor, zero: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        form = Affine(*self._layout(), self.bits, zero is None)
        return form.spread(scale, shape), None if zero is None else form.spread(zero, shape)


# (scale, zero) of rows
_Side = tuple[Tensor, Tensor | None]
