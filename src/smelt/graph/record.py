"""What one forward pass did: which functions made which tensors of which, and which module ran when.

It is recorded while the model runs, so it needs an example, and any Python that a forward pass consists of is fine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smelt.core.data import evaluating, forward_or_raise, tensors

ADD = ("add", "__add__", "__radd__", "__iadd__", "add_")
# Functions through which what a tensor holds goes on, though scaled, bent or reshaped.
_CARRY = (
    *ADD,
    *("sub", "sub_", "__sub__", "__isub__", "relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "elu"),
    *("dropout", "layer_norm", "batch_norm", "group_norm", "rms_norm", "instance_norm"),
    *("to", "float", "half", "bfloat16", "type", "contiguous", "clone", "view", "reshape", "permute", "transpose"),
    *("flatten", "unflatten", "squeeze", "unsqueeze", "__getitem__", "roll"),
)
# The same, but for products of two tensors that functions made, as in gates.
_SCALE = ("mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "__truediv__")

Token = tuple[int, int]
"""A tensor as it was between two changes in place."""


@dataclass(frozen=True)
class Event:
    """One function: what it read and made."""

    name: str
    reads: tuple[Token, ...]
    makes: tuple[Token, ...]


@dataclass
class Call:
    """One call of a module: its events are those from `begin` to before `end`.

    x, y: its first argument and the first tensor that it returned, where these are floating tensors.
    same: whether these have one shape and dtype.
    argument: the name of the first argument, if it was called by keywords only, else ''.
    returns: 'x' for a tensor; for a tuple a list with 'x' at the first tensor and None elsewhere; '' for others.
    plain: called with one positional tensor and nothing else, and returned a tensor.
    """

    path: str
    module: nn.Module
    begin: int
    end: int = -1
    x: Token | None = None
    y: Token | None = None
    same: bool = False
    argument: str = ""
    returns: Any = ""
    plain: bool = False


class Record(TorchFunctionMode):
    """One forward pass; see `record`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.calls: list[Call] = []
        self.outputs: set[Token] = set()
        self._open: list[tuple[Call, Tensor | None]] = []
        self._alive: list[Any] = []  # so that no id is given twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = tuple(self.token(t) for t in tensors((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        makes = tuple(self.token(t) for t in tensors(result))
        if makes and makes != reads[:1]:
            self.events.append(Event(getattr(func, "__name__", ""), reads, makes))
        return result

    def token(self, tensor: Tensor) -> Token:
        self._alive.append(tensor)
        return id(tensor), tensor._version

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch._C.DisableTorchFunction():
            call = Call(path, module, len(self.events))
            name, first = ("", args[0]) if args else next(iter(kwargs.items()), ("", None))
            x = first if isinstance(first, Tensor) and first.is_floating_point() else None
            if x is not None:
                call.x, call.argument, call.plain = self.token(x), name, len(args) == 1 and not kwargs
            self._open.append((call, x))
            self.calls.append(call)

    def leave(self, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            call, x = self._open.pop()
            call.end = len(self.events)
            several = type(output) in (tuple, list)
            found = [t if isinstance(t, Tensor) and t.is_floating_point() else None for t in output] if several else []
            y = next((t for t in found if t is not None), None) if several else output
            if isinstance(y, Tensor) and y.is_floating_point():
                call.y = self.token(y)
                call.returns = ["x" if t is y else None for t in found] if several else "x"
                call.same = x is not None and x.shape == y.shape and x.dtype == y.dtype
            call.plain &= not several

    def carries(self, source: Token, goal: Token, begin: int = 0, end: int | None = None) -> bool:
        """Whether `source` goes on to `goal` past all layers: through additions, norms, activations, views."""
        reached = {source}
        for event in self.events[begin:end]:
            if reached.isdisjoint(event.reads):
                continue
            scales = event.name in _SCALE and sum(token in self.made for token in event.reads) == 1
            if scales or event.name in _CARRY:
                reached.update(event.makes)
        return goal in reached

    @cached_property
    def made(self) -> set[Token]:
        """What functions made: neither parameters nor inputs."""
        return {token for event in self.events for token in event.makes}

    def single(self) -> Iterator[Call]:
        """Calls of modules that ran once."""
        ran = [id(call.module) for call in self.calls]
        return (call for call in self.calls if ran.count(id(call.module)) == 1 and call.end >= 0)


@torch.no_grad()
def record(model: nn.Module, inputs: Any) -> Record:
    """Run the model once, in evaluation mode.  Raises ModelError where it fails."""
    made = Record()
    with evaluating(model), ExitStack() as hooks:
        for path, module in model.named_modules():

            def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                made.enter(path, module, args, kwargs)

            def after(module: nn.Module, args: Any, output: Any) -> None:
                made.leave(output)

            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        with made:
            result = forward_or_raise(model, inputs, "while its forward pass is looked at")
    made.outputs = {made.token(t) for t in tensors(result)}
    return made


@dataclass(frozen=True)
class Branch:
    """f in x + f(x).

    last: the call that returns f(x), which is read by the addition and nothing else.
    inner: the other outermost calls that work for it alone.
    """

    last: Call
    inner: tuple[Call, ...]


def branches(made: Record, calls: Sequence[Call]) -> list[Branch]:
    """The residual branches whose last layer is a module, in order; only `calls` can be part of one."""
    users: dict[Token, set[int]] = {}
    for i, event in enumerate(made.events):
        for token in event.reads:
            users.setdefault(token, set()).add(i)
    ends = {call.y: call for call in reversed(calls) if call.y is not None}  # the outermost is entered first
    activations = made.made | {call.x for call in made.calls if call.x is not None}
    found: list[Branch] = []
    for i, event in enumerate(made.events):
        if event.name not in ADD or len(set(event.reads)) != 2:
            continue
        for skip, token in (event.reads[:2], event.reads[1::-1]):
            last = ends.get(token)
            if last is None or users.get(token) != {i} or token in made.outputs:
                continue
            own, reads = _works_for(made, users, token, i)
            if not any(made.carries(source, skip) for source in reads & activations):
                continue
            inside = [c for c in calls if c.end > c.begin and own.issuperset(range(c.begin, c.end))]
            top = [c for c in inside if not any(c.path.startswith(f"{d.path}.") for d in inside)]
            if last in top:
                found.append(Branch(last, tuple(c for c in top if c is not last)))
                break
    return found


def _works_for(made: Record, users: dict[Token, set[int]], token: Token, at: int) -> tuple[set[int], set[Token]]:
    """Events that matter to nothing but `token`, and what they read that others made."""
    own: set[int] = set()
    reads: set[Token] = set()
    results: set[Token] = set()
    for i in range(at - 1, -1, -1):
        makes = made.events[i].makes
        if all(t == token or (users.get(t, set()) <= own and t not in made.outputs) for t in makes):
            own.add(i)
            if any(t == token or users.get(t) for t in makes):  # else nobody reads it, as what only Python looks at
                reads.update(made.events[i].reads)
                results.update(makes)
    return own, reads - results
