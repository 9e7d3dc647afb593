"""Linear layers of symmetric codes of up to 8 bits, one scale a row, whose inputs are rounded to 8 bits, for a few
samples: only whole numbers are multiplied."""

from __future__ import annotations

from smelt.core.kernel import Layer, Served
from smelt.kernels._codes import packed_bytes
from smelt.kernels._inputs import levels_of
from smelt.kernels._matvec import MatVec, plain

DEVICES = ("cpu",)


def build(layer: Layer) -> Served | None:
    module, levels = plain(layer), levels_of(layer)
    matrix = packed_bytes(layer.weight) if module is not None and levels is not None else None
    return MatVec(matrix, module.bias, levels) if module is not None and matrix is not None else None
