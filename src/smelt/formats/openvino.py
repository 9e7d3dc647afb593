"""OpenVINO's `.xml` and `.bin`: int8 kernels with our scales, weights of 4 and 8 bits as they are stored."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx, nn

from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.formats._rounding import ADDS, Rules, lift, round_all
from smelt.formats._trace import flexible, trace
from smelt.formats._traced import CONVOLUTIONS, Traced, Weight, arguments, aten, rounded
from smelt.grids.calibrated import RANGES

RULES = Rules(
    outputs=False,
    centred=True,
    products=(aten.matmul.default, aten.bmm.default),
    joins=(*ADDS, aten.cat.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default),
)
# What OpenVINO calls the settings of `rest`, and where a file holds the one it was written with.
HINTS = {"float32": "f32", "bfloat16": "bf16"}
HINT = ["runtime_options", "INFERENCE_PRECISION_HINT"]


@dataclass(frozen=True)
class OpenVINO(Export):
    """OpenVINO IR."""

    suffix: ClassVar[str] = ".xml"
    runtimes: ClassVar[tuple[str, ...]] = ("openvino",)
    needs: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "openvino"

    activations: str = setting(
        "stored",
        "stored: rounded where the recipe does; static: also where integer kernels need it, calibrated on data; "
        "dynamic: only weights are stored in integers",
        choices=("stored", "static", "dynamic"),
    )
    range: str = setting("minmax", "range of what is calibrated (activations: static)", choices=RANGES)
    rest: str = setting(
        "float32",
        "in what is computed that is not in integers; bfloat16 is faster where the processor has it",
        choices=tuple(HINTS),
    )

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        ov = package()
        inputs = given.inputs("to trace the model")
        traced = trace(model, inputs, self.name)
        if self.activations == "dynamic":
            lift(traced)
        elif self.activations == "static":
            batches = given.calibration("to calibrate activations on (activations: static)")
            round_all(traced, RULES, traced.per_row, batches, self.range)
        if traced.dynamic:
            traced.notes.append(
                "OpenVINO itself decides how it rounds what enters layers at run time: that of linear layers with "
                "weights in integers, in groups; that of convolutions not at all"
            )
        if slow := _slow(traced):
            traced.notes.append(
                f"OpenVINO takes the codes of {', '.join(slow)} back to values at every run, since what enters is not "
                "rounded; activations=static with data runs them in integers"
            )
        traced.render(lambda weight, node: _constant(traced, weight))
        made = ov.convert_model(_program(traced))
        made.reshape(_shapes(made, traced))
        _narrow(made, ov)
        _terse(made)
        made.set_rt_info(HINTS[self.rest], HINT)
        if traced.weights or self.rest != "float32":
            traced.notes.append(
                f"what is not in integers is computed in {self.rest}: smelt takes that from the file, and OpenVINO by "
                f"itself where it is given INFERENCE_PRECISION_HINT={HINTS[self.rest]}"
            )
        ov.save_model(made, path, compress_to_fp16=False)
        path.write_text(re.sub(r">\s+<", "><", path.read_text()))  # indented, it is twice as large
        return traced.notes


def package() -> Any:
    """OpenVINO, without the module by which it reports each use to its makers, from a new process each time; it does
    without where that is missing.  One that was imported before stays as it is."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _constant(traced: Traced, weight: Weight) -> fx.Node:
    """(codes - zero) * scale, in the shape of the weight; scales along the rows of groups where there are groups."""
    graph, grid, (rows, columns) = traced.graph.graph, weight.grid, weight.grid.codes.shape
    groups = columns // grid.run
    shape = list(weight.shape) if groups == 1 else [rows, groups, grid.run]
    sides = [rows, groups, *[1] * (len(shape) - 2)] if groups > 1 else [rows, *[1] * (len(shape) - 1)]
    kind = torch.int8 if weight.fits(-128, 127) and grid.symmetric else torch.uint8
    codes = traced.constant(f"{weight.name}_codes", grid.codes.to(kind).reshape(shape))
    found = graph.call_function(aten.to.dtype, (codes, torch.float32))
    if bool(grid.zero.any()):
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
        if grid.whole and low <= float(grid.zero.min()) and float(grid.zero.max()) <= high:
            zero = traced.constant(f"{weight.name}_zero", grid.zero.to(kind).reshape(sides))
            zero = graph.call_function(aten.to.dtype, (zero, torch.float32))
        else:
            zero = traced.constant(f"{weight.name}_zero", grid.zero.float().reshape(sides))
        found = graph.call_function(aten.sub.Tensor, (found, zero))
    scale = traced.constant(f"{weight.name}_scale", grid.scale.float().reshape(sides))
    found = graph.call_function(aten.mul.Tensor, (found, scale))
    return found if groups == 1 else graph.call_function(aten.reshape.default, (found, list(weight.shape)))


def _slow(traced: Traced) -> list[str]:
    """Weights of pointwise convolutions whose inputs are not rounded."""
    layers = [node for node in traced.nodes(*CONVOLUTIONS) if not rounded(node)]
    found = [traced.weights.get(traced.attribute(arguments(node)[1]) or "") for node in layers]
    return [weight.name for weight in found if weight is not None and weight.shape[2:].numel() == 1]


def _program(traced: Traced) -> torch.export.ExportedProgram:
    return flexible(traced.graph, traced.inputs, traced.named)[0]


def _shapes(made: Any, traced: Traced) -> dict[Any, list[int]]:
    """The shape of each input, with any number of samples where the graph takes it."""
    given = [x for x in (*traced.inputs, *traced.named.values()) if isinstance(x, torch.Tensor)]
    free = [[-1, *x.shape[1:]] if traced.rows and x.dim() else list(x.shape) for x in given]
    return dict(zip(made.inputs, free, strict=True))


def _narrow(made: Any, ov: Any) -> None:
    """Codes that need no more than 4 bits become constants of 4 bits."""
    for node in made.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() not in (ov.Type.i8, ov.Type.u8):
            continue
        if any(port.get_node().get_type_name() != "Convert" for port in node.output(0).get_target_inputs()):
            continue
        values = node.get_data()
        low, high, kind = (-8, 7, ov.Type.i4) if node.get_element_type() == ov.Type.i8 else (0, 15, ov.Type.u4)
        if 2 <= values.ndim <= 3 and values.size and low <= values.min() and values.max() <= high:
            node.output(0).replace(ov.opset13.constant(values, dtype=kind).output(0))
    made.validate_nodes_and_infer_types()


def _terse(made: Any) -> None:
    """Short names inside, and each number once: of a small model the text is a fifth of the file."""
    kept: dict[Any, Any] = {}
    for i, node in enumerate(made.get_ordered_ops()):
        kind = node.get_type_name()
        users = {port.get_node().get_type_name() for output in node.outputs() for port in output.get_target_inputs()}
        if kind in ("Parameter", "Result"):
            continue
        node.set_friendly_name(str(i))
        if "Result" in users:  # its name is that of the model's output
            continue
        for output in node.outputs():
            output.get_tensor().set_names(set())
        if kind == "Constant" and (value := node.get_data()).size == 1:
            key = (node.get_element_type().get_type_name(), tuple(node.get_output_shape(0)), value.tobytes())
            first = kept.setdefault(key, node)
            if first is not node:
                node.output(0).replace(first.output(0))
