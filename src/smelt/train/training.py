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

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.apply import apply_activations, apply_rewrite, chosen, encode_chain
from smelt.core.data import forward, logits_of
from smelt.core.edit import submodule
from smelt.core.encoded import Encoded
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Codec, Method, Objective, Rewrite, Seen, State, Stats, Values
from smelt.core.recipe import Recipe, Step
from smelt.core.settings import ramps, resolve
from smelt.core.store import eat, renew, store_of
from smelt.core.target import Target, targets

# Share of the loop after which a codec that settles (a mask) no longer moves, unless its ramp says otherwise.
SETTLED = 0.75


@dataclass
class _Link:
    """One codec acting on one tensor."""

    codec: Codec
    label: str
    state: State | None = None


@dataclass
class _Slot:
    """One tensor whose value is computed from its parameters at each forward pass.

    `leaves`: path of a floating leaf -> its parameter ('' for a tensor that is not stored yet).
    `carrier`: the path in `leaves` on which the links act.
    """

    target: Target
    encoded: Encoded | None
    leaves: dict[str, nn.Parameter]
    carrier: str | None
    where: Tensor | None
    links: list[_Link] = field(default_factory=list)

    def value(self) -> Tensor:
        if self.encoded is None:
            return self._chain(self.leaves[""]).to(self.target.tensor.dtype)
        chained = self._chain(self.leaves[self.carrier]) if self.carrier and self.links else None

        def now(path: str, leaf: Tensor) -> Tensor:
            return chained if chained is not None and path == self.carrier else self.leaves.get(path, leaf)

        return self.encoded.map(now).decode()

    def _chain(self, x: Tensor) -> Tensor:
        for link in self.links:
            if link.state is not None:
                x = link.codec.simulate(x, link.state)
        return x

    def seen_by(self, link: _Link) -> Values:
        """The values that reach a link, and the mask of earlier pruning."""
        index = self.links.index(link)
        where = self.where
        with torch.no_grad():
            x = self.leaves[self.carrier or ""].detach()
            for earlier in self.links[:index]:
                if earlier.state is not None:
                    mask = earlier.codec.encode(x, earlier.state).where()
                    where = mask if where is None or mask is None else where & mask
                    x = earlier.codec.simulate(x, earlier.state)
            return Values(x, where)

    def current(self) -> Encoded | None:
        """The stored tree with the trained leaves, rounded to the dtypes they are stored in."""
        if self.encoded is None:
            return None
        return self.encoded.map(lambda p, leaf: self.leaves[p].detach().to(leaf.dtype) if p in self.leaves else leaf)


class training:  # noqa: N801  (a verb, used like torch.no_grad)
    """Context in which `model` trains with `pieces` acting together.

    Args:
        model: any module; what smelt has stored of it trains through its floating leaves.
        pieces: methods, steps, or recipe data ({'prune.weights': {'ratio': 0.5}}).
        steps: optimizer steps of the loop; needed when a setting ramps.
        teacher: module or function for objectives that need one; run without gradients, once per loss.
        calibration: batches for pieces at inputs or outputs that need statistics.
        refresh: share of the loop between two updates of what moves.
        seed: for what is drawn at random.

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
        refresh: float = 0.01,
        seed: int = 0,
    ):
        self.model, self.teacher, self.seed = model, teacher, seed
        self.pieces = _pieces(pieces)
        self.steps, self.done = steps, 0
        self._every = max(1, round(refresh * steps)) if steps else 0
        self._calibration = calibration
        self._slots: list[_Slot] = []
        self._objectives = [piece.act for piece in self.pieces if isinstance(piece.act, Objective)]
        self._groups: list[tuple[Step, list[_Slot], list[_Link]]] = []
        self._hook: Any = None
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
        for piece in self.pieces:
            if isinstance(piece.act, Rewrite):
                self.notes += apply_rewrite(self.model, piece, piece.key, batches=self._calibration)
        weights = [p for p in self.pieces if isinstance(p.act, Codec) and p.at == "weight"]
        acts = [p for p in self.pieces if isinstance(p.act, Codec) and p.at != "weight"]
        slots: dict[str, _Slot] = {}
        entries = store_of(self.model).entries
        for target in targets(self.model):
            if target.name in entries:
                slots[target.name] = self._slot(target, None)
        for piece in weights:
            codec = piece.act
            assert isinstance(codec, Codec)
            members, notes = chosen(self.model, piece, piece.key)
            self.notes += notes
            links = []
            for target in members:
                if target.name not in slots:
                    slots[target.name] = self._slot(target, codec)
                slot = slots[target.name]
                if slot.encoded is not None and slot.carrier is None:
                    eat(codec, target, self.model, piece.key)  # raises: nothing floating is left
                links.append(_Link(codec, piece.key))
                slot.links.append(links[-1])
            self._groups.append((piece, [slots[t.name] for t in members], links))
        self._slots = list(slots.values())
        for piece in acts:
            self.notes += apply_activations(self.model, piece, piece.key, batches=self._calibration, seed=self.seed)
        self._refit(everything=True)
        for slot in self._slots:
            for path, name in slot.target.places:
                submodule(self.model, path)._parameters[name] = None  # keeps its place in the order
        self._hook = self.model.register_forward_pre_hook(lambda *_: self._place())
        self._place()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._refit(last=True)
        self._hook.remove()
        for slot in self._slots:
            for path, name in slot.target.places:
                owner = submodule(self.model, path)
                owner.__dict__.pop(name, None)
                owner._parameters[name] = slot.target.tensor  # type: ignore[assignment]
                _flatten(owner, name, slot.target.tensor)
        with torch.no_grad():
            for slot in self._slots:
                self._leave(slot, finish=kind is None)

    def _leave(self, slot: _Slot, finish: bool) -> None:
        encoded = slot.current()
        if encoded is not None:
            renew(self.model, slot.target, encoded)
        elif slot.leaves[""] is not slot.target.tensor:
            slot.target.tensor.copy_(slot.leaves[""])
        if finish:
            for link in slot.links:
                assert link.state is not None
                encode_chain(self.model, slot.target, link.codec, link.state, link.label)

    def _slot(self, target: Target, codec: Codec | None) -> _Slot:
        entry = store_of(self.model).entries.get(target.name)
        learn = target.tensor.requires_grad
        if entry is None:
            assert codec is not None
            eat(codec, target, self.model, codec.name)
            wide = target.tensor.dtype in (torch.float32, torch.float64)
            master = target.tensor if wide else nn.Parameter(target.tensor.detach().float(), learn)
            assert isinstance(master, nn.Parameter)
            return _Slot(target, None, {"": master}, "", None)
        tree = entry.encoded
        floats = {p: leaf for p, leaf in tree.leaves() if leaf.is_floating_point()}
        leaves = {
            p: nn.Parameter(leaf.detach().clone().to(target.tensor.device, _wide(leaf.dtype)), learn)
            for p, leaf in floats.items()
        }
        carriers = [p for p in tree.carriers() if p in floats]
        return _Slot(target, tree, leaves, carriers[0] if len(carriers) == 1 else None, tree.where())

    def _place(self) -> None:
        """Compute every weight and put it where the modules look for it."""
        for slot in self._slots:
            value = slot.value()
            for path, name in slot.target.places:
                owner = submodule(self.model, path)
                owner.__dict__[name] = value
                _flatten(owner, name, value)

    @torch.no_grad()
    def _refit(self, *, everything: bool = False, epoch: bool = False, last: bool = False) -> None:
        """Fit the states of what moves: at the start all, later what ramps, each epoch what does not settle."""
        t = 1.0 if last else self.progress
        for piece, slots, links in self._groups:
            moving = ramps(piece.act).values()
            codec = piece.act
            assert isinstance(codec, Codec)
            finish = max((r.finish for r in moving), default=SETTLED)
            window = (self._every + 1) / self.steps if self.steps else 0.0  # one last fit where the ramp arrives
            follows = t <= finish + window and not last if codec.settles else bool(moving) or epoch or last
            if not (everything or follows):
                continue
            now = resolve(codec, t)
            seen = {slot.target.name: slot.seen_by(link) for slot, link in zip(slots, links, strict=True)}
            plan = now.plan(seen, {}, lambda e: e.nbytes())
            for slot, link in zip(slots, links, strict=True):
                name = slot.target.name
                if link.state is not None and any(True for _ in link.state.parameters()):
                    continue  # it learns its state
                link.codec = plan[name]
                stats = Stats(where=seen[name].where, seed=self.seed ^ zlib.crc32(name.encode()))
                link.state = link.codec.fit(seen[name].x, stats)

    def step(self) -> None:
        """Tell that one optimizer step is done."""
        self.done += 1
        if self._every and self.done % self._every == 0:
            self._refit()

    def epoch(self) -> None:
        """Tell that one epoch is done: scales and codebooks follow the weights."""
        self._refit(epoch=True)

    def loss(
        self, inputs: Any, outputs: Any, labels: Any = None, hard: Tensor | None = None, guide: Tensor | None = None
    ) -> Tensor:
        """The loss of all objectives together, plus `hard` (your task's loss) in the weight they leave it.

        One forward of the teacher serves all; none is run where `guide` holds its logits.  Without objectives the
        loss is `hard`.
        """
        logits = logits_of(outputs)
        if guide is None and any(o.needs_teacher for o in self._objectives):
            with torch.no_grad():
                guide = logits_of(forward(self.teacher, inputs))
        seen = Seen(inputs, logits, labels, guide, hard)
        weight = 1.0
        total = logits.new_zeros(())
        for objective in self._objectives:
            total = total + objective.loss(seen)
            weight *= objective.hard_weight()
        return total + weight * hard if hard is not None and weight else total

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
            for i, link in enumerate(slot.links):
                for name, p in link.state.named_parameters() if link.state is not None else ():
                    yield f"{slot.target.name}/link{i}.{name}", p
        yield from self.model.named_parameters()
        for activation in store_of(self.model).activations:
            for name, p in activation.state.named_parameters():
                yield f"{activation.path}/{activation.at}.{name}", p

    def state(self) -> dict[str, Tensor]:
        """All that training has changed, by name: parameters, buffers, states of the links."""
        found = {name: p.detach() for name, p in self.named_parameters()}
        found |= {name: b for name, b in self.model.named_buffers()}
        for slot in self._slots:
            for i, link in enumerate(slot.links):
                if link.state is not None:
                    found |= {f"{slot.target.name}/link{i}.{n}": b for n, b in link.state.named_buffers()}
        return {name: tensor.clone() for name, tensor in found.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, in the same context or in one made the same way."""
        for name, p in self.named_parameters():
            p.copy_(state[name])
        for name, b in self.model.named_buffers():
            b.copy_(state[name])
        for slot in self._slots:
            for i, link in enumerate(slot.links):
                for n, _ in list(link.state.named_buffers()) if link.state is not None else ():
                    setattr(link.state, n, state[f"{slot.target.name}/link{i}.{n}"].clone())

    def resume(self, done: int) -> None:
        """Go on after `done` steps: ramps at their places; call before `load`."""
        self.done = done
        self._refit(everything=True)


def _flatten(owner: nn.Module, name: str, value: Tensor) -> None:
    """Recurrent layers read their weights from a list of their own."""
    if isinstance(owner, nn.RNNBase) and name in owner._flat_weights_names:
        owner._flat_weights[owner._flat_weights_names.index(name)] = value


def _pieces(pieces: Sequence[Any]) -> tuple[Step, ...]:
    """Steps from methods, steps or plain data, checked as the pieces of a train step are."""
    if not pieces:
        return ()
    plain = [p if isinstance(p, (Step, Method)) else dict(p) if not isinstance(p, str) else p for p in pieces]
    return Recipe.of({"steps": [{"train": {"with": plain}}]}).steps[0].pieces


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
