"""ResNet.

Source: K. He et al., Deep residual learning for image recognition, 2016 (arXiv:1512.03385), table 1; the stride of a
bottleneck is that of its 3x3 convolution, as torchvision has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from smelt.core.errors import ModelError
from smelt.models._blocks import each, initialise, named, rounded

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def build(
    depth: int = 18,
    width: float = 1.0,
    classes: int = 1000,
    inputs: int = 3,
    stem: int = 64,
    stem_kernel: int = 7,
    stem_stride: int = 2,
    pool: bool = True,
    channels: Sequence[int] = (64, 128, 256, 512),
    blocks: int | Sequence[int] | None = None,
    bottleneck: bool | None = None,
    shortcut: str = "B",
) -> nn.Module:
    """11,689,512 parameters and 1.81 G multiply-accumulates at 224x224 by default; torchvision's weights fit.

    `stem_kernel=3, stem_stride=1, pool=False` suits images of 32x32; `resnet_cifar` has the paper's networks for those.

    Args:
        depth: 18, 34, 50, 101 or 152; the last three have bottlenecks.
        width: factor of all channels, rounded to multiples of 8.
        channels: of each stage (a quarter of what comes out of bottlenecks); `stem` of the convolution in front.
        blocks: of each stage; those of `depth` if None.
        bottleneck: blocks of 1x1, 3x3, 1x1 in place of two 3x3; as `depth` says if None.
        shortcut: where the shape changes: 'B', a 1x1 convolution; 'A', every second pixel, and zeros for new channels.

    Raises:
        ModelError: a depth that no table names, lists of unlike lengths, another shortcut.
    """
    if depth not in DEPTHS and blocks is None:
        raise ModelError(f"resnet: no depth {depth}; one of {', '.join(map(str, DEPTHS))}, or give blocks")
    if shortcut not in ("A", "B"):
        raise ModelError(f"resnet: no shortcut {shortcut!r}; A or B")
    n = len(channels)
    kind = Bottleneck if (depth >= 50 if bottleneck is None else bottleneck) else Basic
    before = rounded(stem * width)
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(inputs, before, stem_kernel, stem_stride, stem_kernel // 2, bias=False),
        "bn1": nn.BatchNorm2d(before),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, 2, 1) if pool else nn.Identity(),
    }
    for i, count in enumerate(each(DEPTHS[depth] if blocks is None else blocks, n, "blocks")):
        hidden = rounded(channels[i] * width)
        layers[f"layer{i + 1}"] = stage = nn.Sequential()
        for j in range(count):
            stage.append(kind(before, hidden, 2 if i and not j else 1, shortcut))
            before = kind.wider * hidden
    model = named(**layers, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(before, classes))
    initialise(model, linear=None)
    return model


class Basic(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut."""

    wider = 1

    def __init__(self, before: int, hidden: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(before, hidden, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.downsample = fitting(before, hidden, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm, and a shortcut."""

    wider = 4

    def __init__(self, before: int, hidden: int, stride: int, shortcut: str):
        super().__init__()
        after = self.wider * hidden
        self.conv1 = nn.Conv2d(before, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample = fitting(before, after, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def fitting(before: int, after: int, stride: int, shortcut: str) -> nn.Module:
    """What makes the input of a block fit its output."""
    if before == after and stride == 1:
        return nn.Identity()
    if shortcut == "A":
        return Padded(stride, after - before)
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


class Padded(nn.Module):
    """Every `stride`-th pixel, between channels of zeros."""

    def __init__(self, stride: int, more: int):
        super().__init__()
        if more < 0:
            raise ModelError("resnet: shortcuts of option A only add channels; take shortcut='B'")
        self.stride, self.more = stride, more

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, more={self.more}"
