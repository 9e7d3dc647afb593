"""PyTorch compiled by inductor with frozen weights: each shape of the inputs is compiled when it first comes."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from smelt.core.runtime import Session
from smelt.runtimes._torch import TorchSession, module_of

SUFFIXES = (".smelt",)
MODULES = True
SHAPES = 256  # that a module may be compiled for; torch's own limit then goes on without compiling


def missing() -> str | None:
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in compilers if name):
        return "no C++ compiler found; install g++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h not found; install the headers of this Python (python3-dev)"
    return None


def open(source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """A module, or that of a file, compiled as it stands: weights are constants, and not to be changed afterwards.

    Raises:
        FileError: as `smelt.load` raises it.
    """
    return _Compiled(module_of(source, device), threads)


class _Compiled(TorchSession):
    def __init__(self, module: nn.Module, threads: int):
        super().__init__(torch.compile(module, dynamic=False, options={"freezing": True}), threads)
        self.seen: set[tuple[object, ...]] = set()

    def outputs(self, inputs: Sequence[Tensor], named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        key = tuple((tuple(x.shape), x.dtype) for x in (*inputs, *named.values()))
        if key in self.seen:
            return super().outputs(inputs, named)
        with torch._dynamo.config.patch(recompile_limit=SHAPES, fail_on_recompile_limit_hit=True):
            found = super().outputs(inputs, named)
        self.seen.add(key)
        return found
