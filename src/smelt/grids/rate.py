"""Steps and codes for an entropy coder: what a weight costs in bits, and how large its step may be.

Where the error of a layer is the sum of g_r d_c a_rc^2 over what is rounded (`grids.feedback`), all errors should be
equally dear: the step of row r and column c is in proportion to (g_r d_c)^-1/2 (reverse water-filling: at high rates
an entropy-coded uniform quantizer with these steps is 0.25 bits from the bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from smelt.forms import entropy
from smelt.grids import feedback

# What is wanted, in steps -> whole numbers.
Code = Callable[[Tensor], Tensor]
# Steps are powers of two, or of a root of two up to this one.
FINEST = 8
REACH = 127
# Octaves to either side in which a step is looked for.
FAR = 24.0
# Codes beyond -LIMIT..LIMIT cost what these do.
LIMIT = 127


def narrow(codes: Tensor) -> Tensor:
    """Codes in the narrowest signed integers that hold them."""
    most = int(codes.abs().max()) if codes.numel() else 0
    return codes.to(torch.int8 if most < 1 << 7 else torch.int16 if most < 1 << 15 else torch.int32)


def coded(codes: Tensor) -> int:
    """Bits of whole numbers in a file."""
    return 8 * int(entropy.encode(narrow(codes), "auto").nbytes())


def prices(codes: Tensor) -> Tensor:
    """Bits of the codes -LIMIT..LIMIT, as their shares tell; those that do not occur are as dear as half of one."""
    counts = torch.bincount((codes.flatten().clamp(-LIMIT, LIMIT) + LIMIT).long(), minlength=2 * LIMIT + 1)
    return (counts.sum() / counts.double().clamp_min(0.5)).log2().to(codes.dtype)


def rounder(bits: Tensor, price: float) -> Code:
    """u -> the code n of the nearest, the next one towards 0, and 0 that has the least (u - n)^2 + price * bits(n)."""
    if not price:
        return torch.round

    def cost(u: Tensor, n: Tensor) -> Tensor:
        return (u - n).square() + price * bits[(n.clamp(-LIMIT, LIMIT) + LIMIT).long()]

    def code(u: Tensor) -> Tensor:
        best = u.round()
        least = cost(u, best)
        for other in (best - best.sign(), torch.zeros_like(best)):
            now = cost(u, other)
            best, least = torch.where(now < least, other, best), torch.minimum(now, least)
        return best

    return code


def octave(steps: int, weights: int) -> int:
    """How finely steps are told apart, in parts of an octave, where so many weights share so many steps.

    Rounded to 1/n of an octave they cost ln 2 / (6 n^2) bits a weight, and log2(n) bits each.
    """
    return max(1, min(FINEST, round(math.log(2) * math.sqrt(weights / (3 * steps)))))


class Layer:
    """A weight, what its errors cost, and what its codes would.

    The error e of each group of rows [out, k] costs tr(G e H e^T).  Steps are multiples of `unit`, in the layout of
    the weight.

    rows: int8 [n], columns: int8 [groups, k]; base: the unit is base * 2^((rows + columns) / octave), as in the form.

    Args:
        x: the weight, float32 or wider.  where: its mask, or None.
        h: [groups, k, k]; g: [groups, out, out]; both positive definite.  None: 1.
        scale: what costs are multiplied by.
    """

    def __init__(
        self,
        x: Tensor,
        where: Tensor | None = None,
        h: Tensor | None = None,
        g: Tensor | None = None,
        scale: float = 1.0,
    ):
        groups = len(h) if h is not None else 1
        self.h = h
        self.x, self.where = x.detach() if where is None else x.detach().masked_fill(~where, 0), where
        self.shape = (groups, len(x) // groups, x[0].numel())
        self.columns_of = None if h is None else [feedback.factor(m) for m in h]
        self.rows_of = None if g is None else [feedback.factor(m) for m in g]
        one = torch.ones((), dtype=torch.float64, device=x.device)
        dear_columns = one.expand(groups, self.shape[2]) if self.columns_of is None else _stack(self.columns_of)
        dear_rows = one.expand(groups, self.shape[1]) if self.rows_of is None else _stack(self.rows_of)
        self.octave = octave(dear_rows.numel() + dear_columns.numel(), self.count())
        (self.rows, first), (self.columns, second) = (self._exponents(dear) for dear in (dear_rows, dear_columns))
        self.rows = self.rows.reshape(-1)
        self.base = 2.0 ** (first + second) / math.sqrt(scale)
        powers = (self.rows.double().reshape(groups, -1, 1) + self.columns[:, None]) / self.octave
        self.unit = (self.base * torch.exp2(powers)).to(x.dtype).reshape(x.shape)
        # What is rounded has taken over errors of others.  With a the rounding errors, it differs from w by
        # a - U^-T a V^-1; here is the spread of that, in steps.
        more = [
            dear if inverse is None else dear * torch.stack([torch.linalg.inv(m).diagonal() for m in inverse])
            for dear, inverse in ((dear_rows, g), (dear_columns, h))
        ]
        taken = (more[0][:, :, None] * more[1][:, None] - 1).clamp_min(0) / 12
        self.taken = taken.sqrt().to(x.dtype).reshape(x.shape) if h is not None or g is not None else None

    def _exponents(self, costs: Tensor) -> tuple[Tensor, float]:
        """(int8 e, middle): 2^(middle + e / octave) is near costs^-1/2, e around 0; all 0 where that is cheaper."""
        wanted = costs.log2() / -2
        middle = float(wanted.mean())
        found = ((wanted - middle) * self.octave).round().clamp(-REACH, REACH).to(torch.int8)
        even = -0.5 * math.log2(float(costs.mean()))
        saved = (middle - even) * self.count()
        return (found, middle) if coded(found) < saved else (torch.zeros_like(found), even)

    def count(self) -> int:
        """Weights that count."""
        return self.x.numel() if self.where is None else int(self.where.sum())

    def loudness(self) -> float:
        """log2 of the root of the mean square of the weights, in units."""
        kept = (self.x / self.unit).double().square().sum() / max(1, self.count())
        return 0.5 * math.log2(max(float(kept), 1e-30))

    def bits(self, step: float, seed: int = 0) -> int:
        """About what codes and steps have in a file, without solving for the codes: noise stands for the errors."""
        u = self.x / (self.unit * step)
        if self.taken is not None:
            noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed), dtype=u.dtype)
            u += self.taken * noise.to(u.device)
        codes = u.round_() if self.where is None else u.round_()[self.where]
        return coded(codes) + (0 if self.taken is None else coded(self.rows) + coded(self.columns))

    def codes(self, step: float, wanted: Tensor, price: float = 0.0) -> Tensor:
        """Whole numbers in the layout of the weight.

        Args:
            wanted: what is rounded in place of the weight.
            price: see `rounder`; costs are those of the codes found without it.
        """
        found = self._codes(step, wanted, torch.round)
        return self._codes(step, wanted, rounder(prices(found), price)) if price else found

    def _codes(self, step: float, wanted: Tensor, code: Code) -> Tensor:
        keep = torch.ones_like(self.x, dtype=torch.bool) if self.where is None else self.where
        steps = self.unit * step
        if self.columns_of is None:
            return code(wanted / steps).where(keep, 0)
        parts = zip(*(t.reshape(self.shape) for t in (wanted, steps, keep)), self.columns_of, strict=True)
        found = []
        for i, (w, one, kept, (columns, _)) in enumerate(parts):
            feed = columns.to(w.dtype)
            if self.rows_of is None:
                found.append(feedback.carried(w, feed, partial(_down, one, kept, code)))
            else:
                above = self.rows_of[i][0].to(w.dtype)
                found.append(feedback.woven(w, above, feed, partial(_across, one, kept, code)))
        codes: Tensor = torch.stack(found).reshape(self.x.shape) / steps
        return codes.round_()


def _down(steps: Tensor, keep: Tensor, code: Code, now: slice, _: Tensor) -> feedback.Round:
    lines, kept = (t[:, now].T.contiguous() for t in (steps, keep))

    def round_(c: int, wanted: Tensor) -> Tensor:
        step = lines[c - now.start]
        return (code(wanted / step) * step).where(kept[c - now.start], 0)

    return round_


def _across(steps: Tensor, keep: Tensor, code: Code, now: slice, _: Tensor) -> feedback.Across:
    own, kept = (t[:, now].contiguous() for t in (steps, keep))

    def across(line: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
        step = line(own)
        return (code(wanted / step) * step).where(line(kept), 0)

    return across


def _stack(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([cost.double() for _, cost in factors])


def step_for(target: float, bits: Callable[[float], float], loud: float, close: float = 0.001) -> float:
    """The step at which `bits`, which falls as the step grows, is `target`; by the secant method on its logarithm.

    Where most of the target is taken by what there is besides codes (a few weights in all), it is the step at which
    codes would have so many bits at high rates.

    Args:
        loud: log2 of the root of the mean square of the weights, in units.
    """
    at, slope = (
        loud + 2 - target,
        -1.0,
    )  # log2(sqrt(2 pi e)) = 2.05: what normal numbers cost above log2 of their spread
    if bits(2.0 ** (at + FAR)) > target / 2:
        return float(2.0**at)
    low, high = at - FAR, at + FAR  # with too many bits, with too few
    last: tuple[float, float] | None = None
    while high - low > 1e-6:
        found = bits(2.0**at)
        if abs(found - target) <= close * target:
            break
        low, high = (at, high) if found > target else (low, at)
        if last is not None and at != last[0]:
            slope = min(-0.05, (found - last[1]) / (at - last[0]))
        last = at, found
        wanted = at + (target - found) / slope
        at = wanted if low < wanted < high else (low + high) / 2
    return float(2.0**at)
