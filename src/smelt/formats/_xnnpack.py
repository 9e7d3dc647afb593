"""Operations of a graph written as those that XNNPACK runs; all others run in slow kernels outside of it."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from smelt.formats._traced import Traced, arguments, aten

SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
FAR = -1e9  # to a score that counts for nothing; minus infinity needs a case of its own where a row holds nothing else


def plain(traced: Traced) -> None:
    """Products of batches, attention, and pieces of tensors; it is traced once more when it becomes a program."""
    for node in traced.nodes(aten.scaled_dot_product_attention.default):
        _attention(traced, node)
    for node in traced.nodes(aten.matmul.default):
        if all(isinstance(x, fx.Node) for x in arguments(node)) and _batches(*arguments(node)):
            _exchange(traced, node, product, arguments(node))
    for node in traced.nodes(aten.unbind.int, *SPLITS):
        _split(traced, node)
    for node in traced.nodes(aten.select.int):
        if all(isinstance(n, int) for n in arguments(node)[1:]):
            _exchange(traced, node, pick, arguments(node))
    traced.clean()


def product(a: Tensor, b: Tensor) -> Tensor:
    """[..., m, k] and [..., k, n] -> [..., m, n]"""
    flat = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return flat.view(*a.shape[:-1], b.shape[-1])


def attention(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(factor q k^T + mask) v of [..., length, width]"""
    scores = product(q * factor, k.transpose(-1, -2))
    return product((scores if mask is None else scores + mask).softmax(-1), v)


def pick(x: Tensor, dimension: int, at: int) -> Tensor:
    """What stands at a place of a dimension, without it."""
    shape = list(x.shape)
    del shape[dimension]
    return x.narrow(dimension, at % x.shape[dimension], 1).reshape(shape)


def _attention(traced: Traced, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, arguments(node), strict=False)), **node.kwargs}
    q, k, v = (given[name] for name in names[:3])
    if given.get("attn_mask") is not None or given.get("dropout_p") or not _batches(q, k):
        return  # a mask may leave a row nothing
    *_, length, width = q.meta["val"].shape
    lengths = length, k.meta["val"].shape[-2]
    causal, scale = given.get("is_causal"), given.get("scale")
    if causal and not all(isinstance(n, int) for n in lengths):
        return
    with traced.graph.graph.inserting_before(node):
        factor = traced.constant(f"{node.name}_factor", torch.tensor([width**-0.5 if scale is None else scale]))
        mask = traced.constant(f"{node.name}_mask", torch.full(lengths, FAR).triu(1)) if causal else None
    _exchange(traced, node, attention, (q, k, v, factor, mask))


def _split(traced: Traced, node: fx.Node) -> None:
    single = node.target is aten.unbind.int
    place = 1 if single else 2
    dimension = arguments(node)[place] if len(arguments(node)) > place else 0
    sizes = [1 if single else part.shape[dimension] for part in node.meta["val"]]
    starts = [0, *accumulate(sizes)]
    for user in list(node.users):
        i = arguments(user)[1]
        if user.target is operator.getitem and all(isinstance(n, int) for n in sizes):
            wanted = (dimension, starts[i]) if single else (dimension, starts[i], sizes[i])
            _exchange(traced, user, pick if single else torch.narrow, (arguments(node)[0], *wanted))


def _batches(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors are known to be as many matrices, in dimensions of their own."""
    if "val" not in a.meta or "val" not in b.meta:
        return False
    first, second = (x.meta["val"].shape for x in (a, b))
    return len(first) > 2 and first[:-2] == second[:-2]


def _exchange(traced: Traced, node: fx.Node, function: Any, args: tuple[Any, ...]) -> None:
    with traced.graph.graph.inserting_before(node):
        new = traced.graph.graph.call_function(function, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    traced.graph.graph.erase_node(node)
