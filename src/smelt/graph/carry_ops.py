"""What each operator of ATen does to the labels of `carry.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from smelt.core.data import tensors
from smelt.graph.team import ANY, FIXED, Place

if TYPE_CHECKING:
    from smelt.graph.carry import Carry

_VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias")
_MOVES = (
    *("permute", "transpose", "t", "expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind"),
    *("squeeze", "unsqueeze", "clone", "contiguous", "alias", "detach", "index_select", "index", "roll", "flip"),
    *("repeat", "unfold", "narrow", "movedim", "lift_fresh", "unsafe_split", "gather"),
)
_BENDS = ("relu", "leaky_relu", "abs", "prelu", "_prelu_kernel")
_POOLS = ("max_pool", "avg_pool", "upsample")


def seen(c: Carry, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label the results of one call of an operator."""
    name = func._schema.name.partition("::")[2].rstrip("_")
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    for a in func._schema.arguments:
        given.setdefault(a.name, a.default_value)
    inputs = [x for x in tensors([args, kwargs]) if x.is_floating_point()]
    if not inputs or not any(x.is_floating_point() for x in tensors(out)):
        for x in inputs:  # something looks at the values
            if name not in ("sym_size", "sym_stride", "_local_scalar_dense"):
                c.fix(c.labels(x), f"{name} in {c.where} looks at its values")
        return
    if (rule := _RULES.get(name)) is not None:
        rule(c, name, given, out)
    elif name in _VIEWS or name in _MOVES:
        _move(c, name, func, args, kwargs, out)
    elif any(part in name for part in _POOLS):
        _pool(c, name, given, out)
    else:
        stop(c, inputs, out, f"it goes through {name} in {c.where}")


def stop(c: Carry, inputs: list[Tensor], out: Any, reason: str) -> None:
    for x in inputs:
        c.fix(c.labels(x), reason)
        c.spoil(x, reason)
    for y in tensors(out):
        c.lose(y, reason)


def _move(c: Carry, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0] if isinstance(args[0], Tensor) else next(tensors(args))
    results = list(tensors(out))
    found = c.labels(x)
    if found is None:
        if c.owner(x) is not None:
            if name in ("index", "index_select", "gather"):
                _rows(c, name, x, results[0])
            elif any(y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for y in results):
                c.spoil(x, f"it is copied in {c.where}")
        for y in results:
            c._why[y] = c.why(x)
    elif name in _VIEWS:
        c.put(results[0], found.reshape(results[0].shape))
    else:
        made = func(*tree_map(lambda v: _as_labels(c, v, x), args), **tree_map(lambda v: _as_labels(c, v, x), kwargs))
        for y, own in zip(results, tensors(made), strict=True):
            c.put(y, own)


def _as_labels(c: Carry, value: Any, x: Tensor) -> Any:
    if isinstance(value, Tensor):
        return c.labels(x) if value is x else value.cpu()
    return value


def _same(c: Carry, name: str, given: Any, out: Any) -> None:
    x = given["self"]
    if c.labels(x) is None:
        c.spoil(x, f"it is copied in {c.where}")
        c._why[out] = c.why(x)
    c.put(out, c.labels(x))


def _bend(c: Carry, name: str, given: Any, out: Any) -> None:
    x = given["self"]
    found = c.labels(x)
    slope = given.get("weight")
    uneven = isinstance(slope, Tensor) and slope.numel() > 1
    if found is None or c.kind == "rotate" or uneven:
        stop(c, [x], out, f"it goes through {name} in {c.where}")
    else:
        c.note(c.bent, found)
        c.note(c.moved, found)
        c.put(out, found)


def _pool(c: Carry, name: str, given: Any, out: Any) -> None:
    x, y = given.get("self", given.get("input")), next(tensors(out))
    found = c.labels(x)
    dims = x.dim() - 2
    if found is None or not c.constant(found, range(2, x.dim())) or (c.kind == "rotate" and "max" in name):
        stop(c, [x], out, f"it goes through {name} in {c.where}")
        return
    if "max" in name:
        c.note(c.bent, found)
    if any(_list(given.get("padding"))):
        c.note(c.moved, found)
    for d in range(2, 2 + dims):
        found = found.narrow(d, 0, 1)
    c.put(y, found)


def _list(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [int(value or 0)]


def _mean(c: Carry, name: str, given: Any, out: Any) -> None:
    x = given["self"]
    found = c.labels(x)
    dims = [d % x.dim() for d in _list(given["dim"])] if given.get("dim") else list(range(x.dim()))
    if found is None or not c.constant(found, dims):
        stop(c, [x], out, f"it goes through {name} in {c.where}")
        return
    if name == "sum":
        c.note(c.moved, found)
    kept = found[tuple(slice(0, 1) if d in dims else slice(None) for d in range(x.dim()))]
    c.put(out, kept.reshape(out.shape))


def _operand(c: Carry, x: Any, shape: Any, partner: Any, adds: bool) -> Tensor:
    """Labels of one side of a sum or product, of the shape of the result."""
    if not isinstance(x, Tensor):
        return torch.tensor(ANY if x == 0 else FIXED).expand(shape)
    found = c.labels(x)
    if found is None and adds and isinstance(partner, Tensor) and c.owner(x) is not None:
        other = c.labels(partner)
        d = None if other is None else _last(other)
        if d is not None and d >= -x.dim() and x.shape[d] > 1:
            vector = c.parameter(x, d % x.dim(), "out")
            if vector is not None:
                found = c.spread(vector, d % x.dim(), x.shape)
    if found is None:
        c.spoil(x, f"it is used in {c.where}, too")
        found = torch.where(x.detach() == 0, ANY, FIXED).cpu()
    return found.expand(shape)


def _last(found: Tensor) -> int | None:
    """The last dimension, counted from the end, along which labels are all different."""
    for d in range(-1, -1 - found.dim(), -1):
        row = found.movedim(d, -1).reshape(-1, found.shape[d])[0]
        if len(row) > 1 and len(row.unique()) == len(row):
            return d
    return None


def _add(c: Carry, name: str, given: Any, out: Tensor) -> None:
    a, b = given["self"], given["other"]
    if all(not isinstance(v, Tensor) or (c.labels(v) is None and c.owner(v) is None) for v in (a, b)):
        c._why[out] = next(c.why(v) for v in (a, b) if isinstance(v, Tensor))
        return
    c.put(out, c.meet(_operand(c, a, out.shape, b, True), _operand(c, b, out.shape, a, True)))


def _where(c: Carry, name: str, given: Any, out: Tensor) -> None:
    a, b = (_operand(c, given[key], out.shape, None, False) for key in ("self", "other"))
    if bool((a >= 0).any()) or bool((b >= 0).any()):
        made = c.meet(a, b)
        c.note(c.moved, made)
        c.put(out, made)


def _fill(c: Carry, name: str, given: Any, out: Tensor) -> None:
    x = given["self"]
    found, value = c.labels(x), given["value"]
    if found is None or (float(value) != 0):
        stop(c, [x], out, f"it is masked in {c.where}")
    else:
        c.note(c.moved, found)
        c.put(out, found)


def _pad(c: Carry, name: str, given: Any, out: Tensor) -> None:
    x = given["self"]
    found = c.labels(x)
    if found is None or given.get("value"):
        stop(c, [x], out, f"it is padded in {c.where}")
    else:
        c.note(c.moved, found)
        c.put(out, torch.nn.functional.pad(found, given["pad"], value=ANY))


def _cat(c: Carry, name: str, given: Any, out: Tensor) -> None:
    parts: list[Tensor] = list(given["tensors"])
    dim = given["dim"] + (out.dim() if name == "stack" and given["dim"] < 0 else 0)
    whole = next((p for p in parts if c.labels(p) is not None), None)
    if whole is None:
        for part in parts:
            c.spoil(part, f"it is used in {c.where}, too")
        c._why[out] = c.why(parts[0])
        return
    made = []
    for part in parts:
        own = _operand(c, part, part.shape, whole if part.dim() == whole.dim() else None, True)
        made.append(own)
    c.put(out, torch.cat(made, given["dim"]) if name == "cat" else torch.stack(made, dim))


def _mul(c: Carry, name: str, given: Any, out: Tensor) -> None:
    a, b = given["self"], given["other"]
    if all(not isinstance(v, Tensor) or c.labels(v) is None for v in (a, b)):
        stop(c, [v for v in (a, b) if isinstance(v, Tensor)], out, f"it is multiplied in {c.where}")
        return
    x, y = (_operand(c, v, out.shape, None, False) for v in (a, b))
    reason = f"two things are multiplied in {c.where}"
    if name == "div":
        c.fix(y, f"it divides in {c.where}")
        y = torch.where(y >= 0, FIXED, y)
    elif bool((both := (x >= 0) & (y >= 0)).any()):
        c.fix(x[both], reason)
        x = torch.where(both, FIXED, x)
    made = torch.where((x == ANY) | (y == ANY), ANY, torch.maximum(x, y))
    if not bool((made >= 0).any()):
        c.lose(out, reason)
        return
    if c.kind == "rotate":
        made = _evenly(c, a if bool((y >= 0).any()) else b, made)
    c.note(c.moved, made)
    c.put(out, made)


def _evenly(c: Carry, factor: Any, made: Tensor) -> Tensor:
    """What is left of labels that may be mixed when a factor multiplies them."""
    if not isinstance(factor, Tensor) or factor.numel() == 1:
        return made
    factor = factor.detach().cpu().expand(made.shape)
    varies = [d for d in range(made.dim()) if not c.constant(made, [d])]
    if all(bool((factor == factor.narrow(d, 0, 1)).all()) for d in varies):
        return made
    if bool((factor == factor[..., :1]).all()):
        c.part(made.reshape(-1, made.shape[-1]))
        return made
    c.fix(made, f"its coordinates are multiplied by unequal factors in {c.where}")
    return torch.full_like(made, FIXED)


def _read(c: Carry, x: Tensor, weight: Tensor, dim: int, along: int, groups: int = 1) -> None:
    """A weight reads `x` along the dimension `dim` of x with its own dimension `along`."""
    found = c.of(weight, along)
    if found is None:
        c.fix(c.labels(x), f"what reads it in {c.where} is no plain weight")
        c.spoil(weight, f"it is used in {c.where} in an unusual way")
        return
    own, d, start = found
    size = own.tensor.shape[d] * groups
    side = c.side(Place(own.name, d, "in", groups), size, start, weight.shape[along] * groups)
    labels = c.labels(x)
    vector = None if labels is None else c.vector(labels, dim)
    if labels is None or vector is None:
        c.fix(labels, f"{own.name} reads it in an unusual order")
        c.fix(side, c.why(x) if labels is None else "what it reads is in an unusual order")
    else:
        c.meet(vector, side)


def _made(c: Carry, weight: Tensor, along: int, bias: Any, out: Tensor, dim: int, groups: int = 1) -> None:
    """A weight makes `out` along the dimension `dim` of out with its own dimension `along`."""
    found = c.of(weight, along)
    if found is None:
        stop(
            c, [v for v in (weight, bias) if isinstance(v, Tensor)], out, f"it is made in {c.where} by no plain weight"
        )
        return
    own, d, start = found
    size = own.tensor.shape[d] * groups
    side = c.side(Place(own.name, d, "out", groups), size, start, weight.shape[along] * groups)
    if isinstance(bias, Tensor) and (bias.numel() > 1 or bool((bias != 0).any())):
        added = c.parameter(bias, bias.dim() - 1, "out") if bias.dim() == 1 else None
        if added is None or len(added) != len(side):
            c.fix(side, f"a bias that is no plain one is added in {c.where}")
            c.spoil(bias, f"it is used in {c.where} in an unusual way")
        else:
            c.meet(side, added)
    c.put(out, c.spread(side, dim, out.shape))


def _rows(c: Carry, name: str, weight: Tensor, out: Tensor) -> None:
    """An embedding."""
    last = c.parameter(weight, weight.dim() - 1, "out")
    if name == "gather" or weight.dim() != 2 or last is None or out.shape[-1] != len(last):
        stop(c, [weight], out, f"it is indexed in {c.where}")
    else:
        c.put(out, c.spread(last, out.dim() - 1, out.shape))


def _embedding(c: Carry, name: str, given: Any, out: Tensor) -> None:
    _rows(c, name, given["weight"], out)


def _matmul(x: str, w: str) -> Callable[..., None]:
    def rule(c: Carry, name: str, given: Any, out: Tensor) -> None:
        a, b, bias = given[x], given[w], given.get("bias") if name == "linear" else given.get("self")
        bias = bias if name in ("linear", "addmm") else None
        if name == "linear":
            b = b.t()
        if c.owner(b) is not None and b.dim() == 2:
            _read(c, a, b, a.dim() - 1, 0)
            _made(c, b, 1, bias, out, out.dim() - 1)
            return
        la, lb = c.labels(a), c.labels(b)
        plain = name in ("mm", "bmm") and c.owner(a) is None
        if plain and lb is not None and la is None and c.constant(lb, [b.dim() - 2]):
            row = lb.narrow(-2, 0, 1)
            if c.kind == "rotate":
                c.part(row.reshape(-1, row.shape[-1]))
            c.note(c.moved, row)
            c.put(out, row)
        elif plain and la is not None and lb is None and c.kind == "scale" and c.constant(la, [a.dim() - 1]):
            c.note(c.moved, la)
            c.put(out, la[..., :1])
        else:
            inputs = [v for v in (a, b, bias) if isinstance(v, Tensor)]
            stop(c, inputs, out, f"it is multiplied with other activations in {c.where}")

    return rule


def _convolution(c: Carry, name: str, given: Any, out: Tensor) -> None:
    x, w, groups, transposed = given["input"], given["weight"], given["groups"], given["transposed"]
    if groups > 1 and c.kind == "rotate":
        stop(c, [v for v in (x, w, given["bias"]) if v is not None], out, f"{c.where} is a grouped convolution")
        return
    if (found := c.labels(x)) is not None and (any(given["padding"]) or (transposed and math.prod(w.shape[2:]) > 1)):
        c.note(c.moved, found)
    if 1 in w.shape[:2] and c.owner(w) is not None:
        _thin(c, x, w, groups, transposed, given["bias"], out)
        return
    _read(c, x, w, 1, 0 if transposed else 1, 1 if transposed else groups)
    _made(c, w, 1 if transposed else 0, given["bias"], out, 1, groups if transposed else 1)


def _thin(c: Carry, x: Tensor, w: Tensor, groups: int, transposed: bool, bias: Any, out: Tensor) -> None:
    """A convolution whose weight has one coordinate along a channel dimension, as a depthwise one has."""
    own = c.owner(w)
    assert own is not None
    reads, makes = (0, 1) if transposed else (1, 0)
    if w is not own.tensor and w.shape != own.tensor.shape:
        stop(c, [x, w], out, f"it is used in {c.where} in an unusual way")
        return
    into = c.side(Place(own.name, reads, "in", groups if reads else 1), x.shape[1])
    side = c.side(Place(own.name, makes, "out", groups if makes else 1), out.shape[1])
    labels = c.labels(x)
    vector = None if labels is None else c.vector(labels, 1)
    if vector is None:
        c.fix(labels, f"{own.name} reads it in an unusual order")
        c.fix(into, c.why(x))
    else:
        c.meet(vector, into)
    if bias is not None:
        added = c.parameter(bias, 0, "out") if bias.numel() > 1 else None
        name = None if (o := c.owner(bias)) is None else o.name
        if added is None and bias.numel() == 1 and name is not None:
            added = c.side(Place(name, 0, "out"), 1)
        if added is None:
            c.fix(side, f"a bias that is no plain one is added in {c.where}")
        else:
            c.meet(side, added)
    c.put(out, c.spread(side, 1, out.shape))


_RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("add", "sub", "rsub", "maximum", "minimum"), _add),
    **dict.fromkeys(("mul", "div"), _mul),
    **dict.fromkeys(("neg", "_to_copy", "native_dropout", "dropout"), _same),
    **dict.fromkeys(_BENDS, _bend),
    **dict.fromkeys(("mean", "sum"), _mean),
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "where": _where,
    "masked_fill": _fill,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
    "linear": _matmul("input", "weight"),
    "mm": _matmul("self", "mat2"),
    "bmm": _matmul("self", "mat2"),
    "addmm": _matmul("mat1", "mat2"),
}
