from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats, Values
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms.crossed import Crossed
from smelt.grids import rate
from smelt.statistics.gram import aimed, rows

BITS = 3.0  # where nothing else is given


@dataclass(frozen=True)
class Entropy(Codec):
    """Whole numbers without a limit, rounded so that the file is small once `code.entropy` has written them.

    `bits` is what a weight costs in the file, scales included, as a mean over all that the step selects; which tensors,
    rows and columns get more follows from their `error`, so that a bit is worth the same everywhere:

        loss      what a layer's change does to the task's loss, by second order: tr(G E H E^T) with H of the layer's
                  inputs and G of the loss's slopes at its outputs (the factors of K-FAC); weights make up for the
                  errors of those in their row and in their column
        outputs   the same with G = 1: the change of the layer's outputs; no labels, no backward pass
        weights   squared errors of the weights; no data

    Steps of rows and columns are such that all errors are equally dear (reverse water-filling); they are stored in a
    byte each.  With `original` the outputs aimed at are those of the model before this step.  Pruned weights stay 0.

    applies to: linear and convolution, grouped too; error: weights every floating tensor
    needs a pretrained model: yes
    needs data: yes, a few thousand positions per layer; labels are drawn where there are none; none for error: weights
    needs training: no, down to about 2 bits
    good at: the smallest file at a given loss, 1.5 to 5 bits; mixed precision by itself
    bad at: kernels for whole numbers, which want 4 or 8 bits; models whose second moments do not fit in memory
    source: G and H: Tseng et al. 2025, arXiv:2505.22988; original: Li et al. 2025, arXiv:2504.02692
    """

    bits: float = setting(BITS, "bits per weight in the file, on average over what is selected", low=0.01, high=16)
    step: float | None = setting(None, "step in place of bits: of the weights, or of the square root of the error")
    error: str = setting("loss", "what errors are measured by", choices=("loss", "outputs", "weights"))
    original: bool = setting(True, "aim at the outputs of the model before this step, not at those on inputs as now")
    price: float = setting(0.0, "what a bit costs where codes are chosen, in squared steps: 0 rounds", low=0, high=4)
    gather: str = setting("layer", "what is rounded between two runs of the data", choices=("block", "layer"))
    damp: float = setting(0.03, "share of the mean diagonal of H added to its diagonal", low=1e-8, high=10)
    spread: float = setting(0.3, "the same of G", low=1e-8, high=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and self.step <= 0:
            raise RecipeError(f"{self.name}.step is {self.step}; it takes a number above 0")
        if self.step is not None and self.bits != BITS:
            raise RecipeError(f"{self.name}: step {self.step} decides the bits; take one of the two out")

    def refuses(self, target: Target) -> str | None:
        module = target.module
        if not target.tensor.is_floating_point():
            return f"it is {target.tensor.dtype}; only floating tensors can be stored in fewer bits"
        if not target.tensor.numel() or not target.tensor.dim():
            return "it is a single number" if target.tensor.numel() else "it is empty"
        if self.error == "weights":
            return None
        if not isinstance(module, (nn.Linear, _ConvNd)) or target.places[0][1] != "weight":
            return (
                f"it is no weight of a linear or convolution layer but of {type(module).__name__}; error: weights can"
            )
        if isinstance(module, _ConvTransposeNd):
            return "the weights of a transposed convolution share no inputs; error: weights can"
        return None

    def needs_at(self, place: str) -> tuple[str, ...]:
        if self.error == "weights" or place not in ("plan", "weight"):
            return ()
        more = self.error == "loss" if place == "plan" else self.original
        return ("gram", "slopes" if place == "plan" else "cross") if more else ("gram",)

    def order(self) -> str | None:
        return None if self.error == "weights" else self.gather

    def plan(
        self, tensors: Mapping[str, Values], scout: Mapping[str, Any], cost: Callable[[Encoded], int]
    ) -> dict[str, Codec]:
        """One step for all tensors: that at which they have `bits` together."""
        if self.step is not None:
            return dict.fromkeys(tensors, self)
        layers = [self._layer(v.x, v.where, scout.get(name, {})) for name, v in tensors.items()]
        count = max(1, sum(layer.count() for layer in layers))
        loud = sum(layer.count() * layer.loudness() for layer in layers) / count
        step = rate.step_for(self.bits, lambda step: sum(layer.bits(step) for layer in layers) / count, loud)
        return dict.fromkeys(tensors, replace(self, bits=BITS, step=step))

    def fit(self, x: Tensor, stats: Stats) -> State:
        """State(step, rows, columns, shift, mask): parts of the form, and what moves x before it is rounded."""
        if self.error != "weights" and "gram" not in stats.gathered:
            raise RuleError(f"{self.name} needs the second moments of the layer's inputs, which are not known")
        if self.step is None:
            planned = self.plan({"": Values(x, stats.where)}, {"": stats.gathered}, lambda _: 0)[""]
            return planned.fit(x, stats)
        layer = self._layer(x, stats.where, stats.gathered)
        wanted = layer.x
        if "cross" in stats.gathered and layer.h is not None:
            gram, cross = (stats.gathered[name].to(x.device) for name in ("gram", "cross"))
            parts = zip(rows(wanted, len(gram)), layer.h, cross, gram, strict=True)
            wanted = torch.stack([aimed(*part) for part in parts]).reshape(x.shape)
        codes = layer.codes(self.step, wanted, self.price)
        values, stretch = codes * (self.step * layer.unit), 1.0
        if self.error == "weights" and bool(codes.any()):  # least squares
            stretch = float((wanted * values).sum() / values.square().sum())
        step = x.new_tensor(self.step * layer.base * stretch, dtype=wanted.dtype)
        shift = values * stretch - layer.x
        return State(step=step, rows=layer.rows, columns=layer.columns, shift=shift, mask=stats.where)

    def _layer(self, x: Tensor, where: Tensor | None, known: Mapping[str, Any]) -> rate.Layer:
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        h, g = (
            None if self.error == "weights" or name not in known else _loaded(known[name].to(x.device), share)
            for name, share in (("gram", self.damp), ("slopes", self.spread))
        )
        scale = 1.0
        if h is not None and g is None:  # errors count as shares of what a layer gives
            flat = rows(wide, len(h)).double()
            scale = 1 / max(float(((flat @ known["gram"].to(x.device)) * flat).sum() / len(x)), NOTHING)
        return rate.Layer(wide, where, h, g, scale)

    def encode(self, x: Tensor, state: State) -> Encoded:
        known: Any = state
        count = x.numel() if known.mask is None else int(known.mask.sum())
        form = Crossed(rate.octave(known.rows.numel() + known.columns.numel(), count))
        steps = known.step * form.spread(known.rows, known.columns, x.shape)
        codes = ((x.detach() + known.shift) / steps).round_()
        if (mask := known.mask) is not None:
            codes = codes.where(mask, 0)
        parts = {"codes": rate.narrow(codes), "step": known.step.clone()}
        return Encoded(form, {**parts, "rows": known.rows.clone(), "columns": known.columns.clone()}, x.shape, x.dtype)


def _loaded(moments: Tensor, share: float) -> Tensor:
    """[groups, n, n] with a share of the mean of all diagonals added to them, so that they are positive definite."""
    mean = float(moments.diagonal(dim1=1, dim2=2).mean())
    added = share * mean if mean > 0 else NOTHING
    return moments + added * torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)


# What errors cost where the data say nothing.
NOTHING = 2.0**-60
