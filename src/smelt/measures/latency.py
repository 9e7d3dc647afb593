"""Milliseconds of a forward on this machine, with their spread."""

from __future__ import annotations

from typing import Any

from torch import nn

from smelt.core.clock import Spread, latencies
from smelt.core.data import evaluating, forward

__all__ = ["UNIT", "Spread", "latencies", "latency"]

UNIT = "ms"


def latency(model: nn.Module, inputs: Any, repeats: int = 30, warmup: int = 5, threads: int | None = None) -> Spread:
    """Milliseconds of one forward of the whole batch `inputs`, in evaluation mode.

    Args:
        inputs: a batch on the model's device.
        repeats: timed forwards, after `warmup` that are not.
        threads: of torch on the CPU; None = as they are.  They are restored.

    Raises:
        RecipeError: a number that is too small.
    """
    with evaluating(model):
        return latencies({"model": lambda: forward(model, inputs)}, repeats, warmup, threads)["model"]
