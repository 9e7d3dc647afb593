"""ONNX, as ONNX Runtime computes it fastest on a CPU; the bits in the file are those that are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from smelt.core.errors import RecipeError
from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.core.store import store_of
from smelt.core.target import targets
from smelt.grids.calibrated import RANGES


@dataclass(frozen=True)
class Onnx(Export):
    """A graph for ONNX Runtime.

    activations
        stored    inputs are rounded where the recipe says so.  A linear layer whose weight alone is stored multiplies
                  its codes (MatMulNBits: 4 or 8 bits, by channel or by blocks); convolutions compute in floats.
        static    unsigned 8 bits everywhere between layers that are stored in 8 bits or less: grids that are stored are
                  used, those of outputs and sums are found from the data.
        dynamic   linear layers round their input to the range of each batch.

    Codebooks are tables with indices, products of factors two nodes, pruned models smaller ones.  Whatever has no
    counterpart is written as numbers, and the notes name it.
    """

    suffix: ClassVar[str] = ".onnx"
    runtimes: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")

    activations: str = setting("stored", "how inputs of layers are rounded", choices=("stored", "static", "dynamic"))
    range: str = setting(
        "minmax", "of grids that are found from data", choices=tuple(kind for kind in RANGES if kind != "lsq")
    )
    dynamic: tuple[int, ...] = setting(
        (0,), "axes of the inputs that may have any size, where the model allows it: [0], [0, 1], []"
    )
    level: int = setting(4, "4: weights stored alone are multiplied by inputs of 8 bits; 1: by floats", choices=(1, 4))
    rest: str = setting("float32", "of what has no counterpart in ONNX", choices=("float32", "float16"))

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        from smelt.formats._onnx_render import Wanted, render

        if any(isinstance(axis, bool) or not isinstance(axis, int) or axis < 0 for axis in self.dynamic):
            raise RecipeError(f"onnx.dynamic is {list(self.dynamic)}; it takes axes: [0], [0, 1] or []")
        model.float()
        inputs = _float32(given.inputs("to follow the model"))
        static = self.activations == "static"
        batches = [_float32(x) for x in given.calibration("to find the grids of activations")] if static else []
        trees = {name: entry.encoded for name, entry in store_of(model).entries.items()}
        dense = {target.name: target.tensor.detach() for target in targets(model)}
        wanted = Wanted(self.activations, self.range, self.dynamic, self.level, self.rest)
        return render(model, trees, dense, inputs, batches, wanted, path)


def _float32(inputs: Any) -> Any:
    """The same nesting with every floating tensor in float32, in which the graph computes."""
    if isinstance(inputs, Tensor):
        return inputs.float() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {k: _float32(x) for k, x in inputs.items()}
    return tuple(_float32(x) for x in inputs) if isinstance(inputs, (tuple, list)) else inputs
