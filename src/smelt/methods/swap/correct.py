from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.edit import Edit, Note
from smelt.core.errors import DataError, RuleError
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.store import store_of
from smelt.core.target import Target
from smelt.core.target import targets as all_targets
from smelt.train.refit import SAMPLES, refit


@dataclass(frozen=True)
class Correct(Rewrite):
    """Biases and batch-norm statistics that make up for what storing the weights moved.

    The model of now and the one before anything was stored run side by side over up to 1,024 samples.  In the order in
    which the layers run, each bias is moved by the mean difference of what its layer gives, and each batch norm that
    sees other values than before takes the mean and variance of what it sees now, so that every layer makes up for
    those before it, quantized inputs included.  A layer without a bias is left to the batch norm after it.  With
    `weights` also weights that are not stored yet, whose inputs are quantized already, are fitted to the original's
    outputs by least squares (He et al. 2017, arXiv:1707.06168, section 3.1).

    applies to: biases of linear and convolution layers, and batch norms, of a model whose weights are stored already
    needs a pretrained model: yes
    needs data: yes, a few batches without labels
    needs training: no
    good at: the shift of the mean that few bits leave, in depthwise convolutions above all
    bad at: errors that are not a shift; train the biases and norms for those
    source: Nagel et al. 2019, arXiv:1906.04721, section 4.2
    """

    norms: bool = setting(True, "estimate the statistics of batch norms anew, too")
    weights: bool = setting(False, "fit weights that are not stored, too, to inputs that are")

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        held = store_of(model)
        if not (held.entries or held.activations):
            return [Note("", "nothing of the model is stored yet; put it after the step that quantizes")]
        if known.original is None:
            raise RuleError(f"{self.name} compares with the model before it was stored; put it outside of train")
        if known.batches is None:
            raise DataError(f"{self.name} needs data to compare the models on; give the job data")
        tied = {t.name: t for t in all_targets(model)}
        original = known.original()
        there = dict(original.named_modules())
        notes: list[Edit] = []
        only = set()
        for target in targets:
            path = target.places[0][0]
            reason = _reason(target, self.weights) if path in there else "its layer was not there before"
            bias = tied.get(f"{path}.bias" if path else "bias")
            if not reason and bias is not None and bias.name in held.entries:
                reason = f"its bias is stored already, by {held.entries[bias.name].steps[0]}"
            if self.weights and target.name in held.entries:
                reason = (
                    f"it is stored already, by {held.entries[target.name].steps[0]}; weights: true comes before that"
                )
            if reason:
                notes.append(Note(target.name, reason))
            else:
                only.add(path)
        if self.norms:
            only |= {path for path, module in model.named_modules() if isinstance(module, _BatchNorm) and path in there}
        now = copy.deepcopy(model)
        edits = refit(original, now, {}, known.batches, weights=self.weights, seed=known.seed, only=only)
        return [*edits, *notes, Note("", f"{len(edits)} tensors were corrected on up to {SAMPLES:,} samples")]


def _reason(target: Target, weights: bool) -> str | None:
    """Why its layer is not corrected."""
    if not isinstance(target.module, (nn.Linear, _ConvNd)) or isinstance(target.module, _ConvTransposeNd):
        return f"{type(target.module).__name__} is no linear or convolution layer"
    if len(target.places) > 1:
        return "its weight stands in several places"
    return None if weights or target.module.bias is not None else "its layer has no bias"
