"""The loops of `kmeans` in NumPy, for where the C library was not built: the same results, to rounding.

Values are flat, float32 or float64; weights float64, one per value, or None for all 1.  Points are float64 and
ascending; w, s, q, count are prefix sums, one longer than the points, that begin with 0: of their weights, of
weight * x, of weight * x^2, and of how many values each stands for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 1 << 20


def gather(values: Array, weights: Array | None, room: int | None) -> tuple[Array, Array, Array] | None:
    """Distinct values, ascending, their weights, and how often each occurs; None where there are more than `room`.

    Raises:
        ValueError: values that are not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("values to cluster must be finite")
    if weights is None:
        ordered = np.sort(values)
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: values.size])
        points, count = ordered[first], np.diff(first, append=values.size).astype(np.float64)
        mass = count
    else:
        points, place = np.unique(values, return_inverse=True)
        count, mass = (np.bincount(place, by, len(points)).astype(np.float64) for by in (None, weights))
    return None if room is not None and len(points) > room else (points.astype(np.float64), mass, count)


def places(values: Array, center: float, inverse: float, bins: int) -> Array:
    """The bin of each value: even steps of t / (1 + |t|), t = (x - center) * inverse, in the order of the values.

    The arithmetic is that of the values' dtype.
    """
    kind = values.dtype.type
    one, half = kind(1), kind(bins // 2)
    with np.errstate(over="ignore"):
        t = (values - kind(center)) * kind(inverse)
    found: Array = ((np.copysign(one - one / (one + np.abs(t)), t) + one) * half).astype(np.int64)
    return np.minimum(found, bins - 1)


def bins(
    values: Array, weights: Array | None, center: float, inverse: float, number: int
) -> tuple[Array, Array, Array, Array, float]:
    """The bin of each value, uint16 (number <= 65,536); of each bin: number of values, weight, weighted sum of
    x - center; and the weighted sum of all (x - center)^2."""
    where = np.empty(values.size, np.uint16)
    count, mass, total = np.zeros(number), np.zeros(number), np.zeros(number)
    squares = 0.0
    for i in range(0, values.size, BLOCK):
        part = values[i : i + BLOCK]
        weight = np.ones(part.size) if weights is None else weights[i : i + BLOCK]
        place, far = places(part, center, inverse, number), part.astype(np.float64) - center
        where[i : i + BLOCK] = place
        count += np.bincount(place, minlength=number)
        mass += np.bincount(place, weight, number)
        total += np.bincount(place, weight * far, number)
        squares += float(weight @ far**2)
    return where, count, mass, total, squares


def members(values: Array, weights: Array | None, where: Array, marks: Array, room: int) -> tuple[Array, Array]:
    """The `room` values of the marked bins as they come, float64, and their weights."""
    chosen = marks[where]
    return values[chosen].astype(np.float64), np.ones(room) if weights is None else weights[chosen]


def program(w: Array, s: Array, q: Array, k: int) -> Array:
    """The ends of the k intervals of least cost, of n > k points; k + 1 of them.

    The least cost of the first j points in m clusters is
    D_m(j) = min_i D_{m-1}(i) + Q_j - Q_i - (S_j - S_i)^2 / (W_j - W_i).  The best i never falls as j or m grows.
    So it is found for j = h, 3h, 5h, ... between the known ones of j - h and j + h, for h = n/2, n/4, ..., 1: a level
    is one vector operation over about n candidates.
    """
    n = len(w) - 1
    cost = np.full(n + 1, np.inf)
    cost[1:] = q[1:] - s[1:] ** 2 / w[1:]
    choices = np.zeros((k, n + 1), np.uint16 if n <= 1 << 16 else np.int32)
    best = np.zeros(n + 2, np.int64)
    for m in range(1, k):
        # m clusters before the last: i in m..j-1, j in m+1..n
        base, before = cost - q, best
        cost, best = np.full(n + 1, np.inf), np.full(n + 2, n - 1)
        best[: m + 1] = m
        step = 1 << (n - m).bit_length() - 1
        while step:
            j = np.arange(m + step, n + 1, 2 * step)
            low = np.maximum(best[j - step], before[j])
            high = np.maximum(low, np.minimum(best[np.minimum(j + step, n + 1)], j - 1))
            number = high - low + 1
            ends = np.cumsum(number)
            begin = ends - number
            i = np.arange(ends[-1]) + np.repeat(low - begin, number)
            gain = np.repeat(s[j], number) - s[i]
            gain *= gain
            gain /= np.repeat(w[j], number) - w[i]
            np.subtract(base[i], gain, out=gain)
            least = np.minimum.reduceat(gain, begin)
            hits = np.flatnonzero(gain == np.repeat(least, number))
            best[j] = i[hits[np.searchsorted(hits, begin)]]
            cost[j] = least + q[j]
            step //= 2
        choices[m] = best[:-1]
    edges = [n]
    for m in range(k - 1, 0, -1):
        edges.append(int(choices[m, edges[-1]]))
    return np.array([*edges, 0][::-1])


def rounds(points: Array, w: Array, s: Array, origin: float, centers: Array, limit: int) -> tuple[Array, Array]:
    """Lloyd's rounds until no point changes its center: (centers, ends of their intervals).

    s is of weight * (x - origin).  Centers without weight stay where they are.
    """
    cuts: Array | None = None
    edges = np.array([0, len(points)])
    for _ in range(limit):
        before, cuts = cuts, np.searchsorted(points, halves(centers), side="right")
        if before is not None and np.array_equal(before, cuts):
            break
        edges = np.concatenate(([0], cuts, [len(points)]))
        heavy = np.diff(w[edges])
        held = heavy > 0
        means = np.diff(s[edges]) / np.where(held, heavy, 1) + origin
        means = np.clip(means, points[np.minimum(edges[:-1], len(points) - 1)], points[edges[1:] - 1])
        centers = np.where(held, means, centers)
    return centers, edges


def coded(
    points: Array,
    sums: tuple[Array, Array, Array],
    origin: float,
    price: float,
    borders: Array,
    limit: int,
) -> tuple[Array, Array, float]:
    """Entropy-constrained rounds from given borders: (centers, borders, cost); see `kmeans.constrained`.

    sums: w, s of weight * (x - origin), and count.  The cost, sum of weight * (x - c)^2 + price * count * bits, comes
    less the constant sum of weight * (x - origin)^2.  Clusters without weight are joined to a neighbour.
    """
    w, s, n = sums
    result = np.empty(0), borders, np.inf
    last: Array | None = None
    for _ in range(limit):
        edges = np.concatenate(([0], np.searchsorted(points, borders, side="right"), [len(points)]))
        kept = np.flatnonzero(np.diff(w[edges]) > 0)
        borders, edges = borders[kept[1:] - 1], np.concatenate(([0], edges[kept[1:]], [len(points)]))
        weight, count, total = (np.diff(sums[edges]) for sums in (w, n, s))
        centers = np.clip(total / weight + origin, points[edges[:-1]], points[edges[1:] - 1])
        bits = np.log2(n[-1] / count)
        cost = float(np.sum(price * count * bits - total**2 / weight))
        if last is not None and cost > result[2] + 1e-12 * abs(result[2]):
            break
        result = centers, borders, cost
        if last is not None and np.array_equal(last, edges):
            break
        last, borders = edges, _envelope(centers, weight, count, bits, price)
    return result


def _envelope(centers: Array, weight: Array, count: Array, bits: Array, price: float) -> Array:
    """Borders of the intervals on which each center is the cheapest; centers that are so nowhere have none."""

    def border(i: Any, j: Any) -> Any:
        gap = centers[j] - centers[i]
        extra = price * (bits[j] - bits[i]) * (count[i] + count[j]) / (weight[i] + weight[j])
        with np.errstate(over="ignore"):
            return centers[i] + gap / 2 + extra / (2 * gap)

    every = np.arange(len(centers))
    if (np.diff(centers) > 0).all():
        found: Array = border(every[:-1], every[1:])
        if (np.diff(found) > 0).all():
            return found
    kept: list[int] = []
    ends: list[float] = []
    for j in range(len(centers)):
        shown, end = True, 0.0
        while kept:
            i = kept[-1]
            if centers[j] <= centers[i]:
                if bits[j] >= bits[i]:
                    shown = False
                    break
            else:
                end = border(i, j)
                if len(kept) < 2 or end > ends[-1]:
                    break
            kept.pop()
            ends = ends[: max(0, len(kept) - 1)]
        if shown:
            ends += [end] if kept else []
            kept.append(j)
    return np.array(ends)


def assign(values: Array, borders: Array, dtype: Any) -> Array:
    """How many of the ascending borders are below each value."""
    found = np.empty(values.size, dtype)
    for i in range(0, values.size, BLOCK):
        found[i : i + BLOCK] = np.searchsorted(borders, values[i : i + BLOCK].astype(np.float64))
    return found


def halves(centers: Array) -> Array:
    """Half of the way between neighbours."""
    return centers[:-1] + np.diff(centers) / 2
