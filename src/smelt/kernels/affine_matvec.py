"""Linear layers of 2 to 8 bits, a scale per tensor, channel or group, for a few samples: codes are multiplied as
they are stored, by inputs of 16 bits (native/matvec.py)."""

from __future__ import annotations

from smelt.core.kernel import Layer, Served
from smelt.kernels._codes import packed_affine
from smelt.kernels._matvec import MatVec, plain

DEVICES = ("cpu",)


def build(layer: Layer) -> Served | None:
    module = plain(layer)
    matrix = packed_affine(layer.weight) if module is not None else None
    return MatVec(matrix, module.bias) if module is not None and matrix is not None else None
