"""Operators that move coordinates about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from smelt.graph.labels import Axis

if TYPE_CHECKING:
    from smelt.graph.trace import Trace

ONE = "it has one coordinate"


def _view(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    t.put(out, viewed(t, t.axes(a["self"]), a["self"].shape, out.shape))


def viewed(t: Trace, axes: Sequence[Axis], old: Sequence[int], new: Sequence[int]) -> list[Axis]:
    """The axes after a view: blocks of old dimensions are flattened and taken apart again."""
    if 0 in new:
        return ["it is empty"] * len(new)
    found: list[Axis] = []
    i = j = 0
    while j < len(new):
        if new[j] == 1:
            found.append(ONE)
            j += 1
            continue
        while old[i] == 1:
            i += 1
        axis, p, sizes, q = axes[i], old[i], [new[j]], new[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                axis = axis if old[i] == 1 else t.labels.product(axis, axes[i], p, old[i])
                p *= old[i]
                i += 1
            else:
                sizes.append(new[j])
                q *= new[j]
                j += 1
        for size in sizes[:-1]:
            p //= size
            outer, axis = t.labels.split(axis, size, p)
            found.append(outer)
        found.append(axis)
    return found


def _expand(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x = a["self"]
    axes = [*[ONE] * (out.dim() - x.dim()), *t.axes(x)]
    old = [*[1] * (out.dim() - x.dim()), *x.shape]
    t.put(
        out, [axis if m == n else "it repeats one coordinate" for axis, m, n in zip(axes, old, out.shape, strict=True)]
    )


def _permute(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes = t.axes(a["self"])
    t.put(out, [axes[d] for d in a["dims"]])


def _transpose(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes = list(t.axes(a["self"]))
    d, e = a["dim0"], a["dim1"]
    axes[d], axes[e] = axes[e], axes[d]
    t.put(out, axes)


def _t(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    t.put(out, t.axes(a["self"])[::-1])


def _unsqueeze(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes = list(t.axes(a["self"]))
    axes.insert(a["dim"] % out.dim(), ONE)
    t.put(out, axes)


def _squeeze(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x = a["self"]
    dims = a.get("dim", range(x.dim()))
    dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} if x.dim() else set()
    t.put(out, [axis for d, axis in enumerate(t.axes(x)) if d not in dims or x.shape[d] != 1])


def _cat(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    parts = [x for x in a["tensors"] if x.shape != (0,)]
    dim = a["dim"] % out.dim()
    axes: list[Axis] = []
    for d in range(out.dim()):
        own = [t.axis(x, d) for x in parts]
        axes.append(t.labels.meet(own, f" (in {t.where})") if d != dim else joined(t, own, [x.shape[d] for x in parts]))
    t.put(out, axes)


def joined(t: Trace, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """One axis after the other."""
    if all(isinstance(axis, str) for axis in axes):
        return axes[0]
    found = []
    for axis, size in zip(axes, sizes, strict=True):
        if isinstance(axis, str):
            reason, axis = axis, t.labels.fresh(size, "constant")
            t.labels.fix(axis, reason)
        found.append(axis)
    return np.concatenate(found)


def _stack(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    dim = a["dim"] % out.dim()
    own = [t.axes(x) for x in a["tensors"]]
    axes = [t.labels.meet(met, f" (in {t.where})") for met in zip(*own, strict=True)]
    axes.insert(dim, f"it is one of several that are stacked in {t.where}")
    t.put(out, axes)


def _split(t: Trace, a: dict[str, Any], out: Sequence[Tensor]) -> None:
    axes, dim, start = t.axes(a["self"]), a["dim"] % a["self"].dim(), 0
    for piece in out:
        n = piece.shape[dim]
        axis = axes[dim] if isinstance(axes[dim], str) else axes[dim][start : start + n]
        t.put(piece, [*axes[:dim], axis, *axes[dim + 1 :]])
        start += n


def _unbind(t: Trace, a: dict[str, Any], out: Sequence[Tensor]) -> None:
    axes, dim = t.axes(a["self"]), a["dim"] % a["self"].dim()
    t.labels.fix(axes[dim], f"its coordinates are taken one by one in {t.where}")
    for piece in out:
        t.put(piece, [*axes[:dim], *axes[dim + 1 :]])


def _select(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    _unbind(t, a, [out])


def _slice(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes, dim = list(t.axes(a["self"])), a["dim"] % a["self"].dim()
    axis = axes[dim]
    if not isinstance(axis, str):
        axes[dim] = axis[slice(a["start"], a["end"], a["step"])]
    t.put(out, axes)


def _pad(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes, pad = list(t.axes(a["self"])), a["pad"]
    for k in range(len(pad) // 2):
        d = out.dim() - 1 - k
        before, after, axis = pad[2 * k], pad[2 * k + 1], axes[d]
        if isinstance(axis, str) or (before == 0 and after == 0):
            continue
        axis = axis[max(-before, 0) : len(axis) - max(-after, 0)]
        reason = f"it is padding in {t.where}"
        axes[d] = joined(t, [reason, axis, reason], [max(before, 0), len(axis), max(after, 0)])
    t.put(out, axes)


def _flip(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    dims = {d % out.dim() for d in a["dims"]}
    axes = t.axes(a["self"])
    t.put(out, [axis[::-1] if d in dims and not isinstance(axis, str) else axis for d, axis in enumerate(axes)])


def _along(name: str) -> Callable[..., None]:
    """All coordinates of the dimensions that an operator runs along must stay."""

    def rule(t: Trace, a: dict[str, Any], out: Any) -> None:
        x = a["self"]
        dims = a.get("dims", a.get("dim"))
        dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        axes, reason = list(t.axes(x)), f"it goes along aten.{name} in {t.where}"
        for d in dims:
            t.labels.fix(axes[d], reason)
            axes[d] = reason
        for tensor in [out] if isinstance(out, Tensor) else out:
            t.put(tensor, axes)

    return rule


def _triangle(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    _along("tril")(t, {"self": a["self"], "dims": [-2, -1]}, out)


def _repeat(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x = a["self"]
    axes: list[Axis] = [*[ONE] * (out.dim() - x.dim()), *t.axes(x)]
    sizes = [*[1] * (out.dim() - x.dim()), *x.shape]
    t.put(out, [t.labels.product("it repeats the same coordinates", axis, r, n)
                for axis, r, n in zip(axes, a["repeats"], sizes, strict=True)])  # fmt: skip


def _pixel_shuffle(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes, c = t.axes(a["self"]), out.shape[-3]
    outer, inner = t.labels.split(axes[-3], c, a["upscale_factor"] ** 2, ("channels", "pixels"))
    t.labels.fix(inner, f"pixel_shuffle in {t.where} makes pixels of it")
    t.put(out, [*axes[:-3], outer, *_flat(t, axes[-2:])])


def _pixel_unshuffle(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes, r = t.axes(a["self"]), a["downscale_factor"]
    c = a["self"].shape[-3]
    t.put(out, [*axes[:-3], t.labels.product(axes[-3], "pixels", c, r * r), *_flat(t, axes[-2:])])


def _flat(t: Trace, axes: Sequence[Axis]) -> list[Axis]:
    for axis in axes:
        t.labels.fix(axis, f"it is a place in an image in {t.where}")
    return ["it is a place in an image"] * len(axes)


def _im2col(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes, x = t.axes(a["self"]), a["self"]
    c, k = x.shape[-3], a["kernel_size"][0] * a["kernel_size"][1]
    t.put(out, [*axes[:-3], t.labels.product(axes[-3], "pixels", c, k), *_flat(t, axes[-2:])[:1]])


def _col2im(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes, c = t.axes(a["self"]), out.shape[-3]
    outer, inner = t.labels.split(axes[-2], c, a["self"].shape[-2] // c, ("channels", "pixels"))
    t.labels.fix(inner, f"fold in {t.where} makes pixels of it")
    t.put(out, [*axes[:-2], outer, *_flat(t, [axes[-1]]), "it is a place in an image"])


def _unfold(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes = list(t.axes(a["self"]))
    t.labels.fix(axes[a["dimension"]], f"windows slide along it in {t.where}")
    axes[a["dimension"]] = "windows slide along it"
    t.put(out, [*axes, "windows slide along it"])


def _as_strided(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x = a["self"]
    if list(x.shape) == list(a["size"]) and all(
        s == own or n == 1 for s, own, n in zip(a["stride"], x.stride(), x.shape, strict=True)
    ):
        t.put(out, t.axes(x))
    else:
        t.stop([x, out], f"it goes through aten.as_strided in {t.where}")


RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy"), _view),
    **dict.fromkeys(("expand", "expand_copy"), _expand),
    **dict.fromkeys(("permute", "permute_copy"), _permute),
    **dict.fromkeys(("transpose", "transpose_copy"), _transpose),
    "t": _t,
    **dict.fromkeys(("unsqueeze", "unsqueeze_copy"), _unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_copy"), _squeeze),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _split),
    **dict.fromkeys(("chunk", "unsafe_chunk", "split_copy", "split_with_sizes_copy"), _split),
    **dict.fromkeys(("unbind", "unbind_copy"), _unbind),
    **dict.fromkeys(("select", "select_copy"), _select),
    **dict.fromkeys(("slice", "slice_copy"), _slice),
    "constant_pad_nd": _pad,
    "flip": _flip,
    **{name: _along(name) for name in ("roll", "cumsum", "cumprod", "logcumsumexp", "sort", "cummax", "cummin")},
    **dict.fromkeys(("tril", "triu"), _triangle),
    "repeat": _repeat,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "im2col": _im2col,
    "col2im": _col2im,
    "unfold": _unfold,
    "as_strided": _as_strided,
}  # fmt: skip
