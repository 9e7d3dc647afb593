"""The `train` step: a plain loop around `training`, with selection on a held-out split and resuming."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smelt.core.data import Batches, Data, Guided, batch, forward, logits_of, move
from smelt.core.errors import DataError, ModelError
from smelt.core.progress import Progress
from smelt.core.recipe import Step, Train
from smelt.train.training import training


@dataclass
class Loop:
    """What a train step needs besides the model and its settings.

    score: value of a model on a loader, larger is better; selects epochs on the held-out split.
    checkpoint: file that holds the state after each epoch, or None for no resuming.
    """

    data: Data
    teacher: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    score: Callable[[nn.Module, Iterable[Any]], float] | None = None
    device: str = "cpu"
    seed: int = 0
    checkpoint: Path | None = None


def fit(model: nn.Module, step: Step, loop: Loop, progress: Progress | None = None) -> list[str]:
    """Run a train step on `model` in place; returns notes for the report.

    Raises:
        DataError: no training data, or a loss without labels.
        ModelError: the loss became NaN or infinite.
    """
    act = step.act
    assert isinstance(act, Train)
    progress = progress or Progress()
    train, valid, notes = _split(loop.data, act, loop.seed)
    per_epoch = _length(train)
    torch.manual_seed(loop.seed)
    context = training(
        model,
        step.pieces,
        steps=act.epochs * per_epoch,
        teacher=loop.teacher,
        calibration=train,
        refresh=act.refresh,
        seed=loop.seed,
    )
    # Adam's moments of pruned weights decay into denormal numbers, which are several times slower to add.
    torch.set_flush_denormal(True)
    with context as t:
        optimizer = _optimizer(act, list(t.parameters()))
        best, best_state, best_epoch = -math.inf, None, 0
        start = 0
        if loop.checkpoint is not None and loop.checkpoint.exists():
            start, best, best_epoch, best_state = _resume(loop.checkpoint, t, optimizer, per_epoch)
        for epoch in range(start, act.epochs):
            torch.manual_seed(loop.seed + 1000 * (epoch + 1))
            if hasattr(train, "set_epoch"):
                train.set_epoch(epoch)
            mean = _one_epoch(model, train, t, optimizer, act, loop, epoch, per_epoch, progress)
            t.epoch()
            if valid is not None and act.keep == "best" and loop.score is not None and t.settled:
                value = loop.score(model, valid)
                if value >= best:
                    best, best_state, best_epoch = value, t.state(), epoch + 1
                progress.advance(
                    per_epoch * (epoch + 1), per_epoch * act.epochs, f"loss {mean:.4f} held-out {value:.2f}"
                )
                if act.patience is not None and epoch + 1 - best_epoch >= act.patience:
                    notes.append(f"train stopped after epoch {epoch + 1}: no better for {act.patience} epochs")
                    break
            if loop.checkpoint is not None:
                _save(loop.checkpoint, t, optimizer, epoch + 1, best, best_epoch, best_state)
        if best_state is not None:
            t.load(best_state)
        notes += t.notes
    torch.set_flush_denormal(False)
    model.eval()
    if loop.checkpoint is not None:
        loop.checkpoint.unlink(missing_ok=True)
    return notes


def _one_epoch(
    model: nn.Module,
    train: Iterable[Any],
    t: training,
    optimizer: torch.optim.Optimizer,
    act: Train,
    loop: Loop,
    epoch: int,
    per_epoch: int,
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
        with torch.autocast(loop.device.split(":")[0], torch.bfloat16, enabled=act.precision == "bfloat16"):
            outputs = forward(model, _channels_last(inputs))
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
    """Images in the layout in which convolutions run 1.5 to 2 times as fast; other inputs as they are."""
    if isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point():
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


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
        raise DataError(f"train needs training data; {data.name!r} has none")
    if act.keep == "last" and act.patience is None:
        return data.train, None, []
    if data.valid is not None:
        return data.train, data.valid, []
    if isinstance(data.train, Batches) and act.hold_out:
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


def _save(
    path: Path, t: training, optimizer: torch.optim.Optimizer, epoch: int, best: float, best_epoch: int, best_state: Any
) -> None:
    """The state after an epoch as a safetensors file, renamed into place."""
    tensors = {f"now/{k}": v.contiguous() for k, v in t.state().items()}
    tensors |= {f"best/{k}": v.contiguous() for k, v in (best_state or {}).items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value).clone().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, {"epoch": str(epoch), "best": repr(best), "best_epoch": str(best_epoch)})
    os.replace(part, path)


def _resume(
    path: Path, t: training, optimizer: torch.optim.Optimizer, per_epoch: int
) -> tuple[int, float, int, dict[str, Tensor] | None]:
    with safe_open(str(path), "pt") as f:
        meta = f.metadata()
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (not a mapping)
    epoch = int(meta["epoch"])
    t.resume(epoch * per_epoch)
    t.load({k[4:]: v for k, v in tensors.items() if k.startswith("now/")})
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    best = {k[5:]: v for k, v in tensors.items() if k.startswith("best/")}
    return epoch, float(meta["best"]), int(meta["best_epoch"]), best or None
