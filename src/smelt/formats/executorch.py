"""ExecuTorch's `.pte` for its XNNPACK backend: int8 kernels with our scales, weights of 4 and 8 bits as stored."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx, nn

from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.formats._rounding import ADDS, Rules, lift, round_all
from smelt.formats._trace import trace
from smelt.formats._traced import CONVOLUTIONS, LAYERS, Traced, Weight, arguments, aten, quantized
from smelt.formats._xnnpack import plain
from smelt.grids.calibrated import RANGES

RULES = Rules(
    outputs=True,
    joins=(*ADDS, aten.cat.default, aten.mean.dim, aten.avg_pool2d.default),
    ties=(aten.cat.default,),
)
OF_WEIGHTS = (quantized.dequantize_per_channel.default, quantized.dequantize_per_channel_group.default)
GROUP = 32  # groups of 4-bit weights are multiples of so many


@dataclass(frozen=True)
class ExecuTorch(Export):
    """ExecuTorch program; it takes as many samples as the example has."""

    suffix: ClassVar[str] = ".pte"
    runtimes: ClassVar[tuple[str, ...]] = ("executorch",)
    needs: ClassVar[tuple[str, ...]] = ("executorch", "torchao")
    extra: ClassVar[str] = "executorch"

    activations: str = setting(
        "stored",
        "stored: rounded where the recipe does, at run time to the range of each batch in layers where it does not; "
        "static: everywhere that integer kernels need it, calibrated on data; dynamic: at run time in all layers",
        choices=("stored", "static", "dynamic"),
    )
    range: str = setting("minmax", "range of what is calibrated (activations: static)", choices=RANGES)

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        import executorch.kernels.quantized  # noqa: F401  registers the operators that take codes
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        traced = trace(model, given.inputs("to trace the model"), self.name)
        if self.activations == "dynamic":
            lift(traced)
        why = "to calibrate activations on (activations: static)"
        batches = given.calibration(why) if self.activations == "static" else None
        round_all(traced, RULES, traced.per_row, batches, self.range)
        _look_up(traced)
        _write_weights(traced)
        plain(traced)
        _copy_shared(traced)
        program = to_edge_transform_and_lower(
            traced.exported(),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        path.write_bytes(program.to_executorch().buffer)
        return [*traced.notes, traced.fixed()]


def _look_up(traced: Traced) -> None:
    """Embeddings of codes are looked up by a kernel of their own."""
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  declares it

    graph = traced.graph.graph
    for node in traced.nodes(aten.embedding.default):
        weight = traced.weights.get(traced.attribute(arguments(node)[0]) or "")
        if weight is None or not weight.fits(-128, 127) or len(weight.shape) != 2:
            continue
        grid = weight.grid
        with graph.inserting_before(node):
            codes = traced.constant(f"{weight.name}_table", grid.codes.to(torch.int8))
            scale = traced.constant(f"{weight.name}_table_scale", grid.scale.float())
            zero = traced.constant(f"{weight.name}_table_zero", grid.zero.float()) if bool(grid.zero.any()) else None
            looked = graph.call_function(
                quantized.embedding_byte.default, (codes, scale, zero, -128, 127, arguments(node)[1])
            )
        looked.meta = dict(node.meta)
        node.replace_all_uses_with(looked)
        graph.erase_node(node)
    traced.clean()


def _write_weights(traced: Traced) -> None:
    """Codes where XNNPACK has a kernel for the layer, dense values elsewhere."""
    kinds = {node: _kind(traced, node) for node in traced.nodes(*LAYERS)}
    left: list[str] = []

    def write(weight: Weight, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        if all(kinds.get(user, "") in ("rows", "rows at run time") for user in users):
            return _rows(traced, weight)
        if all(kinds.get(user, "") == "groups at run time" for user in users):
            return _groups(traced, weight)
        left.append(weight.name)
        return None

    for node, kind in kinds.items():
        if kind.endswith("at run time"):
            _at_run_time(traced, node)
    traced.render(write)
    if left:
        traced.notes.append(
            f"XNNPACK has no integer kernel for {', '.join(left)} as stored; written as dense values"
            " (activations=static with data gives convolutions one)"
        )


def _copy_shared(traced: Traced) -> None:
    """A dequantization for each who takes from it: XNNPACK's partitions join all that share one, which is a cycle where
    others lie between, as the layers of a residual block do between what enters it and its sum."""
    graph = traced.graph.graph
    for node in traced.nodes(quantized.dequantize_per_tensor.default, *OF_WEIGHTS):
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                own = graph.node_copy(node)
            user.replace_input_with(node, own)
    traced.graph.recompile()


def _kind(traced: Traced, node: fx.Node) -> str:
    """How XNNPACK can run a layer: 'rows' in static integers, '... at run time' on ranges of each batch, or ''."""
    weight = traced.weights.get(traced.attribute(arguments(node)[1]) or "")
    if weight is None:
        return ""
    rounded = (
        isinstance(arguments(node)[0], fx.Node) and arguments(node)[0].target is quantized.dequantize_per_tensor.default
    )
    if rounded:
        return "rows" if traced.per_row(node) and _leaves_rounded(node) else ""
    if not _dynamic_kernel(node):
        return ""
    if traced.per_row(node):
        return "rows at run time"
    blocks = weight.grid.run % GROUP == 0 and not bool(weight.grid.zero.any()) and weight.fits(-8, 7)
    return "groups at run time" if blocks and node.target is aten.linear.default else ""


def _leaves_rounded(node: fx.Node) -> bool:
    users = list(node.users)
    if len(users) == 1 and users[0].target in RULES.fused:
        users = list(users[0].users)
    return len(users) == 1 and users[0].target is quantized.quantize_per_tensor.default


def _dynamic_kernel(node: fx.Node) -> bool:
    """Linear layers, and convolutions over two dimensions that are not grouped."""
    if node.target in CONVOLUTIONS:
        groups = arguments(node)[6] if len(arguments(node)) > 6 else 1
        return node.target is aten.conv2d.default and groups == 1
    return True


def _at_run_time(traced: Traced, node: fx.Node) -> None:
    """Round what enters a layer to the range of each batch."""
    graph, x = traced.graph.graph, arguments(node)[0]
    limits = (-128, 127)
    with graph.inserting_before(node):
        found = graph.call_function(quantized.choose_qparams.tensor, (x, *limits, 1e-12, torch.int8))
        scale, zero = (graph.call_function(operator.getitem, (found, i)) for i in range(2))
        codes = graph.call_function(quantized.quantize_per_tensor.tensor, (x, scale, zero, *limits, torch.int8))
        back = graph.call_function(quantized.dequantize_per_tensor.tensor, (codes, scale, zero, *limits, torch.int8))
    node.args = (back, *arguments(node)[1:])


def _rows(traced: Traced, weight: Weight) -> fx.Node:
    grid = weight.grid
    codes = traced.constant(f"{weight.name}_codes", grid.codes.to(torch.int8).reshape(weight.shape))
    scale = traced.constant(f"{weight.name}_scale", grid.scale[:, 0].float())
    zero = traced.constant(f"{weight.name}_zero", torch.zeros(len(grid.codes), dtype=torch.int64))
    return traced.graph.graph.call_function(
        quantized.dequantize_per_channel.default, (codes, scale, zero, 0, -128, 127, torch.int8)
    )


def _groups(traced: Traced, weight: Weight) -> fx.Node:
    grid = weight.grid
    codes = traced.constant(f"{weight.name}_codes", grid.codes.to(torch.int8))
    scale = traced.constant(f"{weight.name}_scale", grid.scale.float())
    zero = traced.constant(f"{weight.name}_zero", torch.zeros_like(grid.scale, dtype=torch.int32))
    return traced.graph.graph.call_function(
        quantized.dequantize_per_channel_group.default,
        (codes, scale, zero, -8, 7, torch.int8, grid.run, torch.float32),
    )
