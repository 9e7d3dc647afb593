"""Where a traced graph is rounded besides its weights, so that a runtime's integer kernels can run it.

What a recipe stored at activations stands in the graph already (`_traced.py`).  Kernels want more: the sums of
residual connections, what pooling gives, what leaves a layer.  Those grids are calibrated here, on the graph itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from smelt.core import shelf
from smelt.core.data import samples
from smelt.core.errors import DataError
from smelt.core.statistic import Statistic
from smelt.formats._traced import LAYERS, Rounding, Traced, arguments, aten, quantized
from smelt.grids import calibrated, uniform

CLAMPS = (
    *(aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default),
    *(aten.hardtanh.default, aten.hardtanh_.default),
)
MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.max_pool2d.default,
    aten.max_pool1d.default,
)
ADDS = (aten.add.Tensor, aten.add_.Tensor)


@dataclass(frozen=True)
class Rules:
    """What the integer kernels of a runtime are like.

    outputs: whether they give codes, so that what leaves them is rounded; else only what enters them.
    centred: whether kernels are faster where the code of 0 is 0: codes are then signed where there are negative values.
    products: operations on two activations that have one.
    joins: operations that have one, used where everything that enters comes from such kernels.
    ties: those of the joins whose inputs and output lie on one grid.
    moves: operations that keep values on their grid.
    fused: what runs inside the kernel before it.
    fixed: operations whose output lies on a grid that the runtime prescribes.
    """

    outputs: bool
    centred: bool = False
    products: tuple[Any, ...] = ()
    joins: tuple[Any, ...] = ADDS
    ties: tuple[Any, ...] = ()
    moves: tuple[Any, ...] = MOVES
    fused: tuple[Any, ...] = CLAMPS
    fixed: Mapping[Any, Rounding] = field(default_factory=dict)


def lift(traced: Traced) -> dict[fx.Node, Rounding]:
    """Take the roundings that are stored out of the graph; returns the node that each rounds."""
    found: dict[fx.Node, Rounding] = {}
    for node in traced.nodes(quantized.dequantize_per_tensor.default):
        codes = arguments(node)[0]
        _, scale, zero, low, high, _ = arguments(node)
        source = arguments(codes)[0]
        found.setdefault(source, Rounding(scale, zero, low, high))
        node.replace_all_uses_with(source)
        traced.graph.graph.erase_node(node)
        if not codes.users:
            traced.graph.graph.erase_node(codes)
    return found


def ends(node: fx.Node, rules: Rules) -> fx.Node:
    """What an operation gives: itself, or what runs inside its kernel after it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in rules.fused else node


class Plan:
    """The tensors to round, found in one pass along the graph.

    integer: whether a layer's weight is written in codes that an integer kernel takes.
    """

    def __init__(self, traced: Traced, rules: Rules, integer: Callable[[fx.Node], bool]):
        self.traced, self.rules = traced, rules
        self.wanted: dict[fx.Node, set[fx.Node] | None] = {}  # tensor -> who wants it rounded; None: everyone
        self.leader: dict[fx.Node, fx.Node] = {}  # tensors that share a grid
        self.born: set[fx.Node] = set()
        for node in traced.nodes():
            if node.target in LAYERS and integer(node):
                self._kernel(node, [arguments(node)[0]])
            elif node.target in rules.products and all(isinstance(a, fx.Node) for a in arguments(node)[:2]):
                self._kernel(node, list(arguments(node)[:2]))
            elif node.target in rules.moves and arguments(node)[0] in self.born:
                self.born.add(node)
            elif node.target in rules.joins:
                self._join(node)

    def _kernel(self, node: fx.Node, inputs: Sequence[Any]) -> None:
        for x in inputs:
            self._want(x, node)
        self._gives(node)

    def _gives(self, node: fx.Node) -> None:
        out = ends(node, self.rules)
        self.born |= {node, out}
        if self.rules.outputs:
            self.wanted[out] = None

    def _join(self, node: fx.Node) -> None:
        first = arguments(node)[0]
        inputs = (
            list(first)
            if isinstance(first, (list, tuple))
            else [a for a in arguments(node)[:2] if isinstance(a, fx.Node)]
        )
        if not inputs or not all(x in self.born for x in inputs):
            return
        fused = None
        if not self.rules.outputs and node.target in ADDS:  # the kernel that runs last adds the other to what it gives
            order = {n: i for i, n in enumerate(self.traced.graph.graph.nodes)}
            alone = [x for x in inputs if x.target in LAYERS and len(x.users) == 1]
            fused = max(alone, key=lambda n: order[n], default=None)
        for x in inputs:
            if x is not fused:
                self._want(x, node)
        self._gives(node)
        if node.target in self.rules.ties:
            for x in inputs:
                self._tie(self._root(x), ends(node, self.rules))

    def _root(self, x: fx.Node) -> fx.Node:
        while x.target in self.rules.moves and isinstance(arguments(x)[0], fx.Node):
            x = arguments(x)[0]
        return x

    def _want(self, x: fx.Node, user: fx.Node) -> None:
        """Round what `x` comes from, before it is only moved; where kernels give codes, after each move, too."""
        while x.target in self.rules.moves and isinstance(source := arguments(x)[0], fx.Node):
            self._tie(source, x)
            if self.rules.outputs:
                self._add(x, user)
            x, user = source, x
        self._add(x, user)

    def _add(self, x: fx.Node, user: fx.Node) -> None:
        value = x.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            return
        users = self.wanted.setdefault(x, set())
        if users is not None:
            users.add(user)

    def find(self, x: fx.Node) -> fx.Node:
        while self.leader.get(x, x) is not x:
            x = self.leader[x]
        return x

    def _tie(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self.find(a), self.find(b)
        if a is not b:
            self.leader[b] = a

    def grids(
        self, stored: Mapping[fx.Node, Rounding], batches: Iterable[Any] | None, kind: str
    ) -> dict[fx.Node, Rounding] | None:
        """The grid of every tensor to round: as stored, as the runtime prescribes, or calibrated on batches.

        None: without batches, where one of them is not known.

        Raises DataError: no batch can be used.
        """
        known: dict[fx.Node, Rounding] = {}
        for node, rounding in stored.items():
            known.setdefault(self.find(node), rounding)
        for node in self.wanted:
            if (fixed := self.rules.fixed.get(node.target)) is not None:
                known[self.find(node)] = fixed
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.wanted:
            if self.find(node) not in known:
                groups.setdefault(self.find(node), []).append(node)
        if groups and batches is None:
            return None
        known |= calibrate(self.traced, groups, batches or (), kind, self.rules.centred)
        return {node: known[self.find(node)] for node in self.wanted}


def round_all(
    traced: Traced, rules: Rules, integer: Callable[[fx.Node], bool], batches: Iterable[Any] | None, kind: str
) -> bool:
    """Round whatever the kernels of layers in integers want, on the grids that are stored and those calibrated on
    batches; without batches only if all of it is stored.  Whether anything is rounded now: else what is stored is taken
    out.

    integer: whether a layer's weight is one for an integer kernel.
    """
    stored = lift(traced)
    if batches is None and not stored:
        return False
    plan = Plan(traced, rules, integer)
    grids = plan.grids(stored, batches, kind)
    if grids is None:
        traced.notes.append(
            "the recipe stores grids where layers begin, and the kernels need some where they end, too: rounded to "
            "ranges found at run time instead; activations=static with data calibrates what is missing"
        )
        return False
    insert(traced, plan.wanted, {node: grid.signed() for node, grid in grids.items()} if rules.outputs else grids)
    return bool(grids)


def insert(traced: Traced, wanted: Mapping[fx.Node, set[fx.Node] | None], grids: Mapping[fx.Node, Rounding]) -> None:
    """Round these tensors on these grids, for those who want it."""
    graph = traced.graph.graph
    for node, users in wanted.items():
        r = grids[node]
        with graph.inserting_after(_after(node)):
            codes = graph.call_function(
                quantized.quantize_per_tensor.default, (node, r.scale, r.zero, r.low, r.high, r.dtype)
            )
        with graph.inserting_after(codes):
            back = graph.call_function(
                quantized.dequantize_per_tensor.default, (codes, r.scale, r.zero, r.low, r.high, r.dtype)
            )
        codes.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
        back.meta = {**codes.meta, **({"val": node.meta["val"]} if "val" in node.meta else {})}
        for user in list(node.users) if users is None else users:
            if user is not codes:
                user.replace_input_with(node, back)
    traced.graph.recompile()


def _after(node: fx.Node) -> fx.Node:
    """Where something that uses `node` may be put: not between the graph's inputs."""
    while node.next.op in ("placeholder", "get_attr"):
        node = node.next
    return node


class _Watch(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, groups: Mapping[fx.Node, Sequence[fx.Node]], name: str):
        super().__init__(graph)
        cls = shelf.load("statistics", name, Statistic)
        self.found = {leader: cls(nn.Identity()) for leader in groups}
        self.of = {member: leader for leader, members in groups.items() for member in members}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.of:
            self.found[self.of[n]].update(value.detach())
        return value


def calibrate(
    traced: Traced, groups: Mapping[fx.Node, Sequence[fx.Node]], batches: Iterable[Any], kind: str, centred: bool
) -> dict[fx.Node, Rounding]:
    """The grid of each group of tensors, of 8 bits with 0 among the levels, from what passes there in some batches."""
    if not groups:
        return {}
    watch = _Watch(traced.graph, groups, calibrated.statistic(kind, False))
    seen = 0
    with torch.no_grad():
        for inputs in batches:
            given = _as_traced(traced, inputs)
            if given is not None:
                watch.run(*given)
                seen += 1
    if not seen:
        count = samples(traced.inputs or traced.named)
        raise DataError(f"no batch has the {count} samples that the model was traced with")
    return {leader: _grid(statistic.result(), kind, centred) for leader, statistic in watch.found.items()}


def _grid(gathered: Any, kind: str, centred: bool) -> Rounding:
    settings: dict[str, Any] = {"bits": 8, "symmetric": False, "whole": True}
    low, high = calibrated.calibrated(gathered, kind, False, percentile=99.99, **settings)
    if centred and float(low) < 0:
        settings["symmetric"] = True
        low, high = calibrated.calibrated(gathered, kind, False, percentile=99.99, **settings)
    scale, zero = uniform.steps(low.reshape(1), high.reshape(1), **settings)
    step = max(float(scale), torch.finfo(torch.float32).tiny)
    return Rounding(step, 0, -128, 127) if zero is None else Rounding(step, int(zero), 0, 255)


def _as_traced(traced: Traced, inputs: Any) -> list[Any] | None:
    """The inputs of a batch in the order of the graph, with as many samples as it takes; None: there are too few."""
    if isinstance(inputs, Mapping):
        flat = [inputs[name] for name in traced.named]
    else:
        flat = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    if traced.rows:
        return flat
    count = samples(traced.inputs or traced.named)
    if samples(flat) < count:
        return None
    return [x[:count] if isinstance(x, Tensor) and x.dim() else x for x in flat]
