"""MobileNetV2: inverted residuals with linear bottlenecks.

Source: M. Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, 2018 (arXiv:1801.04381), table 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from smelt.models._blocks import classifier, conv_norm, each, initialise, inverted, rounded
from smelt.models._timm import from_timm


def build(
    width: float = 1.0,
    classes: int = 1000,
    inputs: int = 3,
    stem: int = 32,
    stem_stride: int = 2,
    channels: Sequence[int] = (16, 24, 32, 64, 96, 160, 320),
    depths: int | Sequence[int] = (1, 2, 3, 4, 3, 3, 1),
    strides: int | Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
    expansions: float | Sequence[Any] = (1, 6, 6, 6, 6, 6, 6),
    kernels: int | Sequence[Any] = 3,
    head: int = 1280,
    act: str = "relu6",
    dropout: float = 0.2,
    divisor: int = 8,
) -> nn.Module:
    """3,504,872 parameters and 301 M multiply-accumulates at 224x224 by default; torchvision's weights fit.

    `stem_stride=1, strides=(1, 1, 2, 2, 1, 2, 1)` suits images of 32x32.

    Args:
        width: the width multiplier, of all channels (of `head` only above 1), rounded to multiples of `divisor`.
        channels: of each stage, before `width`; `stem` of the convolution in front, `head` of the one at the end.
        depths, strides: blocks of each stage, and the stride of the first of them.
        expansions, kernels: of the depthwise convolutions; one for all, one for each stage, or a list of a stage's
            blocks in its place.

    Raises:
        ModelError: lists of unlike lengths, an activation that is not known, an even kernel.
    """
    n = len(channels)
    before = rounded(stem * width, divisor)
    features: list[nn.Module] = [conv_norm(inputs, before, 3, stem_stride, act=act)]
    for after, depth, stride, wider, kernel in zip(
        channels,
        each(depths, n, "depths"),
        each(strides, n, "strides"),
        each(expansions, n, "expansions"),
        each(kernels, n, "kernels"),
        strict=True,
    ):
        after = rounded(after * width, divisor)
        blocks = zip(
            each(wider, depth, "expansions of a stage"), each(kernel, depth, "kernels of a stage"), strict=True
        )
        for i, (t, k) in enumerate(blocks):
            features.append(Block(before, round(before * t), after, k, 1 if i else stride, act))
            before = after
    last = rounded(head * max(1.0, width), divisor)
    features.append(conv_norm(before, last, act=act))
    model = classifier(features, [nn.Dropout(dropout), nn.Linear(last, classes)])
    initialise(model)
    return model


class Block(nn.Module):
    """`inverted`, added to its input where the shape stays; the last two layers lie with the others."""

    def __init__(self, before: int, hidden: int, after: int, kernel: int, stride: int, act: str):
        super().__init__()
        *layers, last = inverted(conv_norm, before, hidden, after, kernel, stride, act)
        self.conv = nn.Sequential(*layers, *last.children())
        self._adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self._adds else self.conv(x)  # type: ignore[no-any-return]


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of timm's mobilenetv2 with the names of these layers."""
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    ends |= {"conv_head": "features.{after_blocks}.0", "bn2": "features.{after_blocks}.1"}
    return from_timm(state, lambda stage, at, number: f"features.{number + 1}.conv", ends, flat=True)
