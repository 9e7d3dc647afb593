"""A forward pass of a model, in which every tensor carries labels.

The pass is real (so code that looks at values runs as it does) and sees every call three times: as the module it is
in, as the Python function with its arguments (where sizes come from), as the operators of ATen (what it does).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from smelt.core.data import forward, tensors
from smelt.core.named import first_line
from smelt.core.target import targets
from smelt.graph import calls
from smelt.graph.labels import Attribute, Axis, Labels
from smelt.graph.ops import handler
from smelt.graph.sizes import Size

INPUT = "it is an input of the model"
OUTPUT = "it is an output of the model"


class Trace:
    """What one pass has found.

    parameters: target name -> an axis per dimension.
    used: names of the targets that it has met.
    untrained: how a second pass, in training mode, failed; there is one where weights were not used in the first.
    like: tensors that were not used -> one that was, which they follow.
    """

    def __init__(self, model: nn.Module):
        self.labels = Labels()
        self.model = model
        self.parameters: dict[str, list[Axis]] = {}
        self.used: set[str] = set()
        self.untrained = ""
        self.like: dict[str, str] = {}
        self.stack: list[str] = [""]
        self.last = ""  # the module in which the last operator ran
        self.call: tuple[str, Any, Any] = ("", (), {})  # the Python call that is being made: name and arguments
        self.numbers: list[Attribute | Axis] = []  # what the code uses as more than a size
        self._axes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for target in targets(model, transient=True):
            found: list[Axis] = []
            for dim, size in enumerate(target.tensor.shape):
                found.append(self.labels.fresh(size, "channels") if size > 1 else f"dimension {dim} has one coordinate")
            self.parameters[target.name] = found
            self._axes[target.tensor] = found
            self._names[target.tensor] = target.name

    def axes(self, tensor: Tensor) -> list[Axis]:
        found = self._axes.get(tensor)
        if found is None or len(found) != tensor.dim():
            found = [f"it meets a constant in {self.where}"] * tensor.dim()
            self._axes[tensor] = found
        return found  # type: ignore[no-any-return]

    def use(self, tensor: Tensor) -> None:
        if (name := self._names.get(tensor)) is not None:
            self.used.add(name)

    def axis(self, tensor: Tensor, dim: int) -> Axis:
        return self.axes(tensor)[dim]

    def put(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Give a tensor its axes; what it had before (it was changed in place) is the same."""
        made: list[Axis] = []
        for dim, (axis, size) in enumerate(zip(axes, tensor.shape, strict=True)):
            if not isinstance(axis, str) and len(axis) != size:
                self.labels.fix(axis, f"its length changes in an unknown way in {self.where}")
                axis = f"its length changes in an unknown way in {self.where}"
            made.append(axis if size > 1 else f"dimension {dim} has one coordinate")
        if (old := self._axes.get(tensor)) is not None and tensor.dim() == len(old):
            made = [self.labels.meet([a, b]) for a, b in zip(old, made, strict=True)]
        self._axes[tensor] = made

    def stop(self, tree: Any, reason: str) -> None:
        """No coordinate of any of these tensors may go."""
        for tensor in tensors(tree):
            axes = self.axes(tensor)
            for axis in axes:
                self.labels.fix(axis, reason)
            self._axes[tensor] = [reason] * tensor.dim()

    @property
    def path(self) -> str:
        return self.stack[-1]

    @property
    def where(self) -> str:
        return self.path or type(self.model).__name__


_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


class _Operators(TorchDispatchMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.trace.last = self.trace.where
        out = func(*args, **(kwargs or {}))
        handler(self.trace, func, args, kwargs or {}, out)
        return out


class _Calls(TorchFunctionMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.trace.call = getattr(func, "__name__", ""), args, kwargs or {}
        out = func(*args, **(kwargs or {}))
        return calls.seen(self.trace, func, args, kwargs or {}, out)


class TraceError(Exception):
    """The forward pass failed; the message says where and how."""


def trace(model: nn.Module, example: Any) -> tuple[Trace, Any]:
    """Run `model` on `example`; (what was found, the outputs).  The model is a copy that nobody else uses.

    Raises:
        TraceError: the model does.
    """
    found = Trace(model)
    for tensor in tensors(example):
        found._axes[tensor] = [INPUT] * tensor.dim()
    with torch.no_grad(), plainly(), torch.random.fork_rng(devices=[]), ExitStack() as stack:
        for path, module in list(model.named_modules()):
            instrument(module, path, found)
            enter, leave = _hooks(found, path)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        try:
            out = _pass(found, model.eval(), example)
        except Exception as error:  # foreign code fails in any way it likes
            raise TraceError(f"{found.last or found.where} fails: {first_line(error)}") from error
        if any(t.is_weight and t.name not in found.used for t in targets(model)):
            try:
                _pass(found, model.train(), example)
            except Exception as error:
                found.untrained = f"{found.last or found.where} fails in training: {first_line(error)}"
            _follow(found, model)
    return found, out


def _pass(found: Trace, model: nn.Module, example: Any) -> Any:
    found.stack = [""]
    with _Calls(found), _Operators(found):
        out = forward(model, example)
    for tensor in tensors(main(out)):
        for axis in found.axes(tensor):
            found.labels.fix(axis, OUTPUT)
    return out


def _follow(found: Trace, model: nn.Module) -> None:
    """What was not used does as its like does: experts that no sample of the example met."""
    everything = targets(model, transient=True)
    shapes = {t.name: t.tensor.shape for t in everything if t.name in found.used}
    known = [(name, _NUMBER.split(name)) for name in shapes]
    for target in everything:
        own = _NUMBER.split(target.name)
        for name, other in known if target.name not in found.used else ():
            unlike = [i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b]
            # Splitting puts the numbers at the odd places.
            if len(own) == len(other) and len(unlike) == unlike[0] % 2 == 1 and shapes[name] == target.tensor.shape:
                found.like[target.name] = name
                for a, b in zip(found.parameters[target.name], found.parameters[name], strict=True):
                    found.labels.meet([a, b])
                break
    found.used |= found.like.keys()


def main(out: Any) -> Any:
    """What of a model's outputs must keep its shape: the logits, where they are named, else everything."""
    inner = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    return out if inner is None or isinstance(out, Tensor) else inner


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the parameters."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


@contextmanager
def plainly() -> Iterator[None]:
    """Attention as a sequence of plain operators."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _hooks(found: Trace, path: str) -> tuple[Any, Any]:
    def enter(*_: Any) -> None:
        found.stack.append(path)

    def leave(*_: Any) -> None:
        found.stack.pop()

    return enter, leave


def instrument(module: nn.Module, path: str, found: Trace) -> None:
    """Let the whole numbers among a module's attributes say where they come from."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    calls.mirror(found, module, path)
    if type(module).__module__.startswith("torch.nn") and not isinstance(module, (nn.Unflatten, nn.RNNBase)):
        return
    for name, value in list(vars(module).items()):
        if name.startswith("_"):
            continue
        if type(value) is int:
            vars(module)[name] = Size(value, (path, name, -1), found.numbers)
        elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
            made = [Size(v, (path, name, i), found.numbers) for i, v in enumerate(value)]
            vars(module)[name] = type(value)(made)
