"""A module as an ONNX file: traced, its layers computed by their codes, written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from smelt.core.encoded import Encoded
from smelt.formats._onnx_graph import Graph, Notes
from smelt.formats._onnx_layers import Layer, Products, floats, layers
from smelt.formats._onnx_static import Grid, Static, grid_of, observed, pools
from smelt.formats._onnx_trace import DOMAIN, Traced, trace
from smelt.formats._onnx_weights import Decoder
from smelt.version import __version__

GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
LARGEST = 2_000_000_000  # bytes that one file holds; beyond, weights stand beside it

Marks = dict[tuple[ir.Node, int], "Grid | str"]


@dataclass(frozen=True)
class Wanted:
    """The settings of the format."""

    activations: str
    range: str
    dynamic: tuple[int, ...]
    level: int
    rest: str


def render(
    model: nn.Module,
    trees: Mapping[str, Encoded],
    dense: Mapping[str, Tensor],
    inputs: Any,
    batches: Sequence[Any],
    wanted: Wanted,
    path: Path,
) -> list[str]:
    """Write `model`, which is changed, to `path`; returns notes.

    Args:
        trees: name of a target -> what it is stored as.
        dense: name of a target -> its values.
        batches: inputs to calibrate on (activations: static).

    Raises:
        ModelError: torch cannot export the model.
    """
    notes = Notes()
    traced = trace(model, inputs, wanted.dynamic)
    graph = Graph(traced.model)
    marks = _marks(traced, graph, notes)
    if wanted.activations == "static":
        pools(graph)
    found = layers(traced.weights, trees)
    static = _static(graph, traced, found, marks, dense, batches, wanted)
    products = Products(graph, notes, wanted.level)
    for layer in found:
        _write(layer, static, products, marks.get((layer.node, 0)), wanted.activations, notes)
    for value, name in traced.weights.items():
        for node, index in value.uses():
            if node.op_type == "Gather" and index == 0:
                products.lookup(node, trees[name], name)
    graph.sweep()
    for name in floats(traced.weights, trees, Decoder(graph, notes, wanted.rest)):
        notes.add("computes in floats; its codes in the file are decoded when it is loaded", name)
    graph.sweep()
    graph.strip()
    traced.model.opset_imports.pop(DOMAIN, None)
    _save(traced.model, path)
    return notes.lines()


def _marks(traced: Traced, graph: Graph, notes: Notes) -> Marks:
    """Which inputs of nodes are rounded, and how; the nodes that said so are taken out."""
    found: Marks = {}
    for node in [n for n in graph.graph if n.domain == DOMAIN and n.op_type == "Grid"]:
        activation = traced.activations[node.attributes["index"].as_int()]
        grid, x = grid_of(activation), node.inputs[0]
        assert x is not None
        if grid is None:
            reason = f"{activation.codec.name} has no counterpart in ONNX; the {activation.at} is not rounded"
            notes.add(reason, activation.path)
        else:
            found.update({use: grid for use in node.outputs[0].uses() if use.node.domain != DOMAIN})
        graph.replace(node.outputs[0], x)
        graph.graph.remove(node, safe=True)
    return found


def _static(
    graph: Graph,
    traced: Traced,
    found: Sequence[Layer],
    marks: Marks,
    dense: Mapping[str, Tensor],
    batches: Sequence[Any],
    wanted: Wanted,
) -> Static | None:
    """Round what is to be rounded to fixed grids; None where nothing is."""
    known = {use: grid for use, grid in marks.items() if isinstance(grid, Grid)}
    if wanted.activations == "dynamic":
        return None
    stored: dict[ir.Value, Grid] = {}
    for (node, index), grid in known.items():
        value = node.inputs[index]
        assert value is not None
        stored.setdefault(value, grid)
    static = Static(graph, [layer for layer in found if layer.integer], stored)
    if wanted.activations == "static":
        missing = static.place()
        values = {str(value.name): dense[name] for value, name in traced.weights.items()}
        if missing:
            grids = observed(traced.model, missing, values, batches, wanted.range)
            static.grids.update(zip(missing, grids, strict=True))
    static.reads.update(known)
    static.write()
    return static


def _write(
    layer: Layer, static: Static | None, products: Products, mark: Grid | str | None, activations: str, notes: Notes
) -> None:
    """Let a layer compute with its codes, as far as these and what is known of its input allow it."""
    grid = mark if isinstance(mark, Grid) else None
    if static is not None and activations == "static" and layer.integer:
        if layer.node in static.ends or layer.node.op_type == "Gemm":
            static.kernel(layer)
        else:
            products.integers(layer, static.rounded(layer.x, static.taken(layer)))
    elif layer.kind == "conv":
        if mark == "dynamic":
            notes.add(
                "its input is not rounded, since ONNX Runtime has no fast convolution for a range of each batch",
                layer.name,
            )
        if layer.integer:
            notes.add("convolutions compute in floats; activations: static lets them compute in integers")
    elif static is not None and grid is not None and layer.integer:
        products.integers(layer, static.rounded(layer.x, grid))
    elif layer.integer and (
        mark == "dynamic" or (activations == "dynamic" and layer.codes is not None and layer.codes.bits > 4)
    ):
        products.integers(layer, None)
    elif products.blocks(layer) and products.level == 4:
        notes.add("inputs of linear layers are rounded to 8 bits, by block; with level: 1 they are not")


def _terse(graph: ir.Graph) -> None:
    """Short names inside and no shapes, which runtimes find by themselves: a twentieth of a small file."""
    kept = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    outputs = set(graph.outputs)
    if any(attribute.type in GRAPHS for node in graph for attribute in node.attributes.values()):
        return  # what is inside may go by any name
    names = (name for name in map(str, itertools.count()) if name not in kept)
    for node in graph:
        node.name = None
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None
                value.name = next(names) if value.name else value.name  # one that is left out has none


def _save(model: ir.Model, path: Path) -> None:
    _terse(model.graph)
    model.producer_name, model.producer_version = "smelt", __version__
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > LARGEST else None)
