"""A model of Keras or TensorFlow, written for LiteRT and measured before and after, as the runner does with steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.clock import latencies
from smelt.core.data import Data, batch, check_data, forward, samples
from smelt.core.export import CALIBRATION_BATCHES
from smelt.core.output import check_output, replacing
from smelt.core.report import Report, Row
from smelt.core.runtime import Session, open_session
from smelt.formats.keras import KerasModel, open_keras, tflite
from smelt.measure import examples, metric_name
from smelt.measures.accuracy import evaluate, unit_of


class _Runs(nn.Module):
    """A session as a module, for what measures modules."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        return self.session(*inputs, **named)


def convert(
    path: str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    mode: str = "int8",
    metric: str | Callable[..., Any] = "accuracy",
    force: bool = False,
) -> Report:
    """Write a Keras 3 file or a SavedModel as `.tflite`, and measure both: bytes, and with data output error,
    latency on one thread and the metric on the test split.

    Args:
        data: batches as the model takes them; int8 calibrates on the training split, else the validation split.
        mode: see `smelt.formats.keras.tflite`.
        force: replace `out` if it exists.

    Raises:
        RecipeError: TensorFlow is missing, or no such mode.
        FileError, ModelError, DataError, OutputError: as `open_keras`, `tflite` and the measures raise them.
    """
    path, out = Path(path), Path(out)
    check_output(out, force)
    check_data(data)
    report = Report(conditions={"device": "cpu", "threads": "1", "runtime": "TensorFlow before, LiteRT after"})
    with open_keras(path) as model:
        content = tflite(model, mode, _calibration(data))
        with replacing(out, force, len(content)) as file:
            file.write(content)
        made = _Runs(open_session("litert", out, threads=1))
        sides: list[tuple[str, nn.Module, int]] = [("original", model, _bytes(path)), (mode, made, len(content))]
        for step, (after, side, size) in enumerate(sides):
            report.rows.append(Row(step, after, "file", size, "bytes"))
            if data is not None and data.test is not None:
                value = evaluate(side, data.test, metric)
                report.rows.append(Row(step, after, metric_name(metric), value, unit_of(metric)))
        if (inputs := examples(data)) is not None:
            _compare(report, model, made, inputs, mode)
    return report


def _calibration(data: Data | None) -> list[Any] | None:
    loader: Iterable[Any] | None = None if data is None else data.train if data.train is not None else data.valid
    return None if loader is None else [batch(item)[0] for item in islice(loader, CALIBRATION_BATCHES)]


def _compare(report: Report, model: KerasModel, made: nn.Module, inputs: Any, mode: str) -> None:
    with torch.no_grad():
        want, got = (_first(forward(side, inputs)) for side in (model, made))
        error = float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-30))
        took = latencies({"original": lambda: forward(model, inputs), mode: lambda: forward(made, inputs)}, threads=1)
    report.conditions["batch size"] = str(samples(inputs))
    for step, (after, spread) in enumerate(took.items()):
        report.rows.append(Row(step, after, "latency", spread.median, "ms", (spread.low, spread.high), threads=1))
    report.rows.append(Row(1, mode, "output error", error, "of the outputs' root mean square"))


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
