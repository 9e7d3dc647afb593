"""Elastic and affine distortions of small images (Simard et al. 2003, ICDAR), a batch at a time."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

COARSE = 6  # points of the field of elastic displacements each way
DRAWN = 0.7  # standard deviation of its displacements, in pixels


def warp(x: Tensor, generator: torch.Generator) -> Tensor:
    """Square images [n, c, side, side], each turned by up to 12 degrees, stretched by up to 15 % each way, sheared by
    up to 0.15, moved by up to 2 pixels, and displaced by a smooth random field; bilinear, 0 beyond the borders."""
    n, side = len(x), x.shape[-1]

    def draw(most: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * most

    turn, shear, pixel = draw(math.pi * 12 / 180), draw(0.15), 2 / side
    across, down = 1 + draw(0.15), 1 + draw(0.15)
    cos, sin = turn.cos(), turn.sin()
    left = torch.stack((across * cos, across * (shear * cos - sin), draw(2 * pixel)), 1)
    up = torch.stack((down * sin, down * (shear * sin + cos), draw(2 * pixel)), 1)
    field = torch.randn(n, COARSE**2, 2, generator=generator) * (DRAWN * pixel)
    grid = _basis(side) @ torch.cat((torch.stack((left, up), 2), field), 1)
    return F.grid_sample(x, grid.reshape(n, side, side, 2), align_corners=False)


@lru_cache
def _basis(side: int) -> Tensor:
    """[side^2, 3 + COARSE^2]: x, y and 1 of every pixel, and how far each point of the coarse field moves it."""
    at = (torch.arange(side) * 2 + 1) / side - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    hats = (1 - (torch.linspace(0, COARSE - 1, side)[:, None] - torch.arange(COARSE)).abs()).clamp_min(0)
    field = torch.einsum("ya,xb->yxab", hats, hats).reshape(side**2, -1)
    return torch.cat((torch.stack((x, y, torch.ones_like(x)), 2).reshape(-1, 3), field), 1)
