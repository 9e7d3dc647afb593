"""A job: what a recipe is run on, besides the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.core.data import Data, check_data
from smelt.core.errors import DataError, ModelError
from smelt.core.named import first_line


@dataclass
class Job:
    """Data, evaluation, teacher, device and seed of a run.

    data: `smelt.open_data(...)`, or a `Data` of your own loaders; None for recipes that need none.
    metric: 'accuracy', 'loss', ... (see `smelt measure --help`), or a function (outputs, labels) -> float.
    loss: (outputs, labels) -> scalar tensor for training; default cross entropy for integer labels, else mean
        squared error.
    teacher: a module or function giving logits for distillation; default is a copy of the model as it came.
    cache: folder for the states of interrupted or edited runs; None switches it off.
    checkpoint: minutes between two states of a train step, which lie in the cache, beside those after each epoch.
    log: of train steps, a CSV file, or else a folder for TensorBoard (which needs the extra `tensorboard`).
    latency: whether to time the loaded model after every step.
    threads: for latency; None leaves the setting of torch.

    Raises:
        DataError: data that is no `Data`, or a metric that is neither a name nor a function.
        ModelError: a device that is not there.
    """

    data: Data | None = None
    metric: str | Callable[..., float] = "accuracy"
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    teacher: nn.Module | Callable[[Any], Any] | None = None
    device: str = "cpu"
    seed: int = 0
    cache: Path | str | None = None
    checkpoint: float = 10.0
    log: Path | str | None = None
    latency: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        check_data(self.data)
        if not isinstance(self.metric, str) and not callable(self.metric):
            raise DataError(f"metric is {self.metric!r}; give a name such as 'accuracy', or a function")
        self.device = str(self.device)
        if self.device == "cuda" and "LOCAL_RANK" in os.environ:  # a launcher started this process, one for each
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(self.device)


def check_device(device: str) -> None:
    """Raise ModelError for a device on which no tensor can be made and read."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {device!r} cannot be used here: {first_line(error)}") from None
