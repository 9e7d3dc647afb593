from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from smelt.core.method import Objective, Seen, Weight
from smelt.core.settings import Ramp, setting
from smelt.core.target import Target


@dataclass(frozen=True)
class Group(Objective):
    """Draw whole channels or rows of weights to zero together.

    L = strength * sum over groups g of sqrt(n_g) |w_g|_2, where a group holds the n_g weights of one output channel (a
    filter, a row of a linear layer, an embedded word) or of one input channel.  Pruned weights do not count.

    applies to: weights of linear layers, convolutions (grouped and transposed, too) and embeddings
    needs a pretrained model: no
    needs data: yes, to train on
    needs training: yes, it is a term of the loss
    good at: making channels that can be cut out: smaller and faster everywhere
    bad at: shrinking alone; layers before a batch norm, which undoes any scale of its inputs
    source: Yuan & Lin 2006, J. R. Statist. Soc. B 68(1), eq. 2.1; Wen et al. 2016, arXiv:1608.03665, eq. 2 and 3
    """

    needs_weights = True

    strength: float | Ramp = setting(1e-4, "factor of the sum over the groups", low=0)
    over: str = setting("output", "channels that form the groups", choices=("output", "input"))

    def refuses(self, target: Target) -> str | None:
        return None if target.tensor.dim() > 1 else "it has one dimension, and no channels of several weights"

    def loss(self, seen: Seen) -> Tensor:
        assert not isinstance(self.strength, Ramp)  # the loop resolves it
        total = seen.outputs.new_zeros(())
        for weight in seen.weights.values():
            rows = self._rows(weight, weight.x).float()
            size = rows.shape[1] if weight.where is None else self._rows(weight, weight.where).sum(1)
            total = total + (torch.linalg.vector_norm(rows, dim=1) * size**0.5).sum()
        return self.strength * total

    def _rows(self, weight: Weight, x: Tensor) -> Tensor:
        """[groups, n]: one row per channel, of a module with `groups` each part having channels of its own."""
        transposed = isinstance(weight.module, _ConvTransposeNd)
        parts = getattr(weight.module, "groups", 1)
        if (self.over == "output") != transposed:  # the channels are the first dimension
            return x.flatten(1)
        channels: Tensor = x.unflatten(0, (parts, -1)).transpose(1, 2).flatten(0, 1)
        return channels.flatten(1)
