from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.edit import Edit, Replace
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.factors import Part, chain, conv, refusal
from smelt.grids.clusters import together
from smelt.grids.terms import Supported, fit
from smelt.train.aimed import replaced

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Grouped(Rewrite):
    """A convolution becomes one in groups, between shuffles of channels, and perhaps a pointwise one behind it.

    Which inputs and outputs stand together is found by turns, so that most of the kernel's energy stays inside
    groups of equal size: the sum over o and c in one group of w[o, c] H[c, c] w[o, c]^T, with H the second moments of
    what the kernel is laid over.  Then the kernels that are left are fitted to the layer's output (least squares), with
    `pointwise` by turns with a 1 x 1 layer that mixes all groups and takes the place of the second shuffle.  Layers are
    fitted in the order in which they run, on what enters them now, to what they gave before; with `weighted: false` H
    is the identity, and the kernel is fitted.  Layers whose channels do not divide into the groups, or that would need
    no fewer weights, stay dense; with `keep: faster` also those that run no faster on the first batch.

    applies to: 1-D and 2-D convolutions with groups = 1
    needs a pretrained model: yes
    needs data: yes, a few batches without labels; weighted: false needs none
    needs training: yes, to recover: distillation of the logits
    good at: wide convolutions: fewer weights and multiplications by the number of groups, in ordinary layers
    bad at: accuracy without training, where channels of a trained network hardly fall into groups
    source: Zhang et al. 2018, arXiv:1707.01083 (groups and shuffle); Dhillon 2001 (clusters of rows and columns)
    """

    groups: int = setting(4, "groups of channels", low=2)
    pointwise: bool = setting(False, "put a 1 x 1 convolution behind the groups")
    weighted: bool = setting(True, "count errors as they show at the layer's output")
    damp: float = setting(0.01, "weighted: added to the diagonal of the moments, a share of its mean", low=0, high=1)
    starts: int = setting(8, "random starts of the search for groups", low=0, high=10_000)
    turns: int = setting(10, "pointwise: times that all terms are fitted anew, at most", low=0, high=10_000)
    keep: str = setting("smaller", "which new layers are taken", choices=("smaller", "faster"))

    def refuses(self, target: Target) -> str | None:
        return refusal(target, CONVOLUTIONS)

    def _dense(self, target: Target) -> str | None:
        """Why its layer stays as it is."""
        out, inputs = target.tensor.shape[:2]
        for count, what in ((inputs, "inputs"), (out, "outputs")):
            if count % self.groups:
                return f"its {count} {what} do not divide into {self.groups} groups"
        dense = target.tensor.numel()
        need = dense // self.groups + (out * out if self.pointwise else 0)
        return f"the new layers would need {need:,} weights, it has {dense:,}" if need >= dense else None

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        damp, faster = self.damp if self.weighted else None, self.keep == "faster"

        def make(target: Target, w: Tensor, metric: Tensor) -> tuple[Replace, Tensor]:
            return self._split(target, w, metric, known.seed)

        edits, notes = replaced(model, targets, known, self._dense, make, damp=damp, faster=faster)
        return [*edits, *notes]

    def _split(self, target: Target, w: Tensor, metric: Tensor, seed: int) -> tuple[Replace, Tensor]:
        """What comes closest to w [out, in * taps], and the kernel that it amounts to."""
        out, inputs = target.tensor.shape[:2]
        taps = w.shape[1] // inputs
        own = torch.arange(inputs, device=w.device)
        blocks = metric.reshape(inputs, taps, inputs, taps)[own, :, own]
        kernels = w.reshape(out, inputs, taps)
        energy = torch.einsum("ock,ckl,ocl->oc", kernels, blocks, kernels).clamp_min(0)
        rows, columns = (g.to(w.device) for g in together(energy, self.groups, self.starts, seed))
        before, after = (g.argsort(stable=True) for g in (columns, rows))
        places = before.reshape(self.groups, -1, 1) * taps + torch.arange(taps, device=w.device)
        support = Supported(metric, torch.zeros_like(w), rows[after].tolist(), places.flatten(1))
        left = torch.eye(out, dtype=w.dtype, device=w.device)[:, after]
        found = fit(w, metric, support, left, turns=1)
        if self.pointwise:
            support.rows = found.right
            found = fit(w, metric, support, turns=self.turns)
        inner = found.right.reshape(out, inputs, taps)
        mine = before.reshape(self.groups, -1)[rows[after]]  # [out, in / groups]
        kernel = inner.gather(1, mine[:, :, None].expand(-1, -1, taps)).reshape(out, -1, *target.tensor.shape[2:])
        axes = range(target.tensor.dim() - 2)
        module: Any = target.module
        parts: list[Part] = [conv(module, kernel, axes, self.groups)]
        if self.pointwise:
            parts.append(conv(module, found.left.reshape(out, out, *[1] * len(axes))))
        back = [] if self.pointwise else after.argsort().tolist()
        return _shuffled(chain(target, parts), before.tolist(), back, after), found.left @ found.right


def _shuffled(edit: Replace, before: list[int], back: list[int], after: Tensor) -> Replace:
    """The same chain between shuffles, where there is something to shuffle; the bias stands in the order of the outputs
    of its layer."""
    values = dict(edit.values)
    if back and "0.bias" in values:
        values["0.bias"] = values["0.bias"][after]
    orders = {name: order for name, order in (("before", before), ("after", back)) if order != list(range(len(order)))}
    moved = 1 if "before" in orders else 0
    values = {f"{int(k.split('.')[0]) + moved}.{k.split('.')[1]}": v for k, v in values.items()}
    if not orders:
        return edit
    return Replace(edit.path, "shuffled", {**edit.arguments, **orders}, values)
