"""The `train` and `recover` steps: a loop around `training`, with selection on a held-out split and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.core.apply import seed_of
from smelt.core.data import (
    Batches,
    Data,
    Guided,
    batch,
    evaluating,
    forward,
    forward_or_raise,
    logits_of,
    move,
    samples,
)
from smelt.core.errors import DataError, ModelError, RecipeError
from smelt.core.method import Lossless
from smelt.core.progress import Progress
from smelt.core.recipe import Step
from smelt.core.train import Recover, Train
from smelt.train.average import Average, renew_norms
from smelt.train.checkpoint import Best, Place, Running, resume, save
from smelt.train.log import Log
from smelt.train.mixing import Mixed, mixed
from smelt.train.processes import Processes
from smelt.train.rates import optimizer_of, set_rates
from smelt.train.shards import moments
from smelt.train.training import training


@dataclass
class Loop:
    """What a train step needs besides the model and its settings.

    score: value of a model on a loader, larger is better; selects epochs on the held-out split.
    checkpoint: file that holds the state after each epoch, and between them every so many `minutes`; or None for no
        resuming.
    tail: lossless codecs with which candidates are priced.
    log: a CSV file, or a folder for TensorBoard; or None.
    index: number of the step, for the log.
    """

    data: Data
    teacher: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    score: Callable[[nn.Module, Iterable[Any]], float] | None = None
    device: str = "cpu"
    seed: int = 0
    checkpoint: Path | None = None
    tail: tuple[Lossless, ...] = ()
    minutes: float = 10.0
    log: Path | None = None
    index: int = 1


def fit(model: nn.Module, step: Step, loop: Loop, progress: Progress | None = None) -> list[str]:
    """Run a train step on `model` in place; returns notes for the report.

    Raises:
        DataError: no training data, or a loss without labels.
        ModelError: the loss became NaN or infinite, or the forward pass fails.
        OutputError: the checkpoint or the log cannot be written.
    """
    act = step.act
    assert isinstance(act, Train)
    processes = Processes(loop.device)
    train, valid, notes = _split(loop.data, act, loop.seed)
    per_epoch = _length(train, act)
    if hasattr(train, "set_epoch"):
        train.set_epoch(0)
    torch.manual_seed(loop.seed)
    updates = act.epochs * -(-per_epoch // act.accumulate)
    context = training(
        model,
        step.pieces,
        steps=updates if act.steps is None else min(act.steps, updates),
        teacher=loop.teacher,
        calibration=train,
        loss=loop.loss or task_loss,
        refresh=act.refresh,
        seed=loop.seed,
        tail=loop.tail,
        processes=processes,
    )
    # Adam's moments of pruned weights decay into denormal numbers, which are several times slower to add.
    torch.set_flush_denormal(True)
    try:
        with context as t:
            _Run(model, train, valid, t, act, loop, per_epoch, processes, progress or Progress(), notes).go()
            notes += t.notes
    finally:
        torch.set_flush_denormal(False)
    model.eval()
    processes.meet()
    if loop.checkpoint is not None and processes.first:
        loop.checkpoint.unlink(missing_ok=True)
    return notes


class _Forward(nn.Module):
    """From a batch to the loss, as one module with all that learns, as engines of several processes want it."""

    def __init__(self, model: nn.Module, t: training, loss: Callable[[Any, Any], Tensor], act: Train):
        super().__init__()
        self.model, self.beside = model, nn.ModuleList([m for m in t.holders() if any(True for _ in m.parameters())])
        self._t, self._loss, self._act = t, loss, act

    def forward(self, given: Mixed, guide: Tensor | None) -> Tensor:
        outputs, labels, hard = forward(self.model, given.inputs), given.labels, None
        if labels is not None and self._act.hard:
            hard = self._act.hard * given.loss(logits_of(outputs), labels, self._loss)
        return self._t.loss(given.inputs, outputs, labels, hard, guide)


class _Run:
    """One loop.  An update is one optimizer step, of `accumulate` batches."""

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        valid: Any,
        t: training,
        act: Train,
        loop: Loop,
        per_epoch: int,
        processes: Processes,
        progress: Progress,
        notes: list[str],
    ):
        self.model, self.train, self.valid, self.t, self.act, self.loop = model, train, valid, t, act, loop
        self.per_epoch, self.processes, self.progress, self.notes = per_epoch, processes, progress, notes
        assert t.steps is not None
        self.updates: int = t.steps
        self.kind = loop.device.split(":")[0]
        if act.precision == "float16" and processes.sharded:
            raise RecipeError(f"{act.name}.precision: float16 does not go with FSDP; take bfloat16")
        t.optimizer = optimizer_of(act, list(t.parameters()))
        scaler = torch.amp.GradScaler(self.kind, enabled=act.precision == "float16")
        average = None if act.ema is None else Average(t, act.ema)
        self.run = Running(t, t.optimizer, scaler, average, Place(), Best())
        self.layout = _layout(model, train, loop.device)
        self.saved = time.monotonic()
        self.began = self.saved

    def go(self) -> None:
        run, path = self.run, self.loop.checkpoint
        if path is not None and path.exists():
            resume(path, run)
        self.processes.meet()
        self.step = self.processes.wrap(_Forward(self.model, self.t, self._loss(), self.act), run.optimizer)
        self.learning = list(self.t.parameters())
        try:
            self._go()
        except BaseException:
            self.processes.leave(lost=True)
            raise
        self.processes.leave(lost=False)

    def _go(self) -> None:
        run = self.run
        self.log = Log(self.loop.log if self.processes.first else None, self.loop.index, self.t.done)
        try:
            while run.place.epoch < self.act.epochs and (self.t.done < self.updates or run.place.batch):
                self._epoch()
                if self._ended() or self.t.done >= self.updates:
                    break
        finally:
            self.log.close()
        if run.best.state is not None:
            self.t.load(run.best.state)
        elif run.average is not None:
            self.t.load(run.average.values)
        if run.best.state is None:
            with self.processes.whole():
                self._renew()
        if self.processes.count > 1:  # batch norms have seen other samples in each
            self.t.load(self.processes.agreed(self.t.state()))

    def _epoch(self) -> None:
        """The rest of an epoch."""
        run, place = self.run, self.run.place
        self._seed(place.epoch)
        self.model.train()
        batches = iter(self.train)
        for _ in islice(batches, place.batch):
            pass
        if run.random is not None:
            self._draw_as(run.random[self.processes.rank])
            run.random = None
        while self.t.done < self.updates and (group := list(islice(batches, self.act.accumulate))):
            value = self._update(group)
            place.batch, place.total, place.count = place.batch + len(group), place.total + value, place.count + 1
            text = f"epoch {place.epoch + 1}/{self.act.epochs} loss {place.mean:.4f}"
            if run.best.value > -math.inf:
                text += f" held-out {run.best.value:.2f}"
            self.progress.advance(self.t.done, self.updates, text)
            due = time.monotonic() - self.saved >= 60 * self.loop.minutes
            if self.loop.checkpoint is not None and self.processes.agreed(due):
                self._save(self.processes.rows(self._drawn()))
        self.t.epoch()

    def _update(self, group: list[Any]) -> float:
        """One optimizer step; returns the loss."""
        run, act, total = self.run, self.act, 0.0
        now = set_rates(run.optimizer, act, self.t.done / self.updates)
        run.optimizer.zero_grad(set_to_none=True)
        sizes = [samples(batch(item)[0]) for item in group]
        for part, item in enumerate(group):
            given, guide, counts = self._given(item, part)
            with self.processes.alone(self.step, part < len(group) - 1):
                with torch.autocast(self.kind, getattr(torch, act.precision), enabled=act.precision != "float32"):
                    loss = self.step(given, guide)
                if not loss.requires_grad:
                    raise DataError(
                        f"{act.name} has nothing to learn from: the batches have no labels and no objective stands "
                        "under 'with'"
                    )
                loss = counts * sizes[part] / max(1, sum(sizes)) * loss
                run.scaler.scale(loss).backward()
            total += float(self.processes.mean(loss.detach()))
        if not math.isfinite(total):
            raise ModelError(
                f"{act.name}: the loss became {total} in epoch {run.place.epoch + 1}, batch {run.place.batch + 1}; "
                f"a smaller lr than {act.lr} may help"
            )
        if act.clip is not None:
            run.scaler.unscale_(run.optimizer)
        self.processes.ready(self.learning, act.clip)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        self.t.step()
        if run.average is not None:
            with self.processes.whole():
                run.average.update()
        row = {"epoch": run.place.epoch + 1, "loss": total, "rate": now, "seconds": time.monotonic() - self.began}
        self.log.write(self.t.done, row)
        return total

    def _given(self, item: Any, part: int) -> tuple[Mixed, Tensor | None, float]:
        """(this process's share of a batch as it is run, the teacher's logits for it, by how much its mean counts)"""
        act = self.act
        guide = item.teacher if isinstance(item, Guided) and not isinstance(act, Recover) else None
        inputs, labels = batch(item)
        before = mixed(act, inputs, labels, seed_of(self.loop.seed, f"mix {self.t.done}/{part}"))
        if before.inputs is not inputs:
            guide = None
        everything = (before.inputs, before.labels, before.others, guide)
        (inputs, labels, others, guide), counts = self.processes.share(everything, inputs)
        inputs, labels, guide = self.layout(move(inputs, self.loop.device)), move(labels, self.loop.device), guide
        own = self.t.prepare(inputs, labels, part * self.processes.count + self.processes.rank)
        if own is not inputs:
            return Mixed(own, None), None, counts
        return Mixed(inputs, labels, others, before.share), move(guide, self.loop.device), counts

    def _ended(self) -> bool:
        """Score the epoch that has run and go on to the next; whether it was the last."""
        run, act = self.run, self.act
        run.place.epoch, run.place.batch, mean = run.place.epoch + 1, 0, run.place.mean
        run.place.total, run.place.count = 0.0, 0
        over = False
        if self.valid is not None and self.loop.score is not None and self.t.settled:
            with self.processes.whole(), nullcontext() if run.average is None else run.average.standing():
                self._renew()
                value = self.processes.agreed(self.loop.score(self.model, self.valid))
                if value > run.best.value:
                    run.best.gained = run.place.epoch
                if value >= run.best.value:
                    run.best.value = value
                    run.best.state = self.t.state() if act.keep == "best" else None
            self.progress.advance(self.t.done, self.updates, f"loss {mean:.4f} held-out {value:.2f}")
            self.log.write(self.t.done, {"epoch": run.place.epoch, "held out": value})
            if act.patience is not None and run.place.epoch - run.best.gained >= act.patience:
                self.notes.append(
                    f"{act.name} stopped after epoch {run.place.epoch}: no better for {act.patience} epochs"
                )
                over = True
        if not over:
            self._save(None)
        return over

    def _renew(self) -> None:
        self._seed(0)
        renew_norms(self.model, self.train, self.act.renorm, lambda x: self.layout(move(x, self.loop.device)))

    def _seed(self, epoch: int) -> None:
        """Of what the loader and the model draw."""
        torch.manual_seed(self.loop.seed + 1000 * (epoch + 1))
        if hasattr(self.train, "set_epoch"):
            self.train.set_epoch(epoch)

    def _drawn(self) -> Tensor:
        """State of the random number generators, in bytes: of the CPU, and of the device."""
        states = [torch.get_rng_state()]
        if self.kind != "cpu":
            states.append(getattr(torch, self.kind).get_rng_state(self.loop.device))
        return torch.cat(states)

    def _draw_as(self, drawn: Tensor) -> None:
        own = len(torch.get_rng_state())
        torch.set_rng_state(drawn[:own].clone())
        if self.kind != "cpu":
            getattr(torch, self.kind).set_rng_state(drawn[own:].clone(), self.loop.device)

    def _save(self, random: Tensor | None) -> None:
        self.run.random = random
        if self.loop.checkpoint is not None:
            remembered = moments(self.run.optimizer, self.learning)
            with self.processes.whole():
                if self.processes.first:
                    save(self.loop.checkpoint, self.run, remembered)
        self.run.random, self.saved = None, time.monotonic()

    def _loss(self) -> Callable[[Any, Any], Tensor]:
        act, own = self.act, self.loop.loss
        if act.smoothing and own is not None:
            raise RecipeError(f"{act.name}.smoothing is of the usual loss; the job gives a loss of its own")
        return own or partial(task_loss, smoothing=act.smoothing)


def _channels_last(inputs: Any) -> Any:
    if isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point():
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def _layout(model: nn.Module, train: Iterable[Any], device: str) -> Callable[[Any], Any]:
    """How inputs are laid out in memory.

    Images go channels-last, in which convolutions run 1.5 to 2 times as fast, unless the model cannot take them so
    (`view` after a convolution).  Raises ModelError for a model that fails either way.
    """
    inputs = move(batch(next(iter(train)))[0], device)
    with evaluating(model):
        forward_or_raise(model, inputs, "on the first training batch")
        try:
            forward(model, _channels_last(inputs))
        except RuntimeError:
            return lambda x: x
    return _channels_last


def task_loss(outputs: Tensor, labels: Any, smoothing: float = 0.0) -> Tensor:
    """Cross entropy for integer labels (classes in the last dimension), else mean squared error."""
    if labels.dtype in (torch.int64, torch.int32, torch.uint8, torch.int16):
        classes = outputs.float().flatten(0, -2)
        return F.cross_entropy(classes, labels.long().flatten(), label_smoothing=smoothing)
    return F.mse_loss(outputs.float(), labels.float())


def _split(data: Data, act: Train, seed: int) -> tuple[Any, Any, list[str]]:
    """(training batches, held-out batches or None, notes)"""
    if data.train is None:
        raise DataError(f"{act.name} needs training data; give Job(data=...) or --data with a split 'train'")
    if (act.keep == "last" and act.patience is None) or not (data.valid or act.hold_out):
        return data.train, None, []
    own = data.train if type(data.train) is Batches else None
    if data.valid is None and own is None:
        why = "a loader of your own needs Data(valid=...) to select on"
    elif batch(next(iter(data.valid or data.train), (0, 0)))[1] is None:
        why = "there are no labels to select on"
    elif data.valid is not None:
        return data.train, data.valid, []
    elif own is not None:
        return *own.split(act.hold_out, seed), []
    return data.train, None, [f"{act.name} kept the last epoch: {why}"]


def _length(loader: Any, act: Train) -> int:
    try:
        n = len(loader)
    except TypeError:
        n = sum(1 for _ in loader)
    if n == 0:
        raise DataError(f"{act.name}: the training data yields no batch")
    return int(n)
