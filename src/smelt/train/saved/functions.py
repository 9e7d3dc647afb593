"""Operations with a backward pass of their own, which reads what the shelter holds.

Each takes what it needs of its inputs as a `Held`, and lets go of it when its gradient is known.  An output that is
known before comes as a list of one: a tensor given as it is would come back as a view, which nothing may change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smelt.train.saved.held import Gate, Held, Normed, flat, laid_out

aten = torch.ops.aten


def _once_more() -> bool:
    """Whether the graph stays after this backward pass."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _taken(ctx: Any) -> Any:
    """What an operation holds, for the last time unless the graph stays."""
    found = ctx.held
    if found is None:
        raise RuntimeError("a second backward pass through what was freed; give the first one retain_graph=True")
    if not _once_more():
        ctx.held = None
    return found


def _restored(held: tuple[Held, Any, Any], dtype: torch.dtype) -> Tensor:
    what, size, stride = held
    return what.read(dtype).as_strided(size, stride)


class Gated(torch.autograd.Function):
    """A piecewise linear function of which the output is known; held: its `Gate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: list[Tensor] | None, gate: Gate) -> Tensor:
        """y None: ReLU in place."""
        ctx.held, ctx.layout = gate, (x.size(), x.stride())
        if y is not None:
            return y[0]
        ctx.mark_dirty(x)
        return x.relu_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        size, stride = ctx.layout
        gate: Gate = _taken(ctx)
        return gate.through(flat(laid_out(g, size, stride))).as_strided(size, stride), None, None


class Sloped(torch.autograd.Function):
    """A function of each element by itself; held: its slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: list[Tensor], slope: tuple[Held, Any, Any]) -> Tensor:
        ctx.held = slope
        return y[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * _restored(_taken(ctx), g.dtype), None, None


class Masked(torch.autograd.Function):
    """Dropout; held: the gate of what it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: list[Tensor], gate: Gate, factor: float) -> Tensor:
        ctx.held, ctx.factor, ctx.layout = gate, factor, (x.size(), x.stride())
        return y[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        size, stride = ctx.layout
        gate: Gate = _taken(ctx)
        return gate.through(flat(laid_out(g, size, stride))).mul_(ctx.factor).as_strided(size, stride), None, None, None


class Pooled(torch.autograd.Function):
    """A pooling; held: what `backward` of it needs besides the gradient and an input of the right layout."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: list[Tensor], held: Any, back: Callable[[Tensor, Tensor, Any], Tensor]
    ) -> Tensor:
        ctx.held, ctx.back, ctx.layout = held, back, (x.size(), x.stride(), x.dtype)
        return y[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        size, stride, dtype = ctx.layout
        like = torch.empty_strided(size, stride, dtype=dtype, device=g.device)
        return ctx.back(g, like, _taken(ctx)), None, None, None


class Convolved(torch.autograd.Function):
    """held: the input, or () where the weight does not learn."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, held: Any, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.held, ctx.settings, ctx.layout = held, settings, (x.size(), x.stride(), x.dtype)
        ctx.sizes = None if bias is None else list(bias.shape)
        return aten.convolution(x, weight, bias, *settings)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (weight,), held = ctx.saved_tensors, _taken(ctx)
        size, stride, dtype = ctx.layout
        wanted = list(ctx.needs_input_grad[:3])
        wanted[2] = wanted[2] and ctx.sizes is not None
        x = _restored(held, dtype) if held else torch.empty_strided(size, stride, dtype=dtype, device=g.device)
        found = aten.convolution_backward(g, x, weight, ctx.sizes, *ctx.settings, wanted)
        return (*found, None, None)


class Linear(torch.autograd.Function):
    """held: the input, or () where the weight does not learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, held: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.held = held
        y = torch.nn.functional.linear(x, weight, bias)
        return aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (weight,), held = ctx.saved_tensors, _taken(ctx)
        gx = g @ weight if ctx.needs_input_grad[0] else None
        rows = g.reshape(-1, g.shape[-1])
        gw = None
        if ctx.needs_input_grad[1]:
            x = _restored(held, g.dtype)
            gw = rows.t() @ x.reshape(-1, x.shape[-1])
        return gx, gw, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class Normalised(torch.autograd.Function):
    """A norm of which the output is known; held: its normalised input.

    back: (gradient, normalised input, weight) -> gradients of input, weight and bias, those of the input as they would
        be if the input had been normalised already; `rstd` makes up for that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: list[Tensor],
        norm: Normed,
        rstd: Tensor,
        back: Any,
    ) -> Tensor:
        ctx.save_for_backward(weight, rstd)
        ctx.held, ctx.back, ctx.dtype = norm, back, x.dtype
        return y[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        weight, rstd = ctx.saved_tensors
        norm: Normed = _taken(ctx)
        z = norm.normal(ctx.dtype).as_strided(norm.size, norm.stride)
        g = laid_out(g, norm.size, norm.stride)
        gx, gw, gb = ctx.back(g, z, weight, rstd, ctx.needs_input_grad[:3])
        return gx, gw, gb, None, None, None, None
