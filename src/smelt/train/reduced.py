"""Layers of lower rank: what errors of a weight count by, and factors that are fitted in the order in which layers run.

    plain      |W - W'|^2
    fisher     the same with each input's column of W times the root of what the empirical Fisher matrix has for it,
               summed over the outputs (Hsu et al. 2022, arXiv:2207.00112)
    inputs     E |(W - W') x|^2, of what the layer gives for its inputs x (Wang et al. 2024, arXiv:2403.07378)
    loss       tr(G (W - W') E[x x^T] (W - W')^T), G = E[g g^T] of the slopes g at its outputs: twice what the loss
               rises by, to second order, with g and x as if independent (Chekalina et al. 2025, arXiv:2505.17974)

Each is |A^T (W - W') R|^2 with two roots (`statistics._roots`), so the best W' of a rank is known in closed form.
Where a layer has a bias, x is taken from its mean, and the bias makes up for what the mean does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smelt.core.apply import CALIBRATION_BATCHES, batches_of, weight_statistics
from smelt.core.method import Known
from smelt.core.target import Target
from smelt.core.target import targets as all_targets
from smelt.core.walk import walk
from smelt.graph import factors
from smelt.statistics._counts import shares
from smelt.statistics._roots import Root, Truncated, even
from smelt.statistics.gram import aimed, damped

NORMS = ("plain", "fisher", "inputs", "loss")
MOMENTS = ("inputs", "loss")


@dataclass(frozen=True)
class Norm:
    """What errors count by.

    damp: share of the mean diagonal of the inputs' moments that is added to it; spread: the same for slopes.
    """

    kind: str
    damp: float
    spread: float


@dataclass(frozen=True)
class Layer:
    """A layer to be split; `spatial` as in `factors.matrix`."""

    target: Target
    spatial: bool = False

    def matrix(self) -> Tensor:
        return factors.matrix(self.target.module, self.target.tensor.detach(), self.spatial)


@dataclass(frozen=True)
class Split:
    """left [m, r] @ right [r, n], and rest [m, n] where a few weights stay, of the layer's `matrix`; its new bias."""

    left: Tensor
    right: Tensor
    rest: Tensor | None
    bias: Tensor | None

    def product(self) -> Tensor:
        product = self.left @ self.right
        return product if self.rest is None else product + self.rest


@dataclass
class View:
    """One layer, and what is known of it.

    rows, columns: roots of the norm.
    wanted: what its matrix aims at, [m, n] in float64.
    gram: damped moments of its inputs, as they now are, of a spatial split.
    means: [2, k], of its inputs before the step and now, where it has a bias.
    now: its weight and bias in the model that changes.
    """

    layer: Layer
    wanted: Tensor
    rows: Root | None = None
    columns: Root | None = None
    gram: Tensor | None = None
    means: Tensor | None = None
    now: Sequence[Target] = field(default_factory=tuple)

    def squares(self) -> Tensor:
        """Squared singular values in the norm, falling."""
        found: Tensor = Truncated(self.wanted, self.rows, self.columns).squares
        return found

    def split(self, rank: int, count: int = 0, rounds: int = 1) -> Split:
        """The best factors of a rank, beside `count` weights that stay; the two take turns (Zhou & Tao 2011, GoDec)."""
        rest, best, least = torch.zeros_like(self.wanted), None, torch.inf
        for _ in range(rounds if count else 1):
            truncated = Truncated(self.wanted - rest, self.rows, self.columns)
            left, right = self._closed(*truncated.factors(rank), rest)
            off = self.wanted - left @ right
            if count:
                rest = self._largest(off, count)
            error = truncated.error(off - rest)
            if error < least:
                least, best = error, (left, right, rest)
        assert best is not None
        left, right, rest = best
        found = Split(left, right, rest if count else None, None)
        return Split(left, right, found.rest, self._bias(found.product()))

    def _largest(self, off: Tensor, count: int) -> Tensor:
        """The `count` entries that count most, alone."""
        score = off.abs()
        score = score if self.columns is None else score * self.columns.lengths()
        score = score if self.rows is None else score * self.rows.lengths()[:, None]
        index = score.flatten().topk(count).indices
        found = torch.zeros_like(off).flatten()
        found[index] = off.flatten()[index]
        return found.reshape(off.shape)

    def _closed(self, left: Tensor, right: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """For a spatial split the norm is of each column of the kernel alone; its second factor by least squares."""
        if self.gram is None:
            return left, right
        shape = self.layer.target.tensor.shape
        out, width, rank = shape[0], shape[3], right.shape[0]
        wanted = factors.folded(self.layer.target.module, self.wanted - rest, shape, True).flatten(1)
        gram = self.gram.reshape(len(left), width, len(left), width)
        seen = torch.einsum("ar,aqbs,bt->rqts", left, gram, left).reshape(rank * width, rank * width)
        pulled = torch.einsum("oaq,ar->orq", (wanted @ self.gram).reshape(out, len(left), width), left).flatten(1)
        second = pulled @ torch.linalg.pinv(seen, hermitian=True)
        return even(left, second.reshape(out, rank, width).transpose(0, 1).reshape(rank, -1))

    def _bias(self, product: Tensor) -> Tensor | None:
        bias = getattr(self.layer.target.module, "bias", None)
        if self.means is None or bias is None:
            return None
        module, weight = self.layer.target.module, self.layer.target.tensor.detach()
        new = factors.folded(module, product, weight.shape, self.layer.spatial).flatten(1)
        found: Tensor = bias.detach().double() + weight.flatten(1).double() @ self.means[0] - new @ self.means[1]
        return found

    def put(self, split: Split) -> None:
        """Let the model that changes have the weight and bias of a split."""
        for target, value in zip(self.now, (split.product(), split.bias), strict=False):
            if value is not None:
                shape = target.tensor.shape
                if target is self.now[0]:
                    value = factors.folded(self.layer.target.module, value, shape, self.layer.spatial)
                target.tensor.copy_(value)


class Views:
    """Views of the layers of a model.

    Args:
        layers: name of the weight -> layer.
        curved: gather slopes even where the norm does not need them.

    Raises:
        DataError: no data where the norm needs them; a layer that no batch reaches.
        ModelError: the forward pass fails.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        norm: Norm,
        known: Known,
        label: str,
        curved: bool = False,
    ):
        self.model, self.layers, self.norm, self.known, self.label = model, layers, norm, known, label
        members = [layer.target for layer in layers.values()]
        self.slopes: dict[str, Tensor] = {}
        if norm.kind == "loss" or curved:
            found = weight_statistics(model, ("slopes",), members, known, label)
            self.slopes = {name: by["slopes"][0] for name, by in found.items()}
        self._fisher = weight_statistics(model, ("fisher",) if norm.kind == "fisher" else (), members, known, label)
        self._shares: dict[str, Tensor] = {}
        if norm.kind in MOMENTS:
            paths = [t.places[0][0] for t in members if isinstance(t.module, nn.Embedding)]
            self._shares = shares(model, paths, batches_of(known, label), CALIBRATION_BATCHES)

    def each(self, names: Iterable[str], refit: bool = False) -> Iterator[View]:
        """Of the layers of these names; with `refit` in the order in which they run, each after those before it were
        `put` into a copy of the model, and aiming at what it gave before."""
        own = {name: self.layers[name] for name in names}
        if self.norm.kind not in MOMENTS or not own:
            for layer in own.values():
                yield self._alone(layer)
            return
        model = copy.deepcopy(self.model) if refit else self.model
        by_name = {t.name: t for t in all_targets(model)}
        beside = {name: by_name.get(_bias_of(layer.target)) for name, layer in own.items()}
        members = [t for name in own for t in (by_name[name], beside[name]) if t is not None]
        batches = batches_of(self.known, self.label)
        for part, gather in walk(model, members, batches, CALIBRATION_BATCHES, "layer", pairs=refit):
            weights = [t for t in part if t.name in own]
            names = ["gram"] + ["cross"] * refit + ["means"] * any(beside[t.name] is not None for t in weights)
            found = gather(names) if not isinstance(weights[0].module, nn.Embedding) else {}
            for target in weights:
                layer, bias = own[target.name], beside[target.name]
                view = self._seen(layer, found.get(target.name, {}), bias is not None)
                view.now = [target, *([bias] if bias is not None else [])] if refit else ()
                yield view

    def _alone(self, layer: Layer) -> View:
        wanted = layer.matrix().double()
        if self.norm.kind == "plain":
            return View(layer, wanted)
        fisher = self._fisher[layer.target.name]["fisher"].double()
        of_inputs = factors.matrix(layer.target.module, fisher, layer.spatial).sum(1 if layer.spatial else 0)
        root = Root(of_inputs, self.norm.damp)
        return View(layer, wanted, root, None) if layer.spatial else View(layer, wanted, None, root)

    def _seen(self, layer: Layer, found: dict[str, Tensor], biased: bool) -> View:
        module, weight = layer.target.module, layer.target.tensor.detach()
        slopes = self.slopes.get(layer.target.name) if self.norm.kind == "loss" else None
        outputs = None if slopes is None else damped(slopes, self.norm.spread)
        if isinstance(module, nn.Embedding):
            columns = Root(self._shares[layer.target.places[0][0]], self.norm.damp)
            return View(layer, layer.matrix().double(), None if outputs is None else Root(outputs), columns)
        gram = found["gram"][0]
        cross = found["cross"][0] if "cross" in found else gram
        means = found["means"][:, 0] if biased else None
        if means is not None:
            gram, cross = gram - torch.outer(means[1], means[1]), cross - torch.outer(means[0], means[1])
        near = damped(gram, self.norm.damp)
        flat = weight.flatten(1).double()
        wanted = flat if cross is gram else aimed(flat, near, cross, gram)
        if not layer.spatial:
            return View(layer, wanted, None if outputs is None else Root(outputs), Root(near), None, means)
        rows, width = weight.shape[1] * weight.shape[2], weight.shape[3]
        own = near.reshape(rows, width, rows, width).diagonal(dim1=1, dim2=3).mean(-1)
        heard = None if outputs is None else Root(torch.kron(outputs, torch.eye(width).to(outputs)))
        wide = factors.matrix(module, wanted.reshape(weight.shape), True)
        return View(layer, wide, Root(own), heard, near, means)


def _bias_of(target: Target) -> str:
    return f"{target.places[0][0]}.bias"
