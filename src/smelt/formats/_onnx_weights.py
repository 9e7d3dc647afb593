"""Stored tensors as constants of an ONNX graph, in the bits in which they are stored, and the nodes that decode them.

A runtime folds these nodes into dense values when it loads the file; what computes with the codes themselves is in
`_onnx_layers` and `_onnx_static`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from smelt.core.encoded import Encoded, numel
from smelt.formats._onnx_graph import INT32, Graph, Notes
from smelt.forms._sides import side_shape, spread
from smelt.forms.affine import Affine
from smelt.forms.codebook import Codebook
from smelt.forms.factors import Factors
from smelt.forms.float import Float
from smelt.forms.levels import Levels
from smelt.forms.product import Product, lines_of
from smelt.forms.scaled import Scaled
from smelt.forms.sparse import Sparse

TABLE = 256  # distinct values up to which a tensor is a table and indices
NIBBLE = 16  # those of indices of 4 bits
RESTS = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Codes:
    """x = (codes - zero) * scale, all whole but the scale.

    codes: int32 in the tensor's shape, `low`..`high`.  scale: float32, zero: int32 or None, of `side_shape`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    axis: int | None
    group: int
    low: int
    high: int

    @property
    def bits(self) -> int:
        return (self.high - self.low).bit_length()

    def by_row(self) -> bool:
        """One scale for the tensor or for each slice of dimension 0."""
        return not self.group and self.axis in (None, 0)

    def rows(self) -> Codes:
        """The same with a scale for each slice of dimension 0."""
        n = self.codes.shape[:1]
        zero = None if self.zero is None else self.zero.expand(n)
        return replace(self, scale=self.scale.expand(n), zero=zero, axis=0)

    def spread(self, side: Tensor) -> Tensor:
        return spread(side, self.codes.shape, self.axis, self.group)

    def centred(self) -> Codes:
        """The same with codes in -128..127 (of 8 bits or less) as int8 kernels take them."""
        if self.low >= -128 and self.high <= 127:
            return self
        zero = torch.zeros(side_shape(self.codes.shape, self.axis, self.group)) if self.zero is None else self.zero
        return replace(self, codes=self.codes - 128, zero=(zero - 128).int(), low=self.low - 128, high=self.high - 128)


def codes_of(tree: Encoded, fractions: bool = False) -> Codes | None:
    """A tensor as whole codes, where it is stored so and 0 is a level; masked entries have the code of 0.

    fractions: let `zero` be float32 where it is not whole, and 0 no level.
    """
    form, parts = tree.form, tree.parts
    if isinstance(form, Sparse) and isinstance(parts["values"], Encoded):
        found, mask = codes_of(parts["values"]), parts["mask"]
        if found is None or not isinstance(mask, Tensor):
            return None
        none = torch.zeros((), dtype=torch.int32) if found.zero is None else found.spread(found.zero)
        return replace(found, codes=torch.where(mask.cpu(), found.codes, none))
    if not isinstance(form, Affine):
        return None
    scale = _dense(parts["scale"]).float() / form.top
    codes, zero = _dense(parts["codes"]).int(), None
    low, high = (-(1 << form.bits - 1), (1 << form.bits - 1) - 1) if form.symmetric else (0, (1 << form.bits) - 1)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        return None
    if not form.symmetric:
        given = _dense(parts["zero"]).float()
        zero = given.round().int()
        if not torch.equal(zero.float(), given) or int(zero.min()) < low or int(zero.max()) > high:
            return Codes(codes, scale, given, form.axis, form.group, low, high) if fractions else None
    return Codes(codes, scale, zero, form.axis, form.group, low, high)


def _dense(part: Tensor | Encoded) -> Tensor:
    return (part.decode() if isinstance(part, Encoded) else part).detach().cpu()


class Decoder:
    """Puts stored tensors into a graph as codes, tables and factors, and decodes them there."""

    def __init__(self, graph: Graph, notes: Notes, rest: str):
        self.graph, self.notes, self.rest = graph, notes, rest

    def decoded(self, tree: Encoded, name: str, at: ir.Node) -> ir.Value:
        """Nodes before `at` that give the tensor in float32."""
        return self._shaped(self._any(tree, name, at), tree.shape, at)

    def _any(self, tree: Encoded, name: str, at: ir.Node) -> ir.Value:
        form, parts, shape = tree.form, tree.parts, tree.shape
        if (codes := codes_of(tree, fractions=True)) is not None:
            return self._affine(codes, name, at)
        if isinstance(form, Codebook) and isinstance(parts["indices"], Tensor):
            return self._table(_dense(parts["codebook"]).float(), parts["indices"], name, at)
        if isinstance(form, Levels) and isinstance(parts["codes"], Tensor):
            return self._table(form.table(), parts["codes"], name, at)
        ragged = isinstance(form, Scaled) and form.group and numel(shape[form.axis is not None :]) % form.group
        if isinstance(form, Scaled) and isinstance(parts["values"], Encoded) and not ragged:
            scale = _dense(parts["scale"]).float() / form.top
            return self._times(self._any(parts["values"], name, at), scale, shape, form.axis, form.group, name, at)
        if isinstance(form, Float) and isinstance(parts["values"], Tensor):
            return self._plain(parts["values"], name, at)
        if isinstance(form, Factors):
            left, right = (self._factor(parts[k], f"{name}.{k}", at) for k in ("left", "right"))
            return self.graph.op(at, "MatMul", left, right)
        if isinstance(form, Product) and isinstance(parts["indices"], Tensor):
            return self._product(tree, form, name, at)
        if isinstance(form, Sparse):
            self.notes.add("zeros are written out, since ONNX Runtime has no sparse kernels", name)
        return self._rest(tree.decode(), name, str(tree), at, isinstance(form, Sparse))

    def _factor(self, part: Tensor | Encoded, name: str, at: ir.Node) -> ir.Value:
        return self.decoded(part, name, at) if isinstance(part, Encoded) else self._plain(part, name, at)

    def _affine(self, codes: Codes, name: str, at: ir.Node) -> ir.Value:
        x, scale, zero, group = codes.codes, codes.scale, codes.zero, codes.group
        if group:
            x = torch.nn.functional.pad(x.reshape(len(scale) if codes.axis == 0 else 1, -1), (0, _lack(x, codes)))
        value = self.graph.cast(at, self.integers(x, f"{name}.codes", codes.low < 0, codes.bits))
        if zero is not None:
            side = self._side(zero.float(), x.shape, codes.axis, group, f"{name}.zero")
            value = self.graph.op(at, "Sub", self._grouped(value, side, at), side)
        return self._times(value, scale, codes.codes.shape, codes.axis, group, name, at)

    def _times(
        self, x: ir.Value, scale: Tensor, shape: torch.Size, axis: int | None, group: int, name: str, at: ir.Node
    ) -> ir.Value:
        """x, which may be laid out as [rows, groups * group] and filled up, times its scales, in `shape`."""
        if not group:
            return self.graph.op(at, "Mul", x, self._side(scale, shape, axis, group, f"{name}.scale"))
        rows = scale.shape[0] if axis == 0 else 1
        side = self._side(scale, shape, axis, group, f"{name}.scale")
        return self._cut(self.graph.op(at, "Mul", self._grouped(x, side, at), side), rows, shape, at)

    def _grouped(self, x: ir.Value, side: ir.Value, at: ir.Node) -> ir.Value:
        assert side.shape is not None
        if len(side.shape) < 3:
            return x
        return self.graph.op(at, "Reshape", x, self.graph.numbers(int(side.shape[0]), int(side.shape[1]), -1))

    def _cut(self, x: ir.Value, rows: int, shape: torch.Size, at: ir.Node) -> ir.Value:
        flat = self.graph.op(at, "Reshape", x, self.graph.numbers(rows, -1))
        rest = numel(shape) // rows
        numbers = self.graph.numbers
        return self.graph.op(at, "Slice", flat, numbers(0), numbers(rest), numbers(1))

    def _side(self, side: Tensor, shape: torch.Size, axis: int | None, group: int, name: str) -> ir.Value:
        """Scales that broadcast to the tensor, or with groups to [rows, groups, group]."""
        shaped = side.reshape(side.shape[0] if axis == 0 else 1, -1, 1) if group else spread(side, shape, axis)
        return self.graph.constant(name, shaped)

    def _shaped(self, x: ir.Value, shape: torch.Size, at: ir.Node) -> ir.Value:
        if x.shape is not None and tuple(x.shape) == tuple(shape):
            return x
        made = self.graph.op(at, "Reshape", x, self.graph.numbers(*shape))
        made.shape, made.type = ir.Shape(tuple(shape)), ir.TensorType(ir.DataType.FLOAT)
        return made

    def integers(self, x: Tensor, name: str, signed: bool, bits: int) -> ir.Value:
        """Whole numbers as a constant of the narrowest type."""
        narrow = {4: (ir.DataType.UINT4, ir.DataType.INT4), 8: (ir.DataType.UINT8, ir.DataType.INT8)}
        wide = {16: (ir.DataType.UINT16, ir.DataType.INT16), 32: (ir.DataType.INT32, ir.DataType.INT32)}
        dtype = next(pair[signed] for size, pair in (narrow | wide).items() if bits <= size)
        small = x.detach().cpu().numpy().astype(np.int8 if dtype == ir.DataType.INT4 else dtype_of(dtype))
        return self.graph.constant(name, small, dtype)

    def _table(self, table: Tensor, indices: Tensor, name: str, at: ir.Node) -> ir.Value:
        places = self.integers(indices.int(), f"{name}.indices", False, max(1, (len(table) - 1).bit_length()))
        values = self.graph.constant(f"{name}.table", table)
        return self.graph.op(at, "Gather", values, self.graph.cast(at, places, INT32))

    def _plain(self, x: Tensor, name: str, at: ir.Node) -> ir.Value:
        types = {
            torch.bfloat16: (ir.DataType.BFLOAT16, torch.int16),
            torch.float8_e4m3fn: (ir.DataType.FLOAT8E4M3FN, torch.uint8),
            torch.float8_e5m2: (ir.DataType.FLOAT8E5M2, torch.uint8),
        }
        x = x.detach().cpu().contiguous()
        if x.dtype in types:
            dtype, same = types[x.dtype]
            value = self.graph.constant(name, x.view(same).numpy().view(dtype.numpy()), dtype)
        else:
            value = self.graph.constant(name, x)
        return value if x.dtype == torch.float32 else self.graph.cast(at, value)

    def _product(self, tree: Encoded, form: Product, name: str, at: ir.Node) -> ir.Value:
        graph, shape, numbers = self.graph, tree.shape, self.graph.numbers
        book, indices = _dense(tree.parts["codebook"]).float(), _dense(tree.parts["indices"])
        lines, n = lines_of(shape, form.axis)
        vectors = self._table(book, indices, name, at)
        flat = graph.op(at, "Reshape", vectors, numbers(lines, -1))
        x = graph.op(at, "Slice", flat, numbers(0), numbers(n), numbers(1))
        if form.axis is not None:
            others = [d for d in range(len(shape)) if d != form.axis]
            x = graph.op(at, "Reshape", x, numbers(*(shape[d] for d in others), n))
            order = [*others, form.axis]
            x = graph.op(at, "Transpose", x, perm=[order.index(d) for d in range(len(shape))])
        if "place" in tree.parts:
            place = _dense(tree.parts["place"]).int()
            x = graph.op(at, "Reshape", x, numbers(*shape))
            x = graph.op(at, "Gather", x, graph.constant(f"{name}.place", place), axis=1)
        return x

    def _rest(self, x: Tensor, name: str, form: str, at: ir.Node, known: bool) -> ir.Value:
        """Values of a form that has no nodes of its own: as tables, if they are few, else as numbers."""
        x = x.detach().cpu().float()
        table, indices = x.unique(return_inverse=True)
        table = table if len(table) <= min(TABLE, x.numel() // 2) else table[:0]
        rows = x.reshape(x.shape[0] if x.dim() > 1 else 1, -1)
        tables, places = _tables(rows)
        if tables.shape[1] <= min(TABLE if not len(table) else NIBBLE, rows.shape[1] // 2):
            bits = max(1, (tables.shape[1] - 1).bit_length())
            codes = self.graph.cast(at, self.integers(places, f"{name}.indices", False, bits), INT32)
            return self.graph.op(at, "GatherElements", self.graph.constant(f"{name}.table", tables), codes, axis=1)
        if len(table):
            return self._table(table, indices, name, at)
        if not known:
            self.notes.add(f"the form {form} has no counterpart in ONNX; its values are written in {self.rest}", name)
        return self._plain(x.to(RESTS[self.rest]), name, at)


def _tables(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct values of each row, rising and filled up with the last; where in its row's each value stands)."""
    ordered, order = rows.sort(1)
    ranks = torch.nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).int(), (1, 0)).cumsum(1)
    tables = ordered[:, -1:].repeat(1, int(ranks.max()) + 1 if ranks.numel() else 1)
    return tables.scatter(1, ranks, ordered), torch.empty_like(ranks).scatter(1, order, ranks)


def dtype_of(dtype: ir.DataType) -> np.dtype:
    return np.dtype(np.uint8) if dtype == ir.DataType.UINT4 else dtype.numpy()


def _lack(x: Tensor, codes: Codes) -> int:
    rest = x.numel() // (len(codes.scale) if codes.axis == 0 else 1)
    return -rest % codes.group
