"""Layers fitted one after another, each to what it gave before any was changed, on what enters it now."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from smelt.core.apply import CALIBRATION_BATCHES
from smelt.core.method import Known
from smelt.core.target import Target
from smelt.core.target import targets as all_targets
from smelt.core.walk import walk
from smelt.statistics.gram import aimed, damped

Fit = Callable[[Target, Tensor, Tensor], Tensor]


@torch.no_grad()
def in_order(model: nn.Module, members: Sequence[Target], known: Known, damp: float, fit: Fit) -> None:
    """Call `fit(target, w, metric)` for each layer, in the order in which they run; the model is not changed.

    w: float64 [out, k], the weight (of one group) that gives on today's inputs what the layer gave before.
    metric: float64 [k, k], the second moments of these inputs, with `damp` of their mean added to the diagonal: the
        layer's squared error, with v in place of w, is the sum over rows of (v - w) metric (v - w)^T.
    fit: returns the weight that takes effect, of any shape; the layers behind see it.

    Raises:
        DataError: no batches.
        ModelError: the forward pass fails.
    """
    known.example(model, "to weigh errors by the inputs of the layers (weighted: true)")
    now = copy.deepcopy(model)
    named = {t.name: t for t in members}
    theirs = [t for t in all_targets(now) if t.name in named]
    for part, gather in walk(now, theirs, known.batches or (), CALIBRATION_BATCHES, "layer"):
        moments = gather(("gram", "cross"))
        for twin in part:
            gram, cross = (moments[twin.name][name][0] for name in ("gram", "cross"))
            metric = damped(gram, damp)
            w = aimed(twin.tensor.detach().flatten(1).double(), metric, cross, gram)
            twin.tensor.copy_(fit(named[twin.name], w, metric).reshape(twin.tensor.shape))


def by_weight(members: Sequence[Target], fit: Fit) -> None:
    """The same without data: w is the weight itself, and every input counts alike."""
    for target in members:
        w = target.tensor.detach().flatten(1).double()
        fit(target, w, torch.eye(w.shape[1], dtype=w.dtype, device=w.device))
