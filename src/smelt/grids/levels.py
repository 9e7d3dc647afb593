"""Levels of a table: which code a value gets, and which scale makes the error least.

    values  ->  scale  ->  codes  ->  values
                absmax, shrunk        Rounder     table[codes] * scale

Scales are found over rows [r, n], one for each row.  `where` [r, n] says which entries count (None: all); a row of
which nothing counts has absmax 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from smelt.forms.levels import Levels

# Values that `least` works on at a time, so that they stay in the cache.
BLOCK = 1 << 16
# What `shrunk` multiplies a scale by: from a little above 1, where more levels lie in the middle of the row, to 1/5.
FACTORS = (1.0, *(1.25 * 0.96**i for i in range(45)))

TINY = torch.finfo(torch.float32).tiny


class Rounder:
    """Rounds numbers to the levels of a form.

    companded: to the level that is nearest in the domain where the levels are even ('log', 'mu', 'power'), as the
        papers do it; else to the nearest level, which has the least error.  Half way between two 'float' levels the
        even mantissa wins, as IEEE 754 has it.
    """

    def __init__(self, form: Levels, companded: bool = False):
        table = form.table()
        if form.kind == "normal":
            codes = torch.arange(len(table))
        else:
            half = len(table) // 2
            codes = torch.cat((torch.arange(len(table) - 1, half, -1), torch.arange(half)))  # one zero is enough
        exact = table[codes].double()
        borders = ((exact[1:] + exact[:-1]) / 2).float()
        if companded and form.kind in ("log", "mu", "power"):
            of = form.magnitude()
            upper = torch.tensor([of(m + 0.5) for m in range(half - 1)], dtype=torch.float64).float()
            borders = torch.cat((-upper.flip(0), upper))
        elif form.kind == "float":
            up = codes[1:] % 2 == 0  # a tie goes to the lower level unless its border is moved below it
            borders = torch.where(up, torch.nextafter(borders, torch.tensor(-torch.inf)), borders)
        self._codes, self._levels, self._borders = codes.to(torch.uint8), table[codes], borders

    def codes(self, x: Tensor) -> Tensor:
        """The code of each number; those beyond the outermost levels get these."""
        return self._of(self._codes, x)

    def __call__(self, x: Tensor) -> Tensor:
        """The level of each number, float32."""
        return self._of(self._levels, x)

    def _of(self, table: Tensor, x: Tensor) -> Tensor:
        index = torch.bucketize(x, self._borders.to(x.device), out_int32=True)
        return table.to(x.device).index_select(0, index.reshape(-1)).view(x.shape)


@lru_cache(maxsize=256)
def rounder(form: Levels, companded: bool = False) -> Rounder:
    """The same one for equal arguments."""
    return Rounder(form, companded)


def absmax(rows: Tensor, where: Tensor | None = None) -> Tensor:
    """The largest magnitude of each row, float32 and finite."""
    kept = rows if where is None else rows.where(where, 0)
    return kept.abs().amax(1).float().clamp_max(torch.finfo(torch.float32).max)


def shrunk(scale: Tensor) -> Iterable[Tensor]:
    """Scales worth trying around one that reaches the largest value."""
    return (scale * factor for factor in FACTORS)


def least(
    rows: Tensor, where: Tensor | None, scales: Iterable[Tensor], round_: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of several scales [r] for each row the one with the least sum of squared errors, and that sum [r].

    round_: numbers to levels, before the scale.  Of equal scales the first is taken.
    """
    tried = list(scales)
    size = max(1, BLOCK // max(rows.shape[1], 1))
    best, errors = torch.empty_like(tried[0]), torch.empty_like(tried[0])
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        x, mask = rows[part].float(), None if where is None else where[part]
        error = torch.full_like(tried[0][part], torch.inf)
        found = tried[0][part].clone()
        for scale in tried:
            scale = scale[part].clamp_min(TINY)
            wrong = (round_(x / scale[:, None]) * scale[:, None]).sub_(x).square_()
            now = (wrong if mask is None else wrong.where(mask, 0)).sum(1)
            better = now < error
            found, error = scale.where(better, found), now.where(better, error)
        best[part], errors[part] = found, error
    return best, errors


def sample(x: Tensor, most: int) -> Tensor:
    """At most `most` evenly spaced elements of a flat tensor."""
    return x[:: -(-x.numel() // most)] if x.numel() > most else x
