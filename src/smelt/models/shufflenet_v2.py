"""ShuffleNetV2: half of the channels pass by, then all are shuffled.

Source: N. Ma et al., ShuffleNet V2: practical guidelines for efficient CNN architecture design, 2018
(arXiv:1807.11164), table 5; weights initialised as in the authors' PyTorch code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor, nn

from smelt.models._blocks import conv_norm, each, initialise, named, one_over_inputs, rounded, shuffle, small

WIDTHS = {0.5: 48, 1.0: 116, 1.5: 176, 2.0: 244}  # width -> channels of the first stage; each later one has twice those


def build(
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
    head: int | None = None,
) -> nn.Module:
    """2,278,604 parameters and 145 M multiply-accumulates at 224x224 by default; torchvision's weights fit.

    `stem_stride=1, pool=False` suits images of 32x32.

    Args:
        width: 0.5, 1, 1.5 and 2 have the channels of the paper's table, others 116 times that, made even.
        channels: of each stage, in place of those, made even; `stem` of the convolution in front.
        depths, strides, kernels: units of each stage, stride of the first of them, depthwise kernels.
        head: channels of the convolution at the end; 1,024, from `width=2` on 2,048, if it is None.

    Raises:
        ModelError: lists of unlike lengths, an even kernel.
    """
    first = WIDTHS.get(width, 116 * width)
    channels = [rounded(c, 2) for c in ([first, 2 * first, 4 * first] if channels is None else channels)]
    n = len(channels)
    before = stem
    stages: dict[str, nn.Module] = {}
    for i, after, depth, stride, kernel in zip(
        count(2),
        channels,
        each(depths, n, "depths"),
        each(strides, n, "strides"),
        each(kernels, n, "kernels"),
        strict=False,
    ):
        stages[f"stage{i}"] = stage = nn.Sequential(Unit(before, after, kernel, stride))
        stage.extend(Unit(after, after, kernel, 1) for _ in range(depth - 1))
        before = after
    last = head or (2048 if width >= 2 else 1024)
    stages[f"conv{n + 2}"] = conv_norm(before, last, act="relu")
    model = named(
        conv1=conv_norm(inputs, stem, 3, stem_stride, act="relu"),
        maxpool=nn.MaxPool2d(3, 2, 1) if pool else nn.Identity(),
        **stages,
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(last, classes),
    )
    initialise(model, one_over_inputs)
    small(model.get_parameter("conv1.0.weight"))
    return model


class Unit(nn.Module):
    """1x1, depthwise, 1x1 on half of the channels, or on all, which then all go through a second branch as well."""

    def __init__(self, before: int, after: int, kernel: int, stride: int):
        super().__init__()
        half = after // 2
        self._all = stride > 1 or before != after
        own = before if self._all else half
        side = (conv_norm(own, own, kernel, stride, own), conv_norm(own, half, act="relu")) if self._all else ()
        main = (
            conv_norm(own, half, act="relu"),
            conv_norm(half, half, kernel, stride, half),
            conv_norm(half, half, act="relu"),
        )
        self.branch1 = nn.Sequential(*(layer for unit in side for layer in unit))
        self.branch2 = nn.Sequential(*(layer for unit in main for layer in unit))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x, x) if self._all else x.chunk(2, 1)
        return shuffle(torch.cat((self.branch1(a), self.branch2(b)), 1), 2)
