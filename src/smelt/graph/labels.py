"""Labels: which coordinates of which dimensions are cut together.

Each dimension of each tensor has an `Axis`: one label per coordinate, or, where none of them may go, the reason.
Labels that meet are united.  A label may be a product, x = (a, b): it is cut where a is cut or b is cut.  So
channels that are viewed as heads x head dims follow the heads and the head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Axis = Ids | str
Attribute = tuple[str, str, int]  # module path, attribute, place in a tuple or list (-1: it is the number itself)


@dataclass(frozen=True, eq=False)
class Product:
    """x[i, j] = (a[i], b[j])."""

    x: Ids
    a: Ids
    b: Ids


@dataclass(frozen=True, eq=False)
class Equal:
    """The code takes `ids` in `count` pieces of one size, so that all of them must keep equally many."""

    ids: Ids
    count: int
    reason: str


class Labels:
    def __init__(self) -> None:
        self.n = 0
        self.vectors: list[tuple[int, int, str]] = []  # first label, how many, what they are
        self.pairs: list[tuple[Ids, Ids]] = []
        self.products: list[Product] = []
        self.fixed: list[tuple[Ids, str]] = []
        self.equal: list[Equal] = []
        self.ties: list[tuple[Ids, Ids]] = []  # not the same coordinates, but the code asks for equally many
        self.read: list[Ids] = []  # along these, products are summed
        self.made: list[Ids] = []  # these are the results
        self.inexact: list[Ids] = []
        self.sizes: dict[Attribute, Axis] = {}  # what the number in an attribute counts
        self._splits: dict[tuple[bytes, int], tuple[Axis, Axis]] = {}
        self._products: dict[tuple[bytes, bytes], Ids] = {}
        self._pairs_seen: set[tuple[bytes, bytes]] = set()
        self._factors = np.full((2, 1024), -1)  # [a and b, label] of the labels that are products

    def fresh(self, n: int, kind: str) -> Ids:
        self.vectors.append((self.n, n, kind))
        self.n += n
        if self.n > self._factors.shape[1]:
            self._factors = np.concatenate([self._factors, np.full((2, self.n), -1)], 1)
        return np.arange(self.n - n, self.n)

    def meet(self, axes: Sequence[Axis], why: str = "") -> Axis:
        """The coordinates of axes of one size are the same."""
        given = [axis for axis in axes if not isinstance(axis, str)]
        reasons = [axis for axis in axes if isinstance(axis, str)]
        if reasons:
            for axis in given:
                self.fix(axis, f"{reasons[0]}{why}")
            return reasons[0]
        for other in given[1:]:
            self.unite(given[0], other)
        return given[0]

    def unite(self, a: Ids, b: Ids) -> None:
        if a is not b and (key := (a.tobytes(), b.tobytes())) not in self._pairs_seen and not np.array_equal(a, b):
            self._pairs_seen.add(key)
            self.pairs.append((a, b))

    def fix(self, axis: Axis, reason: str) -> None:
        if not isinstance(axis, str) and len(axis):
            self.fixed.append((np.unique(axis), reason))

    def even(self, ids: Ids, count: int, reason: str) -> None:
        self.equal.append(Equal(ids, count, reason))

    def count(self, attribute: Attribute, axis: Axis, where: str) -> None:
        """The number in an attribute is the length of `axis`."""
        known = self.sizes.setdefault(attribute, axis)
        if known is not axis:
            self.tie(known, axis, where)

    def tie(self, a: Axis, b: Axis, why: str) -> None:
        """The code asks that two axes have one length."""
        if isinstance(a, str) or isinstance(b, str):
            self.meet([a, b], why)
        elif len(a) == len(b) and not np.array_equal(a, b):
            self.ties.append((a, b))

    def product(self, a: Axis, b: Axis, n: int, m: int) -> Axis:
        """The axis of length n * m of two axes that are flattened."""
        if isinstance(a, str):
            return a if isinstance(b, str) else np.tile(b, n)
        if isinstance(b, str):
            return np.repeat(a, m)
        key = (a.tobytes(), b.tobytes())
        if key not in self._products:
            x = self.fresh(n * m, "product")
            self._products[key] = x
            self._splits[x.tobytes(), n] = (a, b)
            self._note(x.reshape(n, m), a, b)
        return self._products[key]

    def _note(self, grid: Ids, a: Ids, b: Ids) -> None:
        self.products.append(Product(grid, a, b))
        self._factors[0, grid], self._factors[1, grid] = a[:, None], b

    def split(self, x: Axis, n: int, m: int, kinds: tuple[str, str] = ("heads", "head dims")) -> tuple[Axis, Axis]:
        """The axes of lengths n and m that an axis of length n * m is seen as: the inverse of `product`."""
        if isinstance(x, str):
            return x, x
        if n == 1 or m == 1:
            return ("it has one coordinate", x) if n == 1 else (x, "it has one coordinate")
        key = (x.tobytes(), n)
        if key not in self._splits:
            self._splits[key] = self._split(x, n, m, kinds)
        return self._splits[key]

    def _split(self, x: Ids, n: int, m: int, kinds: tuple[str, str]) -> tuple[Axis, Axis]:
        grid = x.reshape(n, m)
        if (grid == grid[:1]).all():
            return "it repeats the same coordinates", grid[0].copy()
        if (grid == grid[:, :1]).all():
            return grid[:, 0].copy(), "it repeats the same coordinates"
        if (period := _period(x)) < len(x) and period % m == 0:
            a, b = self.split(x[:period].copy(), period // m, m, kinds)
            return (a if isinstance(a, str) else np.tile(a, n * m // period)), b
        if (run := _run(x)) > 1 and m % run == 0:
            a, b = self.split(x[::run].copy(), n, m // run, kinds)
            return a, (b if isinstance(b, str) else np.repeat(b, run))
        known = self._factors[0, grid], self._factors[1, grid]
        for a, b in (known, known[::-1]):
            if (a >= 0).all() and (a == a[:, :1]).all() and (b == b[:1]).all():
                return a[:, 0].copy(), b[0].copy()
        a, b = self.fresh(n, kinds[0]), self.fresh(m, kinds[1])
        self._note(grid, a, b)
        return a, b


def _period(x: Ids) -> int:
    """The smallest p with x = x[:p] repeated."""
    for p in np.flatnonzero(x[1:] == x[0])[:64] + 1:
        if len(x) % p == 0 and (x.reshape(-1, p) == x[:p]).all():
            return int(p)
    return len(x)


def _run(x: Ids) -> int:
    """The largest r with x = every r-th of x, r times."""
    changes = np.flatnonzero(x[1:] != x[:-1]) + 1
    r = int(np.gcd.reduce([*changes, len(x)])) if len(changes) else len(x)
    return r
