"""Multiply-accumulates of one forward, counted from the operators that run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from smelt.core.data import evaluating, forward_or_raise, samples
from smelt.measures._unfused import unfused

UNIT = "MACs"

aten = torch.ops.aten
REGISTRY: Mapping[Any, Any] = flop_registry


def macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates per sample of a forward of `inputs`, in evaluation mode; the fraction is rounded.

    Convolutions (padding included), matrix products and attention count, half of what torch's `FlopCounterMode`
    gives them; bias, element-wise operations, normalisation, pooling and embeddings do not.  Zeros count as any
    other value.  Work that does not depend on the batch (a stored weight that is decoded) is divided by it too.

    Args:
        inputs: a batch, as `forward` takes it, with the samples along the first dimension.

    Raises:
        ModelError: the forward pass fails.
    """
    counter = _Counter()
    with unfused(), evaluating(model), counter:
        forward_or_raise(model, inputs, "on the first batch")
    return round(counter.flops / 2 / max(1, samples(inputs)))


class _Counter(TorchDispatchMode):
    """Adds up what torch's registry says of each operator; those that it does not know are taken apart."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = getattr(func, "_overloadpacket", func)
        if known in OWN:
            self.flops += OWN[known](*(a.shape if isinstance(a, torch.Tensor) else a for a in args))
        elif known not in REGISTRY and isinstance(func, torch._ops.OpOverload):
            with self:
                apart = func.decompose(*args, **kwargs)
            if apart is not NotImplemented:
                return apart
        out = func(*args, **kwargs)
        if known in REGISTRY:
            self.flops += REGISTRY[known](*args, **kwargs, out_val=out)
        return out


def _mv(matrix: Any, vector: Any, *args: Any) -> int:
    return 2 * int(matrix[0]) * int(matrix[1])


def _addmv(bias: Any, matrix: Any, vector: Any, *args: Any) -> int:
    return _mv(matrix, vector)


def _bilinear(a: Any, weight: Any, *args: Any) -> int:
    return 2 * int(a[0]) * math.prod(map(int, weight))


def _dot(a: Any, b: Any, *args: Any) -> int:
    return 2 * int(a[0])


OWN: Mapping[Any, Callable[..., int]] = {aten.mv: _mv, aten.addmv: _addmv, aten.dot: _dot, aten._trilinear: _bilinear}
"""Operators that torch's registry lacks: flops of the shapes of their tensors."""
