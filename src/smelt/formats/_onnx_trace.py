"""From a module to an ONNX graph in which what is stored stands as a node of its own.

    smelt::Weight(name)    a stored tensor
    smelt::Grid(x, index)  what passes the place of a codec for activations; `index` into the list that is returned

The optimizer of onnxscript cannot look into either, so that neither is folded away or merged with others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from smelt.core.data import describe
from smelt.core.errors import ModelError
from smelt.core.named import first_line
from smelt.core.store import Activation, store_of
from smelt.core.target import targets

OPSET = 21  # the first with 4-bit integers
DOMAIN = "smelt"
AXES = ("batch", "sequence")


@dataclass
class Traced:
    """model: the graph; weights: value of a Weight node -> name of what is stored; activations: by index of a Grid."""

    model: ir.Model
    weights: dict[ir.Value, str]
    activations: list[Activation]


def trace(model: nn.Module, inputs: Any, axes: Sequence[int]) -> Traced:
    """The graph of a model, which is changed: its codecs for activations are taken out.

    Args:
        inputs: of one batch.
        axes: of every input that may have any size, where the model allows it.

    Raises:
        ModelError: torch cannot export the model.
    """
    activations = list(store_of(model).activations)
    for index, activation in enumerate(activations):
        activation.remove()
        _mark(model, activation, index)
    for module in model.modules():
        if isinstance(module, nn.EmbeddingBag):
            _plain(module)
    graph = _exported(model, _doubled(inputs, axes), axes)
    weights = {}
    for target in targets(model):
        names = [f"{path}.{name}" if path else name for path, name in target.places]
        found = next((graph.graph.initializers[n] for n in names if n in graph.graph.initializers), None)
        if target.name in store_of(model).entries and found is not None:
            weights[_opaque(graph.graph, found)] = target.name
    graph.opset_imports[DOMAIN] = 1
    _forget_sizes(graph.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.optimize(graph)
    return Traced(graph, {v: n for v, n in weights.items() if v.uses()}, activations)


def _exported(model: nn.Module, inputs: Any, axes: Sequence[int]) -> ir.Model:
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}

    def free(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        return {axis: torch.export.Dim.AUTO for axis in axes if axis < x.dim()}

    shapes = {k: free(x) for k, x in kwargs.items()} if kwargs else tuple(free(x) for x in args)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own functions
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        what = f"{type(cause).__name__}: {first_line(cause)}"
        raise ModelError(
            f"torch cannot export the {type(model).__name__}, given {describe(inputs)}: {what}{_where(model, error)}"
        ) from error
    assert program is not None
    _name_axes(program.model, axes)
    return program.model


def _where(model: nn.Module, error: BaseException) -> str:
    """' (in layer1.0)' where the message of an error names a module of the model."""
    text = str(error)
    named = [path for path, _ in model.named_modules() if path and f"'{path}'" in text]
    return f" (in {max(named, key=len)})" if named else ""


def _doubled(inputs: Any, axes: Sequence[int]) -> Any:
    """A batch of one is taken twice, since torch fixes sizes of 1."""
    if 0 not in axes:
        return inputs
    if isinstance(inputs, Tensor):
        return torch.cat((inputs, inputs)) if inputs.dim() and len(inputs) == 1 else inputs
    if isinstance(inputs, Mapping):
        return {k: _doubled(x, axes) for k, x in inputs.items()}
    return tuple(_doubled(x, axes) for x in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _mark(model: nn.Module, activation: Activation, index: int) -> None:
    """Let what passes a place pass a Grid node."""
    module = model.get_submodule(activation.path)

    def marked(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Grid", (x,), {"index": index}, dtype=x.dtype, shape=x.shape, version=1
        )

    if activation.at == "input":
        module.register_forward_pre_hook(lambda _, args: (marked(args[0]), *args[1:]))
    else:
        module.register_forward_hook(lambda _, args, out: marked(out))


def _plain(module: nn.EmbeddingBag) -> None:
    """Bags of equal lengths are a lookup and a reduction; as torch exports them they are a loop."""
    original = module.forward
    reduce: Any = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[module.mode]

    def forward(indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if indices.dim() != 2 or per_sample_weights is not None or module.padding_idx is not None:
            return original(indices, offsets, per_sample_weights)
        found: Tensor = reduce(nn.functional.embedding(indices, module.weight), 1)
        return found

    module.forward = forward  # type: ignore[method-assign, assignment]


def _opaque(graph: ir.Graph, initializer: ir.Value) -> ir.Value:
    name = initializer.name
    assert name is not None
    del graph.initializers[name]
    value = ir.Value(name=name, shape=initializer.shape, type=initializer.type)
    node = ir.node("Weight", [], {"name": name}, domain=DOMAIN, outputs=[value])  # else two would be taken for one
    graph.insert_before(graph[0], node)
    ir.convenience.replace_all_uses_with(initializer, value)
    return value


def _name_axes(model: ir.Model, axes: Sequence[int]) -> None:
    """Call the free axes 'batch', 'sequence', 'axis2', ... wherever they occur."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis in axes:
            if value.shape is not None and axis < len(value.shape):
                size = value.shape[axis]
                if isinstance(size, ir.SymbolicDim) and size.value is not None:
                    names.setdefault(str(size.value), AXES[axis] if axis < len(AXES) else f"axis{axis}")
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        if value.shape is not None and not value.shape.frozen:
            for axis, size in enumerate(value.shape):
                if isinstance(size, ir.SymbolicDim) and str(size.value) in names:
                    value.shape[axis] = names[str(size.value)]


def _forget_sizes(graph: ir.Graph) -> None:
    """Behind recurrent layers torch takes the length of the example for that of every sequence."""
    behind = {v for node in graph if node.op_type in ("LSTM", "GRU", "RNN") for v in node.outputs}
    for node in graph:
        if any(x in behind for x in node.inputs):
            behind.update(node.outputs)
    for value in behind - set(graph.outputs):
        value.shape = None
