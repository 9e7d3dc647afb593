"""What the rewrites share that put thinner layers in the place of a layer, by a decomposition of its weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smelt.core.apply import weight_statistics
from smelt.core.edit import Edit, Note, Replace
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph import factors
from smelt.graph.reads import outside
from smelt.statistics.gram import damped

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Split(Rewrite):
    """Writes `plan`; the decomposition says its ranks, its factors, and the edit that they make."""

    weight: str = setting(
        "plain",
        "whose squared error is least: of the weight, or of what it gives on its inputs",
        choices=("plain", "inputs"),
    )
    damp: float = setting(0.01, "share of the mean diagonal of the inputs' moments added to it", low=0, high=1)
    keep: str = setting(
        "smaller", "layers that are split: where that is smaller, or faster too", choices=("smaller", "faster")
    )

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        read = outside(model)
        reasons = {t.name: self.refuses(t) or read.get(t.places[0][0]) for t in targets}
        edits: list[Edit] = [Note(name, reason) for name, reason in reasons.items() if reason]
        able = [t for t in targets if not reasons[t.name]]
        moments = {}
        if self.weight == "inputs" and (known_to := [t for t in able if not isinstance(t.module, nn.Embedding)]):
            moments = weight_statistics(model, ("gram",), known_to, known, self.name)
        speed = None
        if self.keep == "faster" and able:
            example = known.example(model, "to measure layers (keep: faster)")
            speed = factors.Speed(model, [t.places[0][0] for t in able], example)
        for target in able:
            gram = moments.get(target.name, {}).get("gram")
            made = self._split(target, None if gram is None else damped(gram[0], self.damp), speed, known.seed)
            edits.append(Note(target.name, made) if isinstance(made, str) else made)
        return edits

    def _split(self, target: Target, metric: Tensor | None, speed: factors.Speed | None, seed: int) -> Replace | str:
        """The edit, or why the layer stays dense."""
        w = target.tensor.detach().double()
        ranks = self.ranks(target, w, metric)
        empty = [target.tensor.new_ones(shape) for shape in self.shapes(target, ranks)]
        draft = self.edit(target, empty)
        what = f"rank {' x '.join(map(str, ranks))}"
        count = sum(v.numel() for k, v in draft.values.items() if not k.endswith("bias"))
        if reason := factors.larger(target, count, what):
            return reason
        if speed is not None and (reason := speed.slower(draft)):
            return f"with {what} {reason}"
        return self.edit(target, self.factors(target, w, ranks, metric, seed))

    @abstractmethod
    def ranks(self, target: Target, w: Tensor, metric: Tensor | None) -> Ranks:
        """How thin.  w: the weight in float64; metric: damped moments of the inputs, or None for the plain error."""

    @abstractmethod
    def shapes(self, target: Target, ranks: Ranks) -> list[Sequence[int]]:
        """Of the factors."""

    @abstractmethod
    def factors(self, target: Target, w: Tensor, ranks: Ranks, metric: Tensor | None, seed: int) -> Sequence[Tensor]:
        """Of the weight, in float64."""

    @abstractmethod
    def edit(self, target: Target, found: Sequence[Tensor]) -> Replace:
        """What puts the factors in the place of the layer."""
