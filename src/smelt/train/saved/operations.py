"""How the operations of a forward pass are replaced, by the function that was called.

A handler takes what the function takes, after the shelter, and answers NotImplemented where the function shall run as
it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smelt.forms.grouped import packed, unpacked
from smelt.train.saved import norms
from smelt.train.saved.functions import Convolved, Gated, Linear, Masked, Pooled, Sloped, aten
from smelt.train.saved.held import dense
from smelt.train.saved.shelter import FLOATS, Shelter

Handler = Callable[..., Any]


def relu(shelter: Shelter, input: Tensor, inplace: bool = False) -> Any:
    if not input.requires_grad or not dense(input):
        return NotImplemented
    gate, held = shelter.rectified(input.detach())
    y: Tensor = Gated.apply(input, None if inplace else [input.detach().relu()], gate)
    shelter.count(y.detach())
    shelter.put(y, held)
    return y


def relu_(shelter: Shelter, input: Tensor) -> Any:
    return relu(shelter, input, inplace=True)


def hardtanh(
    shelter: Shelter, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    x = input.detach()
    wide = x.float() if x.itemsize < 4 else x  # bounds are not rounded to the type of x
    where = (wide > min_val) & (wide < max_val)
    return _piecewise(shelter, input, F.hardtanh(x, min_val, max_val), where, 0.0, inplace)


def relu6(shelter: Shelter, input: Tensor, inplace: bool = False) -> Any:
    return hardtanh(shelter, input, 0.0, 6.0, inplace)


def leaky_relu(shelter: Shelter, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return _piecewise(shelter, input, F.leaky_relu(input.detach(), negative_slope), None, negative_slope, inplace)


def _piecewise(shelter: Shelter, x: Tensor, y: Tensor, where: Tensor | None, slope: float, inplace: bool) -> Any:
    if inplace or not x.requires_grad or not dense(x):
        return NotImplemented
    shelter.settle()
    shelter.count(x.detach())
    return Gated.apply(x, [y], shelter.gate(x.detach(), where, slope))


def smooth(function: Callable[..., Tensor]) -> Handler:
    """The handler of a function of each element by itself: its slope is stored, so that the gradient is unbiased."""

    def handler(shelter: Shelter, input: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        inplace = inplace or any(a is True for a in args)
        if inplace or not input.requires_grad or input.dtype not in FLOATS:
            return NotImplemented
        shelter.settle()
        with torch.enable_grad():
            x = input.detach().requires_grad_()
            y = function(x, *args, **kwargs)
            (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
        shelter.count(x.detach())
        return Sloped.apply(input, [y.detach_()], shelter.held(slope))

    return handler


def dropout(shelter: Shelter, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if inplace or not training or not 0 < p < 1 or not input.requires_grad or not dense(input):
        return NotImplemented
    shelter.settle()
    noise = torch.empty_like(input).bernoulli_(1 - p)
    gate = shelter.gate(noise)
    shelter.count(noise.detach())
    return Masked.apply(input, [input.detach() * noise.div_(1 - p)], gate, 1 / (1 - p))


def max_pool2d(
    shelter: Shelter,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Of each maximum, where it is in its window."""
    kernel, pad, apart = _pair(kernel_size), _pair(padding), _pair(dilation)
    step = _pair(stride) if stride else kernel
    window = kernel[0] * kernel[1]
    if return_indices or not input.requires_grad or input.dim() != 4 or window > 256:
        return NotImplemented
    shelter.settle()
    x = input.detach()
    y, index = aten.max_pool2d_with_indices(x, kernel, step, pad, apart, ceil_mode)
    shelter.count(x, index)
    row = torch.arange(y.shape[2], device=x.device)[:, None] * step[0] - pad[0]
    column = torch.arange(y.shape[3], device=x.device) * step[1] - pad[1]
    width = x.shape[3]
    down, right = (index // width - row) // apart[0], (index % width - column) // apart[1]
    place = (down * kernel[1] + right).to(torch.uint8).contiguous()
    bits = max(1, math.ceil(math.log2(window)))
    codes = packed(place.flatten(), bits)
    shelter.taken += codes.numel()
    size = y.shape

    def back(g: Tensor, like: Tensor, held: Tensor) -> Tensor:
        found = unpacked(held, bits, size.numel()).view(size).long()
        index = (found // kernel[1] * apart[0] + row) * width + found % kernel[1] * apart[1] + column
        g = g.contiguous(memory_format=torch.contiguous_format)
        like = like.contiguous()
        index = index.contiguous()
        return aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]
            g, like, kernel, step, pad, apart, ceil_mode, index
        )

    return Pooled.apply(input, [y], codes, back)


def avg_pool2d(
    shelter: Shelter,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if not input.requires_grad:
        return NotImplemented
    shelter.settle()
    x = input.detach()
    shelter.count(x)
    settings = (_pair(kernel_size), _pair(stride) if stride else [], _pair(padding), ceil_mode, count_include_pad)

    def back(g: Tensor, like: Tensor, held: Any) -> Tensor:
        return aten.avg_pool2d_backward(g, like, *settings, divisor_override)  # type: ignore[no-any-return]

    return Pooled.apply(input, [aten.avg_pool2d(x, *settings, divisor_override)], (), back)


def adaptive_avg_pool2d(shelter: Shelter, input: Tensor, output_size: Any) -> Any:
    size = [n or m for n, m in zip(_pair(output_size), input.shape[-2:], strict=True)]
    if not input.requires_grad or size == [1, 1]:
        return NotImplemented  # a mean, which saves nothing
    shelter.settle()
    x = input.detach()
    shelter.count(x)

    def back(g: Tensor, like: Tensor, held: Any) -> Tensor:
        return aten._adaptive_avg_pool2d_backward(g, like)  # type: ignore[no-any-return]

    return Pooled.apply(input, [aten._adaptive_avg_pool2d(x, size)], (), back)


def convolution(dims: int, transposed: bool) -> Handler:
    def call(
        shelter: Shelter,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        stride: Any,
        padding: Any,
        more: Any,
        dilation: Any,
        groups: int,
    ) -> Any:
        if x.dim() != weight.dim():
            return NotImplemented
        apart = _many(dilation, dims)
        if isinstance(padding, str):
            spans = [d * (k - 1) for d, k in zip(apart, weight.shape[2:], strict=True)]
            if padding == "same" and any(span % 2 for span in spans):
                return NotImplemented
            padding = [0] * dims if padding == "valid" else [span // 2 for span in spans]
        shelter.settle()
        source, (x, weight, bias) = x, _cast(x, weight, bias)
        shelter.count(x.detach() if weight.requires_grad else None)
        held = shelter.held(source) if weight.requires_grad else ()
        settings = (_many(stride, dims), _many(padding, dims), apart, transposed, _many(more, dims), groups)
        return Convolved.apply(x, weight, bias, held, settings)

    if transposed:

        def handler(
            shelter: Shelter,
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Any = 1,
            padding: Any = 0,
            output_padding: Any = 0,
            groups: int = 1,
            dilation: Any = 1,
        ) -> Any:
            return call(shelter, input, weight, bias, stride, padding, output_padding, dilation, groups)

        return handler

    def plain(
        shelter: Shelter,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        return call(shelter, input, weight, bias, stride, padding, 0, dilation, groups)

    return plain


def linear(shelter: Shelter, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if input.dim() < 2 or weight.dim() != 2:
        return NotImplemented
    shelter.settle()
    x, weight, bias = _cast(input, weight, bias)
    shelter.count(x.detach() if weight.requires_grad else None)
    return Linear.apply(x, weight, bias, shelter.held(input) if weight.requires_grad else ())


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast would."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _many(value: Any, n: int) -> list[int]:
    return [int(value)] * n if isinstance(value, int) else [int(v) for v in value] * (n if len(value) == 1 < n else 1)


def _pair(value: Any) -> list[Any]:
    return [value] * 2 if isinstance(value, int) or value is None else list(value) * (2 if len(value) == 1 else 1)


def _table() -> dict[Any, Handler]:
    found: dict[Any, Handler] = dict.fromkeys((F.relu, torch.relu, Tensor.relu), relu)
    found |= dict.fromkeys((torch.relu_, Tensor.relu_), relu_)
    found |= {F.hardtanh: hardtanh, F.relu6: relu6, F.leaky_relu: leaky_relu, F.dropout: dropout}
    found |= {torch.dropout: dropout, F.batch_norm: norms.batch_norm, F.layer_norm: norms.layer_norm}
    found |= {F.group_norm: norms.group_norm, F.linear: linear, F.avg_pool2d: avg_pool2d}
    found |= dict.fromkeys((F.max_pool2d, torch.max_pool2d), max_pool2d)
    found[F.adaptive_avg_pool2d] = adaptive_avg_pool2d
    for dims in (1, 2, 3):
        found[getattr(F, f"conv{dims}d")] = convolution(dims, False)
        found[getattr(F, f"conv_transpose{dims}d")] = convolution(dims, True)
    names = "gelu silu mish hardswish hardsigmoid softplus elu selu celu sigmoid tanh logsigmoid softsign"
    for name in names.split():
        for owner in (F, torch, Tensor):
            function = getattr(owner, name, None)
            if function is not None:
                found[function] = smooth(function)
    return found


HANDLERS = _table()
