from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from smelt.core.edit import Edit, Note
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.carry import Carried, carried
from smelt.graph.fold import backward, forward
from smelt.graph.norms import Norm
from smelt.graph.work import RefusedError, Trial, Work


@dataclass(frozen=True)
class FoldNorm(Rewrite):
    """Norms disappear into the layers beside them; outputs stay.

    `of: batch`: with a = gain / sqrt(variance + eps) and c = bias - a mean of a batch norm, the layer before it gets
    a W and a b + c (a bias, if it had none), and the norm goes.  Where no layer stands right before it, the layers that
    read it get W diag(a) and b + W c, which a convolution that pads does not allow.  `of: gain`: of norms that run over
    what they are given (LayerNorm, RMSNorm, and modules that act like them) gain and bias move into all layers that
    read them, and are 1 and 0 then.  Who stands beside whom is found by running the first batch; whatever changes the
    outputs on it is left alone.  Inside `train` it acts at the start.

    applies to: batch norm beside linear layers and (transposed) convolutions; LayerNorm and RMSNorm before them
    needs a pretrained model: yes
    needs data: a batch, to run the model
    needs training: no
    good at: one tensor and one pass less per norm; what integer kernels and other rewrites ask for first
    bad at: norms behind additions or activations
    source: Jacob et al. 2018, arXiv:1712.05877, section 3.2; of gains: Ashkboos et al. 2024, arXiv:2401.15024
    """

    of: str = setting("batch", "which norms", choices=("batch", "gain", "all"))
    tolerance: float = setting(1e-4, "largest change of an output, over the largest output", low=0)

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        example = known.example(model, "to find what stands beside its norms by running the model")
        found = carried(model, example)
        wanted = {target.name for target in targets}
        trial = Trial(model, example, found.norms, self.tolerance)
        changes = []
        for norm in found.norms.values():
            beside = {name for t in found.teams if _touches(t.places, norm) for name in t.names()}
            if self.of in ("all", "batch" if norm.kind == "batch" else "gain") and (not beside or beside & wanted):
                changes.append((norm.gain or norm.path, partial(_fold, found=found, norm=norm)))
        edits = trial.run(changes)
        return [*edits, *(Note(name, reason) for name, reason in trial.refused.items())]


def _touches(places: object, norm: Norm) -> bool:
    return any(p.tensor in (norm.gain, norm.path) for p in places)  # type: ignore[attr-defined]


def _fold(work: Work, found: Carried, norm: Norm) -> None:
    if norm.kind != "batch":
        forward(work, found, norm)
        return
    try:
        backward(work, found, norm)
    except RefusedError as first:
        try:
            forward(work, found, norm)
        except RefusedError as second:
            raise RefusedError(f"before it: {first}; behind it: {second}") from None
