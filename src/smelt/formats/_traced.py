"""A model as a graph of ATen operations with its stored weights as whole codes: what runtimes' converters read.

    model  ->  graph (`_trace.py`)  ->  roundings of activations (`_rounding.py`)  ->  weights as codes and scales

Formats that convert such a graph (openvino, executorch, litert) differ in how a weight is written (`Traced.render`)
and in which activations their kernels want rounded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # declares quantized_decomposed
from torch import Tensor, fx, nn

from smelt.core.data import samples
from smelt.formats._affine import Grid

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
LAYERS = (*CONVOLUTIONS, aten.linear.default)


@dataclass(frozen=True)
class Rounding:
    """x is rounded to (q - zero) * scale with q in low..high, the codes of one byte."""

    scale: float
    zero: int
    low: int
    high: int

    def signed(self) -> Rounding:
        """The same levels with codes of int8."""
        move = 128 if self.high > 127 else 0
        return replace(self, zero=self.zero - move, low=self.low - move, high=self.high - move)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.high > 127 else torch.int8


@dataclass
class Weight:
    """A stored weight in the graph: its grid as a matrix [dimension 0, rest], and what its layer's scale absorbed."""

    name: str
    shape: torch.Size
    grid: Grid

    @property
    def per_row(self) -> bool:
        """Whether one scale for each index of dimension 0 says it all: symmetric, no groups."""
        columns = self.grid.codes.shape[1]
        return self.grid.run == columns and not bool(self.grid.zero.any())

    def dense(self) -> Tensor:
        """The values, in the shape of the weight."""
        grid = self.grid
        return ((grid.codes - grid.spread(grid.zero)) * grid.spread(grid.scale)).float().reshape(self.shape)

    def fits(self, low: int, high: int) -> bool:
        least, most = (int(n) for n in self.grid.codes.aminmax())
        return low <= least and most <= high


@dataclass
class Traced:
    """
    graph: what `torch.export` gives, as a module; operations of ATen and nothing else.
    weights: name of the graph's attribute -> the stored weight, of those that lie on an even grid.
    dynamic: names of the modules whose inputs are rounded to the range of each batch.
    rows: whether the graph takes any number of samples.
    """

    graph: fx.GraphModule
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    weights: dict[str, Weight] = field(default_factory=dict)
    dynamic: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    rows: bool = False

    def nodes(self, *kinds: Any) -> Iterator[fx.Node]:
        for node in list(self.graph.graph.nodes):
            if node.op == "call_function" and (not kinds or node.target in kinds):
                yield node

    def attribute(self, node: Any) -> str | None:
        """Name of the tensor of the model that a node is."""
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.graph.get_submodule(owner), leaf)
        return found

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A node that is a new buffer; to be called within `inserting_before`."""
        name = f"_smelt_{name.replace('.', '_')}"
        while hasattr(self.graph, name):
            name += "_"
        self.graph.register_buffer(name, value.flatten().clone().view(value.shape))  # no strides of expanded ones
        return self.graph.graph.get_attr(name)

    def render(self, write: Callable[[Weight, fx.Node], fx.Node | None]) -> None:
        """Let what `write` gives stand for the weights on a grid, each once; where it gives None they stay dense.

        write: gets the weight and the node that it is; nodes that it makes come before all who use that.
        """
        for node in list(self.graph.graph.nodes):
            weight = self.weights.get(self.attribute(node) or "")
            if weight is None or not node.users:
                continue
            users = list(node.users)
            with self.graph.graph.inserting_before(_first(users, self.graph.graph)):
                new = write(weight, node)
                if new is None:
                    self.weights.pop(str(node.target))
                    new = self.constant(f"{weight.name}_dense", weight.dense())
            for user in users:
                user.replace_input_with(node, new)
        self.clean()

    def clean(self) -> None:
        """Take out what nothing uses, nodes and tensors."""
        self.graph.graph.eliminate_dead_code()
        for node in list(self.graph.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.graph.erase_node(node)
        self.graph.delete_all_unused_submodules()
        used = {str(n.target) for n in self.graph.graph.nodes if n.op == "get_attr"}
        for path, module in list(self.graph.named_modules()):
            for kind in (module._parameters, module._buffers):
                for name in [n for n in kind if (f"{path}.{n}" if path else n) not in used]:
                    del kind[name]
        self.graph.recompile()

    def fixed(self) -> str:
        """A note on the number of samples, for formats that fix it."""
        count = samples(self.inputs or self.named)
        return f"the file takes {count} sample(s) at once, as the example does; other numbers need a file of their own"

    def exported(self) -> torch.export.ExportedProgram:
        """The graph as a program for inputs of exactly the example's shapes."""
        return program_of(self.graph, self.inputs, self.named, None)

    def per_row(self, layer: fx.Node) -> bool:
        """Whether a layer's weight is symmetric codes of a byte with one scale for each row, as int8 kernels want."""
        weight = self.weights.get(self.attribute(arguments(layer)[1]) or "")
        return weight is not None and weight.per_row and weight.fits(-128, 127)

    def where(self, node: fx.Node) -> str:
        """Path of the module in which a node runs, for messages."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack and stack[-1][0] else "the model"


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of an operation."""
    return node.args


def rounded(layer: fx.Node) -> bool:
    """Whether what enters a layer was rounded to a grid that is known."""
    entering = layer.args[0]
    return isinstance(entering, fx.Node) and entering.target is quantized.dequantize_per_tensor.default


def program_of(
    model: nn.Module, args: tuple[Any, ...], named: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, named or None, dynamic_shapes=shapes, strict=False)


def _first(nodes: Sequence[fx.Node], graph: fx.Graph) -> fx.Node:
    """The one that runs first."""
    found: fx.Node = next(node for node in graph.nodes if node in nodes)
    return found
