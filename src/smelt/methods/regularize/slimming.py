from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from smelt.core.method import Objective, Seen
from smelt.core.settings import Ramp, setting
from smelt.core.target import Target


@dataclass(frozen=True)
class Slimming(Objective):
    """Draw the scales of batch norms to zero, so that channels switch themselves off.

    L = strength * sum |gamma|, over the batch norms that `on` selects (all by default).

    applies to: scales (gamma) of batch norms
    needs a pretrained model: no
    needs data: yes, to train on
    needs training: yes, it is a term of the loss
    good at: convolutional networks whose channels are cut by the scale of their batch norm afterwards
    bad at: networks without batch norm; shrinking alone
    source: Liu et al. 2017, arXiv:1708.06519, eq. 1
    """

    needs_weights = True
    all_kinds = True

    strength: float | Ramp = setting(1e-4, "factor of the sum of magnitudes", low=0)

    def refuses(self, target: Target) -> str | None:
        if isinstance(target.module, _BatchNorm) and target.places[0][1] == "weight":
            return None
        return f"it is no scale of a batch norm but stands in a {type(target.module).__name__}"

    def loss(self, seen: Seen) -> Tensor:
        assert not isinstance(self.strength, Ramp)  # the loop resolves it
        total = seen.outputs.new_zeros(())
        for weight in seen.weights.values():
            total = total + weight.x.float().abs().sum()
        return self.strength * total
