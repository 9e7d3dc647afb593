from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.encoded import Encoded
from smelt.core.errors import RuleError
from smelt.core.method import Codec, State, Stats, make
from smelt.core.settings import Ramp, setting
from smelt.core.target import Target
from smelt.forms.affine import Affine
from smelt.grids import uniform
from smelt.statistics.gram import aimed, damped, rows

# Nagel et al., section 3.2: the sigmoid is stretched to LOW..HIGH and cut to 0..1, and the regulariser's exponent falls
# from START to END.  With all of H in every step Adam takes larger steps (RATE) than theirs, and fewer; STRENGTH is the
# regulariser's weight beside an error in units of `_Task`.
LOW, HIGH = -0.1, 1.1
START, END = 20.0, 2.0
STRENGTH = 1.0
RATE = 0.1


@dataclass(frozen=True)
class AdaRound(Codec):
    """Whole numbers of `bits` bits, each weight rounded up or down so that its layer's outputs change least.

    Minimised is (w~ - w)^T H (w~ - w) over every row w of a layer's weight, with H = E x x^T of its inputs (plus `damp`
    times its mean diagonal).  The choices are relaxed to h(v) in 0..1, a cut-off sigmoid, w~ = (floor + h(v)) * scale,
    and learned by Adam in `steps` steps with a term 1 - |2h - 1|^beta that drives them to 0 or 1 as beta falls.  Since
    the error is quadratic in them, H holds all of the data, and no step runs the layer.  Then single choices are
    turned, the most useful of every row first, until none lowers the error (`polish`; with `steps: 0` that alone, from
    the nearest levels).  No row ends worse than with the nearest levels.

    Levels, ranges and groups are those of quantize.gptq.  Statistics are gathered in the order in which the model
    runs, of a `block` of the model at a time or of a `layer` (`gather`), on outputs of what is already stored; w is
    then what comes closest to the outputs as they were before (`original`).  Pruned weights stay 0.

    Inside `train` the v learn from its loss, of the model or of a block, together with all else that learns.  With
    `soft: 0` they start from the choices found by H, every forward pass uses whole choices, and v has the slope of
    h(v); with `soft: {ramp: [1, 0]}` they start from the unrounded weights, and h(v / soft) hardens.

    applies to: linear; convolution, grouped too
    needs a pretrained model: yes
    needs data: yes, a few thousand positions per layer; no labels
    needs training: no; train with distill.logits for 3 bits and fewer
    good at: 4 and 3 bits, where nearest rounding hurts and there is data without labels
    bad at: layers with fewer calibration positions than inputs
    source: Nagel et al. 2020, arXiv:2004.10568; outputs of more than a layer: Li et al. 2021, arXiv:2102.05426
    """

    renews = True  # so that `soft` may ramp

    bits: int = setting(4, "bits per value", low=1, high=8)
    symmetric: bool = setting(False, "levels mirrored at 0")
    per: str = setting("group", "what has its own scale", choices=("channel", "tensor", "group"))
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    range: str = setting("mse", "range that the levels span: all, or least error", choices=("minmax", "mse"))
    zero: str = setting(
        "float", "of asymmetric levels: float (any) or whole (0 is a level)", choices=("float", "whole")
    )
    scales: str = setting(
        "float16", "how scales and float zeros are stored", choices=("float32", "float16", "bfloat16")
    )
    steps: int = setting(500, "steps of Adam", low=0)
    polish: bool = setting(True, "turn single choices until none lowers the error")
    gather: str = setting("layer", "what is rounded between two runs of the data", choices=("block", "layer"))
    damp: float = setting(0.01, "share of the mean diagonal of H added to its diagonal", low=1e-8, high=1)
    original: bool = setting(True, "aim at the outputs of the model before this step, not at those on inputs as now")
    soft: float | Ramp = setting(0.0, "inside train, how soft choices are: 1 as h(v), 0 whole", low=0, high=1)

    def refuses(self, target: Target) -> str | None:
        module = target.module
        if not isinstance(module, (nn.Linear, _ConvNd)) or target.places[0][1] != "weight":
            return f"it is no weight of a linear or convolution layer but of {type(module).__name__}"
        if isinstance(module, _ConvTransposeNd):
            return "the weights of a transposed convolution share no inputs; take quantize.affine"
        return None if target.tensor.numel() else "it is empty"

    def needs_at(self, place: str) -> tuple[str, ...]:
        return (("gram", "cross") if self.original else ("gram",)) if place == "weight" else ()

    def order(self) -> str | None:
        return self.gather

    @property
    def _gptq(self) -> Any:
        """The codec with the same levels, which finds their ranges and stores what was chosen."""
        own = ("bits", "symmetric", "per", "group", "range", "zero", "scales", "damp", "original")
        return make("quantize.gptq", {name: getattr(self, name) for name in own} | {"columns": "loud", "rounds": 0})

    def fit(self, x: Tensor, stats: Stats) -> State:
        """State(scale, zero, low, step, v): of each weight the lower of its two values, the way to the upper one, and
        the choice, positive for the upper; low and step are 0 where weights are pruned."""
        if "gram" not in stats.gathered:
            raise RuleError(f"{self.name} needs the second moments of the layer's inputs, which are not known")
        if stats.inside is not None and stats.inside.before is not None:
            return stats.inside.before
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if stats.where is not None:
            wide = wide.masked_fill(~stats.where, 0)
        gram: Tensor = stats.gathered["gram"].to(x.device)
        h = torch.stack([damped(one, self.damp) for one in gram])
        goal = self._goal(wide, h, gram, stats)
        grid = self._gptq.fit(wide, stats)
        form: Affine = self._gptq.encode(wide, grid).form
        zero = getattr(grid, "zero", None)
        step = form.spread(grid.scale, x.shape).expand_as(wide)
        shift = torch.zeros_like(wide) if zero is None else form.spread(zero, x.shape)
        first, last = uniform.limits(self.bits, zero is None)
        at = goal / step + shift
        floor = at.floor().clamp(first, last - 1)
        v = torch.logit(((at - floor).clamp(0, 1) - LOW) / (HIGH - LOW))
        low = (floor - shift) * step
        if stats.where is not None:
            low, step = low.masked_fill(~stats.where, 0), step.masked_fill(~stats.where, 0)
        if stats.inside is None or not self.soft:
            up = self._choose(goal, low, step, v, h)
            v = torch.where(up == (v >= 0), v, torch.where(up, EDGE, -EDGE))
        return State(scale=grid.scale, zero=zero, low=low, step=step, v=v, learn=("v",))

    def _goal(self, w: Tensor, h: Tensor, gram: Tensor, stats: Stats) -> Tensor:
        """What would be best if it had not to be rounded."""
        if not self.original or "cross" not in stats.gathered:
            return w
        parts = zip(rows(w, len(h)), h, stats.gathered["cross"].to(w.device), gram, strict=True)
        return torch.stack([aimed(*part) for part in parts]).reshape(w.shape)

    def _choose(self, goal: Tensor, low: Tensor, step: Tensor, v: Tensor, h: Tensor) -> Tensor:
        """Which weights take their upper value: bool in the layout of a weight."""
        task = _Task(rows(low - goal, len(h)), rows(step, len(h)), h)
        nearest = rows(v >= 0, len(h))
        found = task.learn(rows(v, len(h)), self.steps) >= 0 if self.steps else nearest
        if self.polish:
            found, nearest = task.polish(found), task.polish(nearest) if self.steps else nearest
        better = task.error(found) <= task.error(nearest)
        return torch.where(better[..., None], found, nearest).reshape(goal.shape)

    def encode(self, x: Tensor, state: State) -> Encoded:
        known: Any = state
        values = torch.where(known.v.detach() >= 0, known.low + known.step, known.low)
        chosen = State(scale=known.scale, zero=getattr(known, "zero", None), shift=values - x)
        stored: Encoded = self._gptq.encode(x, chosen)
        return stored

    def simulate(self, x: Tensor, state: State) -> Tensor:
        """The choices learn; x, which they replace, has their gradient."""
        assert not isinstance(self.soft, Ramp)  # the loop resolves it
        known: Any = state
        chosen = _stretched(known.v / (self.soft or 1)).clamp(0, 1)
        if not self.soft:
            chosen = (known.v >= 0).to(chosen.dtype) + (chosen - chosen.detach())
        values: Tensor = known.low + chosen * known.step
        return values.to(x.dtype) + (x - x.detach())


EDGE = 0.1  # |v| of a choice against the nearest level


def _stretched(v: Tensor) -> Tensor:
    return torch.sigmoid(v) * (HIGH - LOW) + LOW


class _Task:
    """Rows of choices u in 0..1 that minimise d^T h d with d = miss + u * step.

    miss, step, u [groups, out, k], h [groups, k, k].  Rows are independent, and scaled so that a choice that counts by
    itself weighs about 1.
    """

    def __init__(self, miss: Tensor, step: Tensor, h: Tensor):
        self.exact = (miss, step, h)
        weight = (step.square() * h.diagonal(dim1=1, dim2=2)[:, None].to(step.dtype)).mean(2, keepdim=True)
        unit = weight.sqrt().clamp_min(torch.finfo(weight.dtype).tiny)
        self.miss, self.step, self.h = miss / unit, step / unit, h.to(step.dtype)

    def error(self, up: Tensor) -> Tensor:
        """[g, out]"""
        miss, step, h = self.exact
        d = (miss + up * step).to(h.dtype)
        return ((d @ h) * d).sum(2)

    def learn(self, v: Tensor, steps: int) -> Tensor:
        """Nagel et al., eq. 21 to 25, by Adam with the gradient written out."""
        v, mean, square = v.clone(), torch.zeros_like(v), torch.zeros_like(v)
        for t in range(1, steps + 1):
            sigmoid = torch.sigmoid(v)
            h = (sigmoid * (HIGH - LOW) + LOW).clamp_(0, 1)
            slope = (self.miss + h * self.step) @ self.h
            slope.mul_(self.step).mul_(2)
            beta, way = END + (START - END) * (1 - t / steps), 2 * h - 1
            slope.sub_(way.abs().pow_(beta - 1).mul_(way.sign()), alpha=2 * beta * STRENGTH)
            slope.mul_(sigmoid * (1 - sigmoid)).mul_((HIGH - LOW) * ((h > 0) & (h < 1)))
            mean.lerp_(slope, 0.1)
            square.mul_(0.999).addcmul_(slope, slope, value=0.001)
            root = (square / (1 - 0.999**t)).sqrt_().add_(1e-8)
            v.addcdiv_(mean, root, value=-RATE / (1 - 0.9**t))
        return v

    def polish(self, up: Tensor) -> Tensor:
        """Turn the one choice of each row that lowers its error most, until none lowers any."""
        up = up.clone()
        for u, miss, step, h in zip(up, self.miss, self.step, self.h, strict=True):
            _turn(u, miss, step, h)
        return up


def _turn(up: Tensor, miss: Tensor, step: Tensor, h: Tensor) -> None:
    """`_Task.polish` of one group, in place."""
    active = torch.arange(len(up), device=up.device)
    own = h.diagonal()
    pull = 2 * (miss + up * step) @ h
    move = torch.where(up, -step, step)
    for _ in range(MOST * up.shape[1]):
        gain, at = (move * (pull[active] + move * own)).min(1)
        helps = gain < -LEAST
        active, at, move = active[helps], at[helps], move[helps]
        if not len(active):
            return
        turned = move.gather(1, at[:, None])
        pull[active] += 2 * turned * h[at]
        move.scatter_(1, at[:, None], -turned)
        up[active, at] = ~up[active, at]


# Choices turned in a row per weight, at most, and what a turn must gain at least, in units of `_Task`.
MOST = 4
LEAST = 1e-4
