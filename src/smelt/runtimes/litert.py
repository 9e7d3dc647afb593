"""LiteRT's interpreter (formerly TensorFlow Lite) with its XNNPACK kernels: `.tflite`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.runtime import Session, file_on_cpu, needs

SUFFIXES = (".tflite",)


def missing() -> str | None:
    return needs(("ai_edge_litert",), "litert")


def open(source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """An interpreter.  Where the file takes or gives int8, values are rounded to its scales, and back, on the way.

    Raises:
        RecipeError: another device than the CPU.
    """
    from ai_edge_litert.interpreter import Interpreter

    path = file_on_cpu("litert", source, device)
    return LiteRTSession(Interpreter(model_path=str(path), num_threads=threads))


class LiteRTSession(Session):
    """names: of the signature's inputs where there is one; their order is that of the model's arguments."""

    def __init__(self, interpreter: Any):
        self.interpreter = interpreter
        interpreter.allocate_tensors()
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        signatures = interpreter._get_full_signature_list()
        if signatures:
            found = next(iter(signatures.values()))
            inputs, outputs = _ordered(inputs, found["inputs"]), _ordered(outputs, found["outputs"])
            self.names = tuple(sorted(found["inputs"], key=_order))
        self.inputs, self.outputs = inputs, outputs
        sizes = {int(d["shape"][0]) for d in inputs if len(d["shape"])}
        dynamic = any(-1 in d["shape_signature"][:1] for d in inputs)
        self.batch = sizes.pop() if len(sizes) == 1 and not dynamic else None

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.batch is None:
            self._resize(inputs)
        for detail, x in zip(self.inputs, inputs, strict=True):
            self.interpreter.set_tensor(detail["index"], _into(x.detach(), detail).contiguous().numpy())
        self.interpreter.invoke()
        return [_back(torch.from_numpy(self.interpreter.get_tensor(d["index"])), d) for d in self.outputs]

    def _resize(self, inputs: Sequence[Tensor]) -> None:
        shapes = [tuple(x.shape) for x in inputs]
        if shapes != [tuple(d["shape"]) for d in self.inputs]:
            for detail, shape in zip(self.inputs, shapes, strict=True):
                self.interpreter.resize_tensor_input(detail["index"], shape)
                detail["shape"] = shape
            self.interpreter.allocate_tensors()


def _order(name: str) -> tuple[int, str]:
    """args_2 before args_10."""
    digits = name.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else 0, name)


def _ordered(details: Sequence[Any], signature: Mapping[str, int]) -> list[Any]:
    by_index = {d["index"]: dict(d) for d in details}
    return [by_index[signature[name]] for name in sorted(signature, key=_order)]


def _into(x: Tensor, detail: Mapping[str, Any]) -> Tensor:
    kind = torch.from_numpy(detail["dtype"]([0])).dtype
    scale, zero = detail["quantization"]
    if kind in (torch.int8, torch.uint8) and scale and x.is_floating_point():
        info = torch.iinfo(kind)
        return torch.round(x / scale + zero).clamp(info.min, info.max).to(kind)
    return x.to(kind)


def _back(x: Tensor, detail: Mapping[str, Any]) -> Tensor:
    scale, zero = detail["quantization"]
    return (x.float() - zero) * scale if x.dtype in (torch.int8, torch.uint8) and scale else x
