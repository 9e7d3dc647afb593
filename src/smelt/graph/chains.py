"""Which layers feed which, with only functions between that keep neurons or channels apart.

    fc1 -> relu -> dropout -> fc2                  Link("fc1", "fc2", (relu, dropout))
    conv1 -> bn1 -> relu -> max_pool -> conv2      Link("conv1", "conv2", (bn1, relu, max_pool))
    conv2 -> relu -> flatten -> fc                 Link("conv2", "fc", (relu, flatten)): channel c is several columns

Only then does unit i of the producer meet the rest of the model in the columns i of the consumer and nowhere else.
Found by `torch.fx` tracing; where a module cannot be traced (its forward branches on data), its children are looked
at one by one, and the members of a plain `nn.Sequential` are taken to run one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, fx, nn

from smelt.core.target import targets
from smelt.graph.steps import CONVOLUTIONS, Step, asks_for_batch, counts_batch, hooked, of_module, of_node, pads

LAYERS = (nn.Linear, *CONVOLUTIONS)
GROUPED = "it is a grouped convolution"


@dataclass(frozen=True)
class Link:
    """Module paths of two layers, and what stands between them, in order.

    pads: the consumer lays its kernel over zeros beyond the borders.
    """

    producer: str
    consumer: str
    between: tuple[Step, ...]
    pads: bool = False

    @property
    def homogeneous(self) -> bool:
        """f(c x) = c f(x) for c > 0 holds for what stands between."""
        return all(step.homogeneous for step in self.between)

    def apply(self, x: Tensor) -> Tensor:
        """What the consumer sees where the producer gives `x`, with all of its units."""
        for step in self.between:
            x = step.apply(x.clone())
        return x


@torch.no_grad()
def chains(model: nn.Module) -> tuple[list[Link], dict[str, str]]:
    """(the links in the order of the model; path -> reason why each other layer or convolution is no producer)."""
    links: dict[str, Link] = {}
    reasons: dict[str, str] = {}
    tied = {path for t in targets(model) if len(t.places) > 1 for path, _ in t.places}
    for part in _parts(model, ""):
        for node in part.graph.nodes:
            if not part.layer(node):
                continue
            path = part.path(node)
            found = part.follow(node)
            within = (found.consumer, *(step.path for step in found.between)) if isinstance(found, Link) else ()
            if not tied.isdisjoint((path, *within)):
                found = "its weights are tied, or the layer is used under two names"
            if isinstance(found, Link):
                links.setdefault(path, found)
            else:
                reasons.setdefault(path, found)
    order = [path for path, _ in model.named_modules()]
    for path, module in model.named_modules():
        if type(module) in LAYERS and path not in links:
            grouped = getattr(module, "groups", 1) > 1
            reasons.setdefault(path, GROUPED if grouped else "its place in the model was not found by tracing")
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

    def layer(self, node: fx.Node) -> bool:
        """Whether a node calls a linear layer or a convolution that mixes all channels, or all of a group."""
        if node.op != "call_module" or type(module := self.module(node)) not in LAYERS:
            return False
        return not _depthwise(module)

    def path(self, node: fx.Node) -> str:
        return f"{self.prefix}{node.target}"

    def follow(self, producer: fx.Node) -> Link | str:
        """From a producer down to its consumer, or why there is none."""
        between: list[Step] = []
        module = self.module(producer)
        assert isinstance(module.weight, Tensor)
        units, convolves = module.weight.shape[0], type(module) is not nn.Linear
        node, reason, flat = producer, self.unfit(producer), False
        while not reason:
            users = [user for user in node.users if not asks_for_batch(user, node)]
            if len(users) != 1:
                return f"its output has {len(users)} users" if users else "its output is not used"
            before, node = node, users[0]
            if node.op == "output":
                return f"its output leaves {self.prefix[:-1]!r}" if self.prefix else "its output leaves the model"
            if self.layer(node):
                reason = self.unfit(node)
                if not reason and node.args != (before,):
                    reason = "is called in an unusual way"
                spatial = type(self.module(node)) is not nn.Linear
                if not reason and spatial != (convolves and not flat):
                    reason = "does not take the channels as such"
                if not reason:
                    return Link(self.path(producer), self.path(node), tuple(between), pads(self.module(node)))
                return f"its consumer {self.path(node)}: {reason}"
            step = self.step(node, before, units)
            spatial = step is not None and (step.kind in ("pool", "flatten") or step.name in ("conv1d", "conv2d"))
            if step is None or (spatial and not convolves) or (flat and step.kind != "elementwise"):
                name = self.path(node) if node.op == "call_module" else getattr(node.target, "__name__", node.target)
                return f"its output goes through {name}, which is not known to keep {units} units apart"
            between.append(step)
            flat = flat or step.kind == "flatten"
        return reason

    def unfit(self, node: fx.Node) -> str:
        module = self.module(node)
        if (count := self.calls[id(module)]) > 1:
            return f"the layer is used {count} times"
        if str(node.target) in self.read:
            return "its weights are also used outside the layer"
        if getattr(module, "groups", 1) > 1:
            return GROUPED
        return "a hook acts on it" if hooked(module) else ""

    def step(self, node: fx.Node, before: fx.Node, units: int) -> Step | None:
        """What a node does to each of the units of `before`, or None if it is not known to keep them apart."""
        if (
            not node.args
            or node.args[0] is not before
            or not all(n is before or counts_batch(n, before) for n in node.all_input_nodes)
        ):
            return None
        if node.op != "call_module":
            return of_node(node, before)
        module = self.module(node)
        alone = self.calls[id(module)] == 1 and str(node.target) not in self.read
        step = None if hooked(module) else of_module(module, self.path(node), units)
        return step if step is None or step.kind != "channelwise" or alone else None


def _depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1 and module.groups == module.in_channels == module.out_channels
