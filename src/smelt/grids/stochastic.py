"""Values rounded to the levels of their group, up or down at random so that the mean is the value.

    t = (x - low) / step,   code = floor(t + u),   u uniform in [0, 1):   E[low + step * code] = x

u is a hash of the place and the seed (C. Wellons, lowbias32), so that the same call gives the same codes on every
device, compiled or not.  (J. Chen et al. 2021, arXiv:2104.14129, section 3.1.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from smelt.forms.grouped import NATIVE, packed
from smelt.native.rounding import functions

PIECE = 1 << 22  # places at a time, of which 64-bit numbers are computed
LEAST = 1e-30  # a smaller step is none: all values of the group are its least


def rounded(x: Tensor, *, bits: int, group: int, seed: int = 0, nearest: bool = False) -> dict[str, Tensor]:
    """The parts of the form 'grouped'.

    Args:
        x: [n], floating, contiguous.
        group: values that share their least and their step; a multiple of 8.
        nearest: no noise: the nearest level.

    A group with values that are not finite becomes NaN.
    """
    if x.dtype not in NATIVE:
        x = x.float()
    n, compiled = x.numel(), functions() if x.device.type == "cpu" else None
    if compiled is None or not n:
        return _rounded(x.float(), bits, group, seed, nearest)
    codes = torch.empty(-(-n // 8) * bits, dtype=torch.uint8)
    low, step = (torch.empty(-(-n // group), dtype=torch.bfloat16) for _ in range(2))
    places = (codes.data_ptr(), low.data_ptr(), step.data_ptr())
    wide = int(x.dtype == torch.float32)
    compiled["round_encode"](x.data_ptr(), wide, n, bits, group, seed & 0xFFFFFFFF, int(not nearest), *places)
    return {"codes": codes, "low": low, "step": step}


def _rounded(x: Tensor, bits: int, group: int, seed: int, nearest: bool) -> dict[str, Tensor]:
    """The same in torch."""
    n, levels = x.numel(), (1 << bits) - 1
    rest = -n % group
    rows = torch.cat((x, x[-1:].expand(rest))).view(-1, group) if n else x.view(0, group)
    least, most = rows.amin(1), rows.amax(1)
    bad = ~torch.isfinite(rows).all(1)
    low = _narrow(least, up=False).masked_fill(bad, torch.nan)
    span = (most - low.float()) / levels
    step = _narrow(torch.where(span < LEAST, 0, span), up=True).masked_fill(bad, torch.nan)
    inverse = torch.where(bad | (step == 0), 0, 1 / step.float())
    noise = 0.5 if nearest else _noise(n + rest, seed, x.device).view(rows.shape)
    codes = ((rows.nan_to_num() - low.float().nan_to_num()[:, None]) * inverse[:, None] + noise).clamp(0, levels)
    codes = codes.to(torch.uint8).masked_fill(bad[:, None], 0)
    return {"codes": packed(codes.flatten()[:n], bits), "low": low, "step": step}


def _narrow(x: Tensor, up: bool) -> Tensor:
    """The next bfloat16 that is not above (of any x), or not below (of x >= 0)."""
    bits = x.contiguous().view(torch.int32)
    bits = bits + 0xFFFF if up else torch.where(bits < 0, bits + 0xFFFF, bits)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _noise(n: int, seed: int, device: torch.device) -> Tensor:
    """[n] in [0, 1), multiples of 2^-24."""
    out, mask = torch.empty(n, device=device), 0xFFFFFFFF
    for begin in range(0, n, PIECE):
        h = torch.arange(begin, min(begin + PIECE, n), device=device)
        h = (h * 0x9E3779B1 + (seed & mask)) & mask
        h = ((h ^ h >> 16) * 0x7FEB352D) & mask
        h = ((h ^ h >> 15) * 0x846CA68B) & mask
        out[begin : begin + PIECE] = (h >> 8).float() * 2.0**-24
    return out
