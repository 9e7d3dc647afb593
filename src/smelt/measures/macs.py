"""Multiply-accumulates of one forward, counted from the operators that run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smelt.core.data import evaluating, forward, samples
from smelt.measures._unfused import unfused

UNIT = "MACs"

aten = torch.ops.aten


def macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates per sample of a forward of `inputs`, in evaluation mode; the fraction is rounded.

    Convolutions (padding included), matrix products and attention count, half of what torch's `FlopCounterMode`
    gives them; bias, element-wise operations, normalisation, pooling and embeddings do not.  Zeros count as any
    other value.  Work that does not depend on the batch (a stored weight that is decoded) is divided by it too.

    Args:
        inputs: a batch, as `forward` takes it, with the samples along the first dimension.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={aten.mv: _mv, aten.addmv: _addmv, aten.dot: _dot, aten._trilinear: _bilinear}
    )
    with unfused(), evaluating(model), _frozen(model), counter:
        forward(model, inputs)
    flops: int = counter.get_total_flops()
    return round(flops / 2 / max(1, samples(inputs)))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients: torch's counter hooks whatever does, and fails on views of parameters."""
    asking = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _mv(matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(matrix[0]) * int(matrix[1])


def _addmv(bias: Any, matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return _mv(matrix, vector)


def _bilinear(a: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(a[0]) * math.prod(map(int, weight))


def _dot(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(a[0])
