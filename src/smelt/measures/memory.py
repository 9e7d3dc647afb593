"""Peak bytes of the tensors that are alive during one forward: counted, so the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smelt.core.data import evaluating, forward_or_raise, tensors
from smelt.measures._unfused import unfused_modules

UNIT = "bytes"


def memory(model: nn.Module, inputs: Any) -> int:
    """Peak bytes of live tensor storages during a forward of `inputs`: parameters, buffers, inputs and activations.

    A storage counts once, from the operator that makes it until Python and torch have let go of it; an operator's
    inputs and outputs are alive together.  Not counted: what a kernel needs inside (workspaces), the allocator's
    rounding and fragments.  The fused path of multi-head attention is off, for its activations could not be seen.

    Args:
        inputs: a batch, as `forward` takes it.

    Raises:
        ModelError: the forward pass fails.
    """
    live = _Live()
    try:
        live.add(chain(model.parameters(), model.buffers(), tensors(inputs)))
        with unfused_modules(), evaluating(model), live:
            forward_or_raise(model, inputs, "on the first batch")
    finally:
        live.close()
    return live.peak


class _Live(TorchDispatchMode):
    """The storages that are alive, by identity.  torch keeps a storage's Python object as long as the storage."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.watches: dict[int, weakref.finalize[Any, Any]] = {}
        self.now = 0
        self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def add(self, found: Iterable[Tensor]) -> None:
        for tensor in found:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.watches[key] = weakref.finalize(storage, self._drop, key)
            self.now += storage.nbytes() - self.sizes.get(key, 0)
            self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
        del self.watches[key]

    def close(self) -> None:
        for watch in self.watches.values():
            watch.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(chain(tensors(args), tensors(kwargs or {}), tensors(result)))
        return result
