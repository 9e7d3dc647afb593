"""The shelter takes part in the forward passes of a model.

Operations are replaced where they are called, by a mode that sees functions and methods of torch, so that no module
changes.  What other operations save goes through hooks, which leave alone what is small, what is no floating number,
and parameters, buffers and what was made of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from smelt.train.saved.held import Held
from smelt.train.saved.operations import HANDLERS
from smelt.train.saved.shelter import FLOATS, SMALL, Shelter


class _Mode(TorchFunctionMode):
    def __init__(self, shelter: Shelter):
        super().__init__()
        self.shelter = shelter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            with torch._C.DisableTorchFunction(), _as_they_are():
                found = handler(self.shelter, *args, **kwargs)
            if found is not NotImplemented:
                return found
        self.shelter.settle()
        return func(*args, **kwargs)


def _as_they_are() -> saved_tensors_hooks:
    """Hooks that let everything be saved as it is."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


class _Packed:
    """What an operation that is not known by name has saved."""

    def __init__(self, held: tuple[Held, Any, Any], x: Tensor):
        self.held, self.dtype = held, x.dtype

    def read(self) -> Tensor:
        what, size, stride = self.held
        return what.read(self.dtype).as_strided(size, stride)


class Watch:
    """Installs a shelter on modules of a model; `remove` takes it away again.

    Args:
        modules: within whose forward passes it acts.
        step: which optimizer step it is.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], shelter: Shelter, step: Callable[[], int]):
        self.model, self.shelter, self.step = model, shelter, step
        self.most = (0, 0)  # bytes stored and bytes that autograd would have saved, in the largest forward pass
        self._own: set[int] = set()
        self._open: list[ExitStack] = []
        self._handles = [model.register_forward_pre_hook(self._begin)]
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._open:
            self._open.pop().close()

    def _begin(self, *_: Any) -> None:
        while self._open:  # a forward pass that was interrupted
            self._open.pop().close()
        if torch.is_grad_enabled():
            self.shelter.begin(self.step())
            self._own = {t.untyped_storage()._cdata for t in _owned(self.model)}

    def _enter(self, *_: Any) -> None:
        stack = ExitStack()
        if torch.is_grad_enabled():
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
            stack.enter_context(_Mode(self.shelter))
        self._open.append(stack)

    def _leave(self, *_: Any) -> None:
        if not self._open:
            return
        self._open.pop().close()
        if torch.is_grad_enabled():
            self.shelter.settle()
            self.most = max(self.most, (self.shelter.taken, self.shelter.plain), key=lambda pair: pair[1])

    def _pack(self, x: Tensor) -> Any:
        if x.dtype not in FLOATS or x.numel() < SMALL or self._is_own(x):
            return x
        with torch._C.DisableTorchFunction(), torch.no_grad(), _as_they_are():
            self.shelter.count(x.detach())
            return _Packed(self.shelter.held(x, rest=True), x)

    def _is_own(self, x: Tensor) -> bool:
        """Whether it is a parameter or a buffer, or made of one parameter alone."""
        if x.untyped_storage()._cdata in self._own or (x.is_leaf and x.requires_grad):
            return True
        node = x.grad_fn
        while node is not None:
            below = [n for n, _ in node.next_functions if n is not None]
            if not below:
                return hasattr(node, "variable")
            node = below[0] if len(below) == 1 else None
        return False


def _unpack(saved: Any) -> Tensor:
    if not isinstance(saved, _Packed):
        return saved  # type: ignore[no-any-return]
    with torch.no_grad():
        return saved.read()


def _owned(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the weights that are computed at each forward pass."""
    for module in model.modules():
        for owned in (module._parameters, module._buffers, module.__dict__):
            yield from (t for t in owned.values() if isinstance(t, Tensor))
