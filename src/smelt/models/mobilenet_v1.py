"""MobileNet: depthwise and 1x1 convolutions in turn.

Source: A. Howard et al., MobileNets: efficient convolutional neural networks for mobile vision applications, 2017
(arXiv:1704.04861), table 1; ReLU6, dropout and initial weights as in the authors' TensorFlow code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from smelt.models._blocks import classifier, conv_norm, each, initialise, rounded
from smelt.models._timm import from_timm


def build(
    width: float = 1.0,
    classes: int = 1000,
    inputs: int = 3,
    stem: int = 32,
    stem_stride: int = 2,
    channels: Sequence[int] = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024),
    strides: int | Sequence[int] = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1),
    kernels: int | Sequence[int] = 3,
    act: str = "relu6",
    dropout: float = 0.001,
) -> nn.Module:
    """4,231,976 parameters and 569 M multiply-accumulates at 224x224 by default.

    The paper's resolution multiplier is the size of the images; any size does.  `stem_stride=1` suits 32x32.

    Args:
        width: the width multiplier, of all channels; what comes out is rounded to a multiple of 8.
        channels: of each block, before `width`; `stem` of the convolution in front.
        strides, kernels: of the depthwise convolutions, one for all blocks or one each.

    Raises:
        ModelError: lists of unlike lengths, an activation that is not known, an even kernel.
    """
    before = rounded(stem * width)
    features: list[nn.Module] = [conv_norm(inputs, before, 3, stem_stride, act=act)]
    n = len(channels)
    for after, stride, kernel in zip(channels, each(strides, n, "strides"), each(kernels, n, "kernels"), strict=True):
        after = rounded(after * width)
        deep = conv_norm(before, before, kernel, stride, before, act)
        features.append(nn.Sequential(deep, conv_norm(before, after, act=act)))
        before = after
    model = classifier(features, [nn.Dropout(dropout), nn.Linear(before, classes)])
    initialise(model, truncated, truncated)
    return model


def truncated(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, 0, 0.09, -0.18, 0.18)


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of timm's mobilenetv1 with the names of these layers."""
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    return from_timm(state, lambda stage, at, number: f"features.{number + 1}", ends)
