"""Reductions, norms, softmax and pooling."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smelt.core.data import tensors
from smelt.graph.labels import Axis

if TYPE_CHECKING:
    from smelt.graph.trace import Trace


def _reduce(name: str) -> Callable[..., None]:
    def rule(t: Trace, a: dict[str, Any], out: Any) -> None:
        x: Tensor = a["self"]
        dims = a.get("dim")
        dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        gone = {d % x.dim() for d in dims} if x.dim() else set()
        axes = t.axes(x)
        for d in gone:
            if name.startswith("arg"):
                t.labels.fix(axes[d], f"aten.{name} in {t.where} tells its place")
            elif name != "sum":
                _uneven(t, axes[d])
        for tensor in tensors(out):
            kept = tensor.dim() == x.dim()
            left: list[Axis] = [axis for d, axis in enumerate(axes) if d not in gone or kept]
            t.put(
                tensor, [axis if not kept or d not in gone else "it has one coordinate" for d, axis in enumerate(left)]
            )

    return rule


def _uneven(t: Trace, axis: Axis) -> None:
    """Without some of the coordinates of this axis the others change, too."""
    if not isinstance(axis, str):
        t.labels.inexact.append(axis)


def _softmax(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    axes = t.axes(a["self"])
    _uneven(t, axes[a["dim"]])
    t.put(out, axes)


def _batch_norm(t: Trace, a: dict[str, Any], out: Any) -> None:
    x: Tensor = a["input"] if "input" in a else a["self"]
    axes = list(t.axes(x))
    others = [y for k, v in a.items() if k not in ("input", "self") for y in tensors([v]) if y.dim() == 1]
    axes[1] = t.labels.meet([axes[1], *[t.axis(y, 0) for y in others if len(y) == x.shape[1]]], f" (in {t.where})")
    if a.get("training"):
        for d, axis in enumerate(axes):
            if d != 1:
                _uneven(t, axis)
    for tensor in tensors(out):
        if tensor.dim() == x.dim():
            t.put(tensor, axes)
        else:
            t.put(tensor, [axes[1] if n == x.shape[1] else "a statistic" for n in tensor.shape])


def _layer_norm(t: Trace, a: dict[str, Any], out: Any) -> None:
    x, k = a["input"], len(a["normalized_shape"])
    axes = list(t.axes(x))
    for d in range(-k, 0):
        met = [t.axis(y, d) for y in (a.get("weight"), a.get("bias")) if y is not None]
        axes[d] = t.labels.meet([axes[d], *met], f" (in {t.where})")
        _uneven(t, axes[d])
    for tensor in tensors(out):
        full = tensor.shape == x.shape
        t.put(tensor, axes if full else [*axes[:-k], *["it has one coordinate"] * k][: tensor.dim()])


def _group_norm(t: Trace, a: dict[str, Any], out: Any) -> None:
    x, count = a["input"], a["group"]
    axes = list(t.axes(x))
    met = [t.axis(y, 0) for y in (a["weight"], a["bias"]) if y is not None]
    axis = axes[1] = t.labels.meet([axes[1], *met], f" (in {t.where})")
    if not isinstance(axis, str):
        _uneven(t, axis)
        if count > 1:
            t.labels.even(axis, count, f"group norm in {t.where} has {count} groups")
    for tensor in tensors(out):
        t.put(tensor, axes if tensor.shape == x.shape else ["a statistic"] * tensor.dim())


def _spatial(name: str) -> Callable[..., None]:
    k = int(re.findall(r"(\d)d", name)[-1])

    def rule(t: Trace, a: dict[str, Any], out: Any) -> None:
        x = a["self"] if "self" in a else a["input"]
        axes = t.axes(x)
        reason = f"it is a place in an image in {t.where}"
        for axis in axes[-k:]:
            t.labels.fix(axis, reason)
        for other in tensors([v for key, v in a.items() if key not in ("self", "input")]):
            t.stop(other, reason)
        for tensor in tensors(out):
            t.put(tensor, [*axes[:-k], *[reason] * k])

    return rule


_POOLS = [
    *[f"{kind}_pool{d}d" for kind in ("avg", "max") for d in (1, 2, 3)],
    *[f"{kind}_pool{d}d" for kind in ("adaptive_avg", "_adaptive_avg", "adaptive_max") for d in (1, 2, 3)],
    *[f"max_pool{d}d_with_indices" for d in (2, 3)],
    *[f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)],
    *[f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d")],
    *[f"_upsample_{kind}" for kind in ("bilinear2d_aa", "bicubic2d_aa", "nearest_exact1d", "nearest_exact2d")],
    *["upsample_bicubic2d", "grid_sampler_2d", "grid_sampler_3d"],
]
_REDUCTIONS = (
    *("sum", "mean", "amax", "amin", "max", "min", "prod", "all", "any", "logsumexp", "var", "std", "var_mean"),
    *("argmax", "argmin", "linalg_vector_norm", "norm", "nansum", "median"),
)
RULES: dict[str, Callable[..., None]] = {
    **{name: _reduce(name) for name in _REDUCTIONS},
    **{name: _spatial(name) for name in _POOLS},
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), _batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "batch_norm"), _batch_norm),
    **dict.fromkeys(("_batch_norm_no_update", "_batch_norm_with_update"), _batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("native_group_norm",), _group_norm),
}
