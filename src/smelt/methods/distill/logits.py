from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from smelt.core.errors import DataError
from smelt.core.method import Objective, Seen
from smelt.core.settings import setting


@dataclass(frozen=True)
class Logits(Objective):
    """Follow the teacher's softened outputs.

    L = alpha L_hard + (1 - alpha) T^2 KL(softmax(teacher / T) || softmax(student / T)), over the last dimension,
    averaged over all others.  alpha = 0 needs no labels.

    applies to: classifiers and language models, any layer
    needs a pretrained model: yes, as the teacher
    needs data: yes, labels only when alpha > 0
    needs training: yes
    good at: recovering what pruning, sharing or low bits lost
    bad at: students that are too small to follow; costs one forward pass of the teacher
    source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2
    """

    needs_teacher = True

    temperature: float = setting(4.0, "softens both distributions", low=0.01)
    alpha: float = setting(0.5, "share of the hard loss on the labels", low=0, high=1)

    def hard_weight(self) -> float:
        return self.alpha

    def loss(self, seen: Seen) -> Tensor:
        if seen.teacher is None:
            raise DataError("distill.logits needs a teacher; give Job(teacher=...) or training(..., teacher=...)")
        if seen.teacher.shape != seen.outputs.shape:
            raise DataError(
                f"distill.logits: the outputs are {list(seen.outputs.shape)}, the teacher's {list(seen.teacher.shape)}"
            )
        t = self.temperature
        student = F.log_softmax(seen.outputs.float() / t, -1).flatten(0, -2)
        teacher = F.log_softmax(seen.teacher.float() / t, -1).flatten(0, -2)
        return (1 - self.alpha) * t * t * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
