"""The training seam: what is stored trains through its floating leaves, codecs act straight-through.

    with smelt.training(model, [prune.Weights(ratio=Ramp(0, 0.9))], steps=1000, teacher=teacher) as t:
        optimizer = torch.optim.Adam(t.parameters())
        for x, y in loader:                           # your own loop
            out = model(x)
            loss = t.loss(x, out, labels=y, hard=F.cross_entropy(out, y))
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            t.step()                                  # moves ramps on
    # here the pieces have been stored for real; smelt.save(model, path)

Inside, every such weight is computed anew at each forward pass of the model, once per tensor however often it is
tied; outside, the model is an ordinary module again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.apply import (
    apply_activations,
    apply_rewrite,
    chosen,
    encode_chain,
    seed_of,
    weight_statistics,
)
from smelt.core.data import logits_of
from smelt.core.edit import submodule
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Codec, Known, Lossless, Method, Objective, Rewrite, Seen
from smelt.core.recipe import Recipe, Step
from smelt.core.settings import ramps
from smelt.core.store import eat, renew, store_of
from smelt.core.target import Target, targets
from smelt.train.group import Group
from smelt.train.objectives import Objectives
from smelt.train.processes import Processes
from smelt.train.saved.acting import Acting
from smelt.train.slot import Link, Slot, flatten, is_narrow, slot_of, stands_in


class training:  # noqa: N801  (a verb, used like torch.no_grad)
    """Context in which `model` trains with `pieces` acting together.

    The forward pass must go through `model(...)` itself: that is when its weights are computed.

    Args:
        model: any module; what smelt has stored of it trains through its floating leaves.
        pieces: methods, steps, or recipe data ({'prune.weights': {'ratio': 0.5}}).
        steps: optimizer steps of the loop; needed when a setting ramps.
        teacher: module or function for objectives that need one; run without gradients, once per loss.
        calibration: batches for pieces that need statistics.
        loss: of the task, (outputs, labels) -> scalar, for pieces whose statistics are gradients.
        refresh: share of the loop between two updates of what moves.
        seed: for what is drawn at random.
        tail: lossless codecs with which candidates are priced.
        processes: that train together.
        within: path of a module: what stands in it and nowhere else trains, and the forward pass goes through it.

    Attributes:
        optimizer: set it to yours, and what it remembers of weights that start anew from 0 (regrowth) is forgotten.

    Raises:
        RecipeError, RuleError: as in a recipe.
    """

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[Any] = (),
        *,
        steps: int | None = None,
        teacher: Any = None,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[Tensor, Any], Tensor] | None = None,
        refresh: float = 0.01,
        seed: int = 0,
        tail: Sequence[Lossless] = (),
        processes: Processes | None = None,
        within: str = "",
    ):
        self._processes, self._within, self.root = processes or Processes(None), within, submodule(model, within)
        self.model, self.teacher, self.seed, self.tail = model, teacher, seed, tail
        self.pieces = _pieces(pieces)
        self.steps, self.done = steps, 0
        self._every = max(1, round(refresh * steps)) if steps else 0
        self._known = Known(calibration, loss, seed=seed)
        self._slots: list[Slot] = []
        self._objectives = Objectives([piece for piece in self.pieces if isinstance(piece.act, Objective)], teacher)
        self.saved = Acting(model, self.pieces, seed, lambda: self.done)
        self._groups: list[Group] = []
        self._shared: dict[int, nn.Parameter] = {}  # by the id of a leaf that stands in several trees
        self._hook: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.notes: list[str] = []
        for piece in self.pieces:
            if ramps(piece.act) and not steps:
                raise RecipeError(f"{piece.key} ramps; training(..., steps=N) must say how long the loop is")
            if isinstance(piece.act, Objective) and piece.act.needs_teacher and teacher is None:
                raise DataError(f"{piece.key} needs a teacher; give training(..., teacher=...)")

    @property
    def progress(self) -> float:
        return min(1.0, self.done / self.steps) if self.steps else 0.0

    @property
    def settled(self) -> bool:
        """Whether everything that ramps has arrived: only then do measurements speak of the final model."""
        return all(self.progress >= r.finish for piece in self.pieces for r in ramps(piece.act).values())

    def __enter__(self) -> training:
        held = store_of(self.model)
        for piece in self.pieces:
            if isinstance(piece.act, Rewrite):
                self.notes += apply_rewrite(self.model, piece, piece.key, self._known)
        inside = [t for t in targets(self.model) if stands_in(t, self._within)]
        slots = {t.name: self._slot(t) for t in inside if t.name in held.entries or is_narrow(t)}
        for piece in self.pieces:
            if isinstance(piece.act, Codec) and piece.at == "weight":
                self._groups.append(self._group(piece, piece.act, slots))
        self._slots = list(slots.values())
        self._refit(everything=True)
        self.notes += self._objectives.choose(self.model, slots, self._known)
        before = len(held.activations)
        try:
            with self._simulating():
                for piece in self.pieces:
                    if isinstance(piece.act, Codec) and piece.at in ("input", "output"):
                        self.notes += apply_activations(self.model, piece, piece.key, self._known)
        except BaseException:
            for activation in held.activations[before:]:
                activation.remove()
            del held.activations[before:]
            self._objectives.leave()
            raise
        for slot in self._slots:
            for path, name in slot.target.places:
                submodule(self.model, path)._parameters[name] = None  # keeps its place in the order
        self._hook = self.root.register_forward_pre_hook(lambda *_: self._place())
        self.saved.enter()
        self._place()
        return self

    @contextmanager
    def _simulating(self) -> Iterator[None]:
        """Meanwhile the parameters hold what the pieces make of them."""
        acted = [slot for slot in self._slots if slot.links]
        before = [slot.target.tensor.detach().clone() for slot in acted]
        with torch.no_grad():
            for slot in acted:
                slot.target.tensor.copy_(slot.value())
            try:
                yield
            finally:
                for slot, values in zip(acted, before, strict=True):
                    slot.target.tensor.copy_(values)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                if not self.settled:
                    warnings.warn(
                        f"the loop ended after {self.done} of {self.steps} steps; what ramps was set to its end",
                        stacklevel=2,
                    )
                self._refit(everything=not self.settled, last=True)
        except BaseException:
            kind = RuntimeError
            raise
        finally:
            self._restore()
            with torch.no_grad():
                rounded: dict[int, Tensor] = {}
                for slot in self._slots:
                    self._leave(slot, rounded, finish=kind is None)

    def _restore(self) -> None:
        """Put the parameters back where the modules had them."""
        self._hook.remove()
        self.saved.leave()
        self._objectives.leave()
        for slot in self._slots:
            for path, name in slot.target.places:
                owner = submodule(self.model, path)
                owner.__dict__.pop(name, None)
                owner._parameters[name] = slot.target.tensor  # type: ignore[assignment]
                flatten(owner, name, slot.target.tensor)

    def _leave(self, slot: Slot, rounded: dict[int, Tensor], finish: bool) -> None:
        """Give a tensor its trained values, and store it for real by the codecs that acted on it."""
        if slot.encoded is not None:
            renew(self.model, slot.target, slot.current(slot.encoded, rounded))
        elif slot.leaves[""] is not slot.target.tensor:
            slot.target.tensor.copy_(slot.leaves[""])
        if finish:
            for link in slot.links:
                assert link.state is not None
                encode_chain(self.model, slot.target, link.codec, link.state, link.label)

    def _group(self, piece: Step, codec: Codec, slots: dict[str, Slot]) -> Group:
        """The tensors on which a piece acts, with a link on each."""
        members, notes = chosen(self.model, piece, piece.key)
        self.notes += notes
        for target in members:
            eat(codec, target, self.model, piece.key)  # raises where nothing floating is left
            slots.setdefault(target.name, self._slot(target))
        statistics = self._statistics(codec.needs_at("weight"), members, piece.key)
        links = [Link(codec, piece.key, watched=codec.needs_at("training")) for _ in members]
        group = Group(codec, [slots[t.name] for t in members], links, statistics)
        for slot, link in zip(group.slots, group.links, strict=True):
            slot.links.append(link)
        return group

    def _statistics(self, names: Sequence[str], members: list[Target], label: str) -> dict[str, dict[str, Any]]:
        return weight_statistics(self.model, names, members, self._known, label)

    def _slot(self, target: Target) -> Slot:
        entry = store_of(self.model).entries.get(target.name)
        return slot_of(target, entry.encoded if entry else None, self._shared)

    def _place(self) -> None:
        """Compute every weight and put it where the modules look for it."""
        for slot in self._slots:
            value = slot.value()
            for path, name in slot.target.places:
                owner = submodule(self.model, path)
                owner.__dict__[name] = value
                flatten(owner, name, value)

    @torch.no_grad()
    def _refit(self, *, everything: bool = False, epoch: bool = False, last: bool = False) -> None:
        """Fit the states of what moves: at the start all, later what ramps, each epoch what does not settle."""
        self._objectives.masks.clear()
        for _, link in self._links() if self._processes.count > 1 else ():
            link.seen = {name: self._processes.mean(found) for name, found in link.seen.items()}
        groups = [
            g for g in self._groups if everything or g.moves(self.done, self.steps, self._every, epoch=epoch, last=last)
        ]
        with self._processes.whole(bool(groups)):
            for group in groups:
                for leaf, where in group.fit(1.0 if last else self.progress, self.done, self.seed, self.tail):
                    self._processes.restart(self.optimizer, leaf, where)

    def step(self) -> None:
        """Tell that one optimizer step is done."""
        self.done += 1
        self.notes += self.saved.notes()
        if self._every or any(group.codec.period() for group in self._groups):
            self._refit()

    def epoch(self) -> None:
        """Tell that one epoch is done: scales and codebooks follow the weights."""
        self._refit(epoch=True)

    def prepare(self, inputs: Any, labels: Any = None, part: int = 0) -> Any:
        """What to run on instead of a batch; the same `inputs` where nothing is drawn.

        An objective may let the model write its own batch (distill.sequence, on-policy).  Such inputs have no labels,
        no loss of the task and no recorded teacher.  `part` tells batches of one optimizer step apart.
        """
        seed = seed_of(self.seed, f"{self.done}/{part}")
        with self._processes.whole(self._objectives.writes):
            return self._objectives.prepare(self.model, inputs, labels, self.progress, seed)

    def loss(
        self, inputs: Any, outputs: Any, labels: Any = None, hard: Tensor | None = None, guide: Tensor | None = None
    ) -> Tensor:
        """The loss of all objectives together, plus `hard` (your task's loss) in the weight they leave it.

        One forward of the teacher, in evaluation mode, serves all; none is run where `guide` holds its logits and
        nobody asks for its features.  Without objectives the loss is `hard`.
        """
        total = self._objectives.loss(Seen(inputs, logits_of(outputs), labels, guide, hard), self.progress)
        return self.saved.measured(total, self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that learns, each once: leaves, masters, learned states, and the model's other parameters."""
        found: dict[int, nn.Parameter] = {}
        for p in (p for _, p in self.named_parameters()):
            found.setdefault(id(p), p)
        yield from (p for p in found.values() if p.requires_grad)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for slot in self._slots:
            for path, leaf in slot.leaves.items():
                yield f"{slot.target.name}/{path}", leaf
        for key, link in self._links():
            for name, p in link.state.named_parameters() if link.state is not None else ():
                yield f"{key}.{name}", p
        for key, held in self._objectives.states().items():
            for name, p in held.named_parameters():
                yield f"{key}.{name}", p
        yield from self.root.named_parameters()
        for activation in store_of(self.model).activations:
            for name, p in activation.state.named_parameters():
                yield f"{activation.path}/{activation.at}.{name}", p

    def holders(self) -> Iterator[nn.Module]:
        """Modules that hold all of these besides `root`."""
        yield from (slot.leaves for slot in self._slots)
        yield from (link.state for _, link in self._links() if link.state is not None)
        yield from self._objectives.states().values()
        yield from (activation.state for activation in store_of(self.model).activations)

    def _links(self) -> Iterator[tuple[str, Link]]:
        for slot in self._slots:
            for i, link in enumerate(slot.links):
                yield f"{slot.target.name}/link{i}", link

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name, as it now is: parameters, buffers, states of links and objectives.

        In shares, unless the processes hold it whole.
        """
        found = {name: p.detach() for name, p in self.named_parameters()}
        found |= dict(self.root.named_buffers())
        for key, link in self._links():
            if link.state is not None:
                found |= {f"{key}.{name}": b for name, b in link.state.named_buffers()}
            found |= {f"{key}.seen.{name}": seen for name, seen in link.seen.items()}
        for key, held in self._objectives.states().items():
            found |= {f"{key}.{name}": b for name, b in held.named_buffers()}
        return found

    def state(self) -> dict[str, Tensor]:
        """A copy of them."""
        with self._processes.whole():
            return {name: tensor.clone() for name, tensor in (*self.tensors().items(), *self.saved.state().items())}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, in the same context or in one made the same way."""
        with self._processes.whole():
            for name, p in self.named_parameters():
                p.copy_(state[name])
        self._objectives.masks.clear()
        self.saved.load(state)
        for name, b in self.root.named_buffers():
            b.copy_(state[name])
        for key, held in self._objectives.states().items():
            for name, b in held.named_buffers():
                b.copy_(state[f"{key}.{name}"])
        for key, link in self._links():
            for name in [n for n, _ in link.state.named_buffers()] if link.state is not None else ():
                setattr(link.state, name, state[f"{key}.{name}"].clone())
            seen = {name: state.get(f"{key}.seen.{name}") for name in link.watched}
            link.seen = {name: found.clone() for name, found in seen.items() if found is not None}

    def plans(self) -> dict[str, dict[str, Any]]:
        """The settings that `plan` gave each codec for each tensor, as plain data."""
        return {key: asdict(link.codec) for key, link in self._links()}  # type: ignore[call-overload]

    def restart(self, state: dict[str, Tensor]) -> None:
        """Go back to the beginning, where `state` was taken."""
        self.done = 0
        self._refit(everything=True)
        self.load(state)

    def resume(self, done: int, plans: dict[str, dict[str, Any]]) -> None:
        """Go on after `done` steps with what `plans` gave then; call before `load`."""
        self.done = done
        self._refit(everything=True)
        for key, link in self._links():
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in plans[key].items()}
            link.codec = replace(link.codec, **given)  # type: ignore[type-var]


def _pieces(pieces: Sequence[Any]) -> tuple[Step, ...]:
    """Steps from methods, steps or plain data, checked as the pieces of a train step are."""
    if not pieces:
        return ()
    plain = [p if isinstance(p, (Step, Method)) else dict(p) if not isinstance(p, str) else p for p in pieces]
    return Recipe.of({"steps": [{"train": {"with": plain}}]}).steps[0].pieces
