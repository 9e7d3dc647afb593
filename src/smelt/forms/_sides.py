"""Where scales stand: one for the tensor, for each channel of a dimension, or for each group of neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smelt.core.encoded import Form, numel
from smelt.forms._parts import Claims, require, whole


@dataclass(frozen=True)
class Sided(Form):
    """A form with scales (or other numbers) at the sides of its values.

    axis: the dimension of the channels that have their own; None for the whole tensor.
    group: 0, or the length of the groups that have their own.  They run along the flattened remaining dimensions of
        each channel of axis 0, or for axis None along the whole flattened tensor; the last one may be short.
    """

    axis: int | None = None
    group: int = 0

    def side_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the scales: [], [channels], [groups] (of the whole tensor), or [channels, groups]."""
        return side_shape(shape, self.axis, self.group)

    def spread(self, side: Tensor, shape: torch.Size) -> Tensor:
        """Scales, broadcastable to the tensor."""
        return spread(side, shape, self.axis, self.group)

    def check_top(self, top: float) -> None:
        """Raises FileError: what scales are divided by is no sane number."""
        number = isinstance(top, (int, float)) and not isinstance(top, bool)
        require(number and 2**-64 <= top <= 2**64, f"form {self.name!r}: top is {top!r}")

    def check_sides(self, parts: Claims, shape: torch.Size, *names: str) -> None:
        """Raises FileError: axis and group do not fit the tensor, or these parts do not fit them."""
        whole(self, "group", self.group, 0, 2**62)
        if self.axis is not None:
            whole(self, "axis", self.axis, 0, len(shape) - 1)
        require(not self.group or not self.axis, f"form {self.name!r}: groups run within the channels of axis 0")
        for name in names:
            side = parts[name][0]
            fits = side == self.side_shape(shape)
            require(fits, f"form {self.name!r}: its {name} {list(side)} does not fit the tensor {list(shape)}")


def side_shape(shape: torch.Size, axis: int | None, group: int = 0) -> torch.Size:
    """Shape of the scales of a tensor; axis and group as in `Sided`."""
    if not group:
        return torch.Size() if axis is None else shape[axis : axis + 1]
    if axis is None:
        return torch.Size((-(-numel(shape) // group),))
    return torch.Size((shape[0], -(-numel(shape[1:]) // group)))


def spread(side: Tensor, shape: torch.Size, axis: int | None, group: int = 0) -> Tensor:
    """Scales of `side_shape`, broadcastable to the tensor."""
    if not group:
        return side if axis is None else side.reshape([-1 if d == axis else 1 for d in range(len(shape))])
    rest = numel(shape if axis is None else shape[1:])
    each = side.repeat_interleave(min(group, max(rest, 1)), -1)
    return (each[:rest] if axis is None else each[:, :rest]).reshape(shape)


def rows(x: Tensor, axis: int | None, group: int = 0, fill: float | bool = 0) -> Tensor:
    """One row of values for each scale, [scales, values]; the short last group of a channel is filled up."""
    flat = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    if not group:
        return flat
    group = min(group, max(flat.shape[1], 1))
    return functional.pad(flat, (0, -flat.shape[1] % group), value=fill).reshape(-1, group)
