"""One value of a setting for each tensor, under a budget of bytes: mixed precision, mixed codebooks, mixed sparsity.

Each tensor is really stored with each value: fitted, encoded and packed with the lossless codecs, so that the sizes are
those in the file.  What a value costs (`by`) is taken for one tensor alone, all others as they are, and added up:

error      |y - x|^2 / |x|^2 of the values x, stored as y
output     the same of what the layer gives on the calibration batches, from the second moments of its inputs
hessian    sum F (y - x)^2 / 2, with F the diagonal of the empirical Fisher matrix: what the loss rises by, to second
           order (Dong et al. 2019, arXiv:1911.03852, take the trace of the Hessian in place of each entry)
kl         KL(p || q) of the model's outputs p and those with the tensor stored so, q; of outputs that are no classes
           the mean squared error

The least sum that fits the budget is an integer program, solved exactly (`budget.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smelt.core.apply import (
    CALIBRATION_BATCHES,
    apply_codec,
    batches_of,
    chosen,
    eaten,
    encoded_chain,
    seed_of,
    weight_statistics,
)
from smelt.core.budget import Budget, choose
from smelt.core.choice import Choice
from smelt.core.data import batch, evaluating, forward_or_raise, logits_of, move
from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, Known, Lossless, Stats, Values
from smelt.core.recipe import Step
from smelt.core.store import Entry, pack, rest_bytes, store_of
from smelt.core.target import Target
from smelt.core.walk import walk

# A codec that goes in order is fitted anew to what is stored before it, and its sizes may change a little with that.
ATTEMPTS = 5


@dataclass(frozen=True)
class Priced:
    """A tensor stored with one of the values: bytes in the file, what it costs; what it is, where that is measured."""

    size: int
    cost: float
    encoded: Encoded | None = None


@torch.no_grad()
def apply_choice(model: nn.Module, step: Step, label: str, known: Known, tail: Sequence[Lossless]) -> list[str]:
    """Run a step that has a choice; returns notes for the report.

    Args:
        tail: the lossless codecs with which the file is written.

    Raises:
        RecipeError: a budget that no choice keeps.
        RuleError: a setting on which it depends what the codec needs to know.
        DataError: no data, where they are needed.
    """
    choice = step.choice
    assert choice is not None and isinstance(step.act, Codec)
    members, notes = chosen(model, step, label)
    options: list[Any] = [replace(step.act, **{choice.name: value}) for value in choice.values]  # type: ignore[type-var]
    if len({(o.order(), o.needs_at("plan"), o.needs_at("weight")) for o in options}) > 1:
        raise RuleError(f"{label}: what the codec needs to know depends on {choice.name}, which cannot be allocated")
    for value, option in zip(choice.values, options, strict=True):
        for target in members:
            if reason := option.refuses(target):
                raise RuleError(f"{label}: {target} cannot be stored with {choice.name} {value}: {reason}")
    plans, table = _priced(model, members, options, choice, label, known, tail)
    if choice.by == "kl":
        table = _measured(model, members, table, label, known)
    teams = _teams(model, members, choice, label, known)
    limit = allowed = Budget.parse(choice.budget, label).bytes(members)
    for _ in range(ATTEMPTS):
        picks = _picks(teams, table, allowed, choice, label)
        before = _held(model, members)
        plan = {t.name: plans[picks[t.name]][t.name] for t in members}
        apply_codec(model, members, step.act, label, known, tail, plan)
        entries = store_of(model).entries
        used = sum(_bytes(entries[t.name].encoded, tail) for t in members)
        if used <= limit:
            return [*notes, *_said(members, picks, choice, label, used, limit)]
        allowed -= used - limit
        _put_back(model, members, before)
    raise RecipeError(f"{label}: no choice of {choice.name} was found that keeps the budget of {limit:,} bytes")


def _priced(
    model: nn.Module,
    members: list[Target],
    options: Sequence[Codec],
    choice: Choice,
    label: str,
    known: Known,
    tail: Sequence[Lossless],
) -> tuple[list[dict[str, Codec]], dict[str, list[Priced]]]:
    """(for each option its plan, for each member what each option makes of it)"""
    first = options[0]
    seen = eaten(model, members, first, label)
    scout = weight_statistics(
        model, first.needs_at("weight" if first.order() is None else "plan"), members, known, label
    )
    plans = [option.plan(seen, scout, lambda e: rest_bytes(pack(e, tail))) for option in options]
    fisher = weight_statistics(model, ("fisher",) if choice.by == "hessian" else (), members, known, label)
    table: dict[str, list[Priced]] = {}
    for part, gathered in _parts(model, members, first, scout, choice, label, known):
        for target in part:
            own, values = gathered[target.name], seen[target.name]
            weight = {**own, **fisher[target.name]}
            for plan in plans:
                made = _one(model, target, plan[target.name], values, own, label, known)
                cost = _cost(target.tensor.detach(), made.decode(), choice.by, weight)
                kept = made if choice.by == "kl" else None
                table.setdefault(target.name, []).append(Priced(_bytes(made, tail), cost, kept))
    return plans, table


def _bytes(made: Encoded, tail: Sequence[Lossless]) -> int:
    return rest_bytes(pack(made.map(lambda _, leaf: leaf.cpu()), tail))


def _one(
    model: nn.Module, target: Target, codec: Codec, values: Values, own: Mapping[str, Any], label: str, known: Known
) -> Encoded:
    state = codec.fit(values.x, Stats(values.where, own, seed_of(known.seed, target.name)))
    return encoded_chain(model, target, codec, state, label)


def _parts(
    model: nn.Module,
    members: list[Target],
    codec: Codec,
    scout: Mapping[str, Mapping[str, Any]],
    choice: Choice,
    label: str,
    known: Known,
) -> Iterator[tuple[list[Target], Mapping[str, Mapping[str, Any]]]]:
    """(members, what `fit` and the cost need of each): part by part where that is much, of the model as it is."""
    order, needs = codec.order(), codec.needs_at("weight")
    gram = ("gram",) if choice.by == "output" else ()
    if order is None and not gram:
        yield members, scout
        return
    names = tuple(dict.fromkeys((*(() if order is None else needs), *gram)))
    for part, gather in walk(model, members, batches_of(known, label), CALIBRATION_BATCHES, order or "layer"):
        found = gather(names)
        yield part, {n: {**(scout[n] if order is None else {}), **own} for n, own in found.items()}


def _cost(x: Tensor, y: Tensor, by: str, weight: Mapping[str, Any]) -> float:
    wide = torch.promote_types(x.dtype, torch.float32)
    x, off = x.to(wide), y.to(x.device, wide) - x.to(wide)
    if by == "hessian":
        return float((weight["fisher"].to(off) * off.square()).sum(dtype=torch.float64)) / 2
    if by == "output":
        return _power(off, weight["gram"]) / max(_power(x, weight["gram"]), 1e-300)
    return float(off.square().sum(dtype=torch.float64)) / max(float(x.square().sum(dtype=torch.float64)), 1e-300)


def _power(weight: Tensor, gram: Tensor) -> float:
    """Mean square of what a layer of this weight gives, summed over its outputs; gram: [groups, k, k]."""
    rows = weight.reshape(len(gram), -1, gram.shape[-1]).to(gram)
    return max(0.0, float(((rows @ gram) * rows).sum()))


def _measured(
    model: nn.Module, members: list[Target], table: Mapping[str, list[Priced]], label: str, known: Known
) -> dict[str, list[Priced]]:
    """The same with the divergence of the outputs as costs: one forward pass of each batch for each entry."""
    total = {t.name: np.zeros(len(table[t.name])) for t in members}
    number = 0
    with evaluating(model):
        for item in islice(batches_of(known, label), CALIBRATION_BATCHES):
            inputs, labels = move(batch(item), members[0].tensor.device)
            plain = logits_of(forward_or_raise(model, inputs, "on a calibration batch"))
            number += 1
            for target in members:
                kept = target.tensor.detach().clone()
                for i, priced in enumerate(table[target.name]):
                    assert priced.encoded is not None
                    target.tensor.copy_(priced.encoded.decode())
                    out = logits_of(forward_or_raise(model, inputs, f"with another {target.name}"))
                    total[target.name][i] += _divergence(plain, out, labels)
                target.tensor.copy_(kept)
    if not number:
        raise RuleError(f"{label}: there is no calibration batch")
    return {
        name: [replace(priced, cost=cost / number) for priced, cost in zip(entries, total[name], strict=True)]
        for name, entries in table.items()
    }


def _divergence(plain: Tensor, out: Tensor, labels: Any) -> float:
    """KL(plain || out) of classes along the last dimension, mean over the rest, in nats; or the mean squared error."""
    plain, out = plain.float(), out.float()
    if plain.dim() < 2 or plain.shape[-1] < 2 or (isinstance(labels, Tensor) and labels.is_floating_point()):
        return float((plain - out).square().mean(dtype=torch.float64))
    p, q = plain.log_softmax(-1), out.log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean(dtype=torch.float64)))


def _teams(model: nn.Module, members: list[Target], choice: Choice, label: str, known: Known) -> list[list[Target]]:
    """Members that get the same value."""
    if choice.together == "nothing":
        return [[t] for t in members]
    order = {"input": "layer", "block": "block"}[choice.together]
    return [part for part, _ in walk(model, members, batches_of(known, label), 1, order)]


def _picks(
    teams: Sequence[Sequence[Target]], table: Mapping[str, list[Priced]], budget: int, choice: Choice, label: str
) -> dict[str, int]:
    """Which value each member gets, by its number."""
    sizes = np.array([np.sum([[p.size for p in table[t.name]] for t in team], 0) for team in teams], np.int64)
    costs = np.array([np.sum([[p.cost for p in table[t.name]] for t in team], 0) for team in teams], np.float64)
    try:
        picks = choose(costs, sizes, budget)
    except ValueError:
        least, most = int(sizes.min(1).sum()), int(sizes.max(1).sum())
        raise RecipeError(
            f"{label}: the budget {choice.budget!r} is {budget:,} bytes; with {choice.name} from {list(choice.values)} "
            f"the tensors take from {least:,} to {most:,}"
        ) from None
    return {t.name: int(pick) for team, pick in zip(teams, picks, strict=True) for t in team}


def _held(model: nn.Module, members: Sequence[Target]) -> dict[str, tuple[Tensor, Entry | None]]:
    entries = store_of(model).entries
    return {t.name: (t.tensor.detach().clone(), entries.get(t.name)) for t in members}


def _put_back(model: nn.Module, members: Sequence[Target], before: Mapping[str, tuple[Tensor, Entry | None]]) -> None:
    entries = store_of(model).entries
    for target in members:
        dense, entry = before[target.name]
        target.tensor.copy_(dense)
        if entry is None:
            entries.pop(target.name, None)
        else:
            entries[target.name] = entry


def _said(
    members: Sequence[Target], picks: Mapping[str, int], choice: Choice, label: str, used: int, limit: int
) -> list[str]:
    notes = [f"{label} allocated {used:,} of {limit:,} bytes, by {choice.by}"]
    for i, value in enumerate(choice.values):
        names = [t.name for t in members if picks[t.name] == i]
        if names:
            notes.append(f"{label} {choice.name} {value}: {', '.join(names)}")
    return notes
