"""What the arguments of Python calls tell about sizes, and attributes that mirror the shapes of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from smelt.graph.labels import Axis
from smelt.graph.sizes import Size

if TYPE_CHECKING:
    from smelt.graph.trace import Trace

_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


def seen(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Learn from one call; returns its result, in which sizes know their origin."""
    if func == _SHAPE:
        return _lengths(t, args[0])
    name = getattr(func, "__name__", "")
    if name == "size":
        if isinstance(out, int):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return _lengths(t, args[0])[dim]
        return _lengths(t, args[0])
    if (learn := _LEARN.get(name)) is not None:
        learn(t, args, kwargs, out)
    elif name.strip("_") in _ARITHMETIC:
        for value in args:
            if isinstance(value, Size):
                value.as_number()
    return out


def _lengths(t: Trace, tensor: Tensor) -> torch.Size:
    axes = t.axes(tensor)
    sizes = [Size(n, axis, t.numbers) for n, axis in zip(tuple.__iter__(tensor.shape), axes, strict=True)]
    return torch.Size(sizes)


def counts(t: Trace, size: Any, axis: Axis, what: str) -> None:
    """`size`, from the code, is the length of `axis`: solved for what it was computed from."""
    if not isinstance(size, Size):
        t.labels.fix(axis, f"the code of {t.where} writes {int(size)} in {what}")
    elif isinstance(size.source, tuple):
        path, name, place = size.source
        named = f"{path}.{name}" + (f"[{place}]" if place >= 0 else "")
        t.labels.count(size.source, axis, f", which has the length {named}")
    elif size.source is not None:
        t.labels.tie(size.source, axis, f", as {what} in {t.where} asks for equal sizes")
    elif size.made is not None and not isinstance(axis, str):
        sign, left, right = size.made
        if sign == "*":
            left, right = (right, left) if _constant(left) else (left, right)
            if _constant(right) and isinstance(left, Size) and right > 0:
                _evenly(t, axis, int(right))
                counts(t, left, axis[: len(axis) // int(right)], what)
        elif sign == "//" and isinstance(left, Size) and left == right * size:
            other = "" if _constant(right) else _axis(t, right)
            if other is not None:
                counts(t, left, t.labels.product(other, axis, int(right), len(axis)), what)
        elif sign == "-" and isinstance(left, Size) and not isinstance(other := _axis(t, right), str | None):
            counts(t, left, np.concatenate([axis, other]), what)


def _constant(size: int) -> bool:
    return not isinstance(size, Size) or size.constant


def _axis(t: Trace, size: int) -> Axis | None:
    """The axis whose length a number is, where that is known."""
    source = size.source if isinstance(size, Size) else None
    return t.labels.sizes.get(source) if isinstance(source, tuple) else source


def _flat(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += (
            list(tuple.__iter__(value)) if isinstance(value, tuple) else value if isinstance(value, list) else [value]
        )
    return found


def _view(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    sizes = _flat([*args[1:], *kwargs.values()])
    if not isinstance(out, Tensor) or len(sizes) != out.dim() or not all(isinstance(s, int) for s in sizes):
        return
    for size, axis in zip(sizes, t.axes(out), strict=True):
        if size > 1:
            counts(t, size, axis, "a view")


def _like(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    for a, b in zip(t.axes(args[1]), t.axes(out), strict=True):
        t.labels.meet([a, b])


def _unflatten(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = list(args[2] if len(args) > 2 else kwargs["sizes"])
    start = dim % args[0].dim()
    for size, axis in zip(sizes, t.axes(out)[start : start + len(sizes)], strict=True):
        if size > 1:
            counts(t, size, axis, "a view")


def _factory(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    new = args[1:] if args and isinstance(args[0], Tensor) else args
    sizes = _flat(new)[: out.dim()]
    if len(sizes) != out.dim():
        sizes = _flat([kwargs.get("size", ())])
    if len(sizes) == out.dim():
        for size, axis in zip(sizes, t.axes(out), strict=True):
            if size > 1:
                counts(t, size, axis, "a new tensor")


def _evenly(t: Trace, axis: Axis, count: int) -> None:
    reason = f"{t.where} takes it in {count} pieces of one size"
    if isinstance(axis, str) or count < 2:
        return
    if len(axis) % count:
        t.labels.fix(axis, reason)
    else:
        t.labels.even(axis, count, reason)


def _chunk(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    _evenly(t, t.axes(args[0])[dim], len(out))


def _split(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x: Tensor = args[0]
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size", kwargs.get("split_size_or_sections"))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    axis = t.axes(x)[dim]
    if isinstance(axis, str):
        return
    axes = [t.axes(piece)[dim] for piece in out]
    if isinstance(sizes, int) and not (isinstance(sizes, Size) and isinstance(sizes.source, tuple)):
        if not isinstance(sizes, Size):
            counts(t, sizes, axis, "a split")
            return
        _evenly(t, axis, len(out))
        if sizes.made and sizes.made[0] == "//" and sizes.made[1] == len(axis):
            counts(t, sizes.made[1], axis, "a split")
        return
    each = [sizes] * len(axes) if isinstance(sizes, int) else list(sizes)
    for size, piece in zip(each, axes, strict=True):
        if size > 1 and len(piece) == size:
            counts(t, size, piece, "a split")


def _getitem(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, index = args
    items = list(index) if type(index) is tuple else [index]
    used = sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in items if _takes(i))
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += x.dim() - used
        elif isinstance(item, slice):
            _slice(t, x, dim, item)
            dim += 1
        elif _takes(item):
            dim += item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _takes(item: Any) -> bool:
    return item is not None and item is not Ellipsis and not isinstance(item, bool)


def _slice(t: Trace, x: Tensor, dim: int, item: slice) -> None:
    axis = t.axes(x)[dim]
    if isinstance(axis, str):
        return
    if item.step not in (None, 1):
        t.labels.fix(axis, f"{t.where} takes every {item.step}th")
        return
    for bound in (item.start, item.stop):
        _bound(t, axis, bound)


def _bound(t: Trace, axis: np.ndarray, bound: Any) -> None:
    """A cut through an axis that the code makes."""
    n = len(axis)
    place = 0 if bound is None else max(int(bound) + n if bound < 0 else min(int(bound), n), 0)
    if place in (0, n):
        if isinstance(bound, Size) and place == n:
            counts(t, bound, axis, "a slice")
        return
    if isinstance(bound, Size):
        sign, left, right = bound.made or ("", 0, 0)
        whole = left.source if sign == "//" and isinstance(left, Size) and left == n == right * bound else None
        if isinstance(whole, np.ndarray):
            _evenly(t, axis, int(right))
        elif bound > 0:
            counts(t, bound, axis[:place], "a slice")
        return
    t.labels.fix(axis[:place] if bound > 0 else axis[place:], f"the code of {t.where} writes {bound} in a slice")


def _narrow(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    if len(args) == 4 and isinstance(args[2], int):
        _slice(t, args[0], args[1], slice(args[2], args[2] + args[3]))


def _attention(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Without a scale of its own, the number of head dims is also a factor."""
    axis = t.axes(args[0])[-1]
    if kwargs.get("scale") is None and not isinstance(axis, str):
        t.labels.inexact.append(axis)


def _norm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    axes = t.axes(args[0])[args[0].dim() - len(shape) :]
    module = t.model.get_submodule(t.path)
    own = tuple(getattr(module, "normalized_shape", ()))
    for i, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if not isinstance(size, Size) and own == tuple(shape):
            size = Size(size, (t.path, "normalized_shape", i), t.numbers)
        counts(t, size, axis, "a norm")


def _multihead(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """`multi_head_attention_forward` asks that heads x head dims are the model's width."""
    module = t.model.get_submodule(t.path)
    if not isinstance(module, nn.MultiheadAttention):
        return
    inner = t.axes(module.out_proj.weight)[1]
    weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    width = inner
    t.labels.tie(inner, t.axes(weight)[1], f" (in {t.where})")
    if module.in_proj_weight is None:
        for own in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
            t.labels.tie(inner, t.axes(own)[0], f" (in {t.where})")
    heads, dims = t.labels.split(inner, module.num_heads, module.head_dim)
    t.labels.count((t.path, "embed_dim", -1), width, "")
    t.labels.count((t.path, "num_heads", -1), heads, "")
    t.labels.count((t.path, "head_dim", -1), dims, "")
    if not isinstance(dims, str):
        t.labels.inexact.append(dims)
    for name, own in (("kdim", module.k_proj_weight), ("vdim", module.v_proj_weight)):
        t.labels.count((t.path, name, -1), width if own is None else t.axes(own)[1], "")


_LEARN: dict[str, Callable[[Trace, Any, Any, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand"), _view),
    **dict.fromkeys(("view_as", "reshape_as", "expand_as"), _like),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), _factory),
    "unflatten": _unflatten,
    "chunk": _chunk,
    "tensor_split": _chunk,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "__getitem__": _getitem,
    "narrow": _narrow,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    "multi_head_attention_forward": _multihead,
}

_ARITHMETIC = {
    *("mul", "imul", "rmul", "div", "truediv", "itruediv", "rtruediv", "add", "iadd", "radd", "sub", "isub", "rsub"),
    *("pow", "tensor", "as_tensor", "scalar_tensor", "multiply", "divide", "rdiv"),
}

# Attributes of torch's modules that repeat the length of a dimension: (attribute, tensor, dimension).
_MIRRORS: tuple[tuple[type[nn.Module], tuple[tuple[str, str, int], ...]], ...] = (
    (nn.Linear, (("out_features", "weight", 0), ("in_features", "weight", 1))),
    (nn.Bilinear, (("out_features", "weight", 0), ("in1_features", "weight", 1), ("in2_features", "weight", 2))),
    (nn.Embedding, (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1))),
    (nn.EmbeddingBag, (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1))),
    (nn.GroupNorm, (("num_channels", "weight", 0),)),
    (nn.PReLU, (("num_parameters", "weight", 0),)),
    (nn.modules.batchnorm._NormBase, (("num_features", "weight", 0), ("num_features", "running_mean", 0))),
    (nn.RNNBase, (("input_size", "weight_ih_l0", 1),)),
)


def mirror(t: Trace, module: nn.Module, path: str) -> None:
    """Note which attributes of a module repeat the lengths of its parameters' dimensions."""
    for kind, rows in _MIRRORS:
        for attribute, name, dim in rows if isinstance(module, kind) else ():
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and getattr(module, attribute, None) == tensor.shape[dim] > 1:
                t.labels.count((path, attribute, -1), t.axes(tensor)[dim], "")
    if isinstance(module, nn.RNNBase):
        for name in module._flat_weights_names:
            if name.startswith("weight_hh"):
                t.labels.count((path, "hidden_size", -1), t.axes(getattr(module, name))[-1], "")
