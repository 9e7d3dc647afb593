"""Mean square of what each weight of a layer multiplies."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic
from smelt.statistics.gram import geometry


class SecondMoment(Statistic):
    """`result()`: float64, on the CPU, of a shape that broadcasts to the module's weight.

    The diagonal of the Gram matrix of the inputs, divided by their number.  Summed over the weights, result *
    (error of the weight)^2 is the expected squared error at the output, if the inputs were not correlated (Choi et al.
    2017, arXiv:1612.01543).

    linear: [in], over all positions.  Convolution: [out or 1, in / groups, *kernel], over the places where the
    kernel is laid, padding included.  Transposed convolution: [in, 1, ...].  Others: over all but the last dimension.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.total: Tensor | None = None
        self.number = 0

    @classmethod
    def kind(cls, module: nn.Module) -> Hashable:
        return geometry(module)

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(self.module, _ConvTransposeNd):
            x = x.movedim(-1 - len(self.module.kernel_size), -1)
        elif isinstance(self.module, _ConvNd):
            total, number = _under_kernel(self.module, x)
            return self._add(total, number)
        return self._add(x.square().reshape(-1, x.shape[-1]).sum(0), x.numel() // x.shape[-1])

    def _add(self, total: Tensor, number: int) -> None:
        if not bool(torch.isfinite(total).all()):
            raise DataError("there are NaN or infinite values in a calibration batch")
        total = total.cpu().double()
        self.total = total if self.total is None else self.total + total
        self.number += number

    def result(self) -> Tensor:
        assert self.total is not None
        mean = self.total / self.number
        if isinstance(self.module, _ConvTransposeNd):
            return mean.reshape(-1, *[1] * (1 + len(self.module.kernel_size)))
        if isinstance(self.module, _ConvNd) and self.module.groups > 1:
            groups = mean.reshape(self.module.groups, -1, *mean.shape[1:])
            return groups.repeat_interleave(self.module.out_channels // self.module.groups, 0)
        return mean[None] if isinstance(self.module, _ConvNd) else mean


def _under_kernel(module: _ConvNd, x: Tensor) -> tuple[Tensor, int]:
    """(sums of squares [in, *kernel], number of places) of [n, in, ...] or [in, ...]."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if x.dim() == 1 + len(module.kernel_size):
        x = x[None]
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode).square()
    geometry = list(zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True))
    places = [(size - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, step in geometry]
    sums = []
    for offset in product(*map(range, module.kernel_size)):
        cut = [
            slice(at * step, at * step + (number - 1) * stride + 1, stride)
            for at, number, (_, _, stride, step) in zip(offset, places, geometry, strict=True)
        ]
        sums.append(x[(slice(None), slice(None), *cut)].transpose(0, 1).flatten(1).sum(1))
    number = len(x)
    for n in places:
        number *= n
    return torch.stack(sums, 1).unflatten(1, module.kernel_size), number
