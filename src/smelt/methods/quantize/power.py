"""Companding: even levels of a curve of the values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import State
from smelt.core.settings import setting
from smelt.forms.levels import KINDS, Levels
from smelt.forms.scaled import Scaled
from smelt.grids import levels, scales
from smelt.grids.sided import Sided

# The parameters that are tried, and by how much the best is moved then (power: added, mu: multiplied).
_TRIED = {"power": [i / 20 for i in range(6, 25)], "mu": [2.0**i / 8 for i in range(14)]}
_MOVED = {"power": [-0.025, 0.025], "mu": [2**-0.5, 2**0.5]}
# Values that the parameter is searched on.
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Power(Sided):
    """Companding: evenly spaced levels of |x|^p, or of log(1 + mu |x|) (mu-law), so that small values get more of them.

    Values are divided by the largest, or by the scale with the least squared error, first.  An open `parameter` is
    searched for each tensor (p from 0.3 to 1.2, where 1 is even steps), on at most 65,536 of its values.  With
    `rounding: companded` the curve of x is rounded, as published, and not x itself.

    applies to: every floating tensor; linear, convolution, embedding; inputs and outputs of layers
    needs a pretrained model: yes
    needs data: no; a few batches for dynamic: false at inputs and outputs
    needs training: at 3 or fewer bits
    good at: heavy-tailed weights at 3 to 6 bits, without data
    bad at: speed: kernels decode first, through a table
    source: Yvinec et al. 2023, arXiv:2301.09858; mu: ITU-T G.711
    """

    bits: int = setting(4, "bits per value, with the sign", low=2, high=8)
    curve: str = setting("power", "|x|^p, or the logarithm of mu-law", choices=("power", "mu"))
    parameter: float | None = setting(None, "p (1/16..16) or mu (1/1024..2^20); nothing: least error")
    range: str = setting("minmax", "scales reach the largest value, or make the error least", choices=("minmax", "mse"))
    rounding: str = setting("nearest", "to the nearest level, or on the curve", choices=("nearest", "companded"))
    scales: str = setting(
        "float32",
        "how scales are stored; double: 8 bits, in groups of 256; e4m3: fp8 with one scale for all",
        choices=scales.KINDS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high, _ = KINDS[self.curve]
        if self.parameter is not None and not low <= self.parameter <= high:
            raise RecipeError(f"{self.name}.parameter is {self.parameter}, outside {low}..{high}")

    def searches(self) -> str | None:
        return "range: mse" if self.range == "mse" else "parameter: nothing" if self.parameter is None else None

    def fitted(self, rows: Tensor, where: Tensor | None) -> dict[str, Tensor]:
        """scale; parameter, if it was searched."""
        scale = levels.absmax(rows, where)
        parameter = self._searched(rows, where, scale) if self.parameter is None else self.parameter
        if self.range == "mse":
            scale = levels.least(rows, where, levels.shrunk(scale), self._rounder(parameter))[0]
        found = {"scale": scale}
        if self.parameter is None:
            found["parameter"] = torch.tensor(parameter, dtype=torch.float64, device=scale.device)
        return found

    def stored(self, x: Tensor, axis: int | None, group: int, state: State) -> Encoded:
        found = dict(state.named_buffers())
        parameter = float(found["parameter"]) if self.parameter is None else float(self.parameter)
        side, form = scales.stored(found["scale"], self.scales), Scaled(axis, group)
        codes = self._rounder(parameter).codes(x.detach().float() / form.spread(scales.values(side), x.shape))
        inner = Encoded(Levels(self.curve, self.bits, parameter), {"codes": codes}, x.shape, torch.float32)
        return Encoded(form, {"values": inner, "scale": side}, x.shape, x.dtype)

    def _searched(self, rows: Tensor, where: Tensor | None, scale: Tensor) -> float:
        """The parameter with the least squared error of all rows together."""
        down = -(-len(rows) // _SAMPLE)
        rows, scale, where = rows[::down], scale[::down], None if where is None else where[::down]
        across = -(-rows.numel() // _SAMPLE)
        rows, where = rows[:, ::across], None if where is None else where[:, ::across]

        def error(parameter: float) -> float:
            return float(levels.least(rows, where, [scale], self._rounder(parameter))[1].sum())

        best: float = min(_TRIED[self.curve], key=error)
        moved = [best + by if self.curve == "power" else best * by for by in _MOVED[self.curve]]
        return round(float(min((best, *moved), key=error)), 4)

    def _rounder(self, parameter: float) -> levels.Rounder:
        return levels.rounder(Levels(self.curve, self.bits, parameter), self.rounding == "companded")
