from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.apply import CALIBRATION_BATCHES, seed_of, weight_statistics
from smelt.core.edit import Edit, Fill, Keep, Note, Set
from smelt.core.errors import DataError, RecipeError, nearest
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.core.target import targets as all_targets
from smelt.graph.cut import applied, cut
from smelt.graph.groups import Group, Part, groups
from smelt.graph.units import Order, costs, orders, positions, rows, structure, sums
from smelt.scores._units import Slice
from smelt.statistics._gates import gates
from smelt.train.refit import refit

KINDS = ("channels", "heads", "head dims", "groups", "group channels")
ROLES = ("out", "in", "along")
GATES = "gates"  # slopes of gates: the one need that is known of units, not of weights
MEASURED = ("parameters", "macs", "bytes", "milliseconds")
TIMINGS = 3  # times that a candidate's milliseconds are measured; their median counts


@dataclass(frozen=True)
class Channels(Rewrite):
    """Cut the least important channels, neurons and heads out of everything they run through.

    What goes together (a filter, its batch norm, the slices that read it, everything that is added to it) is found by
    running the model; a group is cut if all weights that produce its units are selected by `on`.  `ratio` is the share
    that goes at least

        of channels         in each group with `scope: local` (rounded down), else of all units together
        of anything else    found by bisection over the share of units, each candidate cut for real and measured

    scope     local: each group is ranked alone; isomorphic: with those of like structure; global: all together.  Ranked
              together, scores that estimate the loss (fisher, taylor, hessian) are divided by what a unit costs of that
              which `of` names, parameters or multiplications; others are scaled to a mean of 1 in each group.
    score     fisher (slopes of unit gates), taylor, hessian, magnitude, activation, random, summed over the unit's
              weights; apoz (zeros), batchnorm (scales), median (distance to the others)
    repair    ridge: every later layer is fitted to what the original gave there; bias: batch norms are estimated anew
              and biases shifted; both from calibration batches, on the cut model, in the order in which it runs

    With `rounds`, this happens step by step, and what is left is scored anew before each.

    applies to: convolution, linear, attention heads, embeddings, recurrent layers: wherever units can go
    needs a pretrained model: yes
    needs data: yes, a few batches; labels for fisher, taylor and hessian (drawn from the outputs where there are none)
    needs training: a little, to recover, above about a third of the channels
    good at: smaller and faster on everything, without kernels
    bad at: large ratios without training; networks that are thin already
    source: Liu et al. 2021, arXiv:2108.00708 (fisher); He et al. 2017, arXiv:1707.06168 (ridge); arXiv:2407.04616
    """

    ratio: float = setting(0.5, "share to cut", low=0, high=0.99)
    of: str = setting("channels", "what the ratio is a share of", choices=("channels", *MEASURED))
    scope: str = setting("global", "which units are ranked together", choices=("local", "global", "isomorphic"))
    score: str = setting("fisher", "how important a unit is")
    repair: str = setting("ridge", "how what is left makes up for it", choices=("none", "bias", "ridge"))
    rounds: int = setting(1, "times that units are scored and cut", low=1)
    round_to: int = setting(1, "units that stay are a multiple of this", low=1)
    most: float = setting(0.9, "largest share of a group that is cut", low=0, high=1)
    kinds: tuple[str, ...] = setting(
        ("channels", "heads", "groups"), f"kinds of units that are cut, of {', '.join(KINDS)}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        module = shelf.module("scores", self.score)
        if "movement" in module.NEEDS:
            raise RecipeError(f"{self.name}.score: {self.score!r} is known only while weights are trained")
        for kind in self.kinds:
            if kind not in KINDS:
                raise RecipeError(f"{self.name}.kinds: no choice {kind!r}{nearest(str(kind), KINDS)}")

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        if self.of != "channels" and self.of not in known.prices:
            raise DataError(f"{self.name}.of: {self.of!r} is not measured here; it needs data, and no training loop")
        example = known.example(model, "to see which units belong together")
        run = _Run(self, model, {t.name for t in targets}, example, known)
        for turn in range(1, self.rounds + 1):
            run.turn(turn / self.rounds)
        return run.edits()


class _Run:
    """The model on its way: `now` is a copy with what was cut and fitted so far."""

    def __init__(self, act: Channels, model: nn.Module, wanted: set[str], example: Any, known: Known):
        self.act, self.model, self.now, self.example, self.known = act, model, model, example, known
        self.wanted = wanted
        self.estimates: bool = getattr(shelf.module("scores", act.score), "LOSS", False)
        self.keeps: dict[tuple[str, int], tuple[int, ...]] = {}
        self.sets: dict[tuple[str, str], Any] = {}
        self.notes: dict[str, str] = {}
        self.before: dict[str, int] = {}  # units of each group at first
        self.price: Callable[[nn.Module], float] = known.prices.get(act.of, lambda model: 0.0)
        if act.of == "milliseconds":
            self.price = lambda model: median(known.prices[act.of](model) for _ in range(TIMINGS))
        self.full = self.price(model)

    def turn(self, share: float) -> None:
        """Cut until `share` of the ratio has gone."""
        found = self._groups()
        if not found or not self.act.ratio:
            return
        by_name = {t.name: t for t in all_targets(self.now, transient=True)}
        scores = self._scores(found, by_name)
        found = [group for group in found if group in scores]
        if not found:
            return
        ranked = orders(found, scores, self._classes(found, by_name), self._worth(found, by_name), self.before)
        edits, refused = self._choose(ranked, share * self.act.ratio)
        self.notes |= {name: reason for name, reason in refused.items()}
        self.now = applied(self.now, edits)
        self._record(edits)
        if self.act.repair != "none" and edits:
            kept = {name: index for (name, dim), index in self.keeps.items() if dim == 0}
            assert self.known.batches is not None
            weights = self.act.repair == "ridge"
            refit(self.model, self.now, kept, self.known.batches, weights=weights, seed=self.known.seed)

    def _groups(self) -> list[Group]:
        """Those that may be cut; why not, of the others, goes into the notes."""
        found, reasons = groups(self.now, self.example)
        self.notes |= {name: reason for name, reason in reasons.items() if name in self.wanted}
        able: list[Group] = []
        left: dict[str, str] = {}
        for group in found:
            makers = [p.tensor for p in group.parts if p.role == "out"] or [p.tensor for p in group.parts]
            others = [name for name in dict.fromkeys(makers) if name not in self.wanted]
            reason = f"its units are {group.kind}, which are none of the kinds to cut"
            if group.kind in self.act.kinds and not others:
                able.append(group)
                self.before.setdefault(group.name, group.size)
                continue
            if others:
                reason = f"its units go together with those of {others[0]}, which is not selected"
            left |= {name: reason for name in makers if name in self.wanted}
        cut_too = {p.tensor for group in able for p in group.parts if p.role == "out"}
        self.notes |= {name: reason for name, reason in left.items() if name not in cut_too}
        return able

    def _classes(self, found: Sequence[Group], by_name: Mapping[str, Target]) -> dict[Group, Hashable] | None:
        if self.act.scope == "local":
            return None
        return {group: structure(group, by_name) if self.act.scope == "isomorphic" else 0 for group in found}

    def _worth(self, found: Sequence[Group], by_name: Mapping[str, Target]) -> dict[Group, Tensor]:
        """What cutting a unit gains: one channel, its parameters, or its multiplications.

        Only scores that estimate the loss can be weighed against that.
        """
        if self.act.of == "channels" or not self.estimates:
            return {group: torch.ones(group.size) for group in found}
        counted = self.act.of in ("macs", "milliseconds")
        places = positions(self.now, self.example) if counted else None
        return {group: costs(group, by_name, places) for group in found}

    def _scores(self, found: Sequence[Group], by_name: Mapping[str, Target]) -> dict[Group, Tensor]:
        module = shelf.module("scores", self.act.score)
        roles = getattr(module, "ROLES", ROLES)
        seen = self._seen(module.NEEDS, [p for g in found for p in g.parts if p.role in roles], by_name)
        scores = {}
        for group in found:
            parts = [p for p in group.parts if p.role in roles and by_name[p.tensor].parameter]
            if hasattr(module, "units"):
                score = module.units([self._slice(p, by_name[p.tensor], seen) for p in parts])
            else:
                score = self._summed(module.score, module.NEEDS, parts, by_name, seen)
            if score is None:
                self.notes[group.name] = f"the score {self.act.score!r} finds nothing to tell its units apart"
                continue
            score = score.cpu().double()
            if self.act.scope != "local" and not self.estimates:
                score = score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)
            scores[group] = score
        return scores

    def _summed(
        self,
        score: Any,
        needs: Sequence[str],
        parts: Sequence[Part],
        by_name: Mapping[str, Target],
        seen: Mapping[tuple[str, str], Tensor],
    ) -> Tensor | None:
        total: Tensor | None = None
        for part in parts:
            target = by_name[part.tensor]
            own = {name: seen[target.name, name] for name in needs if (target.name, name) in seen}
            if len(own) < len(needs) or target.places[0][1].endswith("bias"):
                continue
            generator = torch.Generator().manual_seed(seed_of(self.known.seed, target.name))
            each = sums(score(target.tensor.detach().float(), own, generator), part)
            total = each if total is None else total + each
        return total

    def _slice(self, part: Part, target: Target, seen: Mapping[tuple[str, str], Tensor]) -> Slice:
        own = {}
        for (tensor, name), value in seen.items():
            if tensor == f"{part.tensor}/{part.dim}":
                own[name] = sums(value, part, 1)
            elif tensor == part.tensor:
                own[name] = rows(value.expand_as(target.tensor), part)
        x = rows(target.tensor.detach().float(), part)
        return Slice(x, part.role, target.module, target.places[0][1], own)

    def _seen(
        self, needs: Sequence[str], parts: Sequence[Part], by_name: Mapping[str, Target]
    ) -> dict[tuple[str, str], Tensor]:
        """(name of a tensor, statistic) -> result; slopes of gates as (tensor/dimension, 'gates')."""
        members = list({p.tensor: by_name[p.tensor] for p in parts if by_name[p.tensor].parameter}.values())
        plain = [name for name in needs if name != GATES]
        found: dict[tuple[str, str], Tensor] = {}
        if plain:
            took = weight_statistics(self.now, plain, members, self.known, self.act.name)
            found |= {(name, key): value for name, of in took.items() for key, value in of.items()}
        if GATES in needs:
            if self.known.loss is None or self.known.batches is None:
                raise DataError(f"{self.act.name}: the score {self.act.score!r} needs data and the task's loss")
            wanted = [(by_name[name], dim) for name, dim in dict.fromkeys((p.tensor, p.dim) for p in parts)]
            slopes = gates(self.now, wanted, self.known.batches, self.known.loss, CALIBRATION_BATCHES, self.known.seed)
            found |= {(f"{name}/{dim}", GATES): value for (name, dim), value in slopes.items()}
        return found

    def _choose(self, ranked: Mapping[Group, Order], ratio: float) -> tuple[list[Edit], dict[str, str]]:
        """The smallest cut that takes the share `ratio` away, and which groups cannot be cut."""
        times = torch.cat([order.when for order in ranked.values()]).unique().tolist()
        if self.act.of == "channels" and self.act.scope == "local":
            return self._cut(ranked, ratio)
        total = sum(self.before[group.name] for group in ranked)

        def enough(t: float) -> bool:
            if self.act.of == "channels":
                left = sum(
                    group.size - len(order.gone(t, self.act.most, self.act.round_to)) for group, order in ranked.items()
                )
                return left <= total * (1 - ratio) + 1e-9
            return self.price(applied(self.now, self._cut(ranked, t)[0])) <= self.full * (1 - ratio)

        low, high = -1, len(times) - 1
        if not enough(times[high]):
            what = f"the {self.act.of} cannot be cut by {ratio:.0%}; as much was cut as most={self.act.most} lets go"
            self.notes[""] = what
            return self._cut(ranked, times[high])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(times[middle]) else (middle, high)
        return self._cut(ranked, times[high])

    def _gone(self, order: Order, t: float) -> list[int]:
        return order.gone(t, self.act.most, self.act.round_to)

    def _cut(self, ranked: Mapping[Group, Order], t: float) -> tuple[list[Edit], dict[str, str]]:
        keep = {}
        for group, order in ranked.items():
            gone = set(self._gone(order, t))
            if gone:
                keep[group] = [unit for unit in range(group.size) if unit not in gone]
        return cut(self.now, self.example, keep)

    def _record(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            if isinstance(edit, Keep):
                old = self.keeps.get((edit.tensor, edit.dim))
                self.keeps[edit.tensor, edit.dim] = edit.index if old is None else tuple(old[i] for i in edit.index)
            elif isinstance(edit, Set):
                self.sets[edit.path, edit.attribute] = edit.value

    def edits(self) -> list[Edit]:
        made: list[Edit] = [Keep(name, dim, index) for (name, dim), index in self.keeps.items()]
        made += [Set(path, attribute, value) for (path, attribute), value in self.sets.items()]
        plain = {t.name: t.tensor for t in all_targets(applied(self.model, made))}
        for target in all_targets(self.now):
            if not torch.equal(target.tensor, plain[target.name]):
                made.append(Fill(target.name, target.tensor.detach()))
        if self.keeps:
            self.notes[""] = "; ".join([*([self.notes[""]] if "" in self.notes else []), self._summary()])
        return [*made, *(Note(name, reason) for name, reason in self.notes.items())]

    def _summary(self) -> str:
        units = {group.name: group.size for group in groups(self.now, self.example)[0]}
        before = sum(self.before.values())
        shares = {"units": (before - sum(units.get(name, 1) for name in self.before)) / before}
        for name in ("parameters", "macs"):
            if name in self.known.prices:
                price = self.known.prices[name]
                shares[name] = 1 - price(self.now) / price(self.model)
        text = "cut " + ", ".join(f"{share:.1%} of the {name}" for name, share in shares.items())
        if self.act.of == "milliseconds":
            text += f"; {self.full:.3g} ms became {self.price(self.now):.3g} ms when measured again"
        return text
