"""Smallest and largest value of each channel, for each call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from smelt.core.statistic import Statistic
from smelt.statistics.range import ends


class ChannelRanges(Statistic):
    """`result()` is (lows, highs), each [calls, *shape] with the `shape` of `by_channel`."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        rows, shape = by_channel(self.module, x)
        low, high = ends(rows, dim=1)
        self.seen.append((low.reshape(shape), high.reshape(shape)))

    def result(self) -> tuple[Tensor, Tensor]:
        return torch.stack([low for low, _ in self.seen]), torch.stack([high for _, high in self.seen])


def by_channel(module: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    """([channels, values], shape of one number per channel) of what a module sees.

    The channels lie along dimension 1 of [n, channels, ...] for convolutions and batch norms, along the last elsewhere.
    The shape has two dimensions or more, ends where `x` ends and broadcasts to it: [1, channels, 1, 1] for images,
    [1, channels] for linear layers.
    """
    after = 0
    if isinstance(module, _ConvNd):
        after = len(module.kernel_size)
    elif isinstance(module, _NormBase):
        after = x.dim() - 2
    dim = x.dim() - 1 - after
    return x.movedim(dim, 0).flatten(1) if x.dim() > 1 else x[:, None], [1, x.shape[dim], *[1] * after]
