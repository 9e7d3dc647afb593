"""MobileNetV3: inverted residuals with squeeze and excitation and hard swish.

Source: A. Howard et al., Searching for MobileNetV3, 2019 (arXiv:1905.02244), tables 1 (large) and 2 (small).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from smelt.core.errors import ModelError, nearest
from smelt.models._blocks import (
    Residual,
    SqueezeExcite,
    activation,
    classifier,
    conv_norm,
    each,
    initialise,
    inverted,
    rounded,
)
from smelt.models._timm import from_timm

COLUMNS = ("kernels", "hidden", "channels", "squeeze", "acts", "strides")  # of each block
Row = tuple[int, int, int, bool, str, int]
LARGE: tuple[Row, ...] = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2),
    (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1),
    (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2),
    (5, 960, 160, True, "hardswish", 1),
    (5, 960, 160, True, "hardswish", 1),
)
SMALL: tuple[Row, ...] = (
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hardswish", 2),
    (5, 240, 40, True, "hardswish", 1),
    (5, 240, 40, True, "hardswish", 1),
    (5, 120, 48, True, "hardswish", 1),
    (5, 144, 48, True, "hardswish", 1),
    (5, 288, 96, True, "hardswish", 2),
    (5, 576, 96, True, "hardswish", 1),
    (5, 576, 96, True, "hardswish", 1),
)
VERSIONS = {"large": (LARGE, 1280), "small": (SMALL, 1024)}


def build(
    version: str = "large",
    width: float = 1.0,
    classes: int = 1000,
    inputs: int = 3,
    stem: int = 16,
    stem_stride: int = 2,
    kernels: int | Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    squeeze: bool | Sequence[bool] | None = None,
    acts: str | Sequence[str] | None = None,
    strides: int | Sequence[int] | None = None,
    head: int | None = None,
    dropout: float = 0.2,
    eps: float = 1e-3,
) -> nn.Module:
    """5,483,032 parameters and 217 M multiply-accumulates at 224x224 (small: 2,542,856, 57 M); torchvision's fit.

    The weights of timm want `eps=1e-5`.  `stem_stride=1` and fewer strides of 2 suit images of 32x32.

    Args:
        version: 'large' or 'small', the table from which comes what is not given.
        width: the width multiplier, of all channels, rounded to multiples of 8.
        channels: that come out of each block; `hidden` inside, after the first 1x1; both before `width`.
        kernels, squeeze, acts, strides: of the depthwise convolutions, one for all blocks or one each.
        head: channels before the last layer; 1,280 or 1,024 times `width` if it is None.
        eps: of the batch norms.

    Raises:
        ModelError: no such version or activation, lists of unlike lengths, an even kernel.
    """
    if version not in VERSIONS:
        raise ModelError(f"mobilenet_v3: no version {version!r}{nearest(str(version), VERSIONS)}; large or small")
    rows, last = VERSIONS[version]
    given = (kernels, hidden, channels, squeeze, acts, strides)
    table = [of if own is None else own for own, of in zip(given, zip(*rows, strict=True), strict=True)]
    n = len(rows if channels is None else channels)
    columns = [each(values, n, name) for values, name in zip(table, COLUMNS, strict=True)]
    unit = partial(conv_norm, eps=eps, momentum=0.01)
    before = rounded(stem * width)
    features: list[nn.Module] = [unit(inputs, before, 3, stem_stride, act="hardswish")]
    for kernel, inside, after, squeezes, act, stride in zip(*columns, strict=True):
        inside, after = rounded(inside * width), rounded(after * width)
        gate = SqueezeExcite(inside, rounded(inside // 4), "relu", "hardsigmoid") if squeezes else None
        layers = inverted(unit, before, inside, after, kernel, stride, act, gate)
        features.append(Residual(layers, stride == 1 and before == after))
        before = after
    features.append(unit(before, 6 * before, act="hardswish"))
    wide = rounded(last * width) if head is None else head
    deep = [nn.Linear(6 * before, wide), activation("hardswish"), nn.Dropout(dropout), nn.Linear(wide, classes)]
    model = classifier(features, deep)
    initialise(model)
    return model


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of timm's mobilenetv3 with the names of these layers; its head is a 1x1 convolution there."""
    ends = {
        "conv_stem": "features.0.0",
        "bn1": "features.0.1",
        "conv_head": "classifier.0",
        "classifier": "classifier.3",
    }
    ends |= {
        "blocks.{stages}.0.conv": "features.{after_blocks}.0",
        "blocks.{stages}.0.bn1": "features.{after_blocks}.1",
    }
    made = from_timm(state, lambda stage, at, number: f"features.{number + 1}.block", ends)
    head = made.get("classifier.0.weight")
    if isinstance(head, Tensor) and head.dim() == 4:
        made["classifier.0.weight"] = head.flatten(1)
    return made
