"""Everything that is measured of one model, as rows: what the runner reports after a step, and `smelt measure`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from smelt.core.data import Data, batch, check, check_data, move, samples
from smelt.core.report import Row
from smelt.core.store import store_of
from smelt.measures.accuracy import evaluate, unit_of
from smelt.measures.bytes import checkpoint_bytes
from smelt.measures.latency import latency as time_forward
from smelt.measures.macs import macs
from smelt.measures.memory import memory
from smelt.measures.parameters import nonzeros, parameters


def measure(
    model: nn.Module,
    data: Data | None = None,
    metric: str | Callable[..., Any] = "accuracy",
    *,
    device: str = "cpu",
    latency: bool = True,
    threads: int | None = None,
    size: int | None = None,
    step: int = 0,
    after: str = "original",
) -> list[Row]:
    """Rows of one model: file, parameters and non-zeros; with data also MACs, peak memory, latency and the metric.

    A row is *simulated* where the model ran dense though something of it is stored otherwise.

    Args:
        model: on `device`.
        metric: a name or a function, as `evaluate` takes it; taken on the test split, if there is one.
        size: bytes of its file; None = of the safetensors checkpoint it would make.
        step, after: of the rows.

    Raises:
        DataError, ModelError: as the measures raise them.
    """
    check_data(data)
    held = store_of(model)
    dense = bool(held.entries) or bool(held.activations)
    rows: list[Row] = []

    def row(name: str, value: float, unit: str, simulated: bool = False, spread: Any = None, on: Any = None) -> None:
        rows.append(Row(step, after, name, value, unit, spread, device, on, simulated))

    row("file", checkpoint_bytes(model) if size is None else size, "bytes")
    row("parameters", parameters(model), "")
    row("non-zeros", nonzeros(model), "")
    inputs = examples(data, device)
    if inputs is not None:
        row("MACs", macs(model, inputs), "per sample", dense)
        row("peak memory", memory(model, inputs), "bytes", dense)
        if latency:
            took = time_forward(model, inputs, threads=threads)
            row("latency", took.median, "ms", dense, (took.low, took.high), took.threads)
    if data is not None and data.test is not None:
        value = evaluate(model, data.test, metric, device)
        row(metric_name(metric), value, unit_of(metric), bool(held.activations))
    return rows


def examples(data: Data | None, device: str = "cpu") -> Any:
    """Inputs of the first batch, on the device, of the test split, else of the others; None without data.

    Raises:
        DataError: what `check` finds in that split.
    """
    for split in ("test", "valid", "train"):
        loader = getattr(data, split, None)
        if data is not None and loader is not None:
            check(Data(**{split: loader}, name=data.name))
            return move(batch(next(iter(loader)))[0], device)
    return None


def conditions(rows: Iterable[Row], data: Data | None, device: str) -> dict[str, str]:
    """Under which the rows were taken: device, samples per batch and threads as far as they matter, torch."""
    found = {"device": device}
    if (inputs := examples(data)) is not None:
        found["batch size"] = str(samples(inputs))
    if threads := sorted({row.threads for row in rows if row.threads is not None}):
        found["threads"] = ", ".join(map(str, threads))
    return {**found, "torch": torch.__version__}


def metric_name(metric: str | Callable[..., Any]) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
