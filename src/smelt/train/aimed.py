"""Layers fitted one after another, each to what it gave before any was changed, on what enters it now, and replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from smelt.core.apply import CALIBRATION_BATCHES
from smelt.core.edit import Edit, Note, Replace
from smelt.core.method import Known
from smelt.core.target import Target
from smelt.core.target import targets as all_targets
from smelt.core.walk import walk
from smelt.graph.factors import Speed
from smelt.graph.reads import outside
from smelt.statistics.gram import aimed, damped

Fit = Callable[[Target, Tensor, Tensor], Tensor]
# (target, w, metric) -> the new layers, and the weight that they amount to
Make = Callable[[Target, Tensor, Tensor], tuple[Replace, Tensor]]
Dense = Callable[[Target], str | None]


@torch.no_grad()
def replaced(
    model: nn.Module,
    targets: Sequence[Target],
    known: Known,
    dense: Dense,
    make: Make,
    *,
    damp: float | None,
    faster: bool,
) -> tuple[list[Edit], list[Edit]]:
    """(edits of the layers that can be made anew, in the order in which they are fitted; notes of the others).

    dense: why a layer stays as it is, if it does.
    damp: as in `in_order`; None fits the weights without data.
    faster: layers that run no faster on the example stay dense, too.
    """
    read = outside(model)
    reasons = {t.name: read.get(t.places[0][0]) or dense(t) for t in targets}
    members = [t for t in targets if not reasons[t.name]]
    speed = None
    if faster:
        speed = Speed(model, [t.places[0][0] for t in members], known.example(model, "to time layers on"))
    edits: list[Edit] = []

    def put(target: Target, w: Tensor, metric: Tensor) -> Tensor:
        found, made = make(target, w, metric)
        slower = speed.slower(found) if speed else None
        edits.append(Note(target.name, slower) if slower else found)
        return target.tensor if slower else made

    if damp is not None and members:
        in_order(model, members, known, damp, put)
    else:
        by_weight(members, put)
    return edits, [Note(name, reason) for name, reason in reasons.items() if reason]


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
