"""Kernels: what runs a layer from the form that its weight is stored in, instead of from the dense weight.

A kernel is a file on the shelf `kernels/`:

    DEVICES = ("cpu",)                                  # types of devices that it runs on
    def build(layer: Layer) -> nn.Module | None: ...    # the layer in its form; None where it does not serve it

`smelt.fast` times what they build against the dense layer, and takes the fastest where it is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.encoded import Encoded
from smelt.core.store import Activation


@dataclass(frozen=True)
class Layer:
    """A layer that a kernel may serve.

    module: the dense layer; its weight holds the decoded values.
    weight: the tree of its weight; None where it is stored dense.
    shape: of its input.
    at_input: the codec at its input, which the kernel must act as, or leave alone (`Served.takes_input`).
    rounds: inputs without a codec may be rounded to 8 bits, in a range found at run time.
    """

    module: nn.Module
    weight: Encoded | None
    shape: torch.Size
    at_input: Activation | None = None
    rounds: bool = False


class Served(nn.Module):
    """Base of what kernels build.

    takes_input: it does what the codec at the layer's input does, which is then taken out.
    few: whether it is for few samples, and computes densely where they are more than `most`.
    most: samples up to which it was measured to be faster; None where that is not known.
    """

    takes_input: bool = False
    few: ClassVar[bool] = False
    most: int | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded anew each time; for code that looks at its layers' weights."""
        return self.dense()

    def dense(self) -> Tensor:
        raise NotImplementedError


def kernels(device: str) -> list[str]:
    """Names of the kernels for devices of a type ('cpu')."""
    return [name for name in shelf.names("kernels") if device in shelf.module("kernels", name).DEVICES]


def build(name: str, layer: Layer) -> Served | None:
    """The layer as the kernel of a name runs it; None where it does not serve it."""
    with torch.no_grad():
        return shelf.module("kernels", name).build(layer)  # type: ignore[no-any-return]
