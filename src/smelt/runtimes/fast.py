"""PyTorch with kernels for stored forms (`smelt.fast`): those that a file names, else those that are fastest for the
first inputs that come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from smelt.core.runtime import Session
from smelt.formats._file import File
from smelt.formats.torch import load_fast
from smelt.kernels._fast import fast
from smelt.runtimes._torch import TorchSession, module_of

SUFFIXES = (".smelt",)


def missing() -> str | None:
    return None


def open(source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """A module, or that of a file.

    Raises:
        FileError: as `smelt.load` raises it.
    """
    if not isinstance(source, nn.Module) and device == "cpu":
        with File(source) as file:
            measured = bool(file.kernels)
        if measured:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return TorchSession(load_fast(source), threads)
            finally:
                torch.set_num_threads(before)
    return _Fast(module_of(source, device), threads)


class _Fast(TorchSession):
    """Kernels are chosen when the first inputs come."""

    def __init__(self, module: nn.Module, threads: int):
        super().__init__(module, threads)
        self.dense: nn.Module | None = module

    def outputs(self, inputs: Sequence[Tensor], named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if self.dense is not None:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                self.call = fast(self.dense, named or tuple(inputs))
            finally:
                torch.set_num_threads(before)
            self.dense = None
        return super().outputs(inputs, named)
