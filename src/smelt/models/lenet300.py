"""LeNet-300-100: a multilayer perceptron with two hidden layers.

Source: Y. LeCun et al., Gradient-based learning applied to document recognition, 1998, section III-C.7; the network
of most compression papers on MNIST.  ReLU in place of the original tanh.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def build(inputs: int = 784, hidden: Sequence[int] = (300, 100), classes: int = 10) -> nn.Module:
    """266,610 parameters by default; layers fc1, fc2, ... with ReLU between; inputs [n, ...] are flattened."""
    widths = [inputs, *hidden, classes]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (before, after) in enumerate(pairwise(widths), 1):
        layers[f"fc{i}"] = nn.Linear(before, after)
        if i <= len(hidden):
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)
