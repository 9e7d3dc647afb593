"""Narrow floating numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import State
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms import float as plain
from smelt.forms.exponent import LOWEST, power
from smelt.forms.levels import Levels
from smelt.forms.scaled import Scaled
from smelt.grids import levels, scales
from smelt.grids.sided import Sided

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_BYTE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# element -> (bits, exponent bits) of those that are codes
_CODED = {"e3m2": (6, 3), "e2m3": (6, 2), "fp4": (4, 2)}
# block format -> the elements that it takes, the usual one first
_BLOCKS = {"mxfp8": ("e4m3", "e5m2"), "mxfp6": ("e2m3", "e3m2"), "mxfp4": ("fp4",)}
# element -> the exponent of its largest number (OCP Microscaling Formats 1.0, tables 3 to 6)
_LARGEST = {"e4m3": 8, "e5m2": 15, "e3m2": 4, "e2m3": 2, "fp4": 2}
_BLOCK = 32


@dataclass(frozen=True)
class Float(Sided):
    """Narrow floating numbers: half precision, fp8, fp6, fp4, normal-float, and blocks that share a power of two.

    fp16, bf16: stored as they are.  e4m3, e5m2 (fp8), e3m2, e2m3 (fp6), fp4 (e2m1): times a scale that puts the largest
    value on the largest number, or makes the squared error least; beyond it they saturate.  nf: 2^bits quantiles of
    the normal distribution, NF4 with 4 bits, per group unless `per` says otherwise.  mxfp8, mxfp6, mxfp4: blocks of 32
    with a scale 2^(floor(log2 max) - exponent of the largest number).

    Ties go to the even mantissa.  Inside `train` values are rounded straight-through.  Of what was stored, scales go on
    training, and fp8 numbers rounded at every forward pass, though most steps are too small to reach the next one.

    applies to: every floating tensor; linear, convolution, embedding; inputs and outputs of layers
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no; a few batches for dynamic: false at inputs and outputs
    needs training: below 4 bits
    good at: half the bytes (bf16, fp16) or a quarter (fp8) without a thought; nf at 4 bits and 3 per group
    bad at: speed without hardware that has the format; 2 bits
    source: Micikevicius et al. 2022, arXiv:2209.05433; nf: Dettmers et al. 2023, arXiv:2305.14314; mx: OCP MX 1.0
    """

    per: str | None = setting(
        None,
        "what has its own scale; nothing: group for nf and fp4, else channel for weights, tensor for activations",
        choices=("channel", "tensor", "group", "token", "none"),
    )
    format: str = setting(
        "e4m3",
        "the numbers; mx...: in blocks of 32",
        choices=("fp16", "bf16", *_BYTE, *_CODED, "nf", *_BLOCKS),
    )
    bits: int = setting(4, "bits per value (format: nf)", low=2, high=8)
    element: str | None = setting(
        None, "numbers of mxfp8 (nothing: e4m3) and mxfp6 (nothing: e2m3)", choices=("e4m3", "e5m2", "e2m3", "e3m2")
    )
    range: str = setting("minmax", "scales reach the largest value, or make the error least", choices=("minmax", "mse"))
    scales: str = setting(
        "float32",
        "how scales are stored; double: 8 bits, in groups of 256; e4m3: fp8 with one scale for all",
        choices=scales.KINDS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        takes = _BLOCKS.get(self.format, ())
        if self.element is not None and self.element not in takes:
            raise RecipeError(f"{self.name}: format {self.format} is not made of {self.element}")
        if takes and (self.per not in (None, "group") or self.scales != "float32"):
            raise RecipeError(f"{self.name}: {self.format} has its own blocks and scales; leave per and scales out")
        if self.format in _HALF and self.per not in (None, "none"):
            raise RecipeError(f"{self.name}: {self.format} has no scale; leave per out")

    def refuses(self, target: Target) -> str | None:
        if self.format in _HALF and target.tensor.is_floating_point() and target.tensor.element_size() <= 2:
            return f"it is {target.tensor.dtype} already"
        return super().refuses(target)

    def layout(self) -> str | None:
        if self.format in _BLOCKS:
            return "group"
        if self.format in _HALF or self.per == "none":
            return "tensor"
        return self.per or ("group" if self.format in ("nf", "fp4") else None)

    def length(self) -> int:
        return _BLOCK if self.format in _BLOCKS else self.group

    def searches(self) -> str | None:
        return "range: mse" if self.range == "mse" else None

    def fitted(self, rows: Tensor, where: Tensor | None) -> dict[str, Tensor]:
        """scale, of the largest number, or exponents for blocks; nothing where there are none."""
        if self.format in _HALF or self.per == "none":
            return {}
        high = levels.absmax(rows, where)
        if self.format in _BLOCKS:
            shared = self._clamped(scales.floor_log2(high).where(high > 0, LOWEST) - _LARGEST[self._element()])
            if self.range == "minmax":
                return {"exponents": shared}
            tried = [power(self._clamped(shared + more)) for more in (0, 1, -1)]
            return {"exponents": scales.floor_log2(levels.least(rows, where, tried, self._rounding()[1])[0])}
        top, rounding = self._rounding()
        if self.range == "mse":
            high = levels.least(rows, where, levels.shrunk(high / top), rounding)[0] * top
        return {"scale": high}

    def stored(self, x: Tensor, axis: int | None, group: int, state: State) -> Encoded:
        if self.format in _HALF:
            return Encoded(plain.Float(), {"values": x.detach().to(_HALF[self.format], copy=True)}, x.shape, x.dtype)
        found: dict[str, Tensor] = dict(state.named_buffers())
        if not found:
            return Encoded(plain.Float(), {"values": self._values(x.detach().float())}, x.shape, x.dtype)
        shift = found.get("exponents")
        side = scales.stored(found["scale"], self.scales) if shift is None else scales.exponents(shift)
        form = Scaled(axis, group, self._rounding()[0] if shift is None else 1)
        numbers = self._values(x.detach().float() / form.spread(scales.values(side) / form.top, x.shape))
        return Encoded(form, {"values": numbers, "scale": side}, x.shape, x.dtype)

    def _values(self, x: Tensor) -> Tensor | Encoded:
        """Scaled values as they are stored."""
        element = self._element()
        if element in _BYTE:
            return _byte(x, _BYTE[element])
        form = self._levels()
        return Encoded(form, {"codes": levels.rounder(form).codes(x)}, x.shape, torch.float32)

    def _rounding(self) -> tuple[float, Callable[[Tensor], Tensor]]:
        """(the largest number, what rounds to numbers)"""
        element = self._element()
        if element in _BYTE:
            dtype = _BYTE[element]
            return torch.finfo(dtype).max, lambda x: _byte(x, dtype).float()
        form = self._levels()
        return form.top(), levels.rounder(form)

    def _element(self) -> str:
        return self.element or _BLOCKS.get(self.format, (self.format,))[0]

    def _levels(self) -> Levels:
        element = self._element()
        return Levels("normal", self.bits) if element == "nf" else Levels("float", *_CODED[element])

    def _clamped(self, exponents: Tensor) -> Tensor:
        return exponents.clamp(LOWEST, -LOWEST)


def _byte(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the nearest number, ties to even; saturated."""
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)
