"""How often each value occurs, in one pass over data whose range is not known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smelt.core.statistic import Statistic
from smelt.statistics.range import ends

# Bins are not narrower than 2^LEAST, so that no value divided by their width is infinite.
LEAST = -100


class Histogram(Statistic):
    """`result()` is (counts [bins], edges [bins + 1]), float64; a bin without width is a value that occurs so often.

    The bins are as wide as a power of two, the least with which `BINS` of them reach the largest magnitude on either
    side of 0.  Where that grows, neighbours are merged, so that nothing is lost and the order of the batches does not
    count.  Exact zeros (padding, ReLU) have a bin of their own; the outermost edges are the smallest and the largest
    value.
    """

    BINS = 4096

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.counts: Tensor | None = None  # [rows, 2 BINS]
        self.zeros = self.exponent = self.low = self.high = torch.zeros(0)  # [rows]
        self.shape: list[int] = []

    def rows(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """([rows, values], shape of one number per row): each row has a histogram of its own."""
        return x.reshape(1, -1), []

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values."""
        rows, self.shape = self.rows(x)
        low, high = ends(rows, dim=1)
        rows = rows.to(low.dtype)
        top = torch.maximum(-low, high)
        exponent = torch.frexp(top / self.BINS).exponent.clamp_min(LEAST)  # 2^exponent BINS > top
        if self.counts is None:
            self.counts = torch.zeros(len(rows), 2 * self.BINS, dtype=torch.float64, device=x.device)
            self.zeros, self.exponent, self.low, self.high = self.counts[:, 0].clone(), exponent, low, high
        else:
            exponent = torch.where(top > 0, exponent, self.exponent)
            self._widen(torch.where(self.counts.any(1), torch.maximum(exponent, self.exponent), exponent))
            self.low, self.high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        width = torch.ldexp(torch.ones_like(top), self.exponent)
        place = (rows / width[:, None]).floor_().long().add_(self.BINS)
        place += 2 * self.BINS * torch.arange(len(rows), device=x.device)[:, None]
        self.counts += torch.bincount(place.flatten(), minlength=self.counts.numel()).reshape_as(self.counts)
        zeros = (rows == 0).sum(1)
        self.counts[:, self.BINS] -= zeros
        self.zeros += zeros

    def _widen(self, exponent: Tensor) -> None:
        """Merge neighbours until the bins of each row are 2^exponent wide."""
        assert self.counts is not None
        while bool((narrow := (self.exponent < exponent) & self.counts.any(1)).any()):
            pairs = self.counts[narrow].unflatten(1, (-1, 2)).sum(2)
            self.counts[narrow] = nn.functional.pad(pairs, (self.BINS // 2, self.BINS // 2))
            self.exponent = self.exponent + narrow
        self.exponent = exponent

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.counts is not None
        counts = torch.cat([self.counts[:, : self.BINS], self.zeros[:, None], self.counts[:, self.BINS :]], 1)
        whole = torch.arange(-self.BINS, self.BINS + 1, dtype=torch.float64, device=counts.device)
        edges = whole * torch.ldexp(torch.ones_like(self.zeros), self.exponent)[:, None]
        edges = torch.cat([edges[:, : self.BINS + 1], edges[:, self.BINS :]], 1)
        edges = edges.clamp(self.low[:, None].double(), self.high[:, None].double())
        return counts.reshape(*self.shape, -1), edges.reshape(*self.shape, -1)
