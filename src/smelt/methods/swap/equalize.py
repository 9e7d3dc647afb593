from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.apply import CALIBRATION_BATCHES
from smelt.core.edit import Edit, Note
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.block import Block
from smelt.graph.carry import Carried, carried
from smelt.graph.owners import watch
from smelt.graph.team import Place, Team, each, largest, scaled
from smelt.graph.work import Trial, Work, layers
from smelt.grids import rows, uniform

# Rounds of `by: range` at most, and the largest change of a factor (its logarithm) that counts as none.
ROUNDS, STILL = 100, 1e-4
# Exponents that `by: search` tries: 0, 1/20, ..., 19/20.
GRID = 20
# Batches that a block of several layers is run on for each of them.
BATCHES = 2
# Inputs of up to so many channels are summed up by their products; wider ones by their squares alone.
WIDE = 8192


@dataclass(frozen=True)
class Equalize(Rewrite):
    """Units between layers are scaled, and scaled back by what reads them; outputs stay, rounding hurts less.

    Whatever makes a unit (rows of layers, gains of norms, embeddings) is divided by s, whatever reads it (columns of
    layers) multiplied, s > 0.  It works where only functions with f(s x) = s f(x) stand between, such as ReLU, max and
    mean pooling, products with gates, attention between values and output projection, additions of things that are
    scaled alike.  That is found by running the first batch.  s of a unit, where r1 and r2 are the largest magnitudes of
    what makes and what reads it, and x what is read on the job's data (at most 16 batches):

        by: range       sqrt(r1 / r2), so that both become sqrt(r1 r2), over all layers in turn until nothing moves
        by: activation  max|x|^alpha / r2^(1 - alpha): activations become easier at the cost of weights
        by: search      mean|x|^alpha, alpha of 0, 1/20 ... 19/20 with the least error of the layer that reads,
                        or of the smallest module around several, weights rounded to `bits` with a scale per `group`

    Batch norms must be folded first (swap.fold_norm).

    applies to: chains of linear layers and convolutions, depthwise ones too; layers behind norms; gated MLPs; attention
    needs a pretrained model: yes
    needs data: range: a batch, to run the model; else some batches without labels
    needs training: no
    good at: range: depthwise networks with one scale per tensor; activation: 8-bit activations of language models;
        search: weights of 3 or 4 bits
    bad at: functions such as sigmoid or GELU between layers, which it leaves alone
    source: Nagel et al. 2019, arXiv:1906.04721, eq. 11; Xiao et al. 2022, arXiv:2211.10438, eq. 4; Lin et al. 2023,
        arXiv:2306.00978
    """

    by: str = setting("range", "what the factors come from", choices=("range", "activation", "search"))
    alpha: float = setting(0.5, "how much of the range of activations moves to weights (activation)", low=0, high=1)
    bits: int = setting(4, "bits per value that the search rounds to", low=1, high=16)
    group: int = setting(128, "values per group that the search rounds to", low=1, high=1 << 31)
    symmetric: bool = setting(False, "whether the search rounds to levels mirrored at 0")
    tolerance: float = setting(1e-4, "largest change of an output, over the largest output", low=0)

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        example = known.example(model, "to find what can be scaled by running the model")
        found = carried(model, example)
        wanted = {target.name for target in targets}
        work = Work(model, found.norms)
        teams = [t for t in found.teams if t.names() & wanted and self._able(t, work)]
        factors = self._ranges(teams, work) if self.by == "range" else self._data(teams, work, known)
        trial = Trial(model, example, found.norms, self.tolerance)
        moved = [(t.name, f) for t, f in zip(teams, factors, strict=True)]
        changes = [(n, partial(Work.scale, team=t, factor=f)) for (n, f), t in zip(moved, teams, strict=True)]
        edits = trial.run([c for c, (_, f) in zip(changes, moved, strict=True) if not bool((f == 1).all())])
        return [*edits, *self._notes(found, teams, trial, wanted, work)]

    def _able(self, team: Team, work: Work) -> bool:
        makers = bool(layers(team, work, "out")) or self.by != "range"
        return makers and bool(layers(team, work, "in")) and not team.of("norm")

    def _notes(self, found: Carried, teams: Sequence[Team], trial: Trial, wanted: set[str], work: Work) -> list[Edit]:
        notes: list[Edit] = [Note(name, reason) for name, reason in trial.refused.items()]
        beside = {name for team in teams for name in team.names()}
        for team in found.teams:
            if team.of("norm") and team.name in wanted - beside:
                norm = next(iter(team.of("norm"))).tensor
                notes.append(Note(team.name, f"the batch norm {norm} reads what it makes; put swap.fold_norm before"))
                beside.add(team.name)
        left = [n for n in found.reasons if n in wanted - beside and work.targets[n].is_weight]
        return [*notes, *(Note(name, found.reasons[name]) for name in left)]

    def _ranges(self, teams: Sequence[Team], work: Work) -> list[Tensor]:
        """[units] per team: what makes them is multiplied by it."""
        total = [torch.ones(team.size, dtype=torch.float64) for team in teams]
        for _ in range(ROUNDS):
            most = 0.0
            for i, team in enumerate(teams):
                made, read = (_range(team, work, role).cpu() for role in ("out", "in"))
                factor = torch.where((made > 0) & (read > 0), (read / made).sqrt(), 1.0)
                factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
                work.scale(team, factor)
                total[i] = total[i] * factor
                most = max(most, float(factor.log().abs().max()))
            if most < STILL:
                break
        return total

    def _data(self, teams: Sequence[Team], work: Work, known: Known) -> list[Tensor]:
        names = {place.tensor for team in teams for place in layers(team, work, "in")}
        seen = _gather(work.model, names, known.batches or (), self.by == "search")
        factors = []
        for team in teams:
            reads = {p: seen[p.tensor] for p in layers(team, work, "in") if p.tensor in seen}
            if not reads:
                factors.append(torch.ones(team.size, dtype=torch.float64))
                continue
            if self.by == "activation":
                x = _by_unit(team, {place: s.most for place, s in reads.items()})
                weight = _range(team, work, "in").to(x)
                scale = x.clamp_min(1e-5) ** self.alpha / weight.clamp_min(1e-5) ** (1 - self.alpha)
                scale = torch.where((x > 0) & (weight > 0), scale, 1.0)
            else:
                scale = self._search(team, work, reads, known)
            factors.append(1 / scale)
        return factors

    def _search(self, team: Team, work: Work, reads: Mapping[Place, _Seen], known: Known) -> Tensor:
        x = _by_unit(team, {place: s.total / s.count for place, s in reads.items()})
        names = [place.tensor for place in reads]
        block = Block(work.model, names, known.batches or (), BATCHES) if len(reads) > 1 else None
        best, least = torch.ones_like(x), torch.inf
        for i in range(GRID):
            scale = x.clamp_min(1e-4) ** (i / GRID)
            scale = scale / (scale.max() * scale.min()).sqrt()
            changes = {p: self._change(work.get(p.tensor), p, each(p, team.places[p], scale)) for p in reads}
            if block is None:
                error = sum(_energy(change, p, reads[p]) for p, change in changes.items())
            else:
                like = {name: work.targets[name].tensor for name in names}
                error = block.error({p.tensor: (work.get(p.tensor) + c).to(like[p.tensor]) for p, c in changes.items()})
            if error < least:
                best, least = scale, error
        return best

    def _change(self, weight: Tensor, place: Place, scale: Tensor) -> Tensor:
        """What rounding the scaled weight does to it, scaled back."""
        larger = scaled(weight, place, scale.to(weight)).float()
        layout = rows.layout(larger, "group", 0, self.group)
        flat, mask = rows.split(larger, None, layout)
        low, high = uniform.minmax(flat, mask)
        step, zero = uniform.steps(low, high, bits=self.bits, symmetric=self.symmetric)
        step, zero = step[:, None], None if zero is None else zero[:, None]
        codes = uniform.quantize(flat, step, zero, bits=self.bits, symmetric=self.symmetric)
        rounded = rows.join(uniform.dequantize(codes, step, zero), larger.shape, layout)
        return scaled(rounded.double() - larger.double(), place, 1 / scale.to(weight))


class _Seen:
    """What one weight reads, summed up over channels: largest and mean magnitude, squares, products."""

    def __init__(self, x: Tensor, products: bool):
        n = x.shape[1]
        self.most, self.total, self.square = (x.new_zeros(n, dtype=torch.float64) for _ in range(3))
        self.count = 0
        self.gram = x.new_zeros(n, n, dtype=torch.float64) if products and n <= WIDE else None

    def update(self, x: Tensor) -> None:
        size = x.double().abs()
        self.most = torch.maximum(self.most, size.amax(0))
        self.total += size.sum(0)
        self.square += size.square().sum(0)
        self.count += len(x)
        if self.gram is not None:
            self.gram += (x.T @ x).double()


def _gather(model: nn.Module, names: Iterable[str], batches: Iterable[Any], products: bool) -> dict[str, _Seen]:
    found: dict[str, _Seen] = {}

    def see(name: str, x: Tensor) -> None:
        found.setdefault(name, _Seen(x, products)).update(x.float())

    watch(model, names, batches, CALIBRATION_BATCHES, see)
    return found


def _energy(weight: Tensor, place: Place, seen: _Seen) -> float:
    """Sum of squares of what a weight makes of what it reads; of inputs that are independent where products are not
    known."""
    if place.groups == 1 and seen.gram is not None:
        flat = weight.movedim(place.dim, -1).flatten(0, -2)
        return float(((flat @ seen.gram) * flat).sum())
    return float(scaled(weight.square(), place, seen.square).sum())


def _by_unit(team: Team, values: Mapping[Place, Tensor]) -> Tensor:
    """[units]: the largest of what the coordinates of the units have."""
    found = next(iter(values.values())).new_zeros(team.size)
    for place, value in values.items():
        index = team.places[place].to(value.device)
        found.scatter_reduce_(0, index[index >= 0], value[index >= 0], "amax")
    return found


def _range(team: Team, work: Work, role: str) -> Tensor:
    return _by_unit(team, {p: largest(work.get(p.tensor), p) for p in layers(team, work, role)})
