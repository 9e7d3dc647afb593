"""A job: what a recipe is run on, besides the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.core.data import Data


@dataclass
class Job:
    """Data, evaluation, teacher, device and seed of a run.

    data: `smelt.open_data(...)`, or a `Data` of your own loaders; None for recipes that need none.
    metric: 'accuracy', 'loss', ... (see `smelt measure --help`), or a function (outputs, labels) -> float.
    loss: (outputs, labels) -> scalar tensor for training; default cross entropy for integer labels, else mean
        squared error.
    teacher: a module or function giving logits for distillation; default is a copy of the model as it came.
    cache: folder for the states of interrupted or edited runs; None switches it off.
    latency: whether to time the loaded model after every step.
    threads: for latency; None leaves the setting of torch.
    """

    data: Data | None = None
    metric: str | Callable[..., float] = "accuracy"
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    teacher: nn.Module | Callable[[Any], Any] | None = None
    device: str = "cpu"
    seed: int = 0
    cache: Path | str | None = None
    latency: bool = True
    threads: int | None = None
