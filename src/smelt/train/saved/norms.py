"""Norms: what is held of them is their normalised input z, from which the gradient follows.

batch norm:  dx = gain / std * (g - mean(g) - z mean(g z)),  d gain = sum(g z)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smelt.train.saved.functions import Normalised, aten
from smelt.train.saved.held import Normed, dense
from smelt.train.saved.shelter import Shelter

Wanted = Sequence[bool]


def batch_norm(
    shelter: Shelter,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    x = input
    if x.dim() < 2 or not dense(x) or not x.numel() or (training and x.numel() == x.shape[1]):
        return NotImplemented
    with torch.no_grad():
        y, mean, rstd = aten.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
        if not training:
            assert running_mean is not None and running_var is not None
            mean, rstd = running_mean, (running_var + eps).rsqrt()
    shape = [1, -1] + [1] * (x.dim() - 2)

    def back(g: Tensor, z: Tensor, gain: Tensor | None, rstd: Tensor, wanted: Wanted) -> Any:
        whole = rstd if gain is None else gain.to(rstd.dtype) * rstd
        if not training:
            rest = [d for d in range(g.dim()) if d != 1]
            gain_slope = (g * z).sum(rest, dtype=rstd.dtype) if wanted[1] else None
            return (g * whole.view(shape)).to(g.dtype), gain_slope, g.sum(rest, dtype=rstd.dtype) if wanted[2] else None
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        mask = [wanted[0], wanted[1], wanted[2]]
        return aten.native_batch_norm_backward(g, z, whole, None, None, zeros, ones, True, eps, mask)

    return _normalised(shelter, x, weight, bias, y, mean.view(shape), rstd.view(shape), rstd, shape, back)


def layer_norm(
    shelter: Shelter,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    x = input
    if not x.is_contiguous() or not x.numel() or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    with torch.no_grad():
        y, mean, rstd = aten.native_layer_norm(x, normalized_shape, weight, bias, eps)

    def back(g: Tensor, z: Tensor, gain: Tensor | None, rstd: Tensor, wanted: Wanted) -> Any:
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        zero = None if gain is None else torch.zeros_like(gain)
        found = aten.native_layer_norm_backward(g, z, normalized_shape, zeros, ones, gain, zero, list(wanted))
        return (None if found[0] is None else (found[0] * rstd).to(g.dtype), *found[1:])

    return _normalised(shelter, x, weight, bias, y, mean, rstd, rstd, None, back)


def group_norm(
    shelter: Shelter,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    x = input
    if x.dim() < 2 or not x.is_contiguous() or not x.numel() or x.shape[1] % num_groups:
        return NotImplemented
    if weight is not None and weight.dtype != x.dtype:
        return NotImplemented
    n, c, rest = x.shape[0], x.shape[1], x[0, 0].numel()
    with torch.no_grad():
        y, mean, rstd = aten.native_group_norm(x, weight, bias, n, c, rest, num_groups, eps)
    shape = [1, -1] + [1] * (x.dim() - 2)

    def spread(side: Tensor) -> Tensor:
        return side.repeat_interleave(c // num_groups, 1).view(n, *shape[1:])

    def back(g: Tensor, z: Tensor, gain: Tensor | None, rstd: Tensor, wanted: Wanted) -> Any:
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        found = aten.native_group_norm_backward(g, z, zeros, ones, gain, n, c, rest, num_groups, list(wanted))
        return (None if found[0] is None else (found[0] * spread(rstd)).to(g.dtype), *found[1:])

    return _normalised(shelter, x, weight, bias, y, spread(mean), spread(rstd), rstd, shape, back)


def _normalised(
    shelter: Shelter,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    kept: Tensor,
    shape: list[int] | None,
    back: Callable[..., Any],
) -> Tensor:
    """mean, rstd: broadcast to x; shape: that of gain and bias to do so."""
    source = x.detach()

    def make() -> Tensor:
        return torch.addcmul(-mean * rstd, source, rstd).to(source.dtype)

    scale, shift = (None if side is None else side.detach().view(shape or side.shape) for side in (weight, bias))
    norm = Normed(make, y, scale, shift)
    shelter.count(source)
    shelter.taken += kept.numel() * kept.element_size()
    out: Tensor = Normalised.apply(x, weight, bias, [y], norm, kept, back)
    shelter.promise(out, norm)
    return out
