"""What a model is worth on a split of the data: accuracy, loss, or a metric of one's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.data import batch, describe, evaluating, forward_or_raise, logits_of, move, samples
from smelt.core.errors import DataError, SmeltError, nearest
from smelt.core.named import first_line

IGNORED = -100
"""Labels of this value do not count (torch's `ignore_index`)."""


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    metric: str | Callable[..., Any],
    device: str | torch.device = "cpu",
    split: str = "test",
) -> float:
    """The metric over a whole split, in evaluation mode without gradients; modes are restored.

    Args:
        loader: batches as `smelt.core.data.batch` takes them.
        metric: a name in `METRICS`; a callable whose first two parameters are named `model` and `loader` is called
            once with them (and moves the batches itself); any other callable is called as `metric(outputs, labels)` per
            batch, and its results are averaged, weighted by the samples of the batch.
        device: where the model is; batches are moved there.
        split: its name, for messages.

    Returns:
        In the unit of the metric (`unit_of`).

    Raises:
        DataError: no batches, no labels, labels that do not fit the outputs, or a result that is NaN.
        ModelError: a forward that fails.
    """
    with evaluating(model):
        if callable(metric) and _whole(metric):
            return _custom(metric, model, loader, f"the metric {_name(metric)!r} on the split {split!r}")
        known = None if callable(metric) else named(metric)
        total, count = 0.0, 0
        number = 0
        for number, item in enumerate(loader, 1):
            inputs, labels = batch(item)
            inputs, labels = move(inputs, device), move(labels, device)
            where = f"the metric {_name(metric)!r} on batch {number} of the split {split!r}"
            outputs = logits_of(forward_or_raise(model, inputs, f"on batch {number} of the split {split!r}"))
            if known is not None:
                value, n = _built_in(known, outputs, labels, where)
            else:
                n = samples(inputs)
                value = n * _custom(metric, outputs, labels, where)
            total, count = total + value, count + n
    if not count:
        found = "no batches" if not number else f"{number} batches and nothing in them that counts"
        raise DataError(f"the split {split!r} has {found}; the metric {_name(metric)!r} needs at least one sample")
    return known.result(total / count) if known is not None else total / count


@dataclass(frozen=True)
class Measure:
    """A built-in metric: `of(outputs, labels)` per row [r, c] and [r], or per element if `rows` is false."""

    unit: str
    higher_is_better: bool
    of: Callable[[Tensor, Tensor], Tensor]
    rows: bool = True
    result: Callable[[float], float] = float


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _hits(outputs: Tensor, labels: Tensor, k: int) -> Tensor:
    """100 where the label is among the k largest outputs of its row, else 0."""
    return 100.0 * (outputs.topk(min(k, outputs.shape[1]), dim=1).indices == labels[:, None]).any(1)


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")


METRICS = {
    "accuracy": Measure("%", True, lambda outputs, labels: 100.0 * (outputs.argmax(1) == labels)),
    "top5": Measure("%", True, lambda outputs, labels: _hits(outputs, labels, 5)),
    "loss": Measure("nats", False, _cross_entropy),
    "perplexity": Measure("", False, _cross_entropy, result=_exp),
    "mse": Measure("", False, lambda outputs, labels: (outputs - labels) ** 2, rows=False),
    "mae": Measure("", False, lambda outputs, labels: (outputs - labels).abs(), rows=False),
}
"""By name.  Each label stands where the output stands that predicts it: a causal language model's next token, not
its input, belongs to an output."""


def named(metric: str) -> Measure:
    """The built-in metric of a name.

    Raises:
        DataError: no such metric; the nearest is given.
    """
    if metric not in METRICS:
        raise DataError(f"no metric {metric!r}{nearest(metric, METRICS)}")
    return METRICS[metric]


def unit_of(metric: str | Callable[..., Any]) -> str:
    """'%', 'nats' or '' ; a callable may have an attribute `unit`."""
    return str(getattr(metric, "unit", "")) if callable(metric) else named(metric).unit


def higher_is_better(metric: str | Callable[..., Any]) -> bool | None:
    """The direction; None = unknown, for a callable without an attribute `higher_is_better`."""
    return getattr(metric, "higher_is_better", None) if callable(metric) else named(metric).higher_is_better


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _whole(metric: Callable[..., Any]) -> bool:
    try:
        return list(inspect.signature(metric).parameters)[:2] == ["model", "loader"]
    except (TypeError, ValueError):
        return False


def _custom(metric: Any, first: Any, second: Any, where: str) -> float:
    try:
        value = metric(first, second)
    except SmeltError:
        raise
    except Exception as error:
        raise DataError(f"{where} fails: {type(error).__name__}: {first_line(error)}") from error
    return _number(value, where)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{where} gives {describe(value)}; it must give one number") from None
    if math.isnan(number):
        raise DataError(f"{where} is NaN")
    return number


def _built_in(metric: Measure, outputs: Tensor, labels: Any, where: str) -> tuple[float, int]:
    """(sum, number of what counts) of one batch."""
    if not isinstance(labels, Tensor):
        found = "none" if labels is None else f"a {type(labels).__name__}"
        raise DataError(f"{where} needs labels as a tensor, and there is {found}; yield (inputs, labels)")
    if bool(outputs.isnan().any()):
        raise DataError(f"{where} is NaN: the outputs {describe(outputs)} hold {int(outputs.isnan().sum())} NaN values")
    if metric.rows:
        outputs, labels = _rows(outputs, labels, where)
    elif outputs.numel() == labels.numel():
        labels = labels.reshape(outputs.shape)
    else:
        raise DataError(f"{where}: outputs {list(outputs.shape)} and labels {list(labels.shape)} differ in their shape")
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    total = float(metric.of(wide, labels).cpu().sum(dtype=torch.float64))
    return _number(total, where), labels.numel()


def _rows(outputs: Tensor, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Outputs [r, c] and labels int64 [r] that count; classes are the last dimension, else the second."""
    shapes = f"outputs {list(outputs.shape)} and labels {list(labels.shape)}"
    if labels.is_floating_point():
        raise DataError(f"{where}: labels are {labels.dtype}; they must be whole numbers, one class each")
    if labels.dim() == outputs.dim() and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if outputs.dim() > 2 and labels.shape != outputs.shape[:-1]:
        outputs = outputs.movedim(1, -1)
    if outputs.dim() < 2 or labels.shape != outputs.shape[:-1]:
        raise DataError(f"{where}: {shapes} do not belong together; outputs are [n, classes], labels [n]")
    classes = outputs.shape[-1]
    outputs, labels = outputs.reshape(-1, classes), labels.reshape(-1).long()
    counts = labels != IGNORED
    outputs, labels = outputs[counts], labels[counts]
    if classes < 2:
        raise DataError(f"{where}: {shapes}; it needs two outputs or more, one per class")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"{where}: labels run from {int(labels.min())} to {int(labels.max())}, outputs have {classes} classes"
        )
    return outputs, labels
