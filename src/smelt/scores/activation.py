"""|w| sqrt(E x^2), with x the input that w multiplies: Wanda (Sun et al. 2023, arXiv:2306.11695, eq. 1).

Inputs of different layers have different scales, so that it is meant to be compared within each output (`scope: row`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEEDS: tuple[str, ...] = ("second_moment",)
ROLES = ("in",)  # of a unit, what the layers that read it make of it


def score(x: Tensor, seen: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    found: Tensor = x.abs() * seen["second_moment"].sqrt().to(x)
    return found
