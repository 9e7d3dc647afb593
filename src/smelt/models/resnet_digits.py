"""A small residual network with batch norm for 8x8 digits.

Source: basic blocks of K. He et al., Deep residual learning for image recognition, 2016 (arXiv:1512.03385), with
projection shortcuts, at a size of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from smelt.core.errors import ModelError


def build(
    channels: Sequence[int] = (32, 64, 96), blocks: Sequence[int] = (2, 2, 1), classes: int = 10, inputs: int = 1
) -> nn.Module:
    """315,114 parameters by default; takes [n, inputs, h, w] of any size from 4x4.

    Args:
        channels: of each stage; every stage but the first halves the sides.
        blocks: residual blocks of each stage.

    Raises:
        ModelError: lists of different lengths, or empty ones.
    """
    if not channels or len(channels) != len(blocks) or min(blocks) < 1:
        raise ModelError(f"resnet_digits: channels={list(channels)} and blocks={list(blocks)} need one entry per stage")
    return ResNet(channels, blocks, classes, inputs)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut (1x1 where the shape changes)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, channels: Sequence[int], blocks: Sequence[int], classes: int, inputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[0])
        self.stages = nn.Sequential()
        before = channels[0]
        for i, (after, depth) in enumerate(zip(channels, blocks, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(Block(before, after, 2 if i and not j else 1))
                before = after
            self.stages.append(stage)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(functional.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]
