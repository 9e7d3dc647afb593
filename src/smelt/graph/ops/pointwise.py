"""Operators that act on each element alone, with broadcasting; new tensors of one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smelt.core.data import tensors
from smelt.graph.labels import Axis

if TYPE_CHECKING:
    from smelt.graph.trace import Trace


def pointwise(t: Trace, a: dict[str, Any], out: Any) -> None:
    inputs = list(tensors(list(a.values())))
    for result in tensors(out):
        t.put(result, broadcast(t, inputs, result.shape))


def broadcast(t: Trace, inputs: Sequence[Tensor], shape: Sequence[int]) -> list[Axis]:
    """The axes of a result of this shape."""
    found: list[Axis] = []
    for dim, size in enumerate(shape):
        back = dim - len(shape)
        met = [x for x in inputs if x.dim() >= -back and x.shape[back] == size]
        if size == 1 or not met:
            found.append("it has one coordinate")
        else:
            found.append(t.labels.meet([t.axis(x, back) for x in met], f" (in {t.where})"))
    return found


def _constant(t: Trace, a: dict[str, Any], out: Tensor) -> None:
    t.put(out, [t.labels.fresh(size, "constant") if size > 1 else "" for size in out.shape])


RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("zeros", "ones", "full", "empty", "scalar_tensor"), _constant),
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided"), _constant
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"), pointwise),
    **dict.fromkeys(("clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous"), pointwise),
    **dict.fromkeys(("copy", "fill", "zero", "masked_fill", "where", "dropout", "native_dropout"), pointwise),
    **dict.fromkeys(
        ("prelu", "_prelu_kernel", "lerp", "addcmul", "addcdiv", "bernoulli", "_conj", "real", "imag"), pointwise
    ),
    **dict.fromkeys(
        ("rrelu_with_noise", "resolve_conj", "resolve_neg", "hardswish", "gelu", "mish", "arctanh"), pointwise
    ),
    **dict.fromkeys(("log_sigmoid_forward", "_add_relu", "set_data", "requires_grad", "_fused_dropout"), pointwise),
}
