"""Choosing by score: how many stay, and which."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from smelt.core.errors import RecipeError


def kept_of(n: int, ratio: float) -> int:
    """How many of n stay; the zeros are counted as torch.nn.utils.prune does, round(ratio * n)."""
    return n - round(ratio * n)


def top(scores: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest along the last dimension; ties are broken as topk breaks them."""
    dropped = scores.shape[-1] - kept
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, scores.topk(dropped, dim=-1, largest=False).indices, False) if dropped else mask


def n_of_m(pattern: str, where: str) -> tuple[int, int]:
    """(2, 4) of '2:4'.  Raises RecipeError naming `where`."""
    match = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise RecipeError(f"{where} is {pattern!r}; it is N:M with 0 < N < M, such as 2:4")
    return int(match[1]), int(match[2])
