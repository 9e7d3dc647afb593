"""ExecuTorch's `.pte` files, in the runtime that comes with its Python package (XNNPACK on the CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smelt.core.runtime import Session, file_on_cpu, needs

SUFFIXES = (".pte",)


def missing() -> str | None:
    return needs(("executorch",), "executorch")


def open(source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """The method `forward` of a program.

    Raises:
        RecipeError: another device than the CPU.
    """
    import executorch.kernels.quantized  # noqa: F401  registers the operators that take codes
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    path = file_on_cpu("executorch", source, device)
    if hasattr(portable_lib, "_unsafe_reset_threadpool"):
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(path.read_bytes())
    return ExecuTorchSession(program, program.load_method("forward"))


class ExecuTorchSession(Session):
    def __init__(self, program: Any, method: Any):
        self.program = program  # the method refers to its bytes
        self.method = method
        meta = method.metadata
        sizes = {tuple(meta.input_tensor_meta(i).sizes())[:1] for i in range(meta.num_inputs())}
        self.batch = next(iter(sizes))[0] if len(sizes) == 1 and sizes != {()} else None

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        found = self.method.execute([x.detach().contiguous() for x in inputs])
        return [x.clone() for x in found]
