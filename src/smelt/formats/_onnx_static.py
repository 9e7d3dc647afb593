"""Static 8-bit arithmetic: which values of an ONNX graph are rounded, to which grids.

A value that is rounded goes through QuantizeLinear and DequantizeLinear, and a runtime computes what lies between two
such pairs in integers.  Which are rounded:

* what enters a convolution or linear layer whose weight is stored in 8 bits or less: to the grid that is stored there;
* what such a convolution gives, behind the ReLU or clip that follows;
* sums, products and joins of values that are rounded, and averages of them that a layer takes in;
* what only moves or selects rounded values (`PASS`) keeps their grid.

Masks, softmax, norms and what linear layers give to them stay as they are: none of these is reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.data import tensors
from smelt.core.errors import ModelError, SmeltError
from smelt.core.named import first_line
from smelt.core.statistic import Statistic
from smelt.core.store import Activation
from smelt.formats._onnx_graph import Graph, array_of, int_of, ints_of, only_user
from smelt.formats._onnx_layers import Layer
from smelt.forms.affine import Affine
from smelt.grids import uniform
from smelt.grids.calibrated import calibrated, statistic

SAME = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")
PASS = (*SAME, "Slice", "Gather", "Expand", "DepthToSpace", "SpaceToDepth")
JOINS = ("Add", "Mul", "Concat")
AVERAGES = ("GlobalAveragePool", "AveragePool", "ReduceMean")
LEVELS = 255
PERCENTILE = 99.99
SAMPLES = 4  # that are calibrated on at a time


@dataclass(frozen=True)
class Grid:
    """x ~ (code - zero) * scale with codes in low..high, of unsigned bytes."""

    scale: float
    zero: int
    low: int = 0
    high: int = LEVELS

    @property
    def ends(self) -> tuple[float, float]:
        return (self.low - self.zero) * self.scale, (self.high - self.zero) * self.scale


def grid_of(activation: Activation) -> Grid | str | None:
    """The grid of a codec for activations; 'dynamic' where it is that of each batch; None: one that ONNX has not.

    The codec is asked to round two tensors, so that it need not be known.
    """
    found = []
    for scale in (1.0, 3.0):
        try:
            with torch.no_grad():
                tree = activation.codec.encode(scale * torch.linspace(-1, 2, 8).reshape(2, 4), activation.state)
        except (RuntimeError, SmeltError):
            return None
        form: Any = tree.form
        if not isinstance(form, Affine) or form.axis is not None or form.group or form.bits > 8:
            return None
        parts = {k: p.decode() if not isinstance(p, Tensor) else p for k, p in tree.parts.items()}
        zero = 0.0 if form.symmetric else float(parts["zero"])
        if zero != round(zero):
            return None
        low, high = uniform.limits(form.bits, form.symmetric)
        shift = 128 if form.symmetric else 0
        found.append(Grid(float(parts["scale"]) / form.top, int(zero) + shift, low + shift, high + shift))
    if found[0] == found[1]:
        return found[0]
    whole = not form.symmetric and form.bits == 8
    return "dynamic" if whole else None


def of_range(low: Tensor, high: Tensor) -> Grid:
    """The unsigned 8-bit grid of a range, with 0 among its levels."""
    scale, zero = uniform.steps(low, high, bits=8, symmetric=False, whole=True)
    assert zero is not None
    return Grid(float(scale), int(zero))


class Static:
    """Rounds values of a graph.

    grids: value -> its grid; None where one is needed and not known yet.
    like: value -> another that has the same grid.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer], stored: Mapping[ir.Value, Grid]):
        """layers: those whose weights integer kernels take."""
        self.graph = graph
        self.layers = layers
        self.grids: dict[ir.Value, Grid | None] = dict(stored)
        self.like: dict[ir.Value, ir.Value] = {}
        self.reads: dict[tuple[ir.Node, int], Grid | None] = {}  # inputs that are read rounded, and to a grid of theirs
        self.ends: dict[ir.Node, Layer] = {}  # that give codes
        self.given: dict[ir.Value, None] = {}  # values that all readers read rounded
        self._pairs: dict[tuple[ir.Value, Grid], tuple[ir.Value, ...]] = {}

    def place(self) -> list[ir.Value]:
        """Decide which values are rounded; returns those whose grid must be found."""
        for layer in self.layers:
            self.grids.setdefault(layer.x, None)
            self.reads[layer.node, 0] = None
        nodes = list(self.graph.graph)
        for node in reversed(nodes):
            x = node.inputs[0] if node.inputs else None
            keeps = node.op_type in SAME and x is not None and only_user(x) is node
            if keeps and self._has(node.outputs[0]) and not self._has(x):
                self.like[x] = node.outputs[0]
        self.ends = {layer.node: layer for layer in self.layers if layer.kind == "conv" or self._chained(layer)}
        for node in nodes:
            if node in self.ends:
                self._give(behind(self.ends[node].out))
            elif node.op_type in (*JOINS, *PASS, *AVERAGES):
                self._follow(node)
        for value in self.given:
            self.reads.update({(node, index): None for node, index in value.uses()})
        return [value for value, grid in self.grids.items() if grid is None]

    def _chained(self, layer: Layer) -> bool:
        """Whether a linear layer gives what only others take in rounded."""
        out = behind(layer.out)
        taken = {(other.node, 0) for other in self.layers}
        return layer.node.op_type == "Gemm" and bool(out.uses()) and self._has(out) and set(out.uses()) <= taken

    def _has(self, value: ir.Value) -> bool:
        return value in self.grids or value in self.like

    def _give(self, value: ir.Value) -> None:
        self.given[value] = None
        if not self._has(value):
            self.grids[value] = None

    def _follow(self, node: ir.Node) -> None:
        """A sum, a pool or the like, where what it takes in is rounded."""
        moving = [v for v in node.inputs if v is not None and array_of(v) is None]
        if node.op_type in PASS:
            moving = moving[:1]
        elif node.op_type in JOINS and len(moving) != len(node.inputs):
            return
        if not moving or any(v not in self.given for v in moving):
            return
        out = node.outputs[0]
        if node.op_type in JOINS:
            self._give(behind(out))
        elif node.op_type in PASS and not self._has(out):
            self.given[out], self.like[out] = None, moving[0]
        elif self._has(out):
            self.given[out] = None

    def grid(self, value: ir.Value) -> Grid:
        """The grid of a value that is rounded, once all are known."""
        while value in self.like:
            value = self.like[value]
        found = self.grids[value]
        assert found is not None
        return found

    def rounded(self, value: ir.Value, grid: Grid) -> tuple[ir.Value, ...]:
        """(codes, scale, zero, decoded codes) of a value."""
        if (value, grid) not in self._pairs:
            graph, x, at = self.graph, value, self.graph.after(value)
            scale = graph.constant(f"scale_{grid.scale!r}", np.array(grid.scale, np.float32))
            zero = graph.constant(f"zero_{grid.zero}", np.array(grid.zero, np.uint8))
            if grid.high - grid.low < LEVELS - 1:
                ends = [graph.constant(f"end_{end!r}", np.array(end, np.float32)) for end in grid.ends]
                x = graph.op(at, "Clip", x, *ends)
            codes = graph.op(at, "QuantizeLinear", x, scale, zero)
            self._pairs[value, grid] = codes, scale, zero, graph.op(at, "DequantizeLinear", codes, scale, zero)
        return self._pairs[value, grid]

    def write(self) -> None:
        """Let every reader of a rounded value read the decoded codes."""
        for (node, index), own in self.reads.items():
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, self.rounded(value, own or self.grid(value))[3])
        for value in self.given:
            grid = self.grid(value)
            if value.is_graph_output():
                decoded = self.rounded(value, grid)[3]
                decoded.name, value.name = value.name, decoded.name
                decoded.shape, decoded.type = value.shape, value.type
                self.graph.graph.outputs[self.graph.graph.outputs.index(value)] = decoded
            _absorb(value, grid)

    def kernel(self, layer: Layer) -> None:
        """Give a convolution, or a Gemm, its weight in codes and its bias in their products."""
        assert layer.codes is not None
        graph, at, codes, grid = self.graph, layer.node, layer.codes.rows().centred(), self.taken(layer)
        whole, steps = codes.codes.numpy(), codes.scale.double().numpy()
        attributes = {k: v for k, v in at.attributes.items()}
        x, whole = self._image(layer, grid, whole, attributes)
        bias = np.zeros(len(steps)) if layer.bias is None else np.asarray(layer.bias, np.float64)
        factor = np.maximum(1.0, np.ceil(np.abs(bias) / (2.0**30 * grid.scale * steps)))  # it must fit 32 bits
        whole = np.rint(whole / factor.reshape(-1, *[1] * (whole.ndim - 1))).astype(np.int8)
        steps = (steps * factor).astype(np.float32)
        unit = steps.astype(np.float64) * grid.scale
        zero = None if codes.zero is None else codes.zero.numpy().astype(np.int8)

        def decoded(key: str, stored: ir.Value, scale: np.ndarray, zero: np.ndarray) -> ir.Value:
            name = f"{key}.zero" if zero.any() else f"zeros_{zero.dtype}_{len(zero)}"
            sides = graph.constant(f"{key}.scale", scale.astype(np.float32)), graph.constant(name, zero)
            return graph.op(at, "DequantizeLinear", stored, *sides, axis=0)

        def none(kind: type) -> np.ndarray:
            return np.zeros(len(steps), kind)

        weight = graph.small(at, f"{layer.name}.codes", whole, codes.bits)
        weight = decoded(layer.name, weight, steps, none(np.int8) if zero is None else zero)
        sums = graph.constant(f"{layer.name}.bias", np.rint(bias / unit).astype(np.int32))
        added = decoded(f"{layer.name}.bias", sums, unit, none(np.int32))
        graph.replace(layer.out, graph.op(at, at.op_type, x, weight, added, **attributes))

    def _image(
        self, layer: Layer, grid: Grid, whole: np.ndarray, attributes: dict[str, ir.Attr]
    ) -> tuple[ir.Value, np.ndarray]:
        """What a layer takes in, and its codes; images of few channels laid out so that kernels need not copy bytes.

        Kernels take in four channels at a time.  An image is given channels of zeros; or, where the window moves two
        places at a time, each square of 2 x 2 becomes a place of four times the channels, and the window half as wide.
        """
        node, graph, rounder = layer.node, self.graph, self.rounded(layer.x, grid)[0].producer()
        x = None if rounder is None else rounder.inputs[0]
        assert x is not None
        small = layer.kind == "conv" and whole.ndim == 4 and whole.shape[1] < 4 and int_of(node, "group", 1) == 1
        if not small:
            return self.rounded(layer.x, grid)[3], whole
        at, channels = graph.after(x), whole.shape[1]
        sizes = None if x.shape is None else [size for size in x.shape[2:] if isinstance(size, int)]
        padding = attributes.get("auto_pad")
        plain = ints_of(node, "dilations", (1, 1)) == [1, 1] and (padding is None or padding.as_string() == "NOTSET")
        if ints_of(node, "strides") != [2, 2] or not plain or len(sizes or ()) != 2:
            pads = graph.numbers(0, 0, 0, 0, 0, -channels % 4, 0, 0)
            whole = np.pad(whole, ((0, 0), (0, -channels % 4), (0, 0), (0, 0)))
            return self.rounded(graph.op(at, "Pad", x, pads), grid)[3], whole
        assert sizes is not None
        begin, pads = ints_of(node, "pads", (0,) * 4)[:2], ints_of(node, "pads", (0,) * 4)
        whole = np.pad(whole, ((0, 0), (0, 0), *((0, k % 2) for k in whole.shape[2:])))
        given = zip(sizes, pads[:2], pads[2:], layer.codes.codes.shape[2:], strict=True)  # type: ignore[union-attr]
        steps = [(size + a + b - k) // 2 for size, a, b, k in given]
        ends = [2 * n + k - size - a for n, k, size, a in zip(steps, whole.shape[2:], sizes, begin, strict=True)]
        padded = graph.op(at, "Pad", x, graph.numbers(0, 0, *begin, 0, 0, *ends))
        codes, scale, zero, _ = self.rounded(padded, grid)
        codes = graph.op(at, "SpaceToDepth", codes, blocksize=2)
        n, c, high, wide = whole.shape
        whole = whole.reshape(n, c, high // 2, 2, wide // 2, 2).transpose(0, 3, 5, 1, 2, 4)
        attributes["strides"] = ir.AttrInt64s("strides", [1, 1])
        attributes["pads"] = ir.AttrInt64s("pads", [0] * 4)
        attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [high // 2, wide // 2])
        return graph.op(at, "DequantizeLinear", codes, scale, zero), whole.reshape(n, 4 * c, high // 2, wide // 2)

    def taken(self, layer: Layer) -> Grid:
        """The grid of what a layer takes in."""
        return self.reads.get((layer.node, 0)) or self.grid(layer.x)


def _absorb(value: ir.Value, grid: Grid) -> None:
    """A ReLU or clip that cuts nothing which the grid does not is taken out."""
    node, ends = value.producer(), grid.ends
    if node is None or node.op_type not in ("Relu", "Clip"):
        return
    low, high = (0.0, None) if node.op_type == "Relu" else (_end(node, 1), _end(node, 2))
    fits = (low is None or ends[0] >= low) and (high is None or ends[1] <= high * (1 + 1e-6))
    if fits and value.uses() and all(user.op_type == "QuantizeLinear" for user, _ in value.uses()):
        x = node.inputs[0]
        assert x is not None
        ir.convenience.replace_all_uses_with(value, x)


def _end(node: ir.Node, index: int) -> float | None:
    found = array_of(node.inputs[index]) if len(node.inputs) > index else None
    return None if found is None else float(found)


def behind(value: ir.Value) -> ir.Value:
    """What is rounded where a value is: the output of the ReLU or clip that alone uses it."""
    user = only_user(value)
    return user.outputs[0] if user is not None and user.op_type in ("Relu", "Clip") else value


def pools(graph: Graph) -> None:
    """Let means over the places of images [n, c, h, w] be the pool that runtimes have in integers."""
    for node in list(graph.graph):
        x, axes = (*node.inputs, None, None)[:2]
        if node.op_type != "ReduceMean" or x is None or x.shape is None or len(x.shape) != 4:
            continue
        if (given := array_of(axes)) is not None and sorted(int(a) % 4 for a in given.reshape(-1)) == [2, 3]:
            pooled = graph.op(node, "GlobalAveragePool", x)
            graph.replace(node.outputs[0], pooled if int_of(node, "keepdims", 1) else graph.op(node, "Flatten", pooled))


def observed(
    model: ir.Model, values: Sequence[ir.Value], dense: Mapping[str, Tensor], batches: Iterable[Any], kind: str
) -> list[Grid]:
    """Grids of values of a graph in float32, from what passes there while batches run in ONNX Runtime.

    Args:
        dense: name of a Weight node -> its values.
        kind: of the ranges, see `grids.calibrated`.

    Raises:
        DataError: values that are not finite.
        ModelError: ONNX Runtime cannot run the graph, or a batch.
    """
    import onnxruntime

    proto = ir.to_proto(model)
    for node in [n for n in proto.graph.node if n.op_type == "Weight"]:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(dense[node.output[0]].numpy(), node.output[0]))
        proto.graph.node.remove(node)
    known = {output.name for output in proto.graph.output}
    names = [str(value.name) for value in values]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    found = [shelf.load("statistics", statistic(kind, False), Statistic)(nn.Identity()) for _ in names]
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        given = [entry.name for entry in session.get_inputs()]
        for inputs in batches:
            for part in _slices(inputs):
                named = dict(part) if isinstance(part, Mapping) else dict(zip(given, tensors(part), strict=True))
                outputs = session.run(names, {name: x.numpy() for name, x in named.items()})
                for one, x in zip(found, outputs, strict=True):
                    one.update(torch.from_numpy(x))
    except SmeltError:
        raise
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot run a calibration batch: {first_line(error)}") from error
    settings: dict[str, Any] = {"bits": 8, "symmetric": False, "whole": True, "percentile": PERCENTILE}
    return [of_range(*calibrated(one.result(), kind, False, **settings)) for one in found]


def _slices(inputs: Any) -> Iterable[Any]:
    """A few samples at a time, where every input has one row for each."""
    held = list(tensors(inputs))
    sizes = {len(x) if x.dim() else 0 for x in held}
    size = sizes.pop() if len(sizes) == 1 else 0
    if not size:
        yield inputs
    for start in range(0, size, SAMPLES):
        part = [x[start : start + SAMPLES] for x in held]
        yield dict(zip(inputs, part, strict=True)) if isinstance(inputs, Mapping) else tuple(part)
