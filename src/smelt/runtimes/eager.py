"""PyTorch, operator by operator: a module, or a `.smelt` file by its builder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from smelt.core.runtime import Session
from smelt.runtimes._torch import TorchSession, module_of

SUFFIXES = (".smelt",)
MODULES = True


def missing() -> str | None:
    return None


def open(source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """A module as it stands, moved to the device, or that of a file.

    Raises:
        FileError: as `smelt.load` raises it.
    """
    return TorchSession(module_of(source, device), threads)
