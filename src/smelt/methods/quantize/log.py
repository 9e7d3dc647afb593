"""Logarithmic levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import State
from smelt.core.settings import setting
from smelt.forms.exponent import LOWEST, power
from smelt.forms.levels import Levels
from smelt.forms.scaled import Scaled
from smelt.grids import levels, scales
from smelt.grids.sided import Sided

_STEPS = {"2": 1, "sqrt2": 2}  # levels per power of two


@dataclass(frozen=True)
class Log(Sided):
    """Powers of two or of sqrt 2, or sums of powers of two, so that multiplying is shifting.

    2, sqrt2: a sign, 0, and 2^(b-1) - 1 magnitudes, each half (1/sqrt 2) of the next.  apot: each magnitude is a sum
    of powers of two, one from each of (b - 1) / 2 sets, which lie more evenly.

    The largest magnitude is a power of two (the full scale range), or with `scales: float32` (usual for apot) just the
    largest value.  `rounding: companded` rounds log |x| and not x, as first published: what is below the smallest level
    divided by sqrt(base) becomes 0.

    applies to: every floating tensor; linear, convolution, embedding; inputs and outputs of layers
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no; a few batches for dynamic: false at inputs and outputs
    needs training: at 4 or fewer bits
    good at: shifts in place of multiplications; values over many magnitudes, as after ReLU
    bad at: weights at 4 bits and more: only the levels near 0 get denser (apot: less so)
    source: Miyashita et al. 2016, arXiv:1603.01025; apot: Li et al. 2020, arXiv:1909.13144
    """

    bits: int = setting(4, "bits per value, with the sign", low=2, high=8)
    base: str = setting("2", "what the levels are powers of; apot: sums", choices=(*_STEPS, "apot"))
    range: str = setting(
        "minmax", "the largest level reaches the largest value, or makes the error least", choices=("minmax", "mse")
    )
    rounding: str = setting("nearest", "to the nearest level, or of log |x|", choices=("nearest", "companded"))
    scales: str | None = setting(
        None,
        "how the largest level is stored; nothing: power (of two), for apot float32",
        choices=("power", *scales.KINDS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base == "apot" and self.rounding == "companded":
            raise RecipeError(f"{self.name}: sums of powers have no curve; rounding: companded is for base 2 and sqrt2")

    def searches(self) -> str | None:
        return "range: mse" if self.range == "mse" else None

    def fitted(self, rows: Tensor, where: Tensor | None) -> dict[str, Tensor]:
        """scale, or exponents where it is a power of two: of the largest level."""
        high, rounder = levels.absmax(rows, where), self._rounder()
        if self._kind() != "power":
            if self.range == "mse":
                high = levels.least(rows, where, levels.shrunk(high), rounder)[0]
            return {"scale": high}
        half = 0.5 / _STEPS.get(self.base, 1)  # what rounds log |x| down to the largest level
        exact = torch.ceil(high.double().log2() - half).where(high > 0, LOWEST)
        exponents = exact.clamp(LOWEST, -LOWEST).int()
        if self.range == "mse":
            tried = [power((exponents + more).clamp(LOWEST, -LOWEST)) for more in (0, 1, -1, -2, -3)]
            exponents = scales.floor_log2(levels.least(rows, where, tried, rounder)[0])
        return {"exponents": exponents}

    def stored(self, x: Tensor, axis: int | None, group: int, state: State) -> Encoded:
        found = dict(state.named_buffers())
        shift = found.get("exponents")
        side = scales.stored(found["scale"], self._kind()) if shift is None else scales.exponents(shift)
        form = Scaled(axis, group)
        codes = self._rounder().codes(x.detach().float() / form.spread(scales.values(side), x.shape))
        inner = Encoded(self._levels(), {"codes": codes}, x.shape, torch.float32)
        return Encoded(form, {"values": inner, "scale": side}, x.shape, x.dtype)

    def _levels(self) -> Levels:
        return Levels("sums", self.bits) if self.base == "apot" else Levels("log", self.bits, _STEPS[self.base])

    def _rounder(self) -> levels.Rounder:
        return levels.rounder(self._levels(), self.rounding == "companded")

    def _kind(self) -> str:
        return self.scales or ("float32" if self.base == "apot" else "power")
