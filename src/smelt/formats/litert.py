"""LiteRT's `.tflite` (formerly TensorFlow Lite): int8 kernels with our scales, for phones and microcontrollers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx, nn

from smelt.core.errors import ModelError
from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.formats import _flatbuffer
from smelt.formats._rounding import ADDS, MOVES, Rules, lift, round_all
from smelt.formats._trace import trace
from smelt.formats._traced import LAYERS, Rounding, Traced, Weight, aten, quantized, rounded
from smelt.grids.calibrated import RANGES

PROBABILITY = Rounding(1 / 256, -128, -128, 127)
RULES = Rules(
    outputs=True,
    products=(aten.matmul.default, aten.bmm.default),
    joins=(
        *ADDS,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.cat.default,
        aten.mean.dim,
        aten.avg_pool2d.default,
        aten.softmax.int,
        aten.sigmoid.default,
        aten.tanh.default,
        *(aten.relu.default, aten.relu6.default),
    ),
    ties=(aten.cat.default, aten.avg_pool2d.default),
    moves=MOVES,
    fixed={
        aten.softmax.int: PROBABILITY,
        aten.sigmoid.default: PROBABILITY,
        aten.tanh.default: Rounding(1 / 128, 0, -128, 127),
    },
)


@dataclass(frozen=True)
class LiteRT(Export):
    """LiteRT flatbuffer; it takes as many samples as the example has."""

    suffix: ClassVar[str] = ".tflite"
    runtimes: ClassVar[tuple[str, ...]] = ("litert",)
    needs: ClassVar[tuple[str, ...]] = ("litert_torch", "ai_edge_litert")
    extra: ClassVar[str] = "litert"

    activations: str = setting(
        "stored",
        "stored: rounded where the recipe does; static: also where integer kernels need it, calibrated on data; "
        "dynamic: at run time, in layers whose weights are stored in integers",
        choices=("stored", "static", "dynamic"),
    )
    range: str = setting("minmax", "range of what is calibrated (activations: static)", choices=RANGES)
    integer: bool = setting(
        False, "int8 in, int8 out and integers only between them, as microcontrollers want; implies activations: static"
    )

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        traced = trace(model, given.inputs("to trace the model"), self.name)
        static = self.activations == "static" or self.integer
        why = "to calibrate activations on (activations: static)"
        if self.activations == "dynamic" and not self.integer:
            lift(traced)
        integers = round_all(traced, RULES, traced.per_row, given.calibration(why) if static else None, self.range)
        weights = dict(traced.weights)
        traced.render(lambda weight, node: _codes(traced, weight, node) if integers else None)
        file = _flatbuffer.File(_convert(traced))
        left = [w.name for n, w in weights.items() if n not in traced.weights and not file.store(w.grid, w.shape)]
        if left:
            traced.notes.append(f"LiteRT's converter changed the values of {', '.join(left)}; written as dense values")
        file.narrow()
        if self.integer:
            file.integer_ends()
            if floating := file.floating():
                raise ModelError(
                    f"integer: {', '.join(floating)} would run in floating point; store the weights of every layer "
                    "in 8 bits per channel, and take out what LiteRT has no integer kernel for"
                )
        else:
            file.floating_ends()
        path.write_bytes(file.content())
        return [*traced.notes, traced.fixed()]


def _codes(traced: Traced, weight: Weight, node: fx.Node) -> fx.Node | None:
    """Weights of layers that run in integers."""
    if not weight.per_row or not weight.fits(-128, 127):
        return None
    inside = all(user.target in LAYERS and rounded(user) for user in node.users)
    return _rows(traced, weight) if inside else None


def _rows(traced: Traced, weight: Weight) -> fx.Node:
    """The dense values, quantized to the very codes that are stored; the converter folds it."""
    graph = traced.graph.graph
    values = traced.constant(f"{weight.name}_dense", weight.dense())
    scale = traced.constant(f"{weight.name}_scale", weight.grid.scale[:, 0].float())
    zero = traced.constant(f"{weight.name}_zero", torch.zeros(len(weight.grid.scale), dtype=torch.int64))
    limits = (0, -128 if bool((weight.grid.codes == -128).any()) else -127, 127, torch.int8)
    codes = graph.call_function(quantized.quantize_per_channel.default, (values, scale, zero, *limits))
    return graph.call_function(quantized.dequantize_per_channel.default, (codes, scale, zero, *limits))


def _convert(traced: Traced) -> bytes:
    with _quiet():
        import litert_torch

        litert_torch.config.show_progress = False
        from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
        from litert_torch.quantize.quant_config import QuantConfig

        config = get_symmetric_quantization_config(is_per_channel=True)
        quantizer = PT2EQuantizer().set_global(config)  # tells the converter what the roundings in the graph mean
        made = litert_torch.convert(
            traced.graph, traced.inputs, traced.named or None, quant_config=QuantConfig(pt2e_quantizer=quantizer)
        )
        content: bytes = made.model_content()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's warnings and logs."""
    logger = logging.getLogger()
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
