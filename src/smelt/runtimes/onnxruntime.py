"""ONNX Runtime: `.onnx` files on the CPU, or on a GPU where the package has the provider for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.errors import ModelError
from smelt.core.runtime import Session, file_of, needs

SUFFIXES = (".onnx",)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def missing() -> str | None:
    return needs(("onnxruntime",), "onnx")


def open(source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """A file; inputs are given in the order of the graph, and integers and floats keep their widths.

    Raises:
        ModelError: a module instead of a file, or a device for which the installed package has no provider.
    """
    import onnxruntime

    path = file_of("onnxruntime", source)
    wanted = PROVIDERS.get(device.partition(":")[0], device)
    if wanted not in onnxruntime.get_available_providers():
        raise ModelError(f"the installed ONNX Runtime does not run on {device!r}; it has no {wanted}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return _Session(onnxruntime.InferenceSession(str(path), options, providers=[wanted]), device)


def parts(path: str | Path) -> tuple[Path, ...]:
    """The file, and the weights beside it where they did not fit into it."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.data")
    return (path, beside) if beside.is_file() else (path,)


class _Session(Session):
    def __init__(self, session: Any, device: str):
        self.session = session
        self.device = device
        given = session.get_inputs()
        self.names = tuple(entry.name for entry in given)
        sizes = {entry.shape[0] for entry in given if entry.shape}
        fixed = sizes.pop() if len(sizes) == 1 else None
        self.batch = fixed if isinstance(fixed, int) else None

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(inputs) != len(self.names):
            raise ModelError(f"there are {len(inputs)} inputs; it takes {len(self.names)}: {', '.join(self.names)}")
        feed = {name: x.detach().cpu().numpy() for name, x in zip(self.names, inputs, strict=True)}
        return [torch.from_numpy(x).to(self.device) for x in self.session.run(None, feed)]
