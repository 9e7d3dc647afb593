"""Matrix products, convolutions, recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smelt.core.data import tensors
from smelt.graph import calls
from smelt.graph.labels import Axis
from smelt.graph.sizes import Size

if TYPE_CHECKING:
    from smelt.graph.trace import Trace


def _sum(t: Trace, a: Axis, b: Axis) -> None:
    """Products are summed along these axes."""
    for axis in (a, b):
        if not isinstance(axis, str):
            t.labels.read.append(axis)
    t.labels.meet([a, b], f" (in {t.where})")


def _makes(t: Trace, axes: Iterable[Axis]) -> None:
    t.labels.made += [axis for axis in axes if not isinstance(axis, str)]


def _product(t: Trace, x: Tensor, y: Tensor, out: Tensor) -> None:
    """x [*, m, k] @ y [*, k, n]; either may lack the outer dimension."""
    a, b = t.axes(x), t.axes(y)
    _sum(t, a[-1], b[-2] if y.dim() > 1 else b[0])
    rows, columns = a[-2:-1], b[-1:] if y.dim() > 1 else []
    batch: list[Axis] = []
    if out.dim() == 3:
        met = [axes[0] for axes, z in ((a, x), (b, y)) if z.dim() == 3]
        batch = [t.labels.meet(met, f" (in {t.where})")]
    _makes(t, [*rows, *columns])
    t.put(out, [*batch, *rows, *columns])


def _mm(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    _product(t, a["self"], a[next(key for key in ("mat2", "vec", "tensor") if key in a)], out)


def _add(first: str, second: str) -> Callable[..., None]:
    def rule(t: Trace, a: dict[str, Any], out: Tensor) -> None:
        _product(t, a[first], a[second], out)
        bias, axes = a["self"], t.axes(out)
        for d in range(1, bias.dim() + 1):
            if bias.shape[-d] > 1:
                t.labels.meet([t.axis(bias, -d), axes[-d]], f" (in {t.where})")

    return rule


def _linear(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x, w = t.axes(a["input"]), t.axes(a["weight"])
    _sum(t, x[-1], w[1])
    _makes(t, [w[0]])
    bias = [] if a["bias"] is None else [t.axis(a["bias"], 0)]
    t.put(out, [*x[:-1], t.labels.meet([w[0], *bias])])


def _grouped_mm(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    """x [rows, k] @ y [group, k, n], the rows dealt to the groups."""
    x, y = t.axes(a["self"]), t.axes(a["mat2"])
    if a["self"].dim() != 2 or a["mat2"].dim() != 3:
        t.stop([a["self"], a["mat2"], out], f"it goes through aten._grouped_mm in {t.where}")
        return
    _sum(t, x[1], y[1])
    t.labels.fix(y[0], f"rows are dealt to it in {t.where}")
    _makes(t, [y[2]])
    t.put(out, [x[0], y[2]])


def _convolution(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    x, w, groups = t.axes(a["input"]), t.axes(a["weight"]), a["groups"]
    size_in, size_out = a["input"].shape[1], out.shape[1]
    for axis in w[2:]:
        t.labels.fix(axis, "it is a place in a kernel")
    places, reason = list(x[2:]), f"it is a place in an image in {t.where}"
    for d, axis in enumerate(places):
        step, pad = (a[key][-1 if len(a[key]) == 1 else d] for key in ("stride", "padding"))
        if (a["weight"].shape[2 + d], step, pad) != (1, 1, 0):
            places[d] = reason
            t.labels.fix(axis, reason)
    if a["transposed"]:
        _sum(t, x[1], w[0])
        made = w[1]
        if groups > 1:
            outer, _ = t.labels.split(w[0], groups, size_in // groups, ("groups", "group channels"))
            made = t.labels.product(outer, w[1], groups, size_out // groups)
            _grouped(t, a, groups, outer)
    else:
        made = w[0]
        if groups == 1:
            _sum(t, x[1], w[1])
        else:
            outer, inner = t.labels.split(x[1], groups, size_in // groups, ("groups", "group channels"))
            if size_in > groups:
                _sum(t, inner, w[1])
            own, _ = t.labels.split(w[0], groups, size_out // groups, ("groups", "group channels"))
            _grouped(t, a, groups, t.labels.meet([outer, own], f" (in {t.where})"))
    _makes(t, [made, w[1] if a["transposed"] else made])
    if a["bias"] is not None:
        made = t.labels.meet([made, t.axis(a["bias"], 0)])
    t.put(out, [x[0], made, *places])


def _grouped(t: Trace, a: dict[str, Any], groups: int, axis: Axis) -> None:
    """Which number in the code is the number of groups."""
    _, args, kwargs = t.call
    given = kwargs.get(
        "groups", args[7 if a["transposed"] else 6] if len(args) > (7 if a["transposed"] else 6) else None
    )
    if a["transposed"] and len(args) > 6:
        given = kwargs.get("groups", args[6])
    if not isinstance(given, Size):
        module = t.model.get_submodule(t.path)
        known = getattr(module, "groups", None) == groups
        given = Size(groups, (t.path, "groups", -1), t.numbers) if known else groups
    calls.counts(t, given, axis, "a convolution as the number of groups")


def _mkldnn_rnn(t: Trace, a: dict[str, Any], out: Any) -> None:
    """One layer and direction of an LSTM: rows of the weights are 4 gates x hidden units."""
    x, hidden = t.axes(a["input"]), t.axis(a["weight1"], 1)
    _sum(t, x[-1], t.axis(a["weight0"], 1))
    n = a["weight1"].shape[1]
    for tensor in tensors([a[f"weight{i}"] for i in range(4)]):
        if tensor.numel():
            gates, units = t.labels.split(t.axis(tensor, 0), tensor.shape[0] // n, n, ("gates", "channels"))
            t.labels.fix(gates, "it is a gate")
            _makes(t, [t.axis(tensor, 0)])
            t.labels.meet([units, hidden])
    t.labels.meet([hidden, t.axis(a["hx_"], -1), t.axis(a["cx_"], -1)], f" (in {t.where})")
    for tensor in tensors(out):
        if tensor.dim() >= 2 and tensor.shape[-1] == n:
            outer = x[:-1] if tensor.dim() == len(x) and tensor.shape[0] == a["input"].shape[0] else []
            t.put(tensor, [*(outer or ["it is a state"] * (tensor.dim() - 1)), hidden])


RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _mm),
    "addmm": _add("mat1", "mat2"),
    "addmv": _add("mat", "vec"),
    "baddbmm": _add("batch1", "batch2"),
    "linear": _linear,
    "_grouped_mm": _grouped_mm,
    "convolution": _convolution,
    "_convolution": _convolution,
    "mkldnn_rnn_layer": _mkldnn_rnn,
}
