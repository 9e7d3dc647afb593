from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.core.errors import DataError
from smelt.core.method import Objective, Seen
from smelt.core.settings import Ramp, setting


@dataclass(frozen=True)
class Logits(Objective):
    """Follow the teacher's softened outputs.

    L = alpha L_hard + (1 - alpha) T^2 D, over the last dimension, averaged over all others, where p and q are what the
    teacher and the student give after softmax(z / T), and

        kd         D = KL(p || q)
        decoupled  D = target KL(p_t, 1 - p_t || q_t, 1 - q_t) + others KL(p^ || q^)

    with p_t the share of the label, and p^ the distribution over the other classes alone; `kd` is the same with
    target = 1, others = 1 - p_t.  With `standardize`, z first becomes (z - mean) / deviation over the classes, so that
    the student need not give logits as large as the teacher's.

    applies to: classifiers and language models, any layer
    needs a pretrained model: yes, as the teacher
    needs data: yes; labels when alpha > 0, or decoupled
    needs training: yes
    good at: recovering what pruning, sharing or low bits lost
    bad at: students that are too small to follow; costs one forward pass of the teacher
    source: Hinton et al. 2015, arXiv:1503.02531; Zhao et al. 2022, arXiv:2203.08679; Sun et al. 2024, arXiv:2403.01427
    """

    needs_teacher = True

    temperature: float = setting(4.0, "softens both distributions", low=0.01)
    alpha: float | Ramp = setting(0.5, "share of the hard loss on the labels", low=0, high=1)
    kind: str = setting("kd", "what is compared", choices=("kd", "decoupled"))
    target: float | Ramp = setting(1.0, "decoupled: weight of the label's class against all others", low=0)
    others: float | Ramp = setting(8.0, "decoupled: weight of the other classes among themselves", low=0)
    standardize: bool = setting(False, "logits of mean 0 and deviation 1, of both")

    def hard_weight(self) -> float:
        assert not isinstance(self.alpha, Ramp)  # the loop resolves it
        return self.alpha

    def loss(self, seen: Seen) -> Tensor:
        if seen.teacher is None:
            raise DataError("distill.logits needs a teacher; give Job(teacher=...) or training(..., teacher=...)")
        if seen.teacher.shape != seen.outputs.shape:
            raise DataError(
                f"distill.logits: the outputs are {list(seen.outputs.shape)}, the teacher's {list(seen.teacher.shape)}"
            )
        t = self.temperature
        student, teacher = (self._scaled(z).flatten(0, -2) for z in (seen.outputs, seen.teacher))
        if self.kind == "kd":
            apart = _kl(student.log_softmax(-1), teacher.log_softmax(-1))
        else:
            apart = self._decoupled(student, teacher, _labels(seen))
        return (1 - self.hard_weight()) * t * t * apart

    def _scaled(self, logits: Tensor) -> Tensor:
        z = logits.float()
        if self.standardize:
            z = (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True).clamp_min(1e-7)
        return z / self.temperature

    def _decoupled(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        assert not isinstance(self.target, Ramp) and not isinstance(self.others, Ramp)
        kept = labels >= 0  # others are padding
        student, teacher, labels = student[kept], teacher[kept], labels[kept]
        own = F.one_hot(labels, student.shape[1]).bool()
        binary, rest = [], []
        for z in (student, teacher):
            inside, outside = z[own], z.masked_fill(own, -torch.inf).logsumexp(-1)
            binary.append(torch.stack([inside, outside], 1).log_softmax(-1))
            rest.append(z[~own].reshape(len(z), -1).log_softmax(-1))
        return self.target * _kl(*binary) + self.others * _kl(*rest)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log probabilities [n, classes], averaged over n."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _labels(seen: Seen) -> Tensor:
    labels = seen.labels
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != seen.outputs.shape[:-1]:
        found = list(labels.shape) if isinstance(labels, Tensor) else "none"
        raise DataError(
            f"distill.logits: decoupled needs a class for each output, {list(seen.outputs.shape[:-1])}; labels: {found}"
        )
    return labels.flatten().long()
