"""What every runtime runs faster, or runs at all: batch norms folded into scales, bags as sums of embeddings."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from smelt.core.errors import ModelError
from smelt.formats._traced import LAYERS, Traced, arguments, aten


def plain_bags(traced: Traced) -> None:
    """Bags of equal lengths become the sum, mean or maximum of embeddings, which every runtime has."""
    graph = traced.graph.graph
    for node in traced.nodes(aten.embedding_bag.padding_idx, aten.embedding_bag.default):
        weight, flat, offsets, *rest = arguments(node)
        mode, weights = (rest[1] if len(rest) > 1 else 0), (rest[3] if len(rest) > 3 else None)
        plain = (
            isinstance(flat, fx.Node)
            and flat.target is aten.reshape.default
            and isinstance(offsets, fx.Node)
            and offsets.target is aten.arange.start_step
            and weights is None
            and (len(rest) < 6 or rest[5] is None)
            and all(arguments(user)[1] == 0 or not user.users for user in node.users)
        )
        if not plain:
            raise ModelError(
                f"{traced.where(node)} is an embedding bag with bags of different lengths or weights; "
                "only rows of indices [samples, length] can be written"
            )
        assert isinstance(flat, fx.Node)
        with graph.inserting_before(node):
            looked = graph.call_function(aten.embedding.default, (weight, arguments(flat)[0]))
            kind = {0: aten.sum.dim_IntList, 1: aten.mean.dim, 2: aten.amax.default}[mode]
            pooled = graph.call_function(kind, (looked, [1]))
            looked.meta = pooled.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
        for user in list(node.users):
            if arguments(user)[1] == 0:
                user.replace_all_uses_with(pooled)
            graph.erase_node(user)
        graph.erase_node(node)


def fold_norms(traced: Traced) -> None:
    """Batch norms go into the scales (or the values) of the convolution or linear layer before them, and its bias."""
    graph = traced.graph.graph
    for node in traced.nodes(aten.batch_norm.default):
        layer, gamma, beta, mean, var, training, _, eps = arguments(node)[:8]
        if training or not isinstance(layer, fx.Node) or layer.target not in LAYERS or len(layer.users) > 1:
            continue
        name = traced.attribute(arguments(layer)[1])
        bias = arguments(layer)[2] if len(arguments(layer)) > 2 else None
        shared = isinstance(arguments(layer)[1], fx.Node) and len(arguments(layer)[1].users) > 1
        if name is None or shared or (bias is not None and traced.attribute(bias) is None):
            continue
        ones = torch.ones_like(traced.tensor(str(mean.target)))
        gain = (ones if gamma is None else traced.tensor(str(gamma.target)).detach()) / torch.sqrt(
            traced.tensor(str(var.target)) + eps
        )
        if not _scaled(traced, name, gain):
            traced.notes.append(f"{name}: the batch norm behind it stays; fold it before the step that stores")
            continue
        shift = (0 if bias is None else traced.tensor(str(bias.target)).detach()) - traced.tensor(str(mean.target))
        shift = shift * gain + (0 if beta is None else traced.tensor(str(beta.target)).detach())
        with graph.inserting_before(layer):
            new = traced.constant(f"{name}_bias", shift)
            weight = arguments(layer)[1]
            if name not in traced.weights:
                dense = traced.tensor(name).detach()
                weight = traced.constant(name, dense * gain.reshape(-1, *[1] * (dense.dim() - 1)))
        layer.args = (arguments(layer)[0], weight, new, *arguments(layer)[3:])
        node.replace_all_uses_with(layer)
        graph.erase_node(node)


def _scaled(traced: Traced, name: str, gain: Tensor) -> bool:
    """Multiply the rows of a stored weight by scaling its scales; negative factors turn the codes around."""
    weight = traced.weights.get(name)
    if weight is None:
        return True
    grid, negative = weight.grid, gain < 0
    codes, zero = grid.codes, grid.zero
    if bool(negative.any()):
        codes = torch.where(negative[:, None], -codes, codes)
        zero = torch.where(negative[:, None], -zero, zero)
        if bool((codes[negative] < -127).any()) or not grid.symmetric:
            return False
    if bool((gain == 0).any()):
        return False
    scale = grid.scale * gain.abs()[:, None]
    traced.weights[name] = replace(weight, grid=replace(grid, codes=codes, scale=scale, zero=zero))
    return True
