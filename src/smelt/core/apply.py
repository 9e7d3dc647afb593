"""One step of a recipe meets a model: targets, statistics, plan, act."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from smelt.core.edit import Note
from smelt.core.encoded import Encoded
from smelt.core.errors import DataError, RuleError
from smelt.core.method import Codec, Known, Lossless, Objective, Rewrite, State, Stats, Values
from smelt.core.recipe import Step
from smelt.core.statistic import gather, of_weights
from smelt.core.store import Activation, apply_edits, eat, pack, rest_bytes, store, store_of
from smelt.core.target import Target, select, targets
from smelt.core.walk import walk

# Batches of the training data that statistics are gathered from.
CALIBRATION_BATCHES = 16


def chosen(model: nn.Module, step: Step, label: str) -> tuple[list[Target], list[str]]:
    """The targets of a step, and a note for each that its method refuses.

    Raises:
        RecipeError: a selector that matches nothing.
        RuleError: every target was refused.
    """
    act = step.act
    lossless = isinstance(act, Codec) and act.lossless
    everything = targets(model)
    hits = select(everything, step.on or "*", all_kinds=all_kinds(step))
    if lossless:
        return hits, []
    kept, notes = [], []
    for target in hits:
        reason = act.refuses(target) if isinstance(act, (Codec, Rewrite, Objective)) else None
        if not target.parameter:
            reason = "it is a buffer; lossy codecs store parameters"
        if isinstance(act, Objective) and not target.tensor.requires_grad:
            reason = reason or "it does not learn"
        if reason:
            notes.append(f"{label} leaves {target} alone: {reason}")
        else:
            kept.append(target)
    if not kept:
        raise RuleError(f"{label} finds nothing to act on; {notes[0] if notes else 'the model has no weights'}")
    return kept, [] if all_kinds(step) else notes


def all_kinds(step: Step) -> bool:
    """Whether a bare '*' in the step's selector means tensors of every kind."""
    act = step.act
    return act.lossless if isinstance(act, Codec) else isinstance(act, Objective) and act.all_kinds


def apply_step(model: nn.Module, step: Step, label: str, known: Known, tail: Sequence[Lossless]) -> list[str]:
    """Run one step that is not `train` and has no choice (`apply_choice`); returns notes for the report."""
    act = step.act
    if isinstance(act, Rewrite):
        return apply_rewrite(model, step, label, known)
    if isinstance(act, Lossless):
        held = store_of(model)
        for target in chosen(model, step, label)[0]:
            held.tails[target.name] = (*held.tails.get(target.name, ()), act)
        return []
    assert isinstance(act, Codec)
    if step.at != "weight":
        return apply_activations(model, step, label, known)
    members, notes = chosen(model, step, label)
    apply_codec(model, members, act, label, known, tail)
    return notes


@torch.no_grad()
def apply_codec(
    model: nn.Module,
    members: list[Target],
    codec: Codec,
    label: str,
    known: Known,
    tail: Sequence[Lossless],
    plan: Mapping[str, Codec] | None = None,
) -> None:
    """Store the members by what `codec` plans for each, or by `plan`."""
    seen = eaten(model, members, codec, label)
    parts = parts_of(model, codec, members, known, label)
    first = next(parts)
    plan = codec.plan(seen, first[1], lambda e: rest_bytes(pack(e, tail))) if plan is None else plan
    for part, gathered in chain([first] if codec.order() is None else [], parts):
        for target in part:
            found = {**first[1][target.name], **gathered[target.name]}
            stats = Stats(seen[target.name].where, found, seed_of(known.seed, target.name))
            own = plan[target.name]
            encode_chain(model, target, own, own.fit(seen[target.name].x, stats), label)


def eaten(model: nn.Module, members: Sequence[Target], codec: Codec, label: str) -> dict[str, Values]:
    """What the codec would eat of each member.  Raises RuleError, as `eat`."""
    found = {}
    for target in members:
        _, _, x, where = eat(codec, target, model, label)
        found[target.name] = Values(x, where)
    return found


def parts_of(
    model: nn.Module, codec: Codec, members: list[Target], known: Known, label: str
) -> Iterator[tuple[list[Target], dict[str, dict[str, Any]]]]:
    """(members, what is known of them): first all with what `plan` reads, then, for a codec that goes in order, part
    by part with what `fit` reads."""
    order = codec.order()
    if order is None:
        yield members, weight_statistics(model, codec.needs_at("weight"), members, known, label)
        return
    yield members, weight_statistics(model, codec.needs_at("plan"), members, known, label)
    batches = batches_of(known, label)
    for part, gather_now in walk(model, members, batches, CALIBRATION_BATCHES, order):
        yield part, gather_now(codec.needs_at("weight"))


def seed_of(seed: int, name: str) -> int:
    """Another seed for every tensor, the same in every run."""
    return seed ^ zlib.crc32(name.encode())


def weight_statistics(
    model: nn.Module, names: Sequence[str], members: Sequence[Target], known: Known, label: str
) -> dict[str, dict[str, Any]]:
    """Statistics of weights, from the calibration batches: target name -> name on the shelf -> result.

    Raises:
        DataError: no batches, no loss of the task where a gradient is asked for; or as `of_weights`.
    """
    if not names:
        return {target.name: {} for target in members}
    batches = batches_of(known, label)
    try:
        return of_weights(model, members, names, batches, known.loss, CALIBRATION_BATCHES, known.seed)
    except DataError as error:
        raise DataError(f"{label}: {error}") from None


def batches_of(known: Known, label: str) -> Iterable[Any]:
    if known.batches is None:
        raise DataError(f"{label} needs data to gather statistics from; give the job data")
    return known.batches


def encode_chain(model: nn.Module, target: Target, codec: Codec, state: State, label: str) -> None:
    """Store a target by a fitted codec, on top of what it is stored as already."""
    store(model, target, encoded_chain(model, target, codec, state, label), label)


def encoded_chain(model: nn.Module, target: Target, codec: Codec, state: State, label: str) -> Encoded:
    """What that stores it as."""
    tree, path, x, _ = eat(codec, target, model, label)
    new: Encoded = codec.encode(x, state)
    return tree.map(lambda p, leaf: new if p == path else leaf) if tree else new


def apply_rewrite(model: nn.Module, step: Step, label: str, known: Known) -> list[str]:
    act = step.act
    assert isinstance(act, Rewrite)
    members, notes = chosen(model, step, label)
    wanted = {t.places[0][0]: [("input", s) for s in act.needs] for t in members}
    edits = act.plan(model, members, replace(known, gathered=_gathered(model, wanted, known, label)))
    notes += [
        f"{label} leaves {e.tensor} as it is: {e.reason}" if e.tensor else f"{label}: {e.reason}"
        for e in edits
        if isinstance(e, Note)
    ]
    if all(isinstance(e, Note) for e in edits):
        notes.append(f"{label} found nothing to change")
    apply_edits(model, edits, label)
    return notes


@torch.no_grad()
def apply_activations(model: nn.Module, step: Step, label: str, known: Known) -> list[str]:
    """Put a codec at the inputs or outputs of the modules whose weights are selected."""
    codec = step.act
    assert isinstance(codec, Codec)
    members, notes = chosen(model, step, label)
    paths = list(dict.fromkeys(path for t in members for path, _ in t.places))
    wanted = {path: [(step.at, s) for s in codec.needs_at(step.at)] for path in paths}
    gathered = _gathered(model, wanted, known, label)
    held = store_of(model)
    for path in paths:
        weight = next(t.tensor for t in members if path in [place for place, _ in t.places])
        by_name = {name: value for (_, name), value in gathered.get(path, {}).items()}
        state = codec.fit(weight.new_zeros(0), Stats(None, by_name, known.seed)) if codec.needs_at(step.at) else State()
        activation = Activation(path, step.at, codec, state)
        activation.install(model)
        held.activations.append(activation)
    notes.append(f"{label} at {step.at}: simulated; no integer kernel runs it")
    return notes


def _gathered(
    model: nn.Module, wanted: Mapping[str, Sequence[tuple[str, str]]], known: Known, label: str
) -> dict[str, dict[tuple[str, str], Any]]:
    if not any(wanted.values()):
        return {}
    return gather(model, wanted, batches_of(known, label), CALIBRATION_BATCHES, known.loss, known.seed)
