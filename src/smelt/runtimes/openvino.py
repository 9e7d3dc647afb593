"""OpenVINO on the CPU: `.xml` with its `.bin` beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.runtime import Session, file_on_cpu, needs
from smelt.formats.openvino import HINT, package

SUFFIXES = (".xml",)
SHAPES = 4  # for which a model is compiled


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
    path = file_on_cpu("openvino", source, device)
    core = package().Core()
    model = core.read_model(str(path))
    settings = {
        "INFERENCE_PRECISION_HINT": model.get_rt_info(HINT).astype(str) if model.has_rt_info(HINT) else "f32",
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
    }
    return OpenVINOSession(model, lambda: core.compile_model(model, "CPU", settings))


class OpenVINOSession(Session):
    """A model that takes any number of samples is compiled for each shape of inputs that comes, for which OpenVINO
    makes faster code; once more than `SHAPES` have come, for all others at once.

    compiled: compiles the model with the shapes that it has now.
    """

    def __init__(self, model: Any, compiled: Callable[[], Any]):
        self.model, self.compiled = model, compiled
        self.free = [port.partial_shape for port in model.inputs]
        self.requests: dict[tuple[tuple[int, ...], ...] | None, Any] = {}
        self.most = SHAPES
        self.names = tuple(port.any_name if port.names else f"input{i}" for i, port in enumerate(model.inputs))
        sizes = [shape[0] for shape in self.free if shape.rank.get_length()]
        self.batch = sizes[0].get_length() if sizes and all(size.is_static for size in sizes) else None
        if not model.is_dynamic():
            self.requests[None] = compiled().create_infer_request()

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [x.detach().contiguous().numpy() for x in inputs]
        request = self._request(tuple(x.shape for x in given))
        found = request.infer(given, share_inputs=True)
        return [torch.from_numpy(found[port].copy()) for port in request.model_outputs]

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        if not self.model.is_dynamic():
            return self.requests[None]
        if shapes not in self.requests and len(self.requests) < self.most:
            ports = self.model.inputs
            try:
                self.model.reshape(dict(zip(ports, map(list, shapes), strict=True)))
                self.requests[shapes] = self.compiled().create_infer_request()
            except RuntimeError:  # OpenVINO fails on some graphs with loops once their shapes are fixed
                self.most = 0
            finally:
                self.model.reshape(dict(zip(ports, self.free, strict=True)))
        at = shapes if shapes in self.requests else None
        if at not in self.requests:
            self.requests[at] = self.compiled().create_infer_request()
        return self.requests[at]
