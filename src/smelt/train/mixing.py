"""MixUp and CutMix: samples of a batch, blended in pairs, with a loss that is blended alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt.core.data import describe
from smelt.core.errors import DataError
from smelt.core.train import Train


@dataclass(frozen=True)
class Mixed:
    """A batch whose sample i is `share` of its own and the rest of another one, with that one's `others` label."""

    inputs: Any
    labels: Any
    others: Any = None
    share: float = 1.0

    def loss(self, outputs: Any, labels: Any, loss: Callable[[Any, Any], Tensor]) -> Tensor:
        """`labels` as in the batch, on the device of the outputs."""
        if self.others is None:
            return loss(outputs, labels)
        others = self.others.to(labels.device)
        return self.share * loss(outputs, labels) + (1 - self.share) * loss(outputs, others)


def mixed(act: Train, inputs: Any, labels: Any, seed: int) -> Mixed:
    """The batch, blended as `act` says.

    MixUp    x = share x_i + (1 - share) x_j (Zhang et al. 2018, arXiv:1710.09412)
    CutMix   a box of x_j stands in x_i, (1 - share) of its pixels (Yun et al. 2019, arXiv:1905.04899)

    Raises:
        DataError: inputs that are no floating tensor (CutMix: no images [n, c, h, w]).
    """
    if not (act.mixup or act.cutmix):
        return Mixed(inputs, labels)
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()) or (act.cutmix and inputs.dim() != 4):
        what = "images [n, c, h, w]" if act.cutmix else "a floating tensor"
        raise DataError(f"{act.name}.{'cutmix' if act.cutmix else 'mixup'} needs {what}, not {describe(inputs)}")
    random = np.random.default_rng(seed)
    order = torch.from_numpy(random.permutation(len(inputs))).to(inputs.device)
    cut = bool(act.cutmix) and (not act.mixup or random.random() < 0.5)
    strength = act.cutmix if cut else act.mixup
    share = float(random.beta(strength, strength))
    if cut:
        inputs, share = _boxed(inputs, order, share, random)
    else:
        inputs = share * inputs + (1 - share) * inputs[order]
    others = labels[order.to(labels.device)] if isinstance(labels, Tensor) else None
    if share < 0.5:  # objectives look at one label: that of the larger part
        labels, others, share = others, labels, 1 - share
    return Mixed(inputs, labels, others, share)


def _boxed(inputs: Tensor, order: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """A box in the middle of anywhere, clipped at the borders; its real area counts."""
    height, width = inputs.shape[2:]
    side = (1 - share) ** 0.5
    spans = []
    for length in (height, width):
        middle, half = int(random.integers(length)), int(length * side) // 2
        spans.append(slice(max(0, middle - half), min(length, middle + half)))
    made = inputs.clone()
    made[:, :, spans[0], spans[1]] = inputs[order][:, :, spans[0], spans[1]]
    area = (spans[0].stop - spans[0].start) * (spans[1].stop - spans[1].start)
    return made, 1 - area / (height * width)
