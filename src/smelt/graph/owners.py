"""Which weight an operator is given, where it is given a view of one; and what weights read, watched there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smelt.core.data import batch, evaluating, forward_or_raise, move
from smelt.core.target import Target, targets
from smelt.graph.trace import plainly


class Owners:
    """Tensors are known by their memory; two that lie in one are not told apart, and not known."""

    def __init__(self, known: Iterable[Target]):
        self._owner: dict[int, Target | None] = {}
        for target in known:
            key = target.tensor.untyped_storage().data_ptr()
            self._owner[key] = None if key in self._owner else target

    def owner(self, tensor: Tensor) -> Target | None:
        """The target that a tensor is, or is a view of."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        return self._owner.get(tensor.untyped_storage().data_ptr())

    def of(self, tensor: Tensor, dim: int) -> tuple[Target, int, int] | None:
        """(target, its dimension, first coordinate) that a dimension of a view of a target runs along."""
        own = self.owner(tensor)
        if own is None or not own.tensor.is_contiguous():
            return None
        fits = [
            d
            for d, (n, step) in enumerate(zip(own.tensor.shape, own.tensor.stride(), strict=True))
            if n > 1 and step == tensor.stride(dim) and tensor.shape[dim] <= n
        ]
        if len(fits) != 1:
            return None
        offset = tensor.storage_offset() - own.tensor.storage_offset()
        return own, fits[0], offset // own.tensor.stride(fits[0]) % own.tensor.shape[fits[0]]


See = Callable[[str, Tensor], None]


@torch.no_grad()
def watch(model: nn.Module, names: Iterable[str], batches: Iterable[Any], limit: int, see: See) -> None:
    """Run calibration batches; `see(name of a weight, what it reads [rows, channels])` at every use of these weights.

    Raises:
        ModelError: the model fails.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    mode = _Watch(Owners(targets(model)), set(names), see)
    with evaluating(model), plainly():
        for item in islice(batches, limit):
            inputs = move(batch(item)[0], device)
            with mode:
                forward_or_raise(model, inputs, "while activations are gathered")


_OPERANDS = {"mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "linear": ("input", "weight")}
_OPERANDS |= dict.fromkeys(("convolution", "_convolution"), ("input", "weight"))


class _Watch(TorchDispatchMode):
    def __init__(self, owners: Owners, names: set[str], see: See):
        super().__init__()
        self.owners, self.names, self.see = owners, names, see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in _OPERANDS:
            given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
            x, weight = (given[key] for key in _OPERANDS[name])
            own = self.owners.owner(weight)
            if own is not None and own.name in self.names:
                channels = 1 if "convolution" in name else -1
                self.see(own.name, x.detach().movedim(channels, -1).flatten(0, -2))
        return func(*args, **(kwargs or {}))
