"""Fixed point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import State
from smelt.core.settings import setting
from smelt.forms.affine import Affine
from smelt.forms.exponent import LOWEST, power
from smelt.grids import levels, scales, uniform
from smelt.grids.sided import Sided


@dataclass(frozen=True)
class Fixed(Sided):
    """Fixed-point numbers Qm.n: whole numbers of `bits` bits, two's complement, times 2^-n.

    n, the bits of the fraction, is the largest with which all values fit; with `range: mse` up to three more, where
    cutting off the largest values makes the squared error less; or it is given.  The other m = bits - 1 - n are those
    of the whole part; either may be negative.  What does not fit saturates.

    applies to: every floating tensor; linear, convolution, embedding; inputs and outputs of layers
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no; a few batches for dynamic: false at inputs and outputs
    needs training: below 6 bits
    good at: arithmetic with nothing but integers and shifts: microcontrollers, FPGAs
    bad at: few bits: up to half of the range is lost to the power of two (quantize.affine has any step)
    source: Lin et al. 2016, arXiv:1511.06393; Courbariaux et al. 2015, arXiv:1412.7024
    """

    bits: int = setting(8, "bits per value, with the sign", low=2, high=16)
    fraction: int | None = setting(
        None, "n of Qm.n for every tensor; nothing: found for each", low=LOWEST, high=-LOWEST
    )
    range: str = setting("minmax", "all values fit, or least error", choices=("minmax", "mse"))

    def searches(self) -> str | None:
        return "range: mse" if self.range == "mse" and self.fraction is None else None

    def fitted(self, rows: Tensor, where: Tensor | None) -> dict[str, Tensor]:
        """exponents: those of the steps, -n."""
        if self.fraction is not None:
            return {"exponents": torch.full((len(rows),), -self.fraction, dtype=torch.int32, device=rows.device)}
        low, high = (end.double() for end in uniform.minmax(rows, where))
        most = 1 << self.bits - 1

        def fits(step: Tensor) -> Tensor:
            size = torch.ldexp(torch.ones_like(high), step)
            return ((high / size).round() < most) & ((low / size).round() >= -most)

        first = torch.frexp(torch.maximum(-low, high)).exponent - (self.bits - 1)
        step = torch.where(fits(first), first, first + 1)  # the largest value may be rounded up to 2^(bits - 1)
        step = torch.where(fits(first - 1), first - 1, step)  # the smallest may be -2^(bits - 1) itself
        step = step.clamp(LOWEST, -LOWEST)
        if self.range == "mse":
            tried = [power((step - less).clamp_min(LOWEST)) for less in (0, 1, 2, 3)]
            best = levels.least(rows, where, tried, lambda x: x.round().clamp_(-most, most - 1))[0]
            step = scales.floor_log2(best)
        return {"exponents": step}

    def stored(self, x: Tensor, axis: int | None, group: int, state: State) -> Encoded:
        form, most = Affine(axis, group, self.bits), 1 << self.bits - 1
        side = scales.exponents(state.get_buffer("exponents"))
        codes = (x.detach().float() / form.spread(scales.values(side), x.shape)).round_().clamp_(-most, most - 1)
        dtype = torch.int8 if self.bits <= 8 else torch.int16
        return Encoded(form, {"codes": codes.to(dtype), "scale": side}, x.shape, x.dtype)
