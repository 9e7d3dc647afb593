"""A norm's gain and bias (of a batch norm all that it does) move into the layers beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smelt.core.edit import Replace, submodule
from smelt.graph.carry import Carried
from smelt.graph.norms import Norm
from smelt.graph.team import Place, Team, each, summed
from smelt.graph.work import RefusedError, Work, layers


def plain(work: Work, norm: Norm) -> bool:
    """Whether a norm has neither gain nor bias to fold."""
    scale, shift = _does(work, norm)
    return bool((scale == 1).all()) and not bool(shift.any())


def backward(work: Work, found: Carried, norm: Norm) -> None:
    """Fold a batch norm into the layer before it.  Raises RefusedError."""
    team = _one([t for t in found.teams if any(p.tensor == norm.path for p in t.of("norm"))], found, norm)
    index = team.places[next(iter(team.of("norm")))]
    makers = layers(team, work, "out")
    if team.of("in") or len(team.of("norm")) > 1:
        raise RefusedError("something else reads what it reads")
    if len(makers) != 1 or not team.straight or not team.signed:
        raise RefusedError("what it reads is not made by one layer directly before it")
    scale, shift = (_by_unit(v, index, team) for v in _does(work, norm))
    work.scale(team, scale)
    maker = makers[0]
    work.shift(maker.tensor, each(maker, team.places[maker], shift, 0.0))
    _gone(work, norm)


def forward(work: Work, found: Carried, norm: Norm) -> None:
    """Fold a norm into the layers that read it.  Raises RefusedError."""
    own = {name for name in (norm.gain, norm.bias) if name}
    if not own:
        if norm.kind == "batch":
            raise RefusedError("it has no gain of its own, and no layer before it takes it in")
        return
    team = _one([t for t in found.teams if norm.gain in t.names()], found, norm)
    if {p.tensor for p in team.of("out")} != own:
        raise RefusedError("what it gives is mixed with what others give before it is read")
    index = team.places[Place(norm.gain, 0, "out")]
    scale, shift = (_by_unit(v, index, team) for v in _does(work, norm))
    if (bool(shift.any()) and not team.straight) or (bool((scale <= 0).any()) and not team.signed):
        raise RefusedError(
            "between it and what reads it stand functions, or zeros at borders, that shifts or signs do not pass"
        )
    if team.of("norm"):
        raise RefusedError(f"{next(iter(team.of('norm'))).tensor} reads it")
    for place, at in team.of("in").items():
        moved = summed(work.get(place.tensor), place, each(place, at, shift, 0.0))
        work.shift(place.tensor, moved)
    factor = torch.where(scale == 0, torch.ones_like(scale), scale)
    work.scale(team, 1 / factor, team.of("in"))
    for place, at in team.of("in").items():
        if bool((scale == 0).any()):
            work.scale(team, torch.where(scale == 0, torch.inf, torch.ones_like(scale)), {place: at})
    _gone(work, norm)


def _does(work: Work, norm: Norm) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each coordinate."""
    module = submodule(work.model, norm.path)
    gain = work.get(norm.gain) if norm.gain else torch.ones(1, dtype=torch.float64)
    if norm.kind != "batch":
        return gain, work.get(norm.bias) if norm.bias else torch.zeros_like(gain)
    variance, mean = (work.get(f"{norm.path}.running_{name}") for name in ("var", "mean"))
    scale = gain.to(variance) * (variance + float(module.eps)).rsqrt()  # type: ignore[arg-type]
    return scale, (work.get(norm.bias) if norm.bias else 0.0) - mean * scale


def _one(teams: Sequence[Team], found: Carried, norm: Norm) -> Team:
    if len(teams) == 1 and bool((teams[0].places[_place(teams[0], norm)] >= 0).all()):
        return teams[0]
    if len(teams) > 1:
        raise RefusedError("its coordinates go different ways")
    raise RefusedError(found.reasons.get(norm.gain) or "no layer stands beside it that could take it in")


def _place(team: Team, norm: Norm) -> Place:
    return next(p for p in team.places if p.tensor in (norm.gain, norm.path))


def _by_unit(values: Tensor, index: Tensor, team: Team) -> Tensor:
    return values.new_zeros(team.size).index_copy_(0, index.to(values.device), values)


def _gone(work: Work, norm: Norm) -> None:
    if norm.kind == "batch":
        work.replaced[norm.path] = Replace(norm.path, "skip", {"returns": "x", "argument": "input"})
        return
    for name, value in ((norm.gain, 1.0), (norm.bias, 0.0)):
        if name:
            work.put(name, torch.full_like(work.get(name), value))
