"""ResNet for images of 32x32.

Source: K. He et al., Deep residual learning for image recognition, 2016 (arXiv:1512.03385), section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from smelt.core.errors import ModelError
from smelt.models import resnet


def build(
    depth: int = 20,
    width: float = 1.0,
    classes: int = 10,
    inputs: int = 3,
    stem: int | None = None,
    channels: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] | None = None,
    shortcut: str = "A",
) -> nn.Module:
    """269,722 parameters and 40.6 M multiply-accumulates at 32x32 by default.

    Args:
        depth: 20, 32, 44, 56, 110: layers with weights, 2 more than 6 blocks have.
        width: factor of all channels, rounded to multiples of 8.
        channels: of each stage, each half as large as the one before; `stem` of the convolution in front, as
            the first stage if None.
        blocks: of each stage, in place of those of `depth`.
        shortcut: where the shape changes: 'A', every second pixel, and zeros for new channels (the paper's); 'B', a
            1x1 convolution.

    Raises:
        ModelError: a depth that is not 6n + 2, lists of unlike lengths, another shortcut.
    """
    if blocks is None and (depth < 8 or depth % 6 != 2):
        raise ModelError(
            f"resnet_cifar: a depth is 6n + 2, as {6 * max(1, depth // 6) + 2}, not {depth}; or give blocks"
        )
    return resnet.build(
        width=width,
        classes=classes,
        inputs=inputs,
        stem=channels[0] if stem is None else stem,
        stem_kernel=3,
        stem_stride=1,
        pool=False,
        channels=channels,
        blocks=(depth - 2) // 6 if blocks is None else blocks,
        bottleneck=False,
        shortcut=shortcut,
    )


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict in which the last layer is called `linear`, as it often is, with the names of these layers."""
    return {f"fc.{key[7:]}" if key.startswith("linear.") else key: value for key, value in state.items()}
