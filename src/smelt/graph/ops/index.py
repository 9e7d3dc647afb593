"""Look-ups, gathers and scatters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smelt.core.data import tensors
from smelt.graph.labels import Axis
from smelt.graph.ops.pointwise import broadcast

if TYPE_CHECKING:
    from smelt.graph.trace import Trace


def _fix(t: Trace, axis: Axis) -> None:
    t.labels.fix(axis, f"it is read by index in {t.where}")


def _embedding(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    rows, columns = t.axes(a["weight"])
    _fix(t, rows)
    if not isinstance(columns, str):
        t.labels.made.append(columns)
    t.put(out, [*t.axes(a["indices"]), columns])


def _index(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    t.put(out, _indexed(t, a["self"], a["indices"], out.dim()))


def _indexed(t: Trace, x: Tensor, indices: list[Tensor | None], dims: int) -> list[Axis]:
    """The axes of x[indices]; dimensions that are indexed are replaced by those of the indices."""
    axes = t.axes(x)
    masks = (torch.bool, torch.uint8)
    spans: list[tuple[Tensor | None, int]] = [
        (i, i.dim() if i is not None and i.dtype in masks else 1) for i in indices
    ]
    d, kept, where, places = 0, list[Axis](), list[Tensor | None](), list[int]()
    for index, span in spans:
        if index is None:
            kept.append(axes[d])
        else:
            for axis in axes[d : d + span]:
                _fix(t, axis)
            places.append(len(where))
        where.append(index)
        d += span
    kept += axes[d:]
    given = [i for i, _ in spans if i is not None]
    if all(i.dtype not in masks for i in given):
        shape = torch.broadcast_shapes(*[i.shape for i in given])
        inner = broadcast(t, given, shape)
    else:
        inner = ["it is picked by a mask"] * (dims - len(kept))
    joined = places == list(range(places[0], places[0] + len(places))) if places else True
    first = sum(1 for i in where[: places[0]] if i is None) if joined and places else 0
    return [*kept[:first], *inner, *kept[first:]]


def _index_put(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x, values = a["self"], a["values"]
    dims = x.dim() if not a["indices"] else max(values.dim(), 1)
    axes = _indexed(t, x, a["indices"], dims)
    for back in range(1, min(values.dim(), len(axes)) + 1):
        if values.shape[-back] > 1:
            t.labels.meet([axes[-back], t.axis(values, -back)], f" (in {t.where})")
    t.put(out, t.axes(x))


def _index_select(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes = list(t.axes(a["self"]))
    if axes:
        _fix(t, axes[a["dim"]])
        axes[a["dim"]] = "it is read by index"
    t.put(out, axes)


def _gather(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    """gather, scatter and their kin: along `dim` by index, elsewhere place by place."""
    x = a["self"]
    others = [y for key in ("index", "src", "source") for y in tensors([a.get(key)]) if y.dim() == x.dim()]
    axes: list[Axis] = []
    for d, axis in enumerate(t.axes(x)):
        if d == a["dim"] % x.dim():
            for one in (axis, *[t.axis(y, d) for y in others]):
                _fix(t, one)
            axes.append("it is read by index")
        else:
            same = [t.axis(y, d) for y in others if y.shape[d] == x.shape[d]]
            axes.append(t.labels.meet([axis, *same], f" (in {t.where})"))
    t.put(out, axes)


def _index_add(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x, source = a["self"], a["source"]
    axes: list[Axis] = []
    for d, axis in enumerate(t.axes(x)):
        own = t.axis(source, d)
        if d == a["dim"] % x.dim():
            _fix(t, axis)
            _fix(t, own)
            axes.append("it is read by index")
        else:
            axes.append(t.labels.meet([axis, own], f" (in {t.where})"))
    t.put(out, axes)


def _topk(t: Trace, a: dict[str, Any], out: Any) -> None:
    axes = list(t.axes(a["self"]))
    _fix(t, axes[a["dim"]])
    axes[a["dim"]] = f"it is sorted in {t.where}"
    for tensor in tensors(out):
        t.put(tensor, axes)


def _places(t: Trace, a: dict[str, Any], out: Any) -> None:
    """What tells places; the values that follow depend on the coordinates."""
    for axis in t.axes(a["self"]):
        _fix(t, axis)
    for tensor in tensors(out):
        t.put(tensor, [f"it comes from values in {t.where}"] * tensor.dim())


RULES: dict[str, Callable[..., None]] = {
    "embedding": _embedding,
    "index": _index,
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put"), _index_put),
    "_unsafe_index": _index,
    "index_select": _index_select,
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), _gather),
    **dict.fromkeys(("index_add", "index_copy"), _index_add),
    "topk": _topk,
    **dict.fromkeys(("nonzero", "masked_select", "bincount", "histc", "unique", "_unique2", "one_hot"), _places),
}
