"""The `train` step: a plain loop around `training`, with selection on a held-out split and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from smelt.core.data import Batches, Data, Guided, batch, evaluating, forward, forward_or_raise, logits_of, move
from smelt.core.errors import DataError, ModelError
from smelt.core.method import Lossless
from smelt.core.output import replacing
from smelt.core.progress import Progress
from smelt.core.recipe import Step, Train
from smelt.train.training import training


@dataclass
class Loop:
    """What a train step needs besides the model and its settings.

    score: value of a model on a loader, larger is better; selects epochs on the held-out split.
    checkpoint: file that holds the state after each epoch, or None for no resuming.
    tail: lossless codecs with which candidates are priced.
    """

    data: Data
    teacher: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    score: Callable[[nn.Module, Iterable[Any]], float] | None = None
    device: str = "cpu"
    seed: int = 0
    checkpoint: Path | None = None
    tail: tuple[Lossless, ...] = ()


def fit(model: nn.Module, step: Step, loop: Loop, progress: Progress | None = None) -> list[str]:
    """Run a train step on `model` in place; returns notes for the report.

    Raises:
        DataError: no training data, or a loss without labels.
        ModelError: the loss became NaN or infinite, or the forward pass fails.
    """
    act = step.act
    assert isinstance(act, Train)
    progress = progress or Progress()
    train, valid, notes = _split(loop.data, act, loop.seed)
    per_epoch = _length(train)
    if hasattr(train, "set_epoch"):
        train.set_epoch(0)
    torch.manual_seed(loop.seed)
    context = training(
        model,
        step.pieces,
        steps=act.epochs * per_epoch,
        teacher=loop.teacher,
        calibration=train,
        loss=loop.loss or task_loss,
        refresh=act.refresh,
        seed=loop.seed,
        tail=loop.tail,
    )
    # Adam's moments of pruned weights decay into denormal numbers, which are several times slower to add.
    torch.set_flush_denormal(True)
    try:
        with context as t:
            _epochs(model, train, valid, t, act, loop, per_epoch, progress, notes)
            notes += t.notes
    finally:
        torch.set_flush_denormal(False)
    model.eval()
    if loop.checkpoint is not None:
        loop.checkpoint.unlink(missing_ok=True)
    return notes


@dataclass
class _Best:
    """The best epoch so far on the held-out split; of equals the later, for a tie has trained longer."""

    value: float = -math.inf
    gained: int = 0  # the epoch of the last real gain
    state: dict[str, Tensor] | None = None


def _epochs(
    model: nn.Module,
    train: Any,
    valid: Any,
    t: training,
    act: Train,
    loop: Loop,
    per_epoch: int,
    progress: Progress,
    notes: list[str],
) -> None:
    optimizer = t.optimizer = _optimizer(act, list(t.parameters()))
    layout = _layout(model, train, loop.device)
    start, best = 0, _Best()
    if loop.checkpoint is not None and loop.checkpoint.exists():
        start, best = _resume(loop.checkpoint, t, optimizer, per_epoch)
    for epoch in range(start, act.epochs):
        torch.manual_seed(loop.seed + 1000 * (epoch + 1))
        if hasattr(train, "set_epoch"):
            train.set_epoch(epoch)
        mean = _one_epoch(model, train, t, optimizer, act, loop, epoch, per_epoch, layout, progress)
        t.epoch()
        if valid is not None and loop.score is not None and t.settled:
            value = loop.score(model, valid)
            if value > best.value:
                best.gained = epoch + 1
            if value >= best.value:
                best.value = value
                best.state = t.state() if act.keep == "best" else None
            progress.advance(per_epoch * (epoch + 1), per_epoch * act.epochs, f"loss {mean:.4f} held-out {value:.2f}")
            if act.patience is not None and epoch + 1 - best.gained >= act.patience:
                notes.append(f"train stopped after epoch {epoch + 1}: no better for {act.patience} epochs")
                break
        if loop.checkpoint is not None:
            _save(loop.checkpoint, t, optimizer, epoch + 1, best)
    if best.state is not None:
        t.load(best.state)


def _one_epoch(
    model: nn.Module,
    train: Iterable[Any],
    t: training,
    optimizer: torch.optim.Optimizer,
    act: Train,
    loop: Loop,
    epoch: int,
    per_epoch: int,
    layout: Callable[[Any], Any],
    progress: Progress,
) -> float:
    model.train()
    total, count = 0.0, 0
    for index, item in enumerate(train):
        guide = item.teacher.to(loop.device) if isinstance(item, Guided) else None
        inputs, labels = move(batch(item), loop.device)
        done = epoch * per_epoch + index
        for group in optimizer.param_groups:
            group["lr"] = act.lr * rate(act, done / (act.epochs * per_epoch))
        inputs = layout(inputs)
        with torch.autocast(loop.device.split(":")[0], torch.bfloat16, enabled=act.precision == "bfloat16"):
            outputs = forward(model, inputs)
            hard = None
            if labels is not None and act.hard:
                hard = act.hard * (loop.loss or task_loss)(logits_of(outputs), labels)
            loss = t.loss(inputs, outputs, labels, hard, guide)
        if not loss.requires_grad:
            raise DataError(
                "train has nothing to learn from: the batches have no labels and no objective stands under 'with'"
            )
        value = loss.item()
        if not math.isfinite(value):
            raise ModelError(
                f"train: the loss became {value} in epoch {epoch + 1}, batch {index + 1}; "
                f"a smaller lr than {act.lr} may help"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if act.clip is not None:
            nn.utils.clip_grad_norm_(list(t.parameters()), act.clip)
        optimizer.step()
        t.step()
        total, count = total + value, count + 1
        progress.advance(done + 1, per_epoch * act.epochs, f"epoch {epoch + 1}/{act.epochs} loss {total / count:.4f}")
    return total / max(count, 1)


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


def task_loss(outputs: Tensor, labels: Any) -> Tensor:
    """Cross entropy for integer labels (classes in the last dimension), else mean squared error."""
    if labels.dtype in (torch.int64, torch.int32, torch.uint8, torch.int16):
        return F.cross_entropy(outputs.float().flatten(0, -2), labels.long().flatten())
    return F.mse_loss(outputs.float(), labels.float())


def rate(act: Train, progress: float) -> float:
    """Factor of the learning rate at `progress` in 0..1."""
    if progress < act.warmup:
        return progress / act.warmup
    t = (progress - act.warmup) / max(1e-9, 1 - act.warmup)
    if act.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    return 1 - t if act.schedule == "linear" else 1.0


def _optimizer(act: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if not parameters:
        raise DataError("train finds nothing to learn: no parameter and no floating leaf requires a gradient")
    if act.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, act.lr, act.momentum, weight_decay=act.weight_decay, nesterov=act.momentum > 0
        )
    cls = torch.optim.AdamW if act.optimizer == "adamw" else torch.optim.Adam
    return cls(parameters, act.lr, betas=(act.momentum, 0.999), weight_decay=act.weight_decay)


def _split(data: Data, act: Train, seed: int) -> tuple[Any, Any, list[str]]:
    """(training batches, held-out batches or None, notes)"""
    if data.train is None:
        raise DataError("train needs training data; give Job(data=...) or --data with a split 'train'")
    if (act.keep == "last" and act.patience is None) or not (data.valid or act.hold_out):
        return data.train, None, []
    if data.valid is not None:
        return data.train, data.valid, []
    if type(data.train) is Batches:
        rest, held = data.train.split(act.hold_out, seed)
        return rest, held, []
    return data.train, None, ["train kept the last epoch: a loader of your own needs Data(valid=...) to select on"]


def _length(loader: Any) -> int:
    try:
        n = len(loader)
    except TypeError:
        n = sum(1 for _ in loader)
    if n == 0:
        raise DataError("train: the training data yields no batch")
    return int(n)


def _save(path: Path, t: training, optimizer: torch.optim.Optimizer, epoch: int, best: _Best) -> None:
    """The state after an epoch as a safetensors file, renamed into place."""
    tensors = {f"now/{k}": v.contiguous() for k, v in t.state().items()}
    tensors |= {f"best/{k}": v.contiguous() for k, v in (best.state or {}).items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value).clone().contiguous()
    meta = {"epoch": epoch, "best": best.value, "gained": best.gained, "plans": t.plans()}
    data = to_bytes(tensors, {"smelt": json.dumps(meta)})
    with replacing(path, True, len(data)) as file:
        file.write(data)


def _resume(path: Path, t: training, optimizer: torch.optim.Optimizer, per_epoch: int) -> tuple[int, _Best]:
    """(epochs that are done, the best of them); a damaged file counts as none."""
    fresh = t.state()
    try:
        with safe_open(str(path), "pt") as f:
            meta = json.loads(f.metadata()["smelt"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (not a mapping)
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        epoch = int(meta["epoch"])
        t.resume(epoch * per_epoch, meta["plans"])
        t.load({k[4:]: v for k, v in tensors.items() if k.startswith("now/")})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        best = {k[5:]: v for k, v in tensors.items() if k.startswith("best/")}
        return epoch, _Best(float(meta["best"]), int(meta["gained"]), best or None)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        path.unlink(missing_ok=True)
        t.restart(fresh)
        return 0, _Best()
