"""The objectives of a loop: what each has seen, and their losses together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.apply import chosen, seed_of
from smelt.core.data import evaluating, forward, forward_or_raise, logits_of
from smelt.core.edit import submodule
from smelt.core.errors import DataError
from smelt.core.method import Known, Look, Objective, Seen, State, Weight
from smelt.core.recipe import Step
from smelt.core.settings import resolve
from smelt.core.target import Target
from smelt.train.slot import Slot


class Objectives:
    """Objectives with the tensors and the modules at which they look.

    masks: of what earlier and acting pruning keeps, by the name of the tensor; to be cleared when one moves.
    """

    def __init__(self, pieces: Sequence[Step], teacher: Any):
        self.pieces = pieces
        self.teacher = teacher
        self.masks: dict[str, Tensor | None] = {}
        self._members: list[list[Target]] = [[] for _ in pieces]
        self._looks: list[Look] = [Look() for _ in pieces]
        self._counts: Tensor | None = None
        self._slots: Mapping[str, Slot] = {}
        self._features: dict[str, Any] = {}
        self._teacher_features: dict[str, Any] = {}
        self._hooks: list[Any] = []

    def choose(self, model: nn.Module, slots: Mapping[str, Slot], known: Known) -> list[str]:
        """Find what the objectives look at, before the parameters leave their places; returns notes."""
        notes: list[str] = []
        self._slots = slots
        for members, piece in zip(self._members, self.pieces, strict=True):
            if _act(piece).needs_weights:
                members[:], left = chosen(model, piece, piece.key)
                notes += left
        self._looks = [_act(piece).look(model, self.teacher, known) for piece in self.pieces]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for state in self.states().values():
            state.to(device)
        watched = [(model, p, self._features) for p in {p for look in self._looks for p in look.features}]
        for path in {p for look in self._looks for p in look.teacher_features}:
            if not isinstance(self.teacher, nn.Module):
                raise DataError(f"the output of {path!r} is asked of the teacher, which is no module")
            watched.append((self.teacher, path, self._teacher_features))
        for module, path, found in [(submodule(root, path), path, found) for root, path, found in watched]:

            def see(_: nn.Module, inputs: Any, output: Any, path: str = path, into: dict[str, Any] = found) -> None:
                into[path] = output

            self._hooks.append(module.register_forward_hook(see))
        return notes

    def states(self) -> dict[str, State]:
        """What the objectives hold, by a name that is their own."""
        named = {
            f"{piece.key}{i}": look.state for i, (piece, look) in enumerate(zip(self.pieces, self._looks, strict=True))
        }
        return {name: state for name, state in named.items() if state is not None}

    @property
    def writes(self) -> bool:
        """Whether one may make inputs of its own."""
        return any(type(_act(piece)).prepare is not Objective.prepare for piece in self.pieces)

    def prepare(self, model: nn.Module, inputs: Any, labels: Any, progress: float, seed: int) -> Any:
        """The inputs that an objective makes in the place of a batch; these very ones where none does."""
        self._counts = None
        for i, act in enumerate(self._acts(progress)):
            made = act.prepare(model, inputs, labels, torch.Generator().manual_seed(seed_of(seed, str(i))))
            if made is not None:
                inputs, self._counts = made
                self._features.clear()
        return inputs

    def _acts(self, progress: float) -> Iterator[Objective]:
        return (resolve(_act(piece), progress) for piece in self.pieces)

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def loss(self, seen: Seen, progress: float) -> Tensor:
        """All terms, plus the task's loss in the weight they leave it."""
        acts = list(self._acts(progress))
        if any(look.teacher_features for look in self._looks) or (
            seen.teacher is None and any(act.needs_teacher for act in acts)
        ):
            seen = replace(seen, teacher=self._guide(seen.inputs))
        weight = 1.0
        total = seen.outputs.new_zeros(())
        for act, members, look in zip(acts, self._members, self._looks, strict=True):
            own = replace(
                seen,
                weights={t.name: self._weight(t) for t in members},
                features=_taken(self._features, look.features, "the model"),
                teacher_features=_taken(self._teacher_features, look.teacher_features, "the teacher"),
                look=look,
                counts=self._counts,
            )
            total = total + act.loss(own)
            weight *= act.hard_weight()
        self._features.clear()
        self._teacher_features.clear()
        return total + weight * seen.hard if seen.hard is not None and weight else total

    def _weight(self, target: Target) -> Weight:
        slot, x = self._slots.get(target.name), getattr(target.module, target.places[0][1])
        if slot is not None and target.name not in self.masks:
            where = slot.seen_by(None).where if slot.links else slot.where
            self.masks[target.name] = where if where is not None and where.shape == x.shape else None
        return Weight(x, self.masks.get(target.name), target.module)

    def _guide(self, inputs: Any) -> Tensor:
        if not isinstance(self.teacher, nn.Module):
            with torch.no_grad():
                return logits_of(forward(self.teacher, inputs))
        with evaluating(self.teacher):
            return logits_of(forward_or_raise(self.teacher, inputs, "as the teacher"))


def _act(piece: Step) -> Objective:
    assert isinstance(piece.act, Objective)
    return piece.act


def _taken(found: Mapping[str, Any], wanted: Sequence[str], who: str) -> dict[str, Any]:
    for path in wanted:
        if path not in found:
            raise DataError(f"the module {path!r} of {who} did not run in this forward; its output is asked for")
    return {path: found[path] for path in wanted}
