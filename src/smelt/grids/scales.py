"""How the scales of a tensor are stored in fewer bits than float32."""

from __future__ import annotations

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.forms._sides import rows
from smelt.forms.affine import Affine
from smelt.forms.exponent import Exponent
from smelt.forms.scaled import Scaled
from smelt.grids import uniform
from smelt.grids.levels import TINY

KINDS = ("float32", "float16", "bfloat16", "double", "e4m3")
# Scales that share a scale of their own, if they are quantized themselves (Dettmers et al. 2023, section 3).
GROUP = 256


def stored(scale: Tensor, kind: str) -> Tensor | Encoded:
    """Positive scales, of any shape, as a part of a form.

    kind: 'float32', 'float16', 'bfloat16'; 'double': 8 bits on an even grid for every 256 of them; 'e4m3': fp8, with
        one float32 for all that puts the largest on 448.
    """
    scale = scale.detach().float().clamp_min(TINY)
    if kind == "double":
        form = Affine(None, GROUP, 8, False, 255)
        real = rows(torch.ones_like(scale, dtype=torch.bool), None, GROUP, False)
        low, high = uniform.minmax(rows(scale, None, GROUP), real)
        step, zero = uniform.steps(low, high, bits=8, symmetric=False)
        assert zero is not None
        spread = [form.spread(side, scale.shape) for side in (step, zero)]
        codes = uniform.quantize(scale, *spread, bits=8, symmetric=False).to(torch.uint8)
        return Encoded(form, {"codes": codes, "scale": step * form.top, "zero": zero}, scale.shape, torch.float32)
    if kind == "e4m3":
        dtype = torch.float8_e4m3fn
        least, top, one = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max, scale.amax()
        values = (scale / (one / top)).clamp(least, top).to(dtype)
        return Encoded(Scaled(top=top), {"values": values, "scale": one}, scale.shape, torch.float32)
    dtype = getattr(torch, kind)
    least = max(torch.finfo(dtype).smallest_normal / 1024, TINY)
    return scale.clamp(least, torch.finfo(dtype).max).to(dtype, copy=True)


def exponents(scale: Tensor) -> Encoded:
    """Whole exponents of two as a part of a form."""
    return Encoded(Exponent(), {"exponents": scale.to(torch.int8, copy=True)}, scale.shape, torch.float32)


def values(part: Tensor | Encoded) -> Tensor:
    """What a stored scale is, float32 and positive."""
    return (part.decode() if isinstance(part, Encoded) else part).float().clamp_min(TINY)


def floor_log2(x: Tensor) -> Tensor:
    """The largest whole number below or at log2 of positive numbers, exactly; int32."""
    return torch.frexp(x.float()).exponent - 1
