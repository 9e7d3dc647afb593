"""Layers with stored weights in an ONNX graph: which there are, and how they compute with codes.

linear      a product with the codes: MatMulNBits (weights alone are stored), MatMulInteger (inputs are rounded, too)
embedding   rows of codes are looked up, and only these are decoded
others      decoded weights
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch

from smelt.core.encoded import Encoded
from smelt.formats._onnx_graph import FLOAT, INT32, MICROSOFT, Graph, Notes, array_of, int_of, ints_of, only_user
from smelt.formats._onnx_weights import Codes, Decoder, codes_of
from smelt.forms.codebook import Codebook

BLOCK = 128  # columns that share a scale in MatMulNBits, where the whole row does
SMALLEST = 16  # of these blocks


@dataclass
class Layer:
    """One use of a stored weight by a convolution or a linear layer.

    node: Conv, Gemm or MatMul.  x: its input.  out: its output with the bias, and for a convolution with the batch norm
    behind it, which then is in the codes and the bias.
    """

    kind: str
    node: ir.Node
    weight: ir.Value
    name: str
    x: ir.Value
    out: ir.Value
    bias: np.ndarray | None
    codes: Codes | None

    @property
    def integer(self) -> bool:
        """Whether a kernel of 8-bit integers can take its weight."""
        codes = self.codes
        if codes is None or not codes.by_row() or codes.bits > 8:
            return False
        return self.kind == "linear" or codes.zero is None


def layers(weights: Mapping[ir.Value, str], trees: Mapping[str, Encoded]) -> list[Layer]:
    """In the order of the graph."""
    found = []
    for value, name in weights.items():
        codes = codes_of(trees[name])
        for node, at in value.uses():
            if node.op_type == "Conv" and at == 1:
                found.append(_conv(node, value, name, codes))
            elif node.op_type == "Gemm" and at == 1 and _plain_gemm(node):
                found.append(_gemm(node, value, name, codes))
            elif node.op_type == "Transpose" and ints_of(node, "perm") == [1, 0]:
                products = [user for user, i in node.outputs[0].uses() if user.op_type == "MatMul" and i == 1]
                found += [_matmul(user, value, name, codes) for user in products]
    return found


def _conv(node: ir.Node, weight: ir.Value, name: str, codes: Codes | None) -> Layer:
    given = node.inputs[2] if len(node.inputs) > 2 else None
    layer = Layer("conv", node, weight, name, _at(node, 0), node.outputs[0], array_of(given), codes)
    if given is not None and layer.bias is None:
        layer.codes = None  # a bias that is computed
    norm = only_user(layer.out)
    return _folded(layer, norm) if norm is not None and norm.op_type == "BatchNormalization" else layer


def _folded(layer: Layer, norm: ir.Node) -> Layer:
    """The batch norm in scales and bias: the codes stay, but for their signs where it turns a channel round."""
    codes, numbers = layer.codes, [array_of(v) for v in norm.inputs[1:5]]
    if codes is None or not layer.integer or any(n is None for n in numbers):
        return layer
    gain, shift, mean, var = (np.asarray(n, np.float64) for n in numbers)
    epsilon = norm.attributes.get("epsilon")
    factor = gain / np.sqrt(var + (1e-5 if epsilon is None else epsilon.as_float()))
    codes, sign = codes.rows(), torch.from_numpy(np.where(factor < 0, -1, 1).astype(np.int32))
    turned = codes.codes * codes.spread(sign)
    if int(turned.max()) > codes.high:
        return layer
    size = torch.from_numpy(np.abs(factor)).float()
    turned = turned * codes.spread((size > 0).int())  # of a channel that is switched off
    scale = torch.where(size > 0, codes.scale * size, 1.0)
    bias = shift + ((0 if layer.bias is None else layer.bias) - mean) * factor
    return replace(
        layer,
        out=norm.outputs[0],
        bias=bias.astype(np.float32),
        codes=replace(codes, codes=turned, scale=scale),
    )


def _plain_gemm(node: ir.Node) -> bool:
    scaled = any(name in node.attributes and node.attributes[name].as_float() != 1 for name in ("alpha", "beta"))
    return int_of(node, "transB", 0) == 1 and not int_of(node, "transA", 0) and not scaled


def _gemm(node: ir.Node, weight: ir.Value, name: str, codes: Codes | None) -> Layer:
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = array_of(given)
    if given is not None and (bias is None or bias.ndim > 1):
        codes = None
    return Layer("linear", node, weight, name, _at(node, 0), node.outputs[0], bias, codes)


def _matmul(node: ir.Node, weight: ir.Value, name: str, codes: Codes | None) -> Layer:
    out, bias = node.outputs[0], None
    user = only_user(out)
    if user is not None and user.op_type == "Add":
        other = next((array_of(v) for v in user.inputs if v is not out), None)
        if other is not None and weight.shape is not None and other.shape == (weight.shape[0],):
            out, bias = user.outputs[0], other
    return Layer("linear", node, weight, name, _at(node, 0), out, bias, codes)


def _at(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


class Products:
    """Linear layers and embeddings in the graph, by their codes.

    level: `accuracy_level` of MatMulNBits: 4 rounds inputs to 8 bits, by block; 1 computes in float32.
    """

    def __init__(self, graph: Graph, notes: Notes, level: int):
        self.graph, self.notes, self.level = graph, notes, level
        self._dynamic: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def blocks(self, layer: Layer) -> bool:
        """Compute a linear layer by MatMulNBits, if its codes allow it."""
        codes = layer.codes
        if codes is None or (packed := self._packed(codes, layer.name)) is None:
            return False
        n, k = codes.codes.shape
        at, level = layer.node, {"accuracy_level": self.level} if self.level else {}
        product = self.graph.op(
            at, "MatMulNBits", _at(at, 0), *packed.inputs, domain=MICROSOFT,
            N=n, K=k, bits=packed.bits, block_size=packed.block, **level,
        )  # fmt: skip
        self._finish(layer, product, at)
        return True

    def integers(self, layer: Layer, grid: Sequence[ir.Value] | None) -> None:
        """Compute a linear layer in integers, its output in floats.

        ONNX Runtime fuses MatMulInteger with what rounds its input and scales its output only where the range is found
        at run time; otherwise the fused node is written.

        Args:
            grid: codes, scale and zero of the input where it is rounded to a fixed grid; None: to that of each batch.
        """
        assert layer.codes is not None
        at, codes, graph = layer.node, layer.codes.rows().centred(), self.graph
        shared = any(node.op_type == "Gather" for node, _ in layer.weight.uses())
        small = codes.codes.to(torch.int8)
        weight = graph.small(at, f"{layer.name}.codes", small if shared else small.T, codes.bits)
        if shared:
            weight = graph.op(at, "Transpose", weight, perm=[1, 0])
        none = None if codes.zero is None else self._constant(f"{layer.name}.zero", codes.zero.to(torch.int8))
        size = self._constant(f"{layer.name}.scale", codes.scale)
        if grid is not None:
            x, scale, zero = grid[:3]
            bias = () if layer.bias is None else (self.graph.constant(f"{layer.name}.bias", layer.bias),)
            product = graph.op(at, "MatMulIntegerToFloat", x, weight, scale, size, zero, none, *bias, domain=MICROSOFT)
            graph.replace(layer.out, product)
            return
        given = _at(at, 0)  # by now another value than when the layer was found, where what gives it was replaced
        x, scale, zero = self._dynamic.get(given) or self._quantized(given)
        product = graph.cast(at, graph.op(at, "MatMulInteger", x, weight, zero, *([none] if none else [])), FLOAT)
        self._finish(layer, graph.op(at, "Mul", product, graph.op(at, "Mul", scale, size)), at)

    def _constant(self, key: str, x: torch.Tensor) -> ir.Value:
        return self.graph.constant(key, x)

    def _quantized(self, x: ir.Value) -> tuple[ir.Value, ...]:
        made = self.graph.ops(self.graph.after(x), "DynamicQuantizeLinear", x, outputs=3)
        self._dynamic[x] = tuple(made)
        return self._dynamic[x]

    def _finish(self, layer: Layer, product: ir.Value, at: ir.Node) -> None:
        if layer.bias is not None:
            bias = layer.bias
            product = self.graph.op(at, "Add", product, self.graph.constant(f"{layer.name}.bias", bias))
        self.graph.replace(layer.out, product)

    def lookup(self, node: ir.Node, tree: Encoded, name: str) -> bool:
        """Look rows up in the codes instead of in the weight, if they allow it."""
        graph, ids = self.graph, node.inputs[1]
        if int_of(node, "axis", 0) or ids is None or ids.shape is None or len(tree.shape) != 2:
            return False
        form, indices = tree.form, tree.parts.get("indices")
        if isinstance(form, Codebook) and isinstance(indices, torch.Tensor):
            size = np.uint8 if indices.dtype == torch.uint8 else np.int32
            rows = graph.constant(f"{name}.indices", indices.cpu().numpy().astype(size))
            table = graph.constant(f"{name}.table", tree.parts["codebook"].float())  # type: ignore[union-attr]
            places = graph.cast(node, graph.op(node, "Gather", rows, ids), INT32)
            graph.replace(node.outputs[0], graph.op(node, "Gather", table, places))
            return True
        codes = codes_of(tree)
        if codes is not None and codes.by_row() and graph.has(f"{name}.codes"):
            graph.replace(node.outputs[0], self._rows(codes.rows().centred(), name, node, ids))
            return True
        packed = None if codes is None else self._packed(codes, name)
        if packed is None:
            return False
        data, scale, zero = (None if v is None else graph.op(node, "Gather", v, ids) for v in packed.sides)
        if packed.bits == 4:
            low = graph.op(node, "BitwiseAnd", data, graph.constant("nibble", np.array(15, np.uint8)))
            four = graph.constant("four", np.array(4, np.uint8))
            high = graph.op(node, "BitShift", data, four, direction="RIGHT")
            pair = [graph.op(node, "Unsqueeze", v, graph.numbers(-1)) for v in (low, high)]
            data = graph.op(node, "Concat", *pair, axis=-1)
        keep = [0] * len(ids.shape)
        blocks = packed.columns // packed.block
        data = graph.op(node, "Reshape", graph.cast(node, data), graph.numbers(*keep, blocks, packed.block))
        if zero is None:
            middle = graph.constant(f"middle{packed.bits}", np.array(1 << packed.bits - 1, np.float32))
        else:
            middle = graph.op(node, "Unsqueeze", graph.cast(node, zero), graph.numbers(-1))
        x = graph.op(node, "Sub", data, middle)
        x = graph.op(node, "Mul", x, graph.op(node, "Unsqueeze", scale, graph.numbers(-1)))
        x = graph.op(node, "Reshape", x, graph.numbers(*keep, packed.columns))
        if packed.columns != tree.shape[1]:
            ends = (graph.numbers(0), graph.numbers(tree.shape[1]), graph.numbers(-1))
            x = graph.op(node, "Slice", x, *ends)
        graph.replace(node.outputs[0], x)
        return True

    def _rows(self, codes: Codes, name: str, node: ir.Node, ids: ir.Value) -> ir.Value:
        """Rows of the codes that a product uses, too."""
        graph = self.graph
        whole = graph.small(node, f"{name}.codes", codes.codes.to(torch.int8), codes.bits)
        x = graph.op(node, "Gather", whole, ids)
        x = graph.cast(node, x)
        if codes.zero is not None:
            zero = graph.op(node, "Gather", self._constant(f"{name}.zeros", codes.zero[:, None].float()), ids)
            x = graph.op(node, "Sub", x, zero)
        return graph.op(
            node, "Mul", x, graph.op(node, "Gather", self._constant(f"{name}.rows", codes.scale[:, None]), ids)
        )

    def _packed(self, codes: Codes, name: str) -> Packed | None:
        """In the layout of MatMulNBits; None where codes or groups do not fit it."""
        if codes.codes.dim() != 2 or codes.bits > 8 or codes.axis == 1 or (codes.group and codes.axis is None):
            return None
        n, k = codes.codes.shape
        block = _block(codes.group or k, bool(codes.group) and codes.group < k)
        if block is None:
            return None
        bits = 4 if codes.bits <= 4 else 8
        blocks = -(-k // block)
        offset = 0 if codes.low >= 0 else 1 << bits - 1

        def sides(side: torch.Tensor) -> torch.Tensor:
            each = side.repeat_interleave(codes.group // block, 1)[:, :blocks] if codes.group else side.reshape(-1, 1)
            return each.expand(n, blocks)

        middle = torch.zeros(n, blocks, dtype=torch.int32) if codes.zero is None else sides(codes.zero)
        fill = middle.repeat_interleave(block, 1)
        padded = torch.cat((codes.codes, fill[:, k:]), 1) + offset
        whole = padded.to(torch.uint8).reshape(n, blocks, block)
        data = whole if bits == 8 else whole[..., ::2] | whole[..., 1::2] << 4
        graph = self.graph
        scale = graph.constant(f"{name}.scales", sides(codes.scale))
        packed = graph.constant(f"{name}.packed", data)
        if codes.zero is None:
            return Packed(bits, block, blocks * block, packed, scale, None, None)
        zeros = (middle + offset).to(torch.uint8)
        pairs = torch.nn.functional.pad(zeros, (0, blocks % 2))
        small = zeros if bits == 8 else pairs[:, ::2] | pairs[:, 1::2] << 4
        plain = graph.constant(f"{name}.zeros", zeros)
        return Packed(bits, block, blocks * block, packed, scale, plain, graph.constant(f"{name}.zero_points", small))


@dataclass(frozen=True)
class Packed:
    """bits: 4 or 8.  columns: those of a whole number of blocks.  zeros: a byte each; zero_points: `bits` each."""

    bits: int
    block: int
    columns: int
    codes: ir.Value
    scale: ir.Value
    zeros: ir.Value | None
    zero_points: ir.Value | None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        found = (self.codes, self.scale)
        return found if self.zero_points is None else (*found, self.zero_points)

    @property
    def sides(self) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        return self.codes, self.scale, self.zeros


def _block(length: int, exactly: bool) -> int | None:
    """The largest power of two up to BLOCK that divides a length; SMALLEST if it need not."""
    block = next((b for b in (128, 64, 32, 16) if b <= BLOCK and length % b == 0), None)
    return block if block or exactly else SMALLEST


def floats(weights: Mapping[ir.Value, str], trees: Mapping[str, Encoded], decoder: Decoder) -> list[str]:
    """Decode the weights that are still used; returns their names."""
    found = []
    for value, name in weights.items():
        if value.uses():
            producer = value.producer()
            assert producer is not None
            decoder.graph.replace(value, decoder.decoded(trees[name], name, producer))
            found.append(name)
    return found
