from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smelt.core.method import Objective, Seen
from smelt.core.settings import Ramp, setting


@dataclass(frozen=True)
class L1(Objective):
    """Draw weights to zero, each with the same force.

    L = strength * sum |w|, over the weights that `on` selects, as the model uses them: of a tied tensor once, of a
    stored one through its leaves, of a pruned one what is left.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: no
    needs data: yes, to train on
    needs training: yes, it is a term of the loss
    good at: making room for prune.weights: many weights come near zero that nothing needs
    bad at: shrinking alone: near zero is not zero; large weights are drawn as much as small ones
    source: Tibshirani 1996, Regression shrinkage and selection via the lasso, J. R. Statist. Soc. B 58(1)
    """

    needs_weights = True

    strength: float | Ramp = setting(1e-5, "factor of the sum of magnitudes", low=0)

    def loss(self, seen: Seen) -> Tensor:
        assert not isinstance(self.strength, Ramp)  # the loop resolves it
        total = seen.outputs.new_zeros(())
        for weight in seen.weights.values():
            total = total + weight.x.float().abs().sum()
        return self.strength * total
