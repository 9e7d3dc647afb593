"""The `train` step with `scope: block`: one block after another learns to give what the original gave."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.apply import chosen, seed_of, weight_statistics
from smelt.core.data import tensors
from smelt.core.errors import DataError, ModelError, RuleError
from smelt.core.named import first_line
from smelt.core.output import replacing
from smelt.core.progress import Progress
from smelt.core.recipe import Step
from smelt.core.statistic import Statistic
from smelt.core.store import store_of
from smelt.core.target import Target, targets
from smelt.core.train import Train
from smelt.core.walk import Block, Call, fresh, rebuilt
from smelt.train.log import Log
from smelt.train.loop import Loop, task_loss
from smelt.train.rates import optimizer_of, set_rates
from smelt.train.training import training

LOSSES = "losses"
Saved = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]  # path of a block -> plans and state at its end


def rebuild(model: nn.Module, step: Step, loop: Loop, progress: Progress | None = None) -> list[str]:
    """Run a train step of `scope: block` on `model` in place; returns notes for the report.

    In each block learn the leaves of what is stored, by earlier steps or by the pieces, and the states of the pieces;
    all else of it stays.  The loss is the squared difference of its outputs on inputs as they are now from those of the
    same block of the original (the teacher) on the original's own inputs, as a share of their squares.  Then it is
    stored, and the next block sees its outputs.

    Raises:
        DataError: no training data, or a teacher that is no module.
        ModelError: the loss became NaN or infinite, the forward pass fails, or the teacher has no such block.
        RuleError: nothing to learn.
        OutputError: the checkpoint or the log cannot be written.
    """
    act = step.act
    assert isinstance(act, Train)
    if loop.data.train is None:
        raise DataError(f"{act.name} needs training data; give Job(data=...) or --data with a split 'train'")
    original = copy.deepcopy(model) if loop.teacher is None else loop.teacher
    if not isinstance(original, nn.Module):
        raise DataError(f"{act.name} with scope: block aims at the outputs of the teacher's blocks; it is no module")
    if hasattr(loop.data.train, "set_epoch"):
        loop.data.train.set_epoch(0)
    torch.manual_seed(loop.seed)
    torch.set_flush_denormal(True)
    try:
        notes = _Run(model, step, act, loop, progress or Progress()).go(original)
    finally:
        torch.set_flush_denormal(False)
    model.eval()
    if loop.checkpoint is not None:
        loop.checkpoint.unlink(missing_ok=True)
    return notes


class _Within(training):
    """`training` of one block, with statistics as a walk gathers them."""

    def __init__(self, model: nn.Module, pieces: Sequence[Step], block: Block, **more: Any):
        super().__init__(model, pieces, within=block.path, **more)
        self._block = block

    def _statistics(self, names: Sequence[str], members: list[Target], label: str) -> dict[str, dict[str, Any]]:
        walked = [n for n in names if shelf.load("statistics", n, Statistic).of in ("values", "pairs")]
        rest = [n for n in names if n not in walked]
        found = weight_statistics(self.model, rest, members, self._known, label)
        seen = self._block.gather(walked) if walked else {}
        return {t.name: {**found[t.name], **seen.get(t.name, {})} for t in members}

    def learning(self) -> list[nn.Parameter]:
        """Leaves of what is stored or acted on, and states."""
        dense = {id(slot.leaves[""]) for slot in self._slots if slot.encoded is None and not slot.links}
        dense |= {id(p) for p in self.root.parameters()}
        return [p for p in self.parameters() if id(p) not in dense]


class _Run:
    """The blocks of one step."""

    def __init__(self, model: nn.Module, step: Step, act: Train, loop: Loop, progress: Progress):
        self.model, self.act, self.loop, self.progress = model, act, loop, progress
        self.acting: list[tuple[Step, list[Target]]] = []
        self.notes: list[str] = []
        for piece in step.pieces:
            members, notes = chosen(model, piece, piece.key)
            tied = [t for t in members if len(t.places) > 1]
            self.notes += [*notes, *(f"{piece.key} leaves {t} alone: it stands in several places" for t in tied)]
            self.acting.append((piece, [t for t in members if t not in tied]))
        wanted = {t.name for _, members in self.acting for t in members} | set(store_of(model).entries)
        self.members = [t for t in targets(model) if t.name in wanted and t.parameter and len(t.places) == 1]
        if not self.members:
            raise RuleError(f"{act.name} has nothing to learn: nothing is stored, and no codec stands under 'with'")
        self.began = time.monotonic()
        self.done = 0

    def go(self, original: nn.Module) -> list[str]:
        saved = _opened(self.loop.checkpoint)
        losses: dict[str, tuple[float, float]] = {}
        self.log = Log(self.loop.log, self.loop.index, 0)
        batches = self.loop.data.train
        assert batches is not None
        try:
            for block in rebuilt(self.model, original, self.members, batches, self.act.batches):
                names = {t.name for t in block.members}
                own = [replace(p, on=tuple(n for t in ts if (n := t.name) in names)) for p, ts in self.acting]
                self.total = self.act.epochs * -(-len(block.calls) // self.act.accumulate)
                self.total = min(self.total, self.act.steps or self.total)
                with torch.enable_grad():
                    losses[block.path] = self._fit(block, [piece for piece in own if piece.on], saved)
        finally:
            self.log.close()
        if losses:
            least, most = (sum(values) / len(losses) for values in zip(*losses.values(), strict=True))
            worst = max(losses, key=lambda path: losses[path][1])
            self.notes.append(
                f"{self.act.name}: blocks miss {100 * most:.3g} % of the squares of their outputs, at first "
                f"{100 * least:.3g} %; {worst} most, {100 * losses[worst][1]:.3g} %"
            )
        return list(dict.fromkeys(self.notes))

    def _fit(self, block: Block, pieces: list[Step], saved: Saved) -> tuple[float, float]:
        """Let a block learn; (loss at first, loss at the end)."""
        loop, act = self.loop, self.act
        t = _Within(
            self.model,
            pieces,
            block,
            steps=self.total,
            calibration=loop.data.train,
            loss=loop.loss or task_loss,
            refresh=act.refresh,
            seed=loop.seed,
            tail=loop.tail,
        )
        with t:
            fit = _Fit(t, block, act, seed_of(loop.seed, block.path))
            if block.path in saved:
                plans, state = saved[block.path]
                t.resume(self.total, plans)
                t.load({k: v.to(block.aims[0].device) for k, v in state.items()})
                self.done += self.total
                found = tuple(state[LOSSES].tolist())
            else:
                found = fit.go(self.total, self._advance)
                state = {**t.state(), LOSSES: torch.tensor(found, dtype=torch.float64)}
                if loop.checkpoint is not None:
                    saved[block.path] = (t.plans(), state)
                    _save(loop.checkpoint, saved)
            self.notes += t.notes
        return found[0], found[1]

    def _advance(self, path: str, update: int, loss: float, rate: float) -> None:
        self.done += 1
        self.progress.advance(update, self.total, f"{path} loss {loss:.3g}")
        seconds = time.monotonic() - self.began
        self.log.write(self.done, {"loss": loss, "rate": rate, "seconds": seconds})


class _Fit:
    """The loop of one block."""

    def __init__(self, t: _Within, block: Block, act: Train, seed: int):
        self.t, self.block, self.act = t, block, act
        self.learning = t.learning()
        self.kind = block.aims[0].device.type
        self.scale = [1 / max(float(aim.float().square().mean()), TINY) for aim in block.aims]
        self.draws = torch.Generator().manual_seed(seed)

    def go(self, updates: int, advance: Callable[[str, int, float, float], None]) -> tuple[float, float]:
        t, act = self.t, self.act
        first, before = self.error(), t.state() if act.keep == "best" else None
        t.optimizer = optimizer = optimizer_of(act, self.learning)
        order = self._order()
        while t.done < updates:
            now, total = set_rates(optimizer, act, t.done / updates), 0.0
            optimizer.zero_grad(set_to_none=True)
            for _ in range(act.accumulate):
                loss = self.loss(next(order)) / act.accumulate
                if not loss.requires_grad:
                    raise DataError(f"{act.name}: nothing in {self.block.path} learns")
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            if not math.isfinite(total):
                raise ModelError(f"{act.name}: the loss of {self.block.path} became {total}; a smaller lr may help")
            if act.clip is not None:
                nn.utils.clip_grad_norm_(self.learning, act.clip)
            optimizer.step()
            t.step()
            advance(self.block.path, t.done, total, now)
            if t.done * act.accumulate % len(self.block.calls) == 0:
                t.epoch()
        last = self.error()
        if before is not None and last > first and t.settled:
            t.load(before)
            last = first
        return first, last

    def _order(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(len(self.block.calls), generator=self.draws).tolist()

    @torch.no_grad()
    def error(self) -> float:
        """The loss over all batches."""
        return sum(float(self.loss(index)) for index in range(len(self.block.calls))) / len(self.block.calls)

    def loss(self, index: int) -> Tensor:
        aim = self.block.aims[index]
        with torch.autocast(self.kind, getattr(torch, self.act.precision), enabled=self.act.precision != "float32"):
            out = _called(self.t.root, self.block, self.block.calls[index])
        if out.shape != aim.shape:
            raise ModelError(f"{self.block.path} gives {list(out.shape)}, and in the original {list(aim.shape)}")
        return (out.float() - aim.float()).square().mean() * self.scale[index]


TINY = 1e-30  # of mean squares


def _called(module: nn.Module, block: Block, call: Call) -> Tensor:
    """The first tensor that it gives."""
    args, kwargs = fresh(call)
    try:
        return next(tensors(module(*args, **kwargs)))
    except Exception as error:
        raise ModelError(f"{block.path} fails while it is trained: {first_line(error)}") from error


def _save(path: Path, saved: Saved) -> None:
    """As a safetensors file, renamed into place."""
    leaves = {f"{block}|{k}": v.contiguous() for block, (_, state) in saved.items() for k, v in state.items()}
    plans = {block: plan for block, (plan, _) in saved.items()}
    data = to_bytes(leaves, {"smelt": json.dumps(plans)})
    with replacing(path, True, len(data)) as file:
        file.write(data)


def _opened(path: Path | None) -> Saved:
    """The inverse; a damaged file counts as none."""
    if path is None or not path.exists():
        return {}
    try:
        with safe_open(str(path), "pt") as f:
            saved: Saved = {block: (plans, {}) for block, plans in json.loads(f.metadata()["smelt"]).items()}
            for key in f.keys():  # noqa: SIM118  (not a mapping)
                block, _, name = key.partition("|")
                saved[block][1][name] = f.get_tensor(key)
        return saved
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return {}
