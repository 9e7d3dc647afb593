"""VGG: stages of 3x3 convolutions with pooling after each, then fully connected layers.

Source: K. Simonyan and A. Zisserman, Very deep convolutional networks for large-scale image recognition, 2014
(arXiv:1409.1556), table 1, configurations A, B, D and E.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from smelt.core.errors import ModelError
from smelt.models._blocks import initialise, named, rounded

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


def build(
    depth: int = 16,
    norm: bool = False,
    width: float = 1.0,
    classes: int = 1000,
    inputs: int = 3,
    channels: Sequence[Sequence[int]] | None = None,
    hidden: Sequence[int] = (4096, 4096),
    pool: int = 7,
    dropout: float = 0.5,
) -> nn.Module:
    """138,357,544 parameters and 15.47 G multiply-accumulates at 224x224 by default; torchvision's weights fit.

    `norm=True, pool=1, hidden=()` is the usual network for images of 32x32: 14,728,266 parameters with 10 classes.

    Args:
        depth: layers with weights, 11, 13, 16 or 19.
        norm: batch norm after each convolution.
        width: factor of the channels of the convolutions, rounded to multiples of 8.
        channels: of each convolution of each stage, in place of those of `depth`; before `width`.
        hidden: fully connected layers before the last one.
        pool: a side of the feature maps that the fully connected layers are given.

    Raises:
        ModelError: a depth that no table names.
    """
    if channels is None:
        if depth not in DEPTHS:
            raise ModelError(f"vgg: no depth {depth}; one of {', '.join(map(str, DEPTHS))}, or give channels")
        channels = [[c] * n for c, n in zip(WIDTHS, DEPTHS[depth], strict=True)]
    features: list[nn.Module] = []
    before = inputs
    for stage in channels:
        for after in stage:
            after = rounded(after * width)
            features += [nn.Conv2d(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
            before = after
        features.append(nn.MaxPool2d(2))
    classifier: list[nn.Module] = []
    before *= pool**2
    for after in hidden:
        classifier += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        before = after
    model = named(
        features=nn.Sequential(*features),
        avgpool=nn.AdaptiveAvgPool2d(pool),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(*classifier, nn.Linear(before, classes)),
    )
    initialise(model)
    return model


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of timm's vgg with the names of these layers; its first two linear layers are convolutions there."""
    names = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
    made = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if layer in names and isinstance(value, Tensor) and value.dim() == 4:
            value = value.flatten(1)
        made[f"{names[layer]}.{leaf}" if layer in names else key] = value
    return made
