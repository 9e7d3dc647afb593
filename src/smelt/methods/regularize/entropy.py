from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from smelt.core.errors import RecipeError
from smelt.core.method import Objective, Seen, Weight
from smelt.core.settings import Ramp, setting
from smelt.core.target import Target
from smelt.grids import uniform

LEVELS = 1 << 16  # at most, on each side of 0


@dataclass(frozen=True)
class Entropy(Objective):
    """Charge for the bits that the weights will take in a file, once rounded and coded.

    L = strength * bits, the mean over all selected weights of -log2 p of their level, where p is how often a tensor
    uses that level.  The levels are those of `quantize.affine` with these bits: symmetric, over the range of each
    channel or tensor, fitted anew at every step; or, with `step`, the multiples of a fixed number.  A weight that lies
    u levels from level j counts there with the share b(u) of the quadratic B-spline,

        b(u) = 3/4 - u^2  for |u| <= 1/2,   (3/2 - |u|)^2 / 2  for |u| <= 3/2,   else 0,

    which is what rounding gives on average under triangular noise two levels wide, so the force on a weight
    is smooth and points to the neighbouring level that is used more.  Pruned weights are not in the file and do not
    count.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: no
    needs data: yes, to train on
    needs training: yes, it is a term of the loss
    good at: smaller files after quantize.affine of the same bits, or with it in the same train
    bad at: files whose weights stay floating, or share values of another grid; it takes time of every step
    source: Ballé et al. 2017, arXiv:1611.01704 (noise for rounding); Oktay et al. 2020, arXiv:1906.06624 (of weights)
    """

    needs_weights = True

    strength: float | Ramp = setting(0.5, "loss per bit of the mean weight", low=0)
    bits: int = setting(4, "bits of the levels", low=2, high=16)
    per: str = setting("channel", "what has a range of its own", choices=("channel", "tensor"))
    step: float | None = setting(None, "distance of the levels, in place of bits", low=1e-30)

    def refuses(self, target: Target) -> str | None:
        return None if target.tensor.is_floating_point() else f"it holds {target.tensor.dtype}, not floating values"

    def loss(self, seen: Seen) -> Tensor:
        assert not isinstance(self.strength, Ramp)  # the loop resolves it
        total, count = seen.outputs.new_zeros(()), 0
        for weight in seen.weights.values():
            codes = self._codes(weight)
            total = total + codes.numel() * _bits(codes)
            count += codes.numel()
        return self.strength * total / max(count, 1)

    def _codes(self, weight: Weight) -> Tensor:
        """[n]: weights that count, in levels."""
        x = weight.x.float()
        if self.step is not None:
            codes = x / self.step
            levels = float(x.detach().abs().max()) / self.step if x.numel() else 0
            if levels > LEVELS:
                raise RecipeError(f"{self.name}.step is {self.step}: the weights lie {levels:.3g} steps from 0")
        else:
            axis = 1 if isinstance(weight.module, _ConvTransposeNd) else 0
            rows = x.movedim(axis, 0).flatten(1) if self.per == "channel" and x.dim() > 1 else x.reshape(1, -1)
            low, high = uniform.minmax(rows.detach())
            scale, _ = uniform.steps(low, high, bits=self.bits, symmetric=True)
            if len(rows) > 1:
                scale = scale.reshape([-1 if d == axis else 1 for d in range(x.dim())])
            codes = x / scale
        return codes.reshape(-1) if weight.where is None else codes[weight.where]


def _bits(codes: Tensor) -> Tensor:
    """Entropy in bits per code of the softly counted histogram of [n] codes; 0 for none."""
    nearest = codes.detach().round()
    if not codes.numel() or not bool(torch.isfinite(nearest).all()):
        return codes.sum()
    first = nearest.min() - 1
    bins = int(nearest.max() - first) + 2
    place = (nearest - first).long()
    u = codes - nearest
    shares = ((0.5 - u).square() / 2, 0.75 - u.square(), (0.5 + u).square() / 2)
    mass = torch.zeros(bins, device=codes.device)
    for offset, share in zip((-1, 0, 1), shares, strict=True):
        mass = mass.index_add(0, place + offset, share)
    p = mass / codes.numel()
    nats: Tensor = -torch.special.xlogy(p, p).sum()
    return nats / math.log(2)
