"""What k-means works on: values gathered into points in ascending order, each of some weight."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smelt.grids import _kmeans_native, _kmeans_numpy
from smelt.native import library

Array = NDArray[Any]

BINS = 1 << 16
FINE = 256  # bins per center, from 16,384 to 65,536 in all
SAMPLE = 1 << 10  # values by which the bins are laid
OCCUPIED = 16  # bins per center that hold values, at least
LIGHT = 1e-15  # share of all weight below which a point's own is lost in sums


def loops() -> ModuleType:
    """The loops over values, points and centers: in C where that was built."""
    return _kmeans_numpy if library() is None else _kmeans_native


def flattened(values: Array) -> Array:
    """Contiguous float32 (of float16 too) or float64."""
    flat = np.ravel(values)
    return np.ascontiguousarray(flat, np.float32 if flat.dtype in (np.float16, np.float32) else np.float64)


def distinct(values: Array, weights: Array | None) -> Points:
    """Every distinct value as a point."""
    found: Any = loops().gather(values, weights, BINS) or _kmeans_numpy.gather(values, weights, None)
    return Points(*found)


def gathered(values: Array, weights: Array | None, k: int) -> Points:
    """Up to 65,536 distinct values as points; more in bins, where those resolve k centers.

    Raises:
        ValueError: values that are not finite.
    """
    found = loops().gather(values, weights, BINS)
    if found is not None:
        return Points(*found)
    sample = np.sort(values[:: max(1, values.size // SAMPLE)].astype(np.float64))
    middle = float(sample[len(sample) // 2])
    with np.errstate(over="ignore", divide="ignore"):
        inverse = values.dtype.type(0.5 / np.abs(sample - middle).mean())
    if 0 < inverse < np.inf:
        binned = Binned(values, weights, middle, float(inverse), k)
        if len(binned.x) >= OCCUPIED * k:
            return binned
    return distinct(values, weights)


class Points:
    """x: ascending; mass, count: weight and number of the values that each stands for; all [n], float64.

    w, s, n: prefix sums [n + 1] of mass, of mass * (x - origin), and of count.
    """

    def __init__(self, x: Array, mass: Array, count: Array):
        self.x, self.mass, self.count = x, mass, count
        self.origin = float(np.average(x, weights=mass)) if mass.any() else 0.0
        self._add_up()

    def _add_up(self) -> None:
        if self.mass is not self.count:
            self.mass = np.where(self.mass > LIGHT * self.mass.sum(), self.mass, 0.0)
        self.w, self.s = (np.append(0.0, np.cumsum(m)) for m in (self.mass, self.mass * (self.x - self.origin)))
        self.n = self.w if self.mass is self.count else np.append(0.0, np.cumsum(self.count))

    def few(self, number: int) -> tuple[Array, Array]:
        """The points and their weights, those of many gathered into the means of up to 65,536 bins.

        Half of the borders lie at equal distances, half at equal numbers of points.
        """
        x, mass = self.x, self.mass
        if len(x) > BINS:
            even = np.searchsorted(x, np.linspace(x[0], x[-1], BINS // 2, endpoint=False))
            first = np.union1d(even, np.arange(BINS // 2) * len(x) // (BINS // 2))
            mass = np.add.reduceat(mass, first)
            x = np.add.reduceat(self.mass * x, first) / np.where(mass > 0, mass, 1)
        kept = mass > LIGHT * mass.sum()
        return x[kept], mass[kept]

    def split(self, borders: Array, margin: int = 0) -> bool:
        """Take apart the points that stand for values on both sides of a border; False where there are none.

        margin: so many bins to either side of a border's own are taken apart, too.
        """
        return False

    def squares(self) -> float:
        """Sum of mass * (x - origin)^2 over the values."""
        return float(self.mass @ (self.x - self.origin) ** 2)

    def error(self, borders: Array) -> float:
        """Sum of mass * (x - c)^2 over the values, c the mean of those between the same borders."""
        edges = np.concatenate(([0], np.searchsorted(self.x, borders, side="right"), [len(self.x)]))
        weight, total = np.diff(self.w[edges]), np.diff(self.s[edges])
        return max(0.0, self.squares() - float(np.sum(total**2 / np.where(weight > 0, weight, 1))))


class Binned(Points):
    """Values in bins, narrow in the midst of them and wider outward (`_kmeans_numpy.places`).

    A bin is a point at the mean of its values until it is taken `apart`: then every one of its values is a point.
    """

    def __init__(self, values: Array, weights: Array | None, middle: float, inverse: float, k: int):
        self.values, self.weights, self.middle, self.inverse = values, weights, middle, inverse
        self.number = next(n for n in (BINS >> 2, BINS >> 1, BINS) if n >= min(BINS, FINE * k))
        self.where, *self.bins = loops().bins(values, weights, middle, inverse, self.number)
        self.apart = (self.bins[0] > 0) & (self.bins[1] <= 0)
        self._take_apart()
        super().__init__(self.x, self.mass, self.count)

    def _take_apart(self) -> None:
        count, mass, total, _ = self.bins
        whole = np.flatnonzero((count > 0) & ~self.apart)
        self.x, self.mass, self.count = self.middle + total[whole] / mass[whole], mass[whole], count[whole]
        if self.apart.any():
            before = np.cumsum(np.where(self.apart, count, 0)).astype(np.int64)
            x, weight = loops().members(self.values, self.weights, self.where, self.apart, int(before[-1]))
            order = np.argsort(x) if self.weights is not None else slice(None)
            x = np.sort(x) if self.weights is None else x[order]
            at = np.arange(len(whole)) + before[whole]
            self.x, self.mass, self.count = (
                _joined(own, at, single)
                for own, single in ((self.x, x), (self.mass, weight[order]), (self.count, np.ones(len(x))))
            )
        if (self.x[1:] < self.x[:-1]).any():  # means that rounding put in each other's place
            self.x.sort()
        if self.weights is None:
            self.mass = self.count

    def few(self, number: int) -> tuple[Array, Array]:
        """The points and their weights, neighbouring bins joined to at most `number`."""
        mass, total = (part.reshape(min(number, self.number), -1).sum(1) for part in self.bins[1:3])
        kept = mass > LIGHT * mass.sum()
        return self.middle + total[kept] / mass[kept], mass[kept]

    def split(self, borders: Array, margin: int = 0) -> bool:
        at = _kmeans_numpy.places(borders.astype(self.values.dtype), self.middle, self.inverse, self.number)
        at = at[(self.bins[0][at] > 0) & ~self.apart[at]]
        if not len(at):
            return False
        begin, end = np.maximum(at - margin, 0), np.minimum(at + margin + 1, self.number)
        change = np.bincount(begin, minlength=self.number + 1) - np.bincount(end, minlength=self.number + 1)
        self.apart |= (np.cumsum(change)[:-1] > 0) & (self.bins[0] > 0)
        self._take_apart()
        self._add_up()
        return True

    def squares(self) -> float:
        _, mass, total, squares = self.bins
        shift = self.middle - self.origin
        return float(squares + 2 * shift * total.sum() + shift**2 * mass.sum())


def _joined(own: Array, at: Array, others: Array) -> Array:
    """`own` at the places `at`, `others` at the rest."""
    joined = np.empty(len(own) + len(others))
    rest = np.ones(len(joined), bool)
    rest[at] = False
    joined[at], joined[rest] = own, others
    return joined
