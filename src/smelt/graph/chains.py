"""Which linear layers feed which, through elementwise functions only.

    fc1 -> relu -> dropout -> fc2        Link("fc1", "fc2", (relu, dropout))

Only then does neuron i of the producer meet the rest of the model in column i of the consumer and nowhere else.
Found by `torch.fx` tracing; where a module cannot be traced (its forward branches on data), its children are looked
at one by one, and the members of a plain `nn.Sequential` are taken to run one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from smelt.core.target import targets

# f(c x) = c f(x) for every c > 0.
HOMOGENEOUS = ("relu", "leakyrelu", "prelu", "identity", "dropout")
_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink),
    *(nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Threshold, nn.Identity, nn.Dropout),
)
_NAMES = (
    *("relu", "leaky_relu", "relu6", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "sigmoid", "logsigmoid"),
    *("hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign"),
    *("threshold", "dropout"),
)
_FUNCTIONS: dict[Any, str] = {
    getattr(home, written): name.replace("_", "")
    for name in _NAMES
    for home in (torch, functional)
    for written in (name, f"{name}_")
    if hasattr(home, written)
}
_METHODS = ("relu", "tanh", "sigmoid", "contiguous", "clone")


@dataclass(frozen=True)
class Elementwise:
    """One function applied to every element alike, as in evaluation mode; `name` such as 'relu'."""

    name: str
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Link:
    """Module paths of two linear layers, and what stands between them, in order."""

    producer: str
    consumer: str
    between: tuple[Elementwise, ...]

    @property
    def homogeneous(self) -> bool:
        """f(c x) = c f(x) for c > 0 holds for what stands between."""
        return all(step.name in HOMOGENEOUS for step in self.between)

    def apply(self, x: Tensor) -> Tensor:
        """What the consumer sees where the producer gives `x` (any shape)."""
        for step in self.between:
            x = step.apply(x.clone())
        return x


@torch.no_grad()
def chains(model: nn.Module) -> tuple[list[Link], dict[str, str]]:
    """(the links in the order of the model, why each other linear layer is no producer: path -> reason)."""
    links: dict[str, Link] = {}
    reasons: dict[str, str] = {}
    tied = {path for t in targets(model) if len(t.places) > 1 for path, _ in t.places}
    for part in _parts(model, ""):
        for node in part.graph.nodes:
            if not part.linear(node):
                continue
            path = part.path(node)
            found = part.follow(node)
            if path in tied or (isinstance(found, Link) and found.consumer in tied):
                found = "its weights are tied, or the layer is used under two names"
            if isinstance(found, Link):
                links.setdefault(path, found)
            else:
                reasons.setdefault(path, found)
    order = [path for path, _ in model.named_modules()]
    for path, module in model.named_modules():
        if type(module) is nn.Linear and path not in links:
            reasons.setdefault(path, "its place in the model was not found by tracing")
    reasons = {path: reason for path, reason in reasons.items() if path not in links}
    return sorted(links.values(), key=lambda link: order.index(link.producer)), reasons


class _Tracer(fx.Tracer):
    """With `flat`, the direct children of the root are not looked into."""

    def __init__(self, flat: bool):
        super().__init__()
        self.flat = flat

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.flat or super().is_leaf_module(m, module_qualified_name)


def _parts(module: nn.Module, prefix: str) -> Iterator[_Part]:
    """The largest parts that can be traced."""
    try:
        # Left out, an optional argument would be traced as if it were given.
        options = {n: p.default for n, p in signature(module.forward).parameters.items() if p.default is not p.empty}
        yield _Part(_Tracer(flat=False).trace(module, options), module, prefix)
        return
    except Exception:  # tracing runs foreign code, which fails in any way it likes
        if type(module) is nn.Sequential:
            yield _Part(_Tracer(flat=True).trace(module), module, prefix)
    for name, child in module.named_children():
        yield from _parts(child, f"{prefix}{name}.")


class _Part:
    """A traced module; `prefix` leads from the model to it."""

    def __init__(self, graph: fx.Graph, root: nn.Module, prefix: str):
        self.graph, self.root, self.prefix = graph, root, prefix
        self.calls = Counter(id(self.module(node)) for node in graph.nodes if node.op == "call_module")
        self.read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def linear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.module(node)) is nn.Linear

    def path(self, node: fx.Node) -> str:
        return f"{self.prefix}{node.target}"

    def follow(self, producer: fx.Node) -> Link | str:
        """From a producer down to its consumer, or why there is none."""
        between: list[Elementwise] = []
        node, reason = producer, self.unfit(producer)
        while not reason:
            users = list(node.users)
            if len(users) != 1:
                return f"its output has {len(users)} users" if users else "its output is not used"
            before, node = node, users[0]
            if node.op == "output":
                return f"its output leaves {self.prefix[:-1]!r}" if self.prefix else "its output leaves the model"
            if self.linear(node):
                reason = self.unfit(node)
                if not reason and node.args == (before,):
                    return Link(self.path(producer), self.path(node), tuple(between))
                return f"its consumer {self.path(node)}: {reason or 'is called in an unusual way'}"
            step = self.elementwise(node, before)
            if step is None:
                name = self.path(node) if node.op == "call_module" else getattr(node.target, "__name__", node.target)
                return f"its output goes through {name}, which is not known to act on each element alone"
            between.append(step)
        return reason

    def unfit(self, node: fx.Node) -> str:
        module = self.module(node)
        if (count := self.calls[id(module)]) > 1:
            return f"the layer is used {count} times"
        if str(node.target) in self.read:
            return "its weights are also used outside the layer"
        return "a hook acts on it" if _hooked(module) else ""

    def elementwise(self, node: fx.Node, before: fx.Node) -> Elementwise | None:
        """The function that a node applies to `before`, or None if it is not known to be elementwise."""
        if not node.args or node.args[0] is not before or node.all_input_nodes != [before]:
            return None
        if node.op == "call_module":
            module = self.module(node)
            several = isinstance(module, nn.PReLU) and module.weight.numel() > 1
            if type(module) not in _MODULES or several or _hooked(module):
                return None
            name = type(module).__name__.lower()
            return Elementwise(name, _same if name == "dropout" else module)
        rest, options = node.args[1:], dict(node.kwargs)
        if node.op == "call_method" and (name := str(node.target).rstrip("_")) in _METHODS:
            same = name in ("contiguous", "clone")
            return Elementwise(
                "identity" if same else name, _same if same else lambda x: getattr(x, name)(*rest, **options)
            )
        if node.op == "call_function" and node.target in _FUNCTIONS:
            function, name = cast("Callable[..., Tensor]", node.target), _FUNCTIONS[node.target]
            return Elementwise(name, _same if name == "dropout" else lambda x: function(x, *rest, **options))
        return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _same(x: Tensor) -> Tensor:
    return x
