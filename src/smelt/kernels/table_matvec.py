"""Linear layers with few different values (codebooks, powers of two, ternary ...), for a few samples: what stands in
the table is looked up in registers; inputs stay as they are."""

from __future__ import annotations

from smelt.core.kernel import Layer, Served
from smelt.kernels._codes import packed_table
from smelt.kernels._matvec import MatVec, plain

DEVICES = ("cpu",)


def build(layer: Layer) -> Served | None:
    module = plain(layer)
    matrix = packed_table(layer.weight) if module is not None else None
    return MatVec(matrix, module.bias) if module is not None and matrix is not None else None
