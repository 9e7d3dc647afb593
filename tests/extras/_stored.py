"""The networks of the round trips, stored as recipes store them, and what a runtime gives for their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.apply import apply_step
from smelt.core.data import forward
from smelt.core.export import Exported, export
from smelt.core.method import Known
from smelt.core.recipe import Recipe
from smelt.core.runtime import open_session
from tests.formats._nets import batches, inputs, net

LOOKED_UP = {"transformer": ("!embed",), "embedding": ("!users", "!items")}

# Weights in 4 bits, with a scale and a whole zero for each 16 of a row.
FOUR = {"quantize.affine": {"bits": 4, "per": "group", "group": 16, "symmetric": False, "zero": "whole"}}
# Weights in 4 bits, with a scale for each 32 of a row: what kernels for blocks take.
BLOCKS = {"quantize.affine": {"bits": 4, "per": "group", "group": 32, "on": ["*", "!embed"]}}


def stored(kind: str, *steps: Any, model: nn.Module | None = None) -> nn.Module:
    """The network of a kind after these steps."""
    model = net(kind) if model is None else model
    for i, step in enumerate(Recipe.of(list(steps)).steps, 1):
        apply_step(model, step, f"{i}: {step.key}", Known(batches(kind)), ())
    return model.eval()


def int8(kind: str, at_input: bool = True, **settings: Any) -> nn.Module:
    """Weights in 8 bits for each channel; inputs of layers, too, with ranges that were calibrated."""
    steps: list[Any] = [{"quantize.affine": {"bits": 8, **settings}}]
    if at_input:
        on = ["*", *LOOKED_UP.get(kind, ())]
        steps.append({"quantize.affine": {"bits": 8, "at": "input", "dynamic": False, "on": on}})
    return stored(kind, *steps)


def run(path: Path, runtime: str, given: Any) -> Tensor:
    session = open_session(runtime, path)
    found = session(**given) if isinstance(given, dict) else session(*(given if isinstance(given, tuple) else (given,)))
    assert isinstance(found, Tensor)
    return found


def left(made: Exported) -> list[str]:
    """Its notes but for the one that every file of a fixed number of samples has."""
    fixed = [note for note in made.notes if note.startswith("the file takes 8 sample(s) at once")]
    assert len(fixed) == 1
    return [note for note in made.notes if note not in fixed]


def round_trip(model: nn.Module, kind: str, to: str, path: Path, **settings: Any) -> tuple[Exported, float]:
    """Written, run, and how far the outputs are from the model's, over what is common in them (root mean squares)."""
    made = export(model, to, path, example=inputs(kind), data=batches(kind), **settings)
    with torch.no_grad():
        want = forward(model, inputs(kind))
    got = run(path, to, inputs(kind))
    return made, float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())
