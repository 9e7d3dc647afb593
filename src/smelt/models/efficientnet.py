"""EfficientNet: inverted residuals whose depth, width and resolution grow together.

Source: M. Tan and Q. Le, EfficientNet: rethinking model scaling for convolutional neural networks, 2019
(arXiv:1905.11946), table 1 and equation 3; B1 to B7 by the coefficients that the authors published with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from smelt.core.errors import ModelError, nearest
from smelt.models._blocks import Residual, SqueezeExcite, classifier, conv_norm, each, initialise, inverted, rounded
from smelt.models._timm import from_timm

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15  # of depth, width and resolution: alpha * beta^2 * gamma^2 is about 2


class Scaling(NamedTuple):
    """Factors of depth and width, pixels of a side of the images, and the dropout that goes with them."""

    depth: float
    width: float
    size: int
    dropout: float


VERSIONS = {
    "b0": Scaling(1.0, 1.0, 224, 0.2),
    "b1": Scaling(1.1, 1.0, 240, 0.2),
    "b2": Scaling(1.2, 1.1, 260, 0.3),
    "b3": Scaling(1.4, 1.2, 300, 0.3),
    "b4": Scaling(1.8, 1.4, 380, 0.4),
    "b5": Scaling(2.2, 1.6, 456, 0.4),
    "b6": Scaling(2.6, 1.8, 528, 0.5),
    "b7": Scaling(3.1, 2.0, 600, 0.5),
}


def scaling(scale: str | float) -> Scaling:
    """The published coefficients of 'b0' to 'b7', or those of a compound coefficient phi.

    depth = 1.2^phi, width = 1.1^phi, size = 224 * 1.15^phi (rounded); each step of phi about doubles the work.

    Raises:
        ModelError: no such version.
    """
    if isinstance(scale, str):
        if scale not in VERSIONS:
            raise ModelError(f"efficientnet: no version {scale!r}{nearest(scale, VERSIONS)}; b0 to b7, or a number phi")
        return VERSIONS[scale]
    return Scaling(ALPHA**scale, BETA**scale, round(224 * GAMMA**scale), 0.2)


def build(
    scale: str | float = "b0",
    depth: float | None = None,
    width: float | None = None,
    classes: int = 1000,
    inputs: int = 3,
    stem: int = 32,
    stem_stride: int = 2,
    channels: Sequence[int] = (16, 24, 40, 80, 112, 192, 320),
    depths: int | Sequence[int] = (1, 2, 2, 3, 3, 4, 1),
    strides: int | Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
    expansions: float | Sequence[Any] = (1, 6, 6, 6, 6, 6, 6),
    kernels: int | Sequence[Any] = (3, 3, 5, 3, 5, 5, 3),
    head: int = 1280,
    act: str = "silu",
    dropout: float | None = None,
    drop_path: float = 0.2,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> nn.Module:
    """B0: 5,288,548 parameters and 386 M multiply-accumulates at 224x224; the weights of torchvision and timm fit.

    The size of the images that goes with a scale is `scaling(scale).size`; any does.  torchvision's B5 to B7 want
    `eps=1e-3, momentum=0.01`.  `stem_stride=1, strides=(1, 1, 2, 2, 1, 2, 1)` suits images of 32x32.

    Args:
        scale: 'b0' to 'b7', or a compound coefficient phi.
        depth, width: factors in place of those of the scale.  Depths are rounded up, widths to multiples of 8.
        channels: of each stage; `stem` of the convolution in front, `head` of the one at the end; before `width`.
        depths, strides: blocks of each stage before `depth`, and the stride of the first of them.
        expansions, kernels: of the depthwise convolutions; one for all, one for each stage, or a list of a stage's
            blocks in its place.
        dropout: before the last layer; that of the scale if None.
        drop_path: share of samples for which the last block is left out in training; earlier ones less, linearly.
        eps, momentum: of the batch norms.

    Raises:
        ModelError: no such scale or activation, lists of unlike lengths, an even kernel.
    """
    of = scaling(scale)
    deeper, wider = of.depth if depth is None else depth, of.width if width is None else width
    n = len(channels)
    counts = [math.ceil(count * deeper) for count in each(depths, n, "depths")]
    unit = partial(conv_norm, eps=eps, momentum=momentum)
    before, done = rounded(stem * wider), 0
    features: list[nn.Module] = [unit(inputs, before, 3, stem_stride, act=act)]
    for after, count, stride, expansion, kernel in zip(
        channels,
        counts,
        each(strides, n, "strides"),
        each(expansions, n, "expansions"),
        each(kernels, n, "kernels"),
        strict=True,
    ):
        after = rounded(after * wider)
        stage = nn.Sequential()
        blocks = zip(
            each(expansion, count, "expansions of a stage"), each(kernel, count, "kernels of a stage"), strict=True
        )
        for i, (t, k) in enumerate(blocks):
            step, hidden = 1 if i else stride, rounded(before * t)
            squeeze = SqueezeExcite(hidden, max(1, before // 4), act, "sigmoid")
            layers = inverted(unit, before, hidden, after, k, step, act, squeeze)
            stage.append(Residual(layers, step == 1 and before == after, drop_path * done / sum(counts)))
            before, done = after, done + 1
        features.append(stage)
    last = rounded(head * wider)
    features.append(unit(before, last, act=act))
    drop = of.dropout if dropout is None else dropout
    model = classifier(features, [nn.Dropout(drop), nn.Linear(last, classes)])
    initialise(model, linear=uniform)
    return model


def uniform(weight: Tensor) -> None:
    bound = len(weight) ** -0.5
    nn.init.uniform_(weight, -bound, bound)


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of timm's efficientnet with the names of these layers."""
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    ends |= {"conv_head": "features.{after_stages}.0", "bn2": "features.{after_stages}.1"}
    return from_timm(state, lambda stage, at, number: f"features.{stage + 1}.{at}.block", ends)
