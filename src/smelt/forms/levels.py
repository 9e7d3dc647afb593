"""Codes of a table of levels that follows from a few settings; no table is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form
from smelt.core.errors import FileError
from smelt.forms._parts import Claims, aligned, exactly, in_layout, require, whole

# kind -> the parameters that it takes: lowest, highest, whether only whole numbers
KINDS = {
    "normal": (0, 0, True),
    "float": (1, 7, True),
    "log": (1, 8, True),
    "sums": (0, 0, True),
    "mu": (2**-10, 2**20, False),
    "power": (2**-4, 2**4, False),
}


@dataclass(frozen=True)
class Levels(Form):
    """x = table[codes], where the table [2^bits] follows from kind, bits and parameter.

    codes: uint8 in the tensor's shape, below 2^bits; bits 2..8.

    'normal': quantiles of the normal distribution in rising order, from -1 through 0 to 1 (Dettmers et al. 2023,
        arXiv:2305.14314, for 4 bits): see `normal`.
    All others are a sign, the highest bit, and a magnitude m of the other bits; the largest m is M.
    'float': `parameter` exponent bits, the rest of m is a mantissa; bias 2^(exponent bits - 1) - 1, with subnormal
        numbers; every code is a finite number (e2m1, e2m3, e3m2 of OCP Microscaling Formats 1.0, section 5.3).
    'log': 0 for m = 0, else 2^((m - M) / parameter): powers of two, of sqrt 2 with parameter 2.
    'sums': sums of powers of two (APoT: Li et al. 2020, arXiv:1909.13144), see `sums`; the largest is 1.
    'mu': ((1 + mu)^(m / M) - 1) / mu with mu the parameter, exponential steps (mu-law companding).
    'power': (m / M)^(1 / p) with p the parameter, so that |x|^p has even steps.
    """

    kind: str = "normal"
    bits: int = 4
    parameter: float = 0

    values: ClassVar[tuple[str, ...]] = ("codes",)
    aligned: ClassVar[tuple[str, ...]] = ("codes",)

    def table(self) -> Tensor:
        """The levels of codes 0, 1, ...: float32 [2^bits] on the CPU, not to be changed."""
        return _table(self.kind, self.bits, self.parameter)

    def top(self) -> float:
        """The largest magnitude."""
        return float(self.table().abs().max())

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, float32.  Raises FileError: a code is not in the table (on the CPU)."""
        codes = parts["codes"]
        in_layout(self, "codes", codes, shape)
        try:
            return self.table().to(codes.device).index_select(0, codes.reshape(-1).int()).view(shape)
        except IndexError:
            raise FileError(f"form 'levels': a code has more than {self.bits} bits") from None

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        require(self.kind in KINDS, f"form 'levels': no kind {self.kind!r}")
        whole(self, "bits", self.bits, 2, 8)
        low, high, integral = KINDS[self.kind]
        high = min(high, self.bits - 1) if self.kind == "float" else high
        number = isinstance(self.parameter, (int, float)) and not isinstance(self.parameter, bool)
        fits = number and low <= self.parameter <= high and (not integral or self.parameter == int(self.parameter))
        require(fits, f"form 'levels': {self.kind} of {self.bits} bits has no parameter {self.parameter!r}")
        exactly(self, parts, shape, "codes")
        aligned(self, parts, "codes", (torch.uint8,), shape)
        require(dtype.is_floating_point, f"form 'levels' cannot store {dtype}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: a code is not in the table (looked for here, once, for every device)."""
        codes = encoded.parts["codes"]
        if isinstance(codes, Tensor) and codes.numel():
            high = int(codes.max())
            require(high < 1 << self.bits, f"form 'levels': code {high} has more than {self.bits} bits")
        return encoded

    def magnitude(self) -> Callable[[float], float]:
        """Of 'log', 'mu' and 'power': the level of a magnitude m, which need not be whole."""
        return _magnitude(self.kind, self.bits, self.parameter)


@lru_cache(maxsize=256)
def _table(kind: str, bits: int, parameter: float) -> Tensor:
    if kind == "normal":
        return normal(bits)
    half = 1 << bits - 1
    if kind == "float":
        positive = [_minifloat(m, bits - 1 - int(parameter), (1 << int(parameter) - 1) - 1) for m in range(half)]
    elif kind == "sums":
        positive = sums(bits - 1)
    else:
        of = _magnitude(kind, bits, parameter)
        positive = [of(m) if m else 0.0 for m in range(half)]
    return torch.tensor([*positive, *(-v for v in positive)], dtype=torch.float64).float()


def _minifloat(m: int, mantissa: int, bias: int) -> float:
    exponent, fraction = m >> mantissa, m & (1 << mantissa) - 1
    if not exponent:
        return math.ldexp(fraction, 1 - bias - mantissa)
    return math.ldexp((1 << mantissa) + fraction, exponent - bias - mantissa)


def _magnitude(kind: str, bits: int, parameter: float) -> Callable[[float], float]:
    most = (1 << bits - 1) - 1
    if kind == "log":
        return lambda m: 2.0 ** ((m - most) / parameter)
    if kind == "mu":
        return lambda m: math.expm1(m / most * math.log1p(parameter)) / parameter
    assert kind == "power"
    return lambda m: (m / most) ** (1 / parameter)


def normal(bits: int) -> Tensor:
    """Float32 [2^bits], rising: 2^(bits-1) evenly spaced quantiles on the positive side, one less on the negative.

    The outermost is the mean of 1 - 1/2^(bits+1) and 1 - 1/(2^(bits+1) - 2), to seven digits as published; the
    whole is divided by its largest in float32.  At 4 bits these are the sixteen published values of NF4.
    """
    half = 1 << bits - 1
    outer = np.float32(round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7))
    middle = np.float32(0.5)

    def side(count: int) -> list[float]:
        """Quantiles of count points from outer to (not at) 1/2; each is counted from the end that is nearer."""
        step, near = (middle - outer) / np.float32(count), (count + 1) // 2
        points = [outer + step * np.float32(i) for i in range(near)]
        points += [middle - step * np.float32(i) for i in range(count - near, 0, -1)]
        return [NormalDist().inv_cdf(float(point)) for point in points]

    levels = [*(-v for v in side(half - 1)), 0.0, *reversed(side(half))]
    found = torch.tensor(levels, dtype=torch.float64).float()
    return found / found.max()


def sums(bits: int) -> list[float]:
    """The 2^bits magnitudes of APoT, rising from 0 to 1 (Li et al. 2020, arXiv:1909.13144, eq. 4).

    Each is a sum of one power of two, or 0, from each of n = bits // 2 sets: set i has 2^-i, 2^-(i+n), 2^-(i+2n), so
    that all powers differ.  An odd bit adds a set of one power, 2^-2n, and moves the third of the others down by one.
    """
    n, odd = divmod(bits, 2)
    sets = [[0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + odd)] for i in range(n)]
    if odd:
        sets.append([0.0, 2.0 ** -(2 * n)])
    found = [0.0]
    for powers in sets:
        found = [a + b for a in found for b in powers]
    return [v / max(found) for v in sorted(found)]
