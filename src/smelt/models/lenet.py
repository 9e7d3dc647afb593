"""LeNet-5 as Caffe has it: two convolutions with pooling, two fully connected layers.

Source: https://github.com/BVLC/caffe, examples/mnist/lenet.prototxt (one ReLU, after the first fully connected
layer), after Y. LeCun et al., Gradient-based learning applied to document recognition, 1998.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from smelt.core.errors import ModelError


def build(
    channels: Sequence[int] = (20, 50),
    hidden: int = 500,
    classes: int = 10,
    size: int = 28,
    inputs: int = 1,
    kernel: int = 5,
    padding: int = 0,
) -> nn.Module:
    """431,080 parameters by default; `size=8, kernel=3, padding=1` suits 8x8 digits.

    Args:
        channels: of the two convolutions.
        size: pixels of a side of the input, [n, inputs, size, size].

    Raises:
        ModelError: other than two convolutions, or a size of which they leave nothing.
    """
    if len(channels) != 2:
        raise ModelError(f"lenet has two convolutions, not channels={list(channels)}")
    first, second = channels
    side = size
    for _ in channels:
        side = (side + 2 * padding - kernel + 1) // 2
    if side < 1:
        raise ModelError(
            f"lenet: nothing is left of size={size} after kernel={kernel}, padding={padding}; try padding=1"
        )
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(inputs, first, kernel, padding=padding),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, kernel, padding=padding),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * side**2, hidden),
            relu1=nn.ReLU(),
            fc2=nn.Linear(hidden, classes),
        )
    )
