from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Known, Look, Objective, Seen, State
from smelt.core.settings import Ramp, setting
from smelt.graph.pairs import Place, hidden, matched, named, places


@dataclass(frozen=True)
class Features(Objective):
    """Follow the teacher's hidden layers.

    L = strength * the sum over pairs of layers of one of (s of the student, t of the teacher, over n samples)

        hint        1/2 mean (r(s) - t)^2, r a learned linear map of the channels (1x1 convolution) where widths differ
        attention   1/2 mean over samples |Q_s / |Q_s| - Q_t / |Q_t||, Q the sum over channels of squares, at each place
        relational  distance * mean l(d_s - d_t) over pairs of samples, d their distance by its mean over all pairs,
                    + angle * mean l(c_s - c_t) over triples, c the cosine of their angle; l is Huber's loss
        similarity  1/n^2 |G_s - G_t|^2, G = Q Q^T of the flattened samples, each row divided by its length

    `pairs` names layers as "student: teacher"; patterns that name several pair them in order, at even distances.
    Without it, `layers` pairs are found by size and depth, by running one batch.  Where sizes of images differ, the
    larger is averaged down.  The map is trained with the student and is not in its file.

    applies to: hidden layers of networks whose sizes (pixels, tokens) the teacher has, too; relational: of any
    needs a pretrained model: yes, as the teacher
    needs data: yes, without labels
    needs training: yes
    good at: deep teachers; students cut from their teacher; beside distill.logits
    bad at: a strength that has to be found for each kind; memory for the hidden layers of both
    source: arXiv:1412.6550 eq. 3; arXiv:1612.03928 eq. 2; arXiv:1904.05068 eq. 5-10; arXiv:1907.09682 eq. 4
    """

    needs_teacher = True

    kind: str = setting("hint", "what is compared", choices=("hint", "attention", "relational", "similarity"))
    pairs: tuple | None = setting(None, 'names or patterns, ["student: teacher", ...]; none: found by size and depth')  # type: ignore[type-arg]
    layers: int = setting(3, "pairs that are found where none are named", low=1)
    projector: bool = setting(True, "hint: map widths that differ; without, they must be equal")
    strength: float | Ramp = setting(1.0, "weight of the term", low=0)
    distance: float | Ramp = setting(1.0, "relational: weight of distances", low=0)
    angle: float | Ramp = setting(2.0, "relational: weight of angles", low=0)

    def __post_init__(self) -> None:
        if isinstance(self.pairs, (Mapping, tuple)):
            object.__setattr__(self, "pairs", tuple(_texts(self.pairs)))
        super().__post_init__()
        for text in self.pairs or ():
            if not isinstance(text, str) or not all(side.strip() for side in text.split(":")) or text.count(":") != 1:
                raise RecipeError(f"{self.name}.pairs: {text!r} is no pair; write \"student's layer: teacher's layer\"")

    def look(self, model: nn.Module, teacher: Any, known: Known) -> Look:
        if not isinstance(teacher, nn.Module):
            raise DataError(f"{self.name} needs a module as the teacher, to see its hidden layers")
        try:
            inputs = known.example(model, "to see the sizes of hidden layers")
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        own, other = places(model, inputs), places(teacher, inputs)
        if self.kind == "attention":
            own, other = ([p for p in side if p.size] for side in (own, other))
        if self.pairs:
            texts = [tuple(side.strip() for side in text.split(":")) for text in self.pairs]
            found = named(own, other, texts)  # type: ignore[arg-type]
        else:
            found = matched(own, other, self.layers)
        if not found:
            raise DataError(
                f"{self.name} finds no hidden layers of equal size in the model and the teacher; name pairs"
            )
        for one, two in found:
            self._check(one, two)
        learnt = self._projectors(found, known.seed) if self.kind == "hint" else {}
        state = State(learn=tuple(learnt), **learnt) if learnt else None
        return Look(tuple(one.path for one, _ in found), tuple(two.path for _, two in found), state)

    def _check(self, one: Place, two: Place) -> None:
        what = f"{self.name}: {one.path} gives {list(one.shape)}, and {two.path} of the teacher {list(two.shape)}"
        images = len(one.shape) == len(two.shape) == 4
        if self.kind in ("hint", "attention") and one.size != two.size and not images:
            raise DataError(f"{what}; {self.kind} needs equal sizes")
        if self.kind == "attention" and not one.size:
            raise DataError(f"{what}; attention needs pixels or tokens")
        if self.kind == "hint" and one.width != two.width and not self.projector:
            raise DataError(f"{what}; without a projector they need equal widths")

    def _projectors(self, pairs: Iterable[tuple[Place, Place]], seed: int) -> dict[str, Tensor]:
        """weight{i} [teacher's width, student's] and bias{i} of those pairs whose widths differ."""
        generator, found = torch.Generator().manual_seed(seed), {}
        for i, (one, two) in enumerate(pairs):
            if one.width != two.width:
                found[f"weight{i}"] = torch.randn(two.width, one.width, generator=generator) / one.width**0.5
                found[f"bias{i}"] = torch.zeros(two.width)
        return found

    def loss(self, seen: Seen) -> Tensor:
        assert not isinstance(self.strength, Ramp)  # the loop resolves it
        held = dict(seen.look.state.named_parameters()) if seen.look.state is not None else {}
        total = seen.outputs.new_zeros(())
        for i, (one, two) in enumerate(zip(seen.look.features, seen.look.teacher_features, strict=True)):
            s, t = hidden(seen.features[one]), hidden(seen.teacher_features[two])
            if s is None or t is None:
                raise DataError(f"{self.name}: {one if s is None else two} gives no floating tensor [n, ...]")
            s, t = s.float(), t.detach().float()
            if self.kind in ("hint", "attention"):
                s, t = _same_size(s, t)
            if f"weight{i}" in held:
                s = _projected(s, held[f"weight{i}"], held[f"bias{i}"])
            total = total + self._term(s, t)
        return self.strength * total

    def _term(self, s: Tensor, t: Tensor) -> Tensor:
        if self.kind == "hint":
            return (s - t).square().mean() / 2
        if self.kind == "attention":
            apart: Tensor = (_attention(s) - _attention(t)).norm(dim=1)
            return apart.mean() / 2
        if self.kind == "similarity":
            return (_similarity(s) - _similarity(t)).square().mean()
        assert not isinstance(self.distance, Ramp) and not isinstance(self.angle, Ramp)
        return _relational(s.flatten(1), t.flatten(1), self.distance, self.angle)


def _texts(pairs: Any) -> Iterable[Any]:
    for one in [pairs] if isinstance(pairs, Mapping) else pairs:
        if isinstance(one, Mapping):
            yield from (f"{student}: {teacher}" for student, teacher in one.items())
        else:
            yield one


def _same_size(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    if s.shape[2:] == t.shape[2:] or s.dim() != 4:
        return s, t
    least = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    return F.adaptive_avg_pool2d(s, least), F.adaptive_avg_pool2d(t, least)


def _projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.dim() < 4:
        return F.linear(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def _attention(x: Tensor) -> Tensor:
    """[n, places], each row of length 1."""
    return F.normalize(x.square().sum(1 if x.dim() > 3 else -1).flatten(1), dim=1)


def _similarity(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return F.normalize(flat @ flat.T, dim=1)


def _relational(s: Tensor, t: Tensor, distance: float, angle: float) -> Tensor:
    """`s`, `t`: [n, width], of a batch of three or more."""
    n = len(s)
    if n < 3:
        raise DataError(f"distill.features: relational needs three samples in a batch, not {n}")
    (far_s, cos_s), (far_t, cos_t) = _relations(s), _relations(t)
    found = distance * F.smooth_l1_loss(far_s, far_t, reduction="sum") / (n * (n - 1))
    return found + angle * F.smooth_l1_loss(cos_s, cos_t, reduction="sum") / (n * (n - 1) * (n - 2))


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [n, n] by their mean, cosines [n, n, n] of the angle at the second of i, j, k; 0 where two are one."""
    n, x = len(x), x - x.mean(0)
    gram = x @ x.T
    square = gram.diagonal()
    apart = (square[:, None] + square - 2 * gram).clamp_min(1e-12)
    other = ~torch.eye(n, dtype=torch.bool, device=x.device)
    far = torch.where(other, apart.sqrt(), 0)
    one_by = torch.where(other, apart.rsqrt(), 0)
    # (x_i - x_j)(x_k - x_j)
    inner = gram[:, None, :] - gram[:, :, None] - gram[None] + square[None, :, None]
    cosine = inner * one_by[:, :, None] * one_by[None]
    return far / (far.sum() / (n * (n - 1))), torch.where(other[:, None, :], cosine, 0)
