"""ShuffleNet: grouped 1x1 convolutions with a shuffle of channels between them.

Source: X. Zhang et al., ShuffleNet: an extremely efficient convolutional neural network for mobile devices, 2017
(arXiv:1707.01083), table 1; layers are named, and weights initialised, as in the authors' PyTorch code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.errors import ModelError
from smelt.models._blocks import conv_norm, each, initialise, named, one_over_inputs, rounded, shuffle, small

WIDTHS = {
    1: 144,
    2: 200,
    3: 240,
    4: 272,
    8: 384,
}  # groups -> channels of the first stage; each later one has twice those


def build(
    groups: int = 3,
    width: float = 1.0,
    classes: int = 1000,
    inputs: int = 3,
    stem: int = 24,
    stem_stride: int = 2,
    pool: bool = True,
    channels: Sequence[int] | None = None,
    depths: int | Sequence[int] = (4, 8, 4),
    strides: int | Sequence[int] = 2,
    kernels: int | Sequence[int] = 3,
    squeeze: int = 4,
    authors: bool = False,
) -> nn.Module:
    """1,864,728 parameters and 137 M multiply-accumulates at 224x224 by default.

    `stem_stride=1, pool=False` suits images of 32x32.

    Args:
        groups: of the 1x1 convolutions, 1, 2, 3, 4 or 8 (others need `channels`).
        width: the width multiplier, of all channels, rounded to multiples of the groups.
        channels: of each stage, before `width`; `stem` of the convolution in front.
        depths, strides, kernels: units of each stage, stride of the first of them, depthwise kernels.
        squeeze: how many times fewer channels there are inside a unit.
        authors: shuffle as the authors' code does, [n, groups] -> [groups, n], and not as their paper says, the
            other way; their weights want it.

    Raises:
        ModelError: groups that no table names, a stage that is no wider than what is before it, lists of unlike
            lengths, an even kernel.
    """
    if channels is None:
        if groups not in WIDTHS:
            raise ModelError(
                f"shufflenet_v1: groups={groups} needs channels; without, one of {', '.join(map(str, WIDTHS))}"
            )
        channels = [WIDTHS[groups] * 2**i for i in range(3)]
    n = len(channels)
    before = rounded(stem * width, groups)
    first = conv_norm(inputs, before, 3, stem_stride, act="relu")
    units: list[nn.Module] = []
    for after, depth, stride, kernel in zip(
        channels, each(depths, n, "depths"), each(strides, n, "strides"), each(kernels, n, "kernels"), strict=True
    ):
        after = rounded(after * width, squeeze * groups)
        if after <= before:
            raise ModelError(f"shufflenet_v1: a stage has {after} channels after {before}; it takes more than before")
        for i in range(depth):
            step = 1 if i else stride
            units.append(Unit(before, after, groups, groups if units else 1, after // squeeze, kernel, step, authors))
            before = after
    model = named(
        first_conv=first,
        maxpool=nn.MaxPool2d(3, 2, 1) if pool else nn.Identity(),
        features=nn.Sequential(*units),
        globalpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(nn.Linear(before, classes, bias=False)),
    )
    initialise(model, one_over_inputs)
    small(model.get_parameter("first_conv.0.weight"))
    return model


class Unit(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; added to the input, or beside the input's means if it strides."""

    def __init__(
        self, before: int, after: int, groups: int, first: int, hidden: int, kernel: int, stride: int, authors: bool
    ):
        super().__init__()
        self._groups, self._authors = groups, authors
        self._beside = stride > 1 or before != after
        self.branch_main_1 = nn.Sequential(
            *conv_norm(before, hidden, groups=first, act="relu").children(),
            *conv_norm(hidden, hidden, kernel, stride, hidden).children(),
        )
        self.branch_main_2 = conv_norm(hidden, after - before if self._beside else after, groups=groups)
        self.branch_proj = nn.AvgPool2d(3, stride, 1) if self._beside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch_main_1(x)
        if self._groups > 1:
            y = shuffle(y, y.shape[1] // self._groups if self._authors else self._groups)
        y = self.branch_main_2(y)
        if self._beside:
            return torch.cat((self.branch_proj(x), functional.relu(y)), 1)
        return functional.relu(x + y)
