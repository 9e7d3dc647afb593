"""OpenVINO on the CPU: `.xml` with its `.bin` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.errors import ModelError, RecipeError
from smelt.core.runtime import Session, needs
from smelt.formats.openvino import HINT

SUFFIXES = (".xml",)


def missing() -> str | None:
    return needs(("openvino",), "openvino")


def parts(path: Path) -> tuple[Path, ...]:
    return (path, path.with_suffix(".bin"))


def open(source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """A compiled model.  What is not in integers is computed as the file says, else in float32 (OpenVINO's own choice
    may be bfloat16).

    Raises:
        RecipeError: another device than the CPU.
    """
    import openvino as ov

    if isinstance(source, nn.Module):
        raise ModelError("the runtime openvino runs files; write one with smelt.export(model, 'openvino', path)")
    if device != "cpu":
        raise RecipeError(f"the runtime openvino runs on the device 'cpu' here, not {device!r}")
    core = ov.Core()
    model = core.read_model(str(source))
    settings = {
        "INFERENCE_PRECISION_HINT": model.get_rt_info(HINT).astype(str) if model.has_rt_info(HINT) else "f32",
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
    }
    return OpenVINOSession(core.compile_model(model, "CPU", settings))


class OpenVINOSession(Session):
    def __init__(self, compiled: Any):
        self.compiled = compiled
        self.request = compiled.create_infer_request()
        self.names = tuple(port.any_name if port.names else f"input{i}" for i, port in enumerate(compiled.inputs))
        sizes = [port.partial_shape[0] for port in compiled.inputs if port.partial_shape.rank.get_length()]
        self.batch = sizes[0].get_length() if sizes and all(size.is_static for size in sizes) else None

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [x.detach().contiguous().numpy() for x in inputs]
        found = self.request.infer(given, share_inputs=True)
        return [torch.from_numpy(found[port].copy()) for port in self.compiled.outputs]
