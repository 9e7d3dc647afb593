"""What the runtimes share that run a module of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import tensors
from smelt.core.errors import ModelError
from smelt.core.runtime import Session
from smelt.formats import smelt as smelt_file


def module_of(source: str | Path | nn.Module, device: str) -> nn.Module:
    """A module, or that of a `.smelt` file, in evaluation mode on the device."""
    module = source if isinstance(source, nn.Module) else smelt_file.load(source)
    return module.eval().to(device)


class TorchSession(Session):
    """A callable without gradients, on so many of torch's threads; the tensors of whatever it gives are the outputs."""

    def __init__(self, call: Callable[..., Any], threads: int):
        self.call = call
        self.threads = threads

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.outputs(inputs, named)
        return found[0] if len(found) == 1 else found

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.outputs(inputs, {})

    def outputs(self, inputs: Sequence[Tensor], named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                found = tuple(tensors(self.call(*inputs, **named)))
        finally:
            if before != self.threads:
                torch.set_num_threads(before)
        if not found:
            raise ModelError("the model gives no tensor")
        return found
