"""What a score of whole units sees of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """What the units of a group take of one tensor.

    x: [units, n] float32: the values, flat.
    role: 'out' (the unit is made by them), 'in' (it is read by them), 'along' (scales and shifts it).
    module, name: where the tensor stands.
    seen: name in the score's NEEDS -> [units, n] what was found, where it was.
    """

    x: Tensor
    role: str
    module: nn.Module
    name: str
    seen: Mapping[str, Tensor] = field(default_factory=dict)
