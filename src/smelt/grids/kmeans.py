"""One-dimensional k-means: the k centers with the least sum of squared distances to the values."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BINS = 1 << 16
CELLS = 1 << 25  # centers times points of the dynamic program: 64 MB of choices, some ten seconds at most
ROUNDS = 10_000
BLOCK = 1 << 20


def optimal(values: Array, k: int, weights: Array | None = None) -> Array:
    """Centers of least weighted sum of squared distances, by dynamic programming (Wang & Song 2011, R Journal 3/2).

    Exact where there are at most 65,536 distinct values (always for 16-bit weights) and k times their number is
    at most 2^25.  More values are first gathered into the means of up to 65,536 bins, half of their borders at
    equal distances and half at equal numbers of distinct values; for larger k the program gives way to centers
    spread by the cube root of the density (Panter & Dite 1951).  Then Lloyd's rounds on all values, until nothing
    moves.

    Args:
        values: any shape, finite.
        k: number of centers, at least 1.
        weights: non-negative, one per value; all 1 without.

    Returns:
        The centers, sorted, float64; fewer than k where there are fewer distinct values.

    Raises:
        ValueError: k below 1, values that are not finite, weights that do not fit.
    """
    points, mass = _distinct(values, weights)
    if len(points) <= _positive(k):
        return points
    few, heavy = (points, mass) if len(points) <= BINS else _bins(points, mass)
    centers = _program(few, heavy, k) if k * len(few) <= CELLS else _spread(few, heavy, k)
    return _rounds(points, mass, centers)


def lloyd(values: Array, k: int, start: str = "quantiles", weights: Array | None = None) -> Array:
    """Centers by Lloyd's rounds from a simple start, until nothing moves: a local optimum.

    start: 'quantiles' (equally many values each), 'line' (evenly from the least to the greatest), 'density'
    (optimal for many values of a normal density with their mean and variance: quantiles of the normal density of
    three times that variance, Panter & Dite 1951).

    Args, Returns and Raises as `optimal`; centers that no value is nearest to are left out.
    """
    points, mass = _distinct(values, weights)
    if len(points) <= _positive(k):
        return points
    share = (np.arange(k) + 0.5) / k
    if start == "quantiles":
        reached = np.cumsum(mass)
        centers = points[np.minimum(np.searchsorted(reached, share * reached[-1]), len(points) - 1)]
    elif start == "line":
        centers = np.linspace(points[0], points[-1], k)
    elif start == "density":
        mean = np.average(points, weights=mass)
        sigma = float(np.sqrt(3 * np.average((points - mean) ** 2, weights=mass)))
        centers = np.array([NormalDist(float(mean), sigma).inv_cdf(p) for p in share])
    else:
        raise ValueError(f"start is 'quantiles', 'line' or 'density', not {start!r}")
    return _rounds(points, mass, centers)


def assign(values: Array, centers: Array) -> Array:
    """The index of the nearest center of every value (the lower one of two), in the values' shape.

    centers: sorted.  Returns uint8 up to 256 centers, int16 up to 32,768, else int32.
    """
    dtype = np.uint8 if len(centers) <= 256 else np.int16 if len(centers) <= 1 << 15 else np.int32
    flat, borders = np.ravel(values), _borders(np.asarray(centers, np.float64))
    found = np.empty(flat.size, dtype)
    for i in range(0, flat.size, BLOCK):
        found[i : i + BLOCK] = np.searchsorted(borders, flat[i : i + BLOCK].astype(np.float64))
    return found.reshape(np.shape(values))


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"k is at least 1, not {k}")
    return k


def _borders(centers: Array) -> Array:
    return centers[:-1] + np.diff(centers) / 2


def _distinct(values: Array, weights: Array | None) -> tuple[Array, Array]:
    """Distinct values, ascending, and their weights, both float64."""
    flat = np.ravel(values)
    if flat.dtype == np.float16 or not np.issubdtype(flat.dtype, np.floating):
        flat = flat.astype(np.float32 if flat.dtype == np.float16 else np.float64)
    if not np.isfinite(flat).all():
        raise ValueError("values to cluster must be finite")
    if weights is None:
        ordered = np.sort(flat)
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: flat.size])
        return ordered[first].astype(np.float64), np.diff(first, append=flat.size).astype(np.float64)
    mass = np.ravel(weights).astype(np.float64)
    if mass.shape != flat.shape or not np.isfinite(mass).all() or (mass < 0).any():
        raise ValueError("weights are finite, not negative, and as many as the values")
    points, place = np.unique(flat[mass > 0], return_inverse=True)
    return points.astype(np.float64), np.bincount(place, mass[mass > 0], len(points))


def _bins(points: Array, mass: Array) -> tuple[Array, Array]:
    """Means and weights of the bins."""
    even = np.searchsorted(points, np.linspace(points[0], points[-1], BINS // 2, endpoint=False))
    first = np.union1d(even, np.arange(BINS // 2) * len(points) // (BINS // 2))
    heavy = np.add.reduceat(mass, first)
    return np.add.reduceat(mass * points, first) / heavy, heavy


def _spread(points: Array, mass: Array, k: int) -> Array:
    """Centers as dense as the cube root of the density: mass / gap, over the gaps between points."""
    reached = np.cumsum(np.cbrt(mass * np.gradient(points) ** 2))
    centers: Array = np.interp((np.arange(k) + 0.5) / k * reached[-1], reached, points)
    return centers


def _program(points: Array, mass: Array, k: int) -> Array:
    """The exact centers of n > k points.

    With W, S, Q the prefix sums of weight, weight * x, weight * x^2 (x centered), the least cost of the first j
    points in m clusters is  D_m(j) = min_i D_{m-1}(i) + Q_j - Q_i - (S_j - S_i)^2 / (W_j - W_i).  The best i
    never falls as j or m grows.  So it is found for j = h, 3h, 5h, ... between the known ones of j - h and j + h,
    for h = n/2, n/4, ..., 1: a level is one vector operation over about n candidates.
    """
    n = len(points)
    mean = np.average(points, weights=mass)
    scale = max(mean - points[0], points[-1] - mean)
    x = (points - mean) / scale
    w, s, q = (np.append(0.0, np.cumsum(mass * x**p)) for p in (0, 1, 2))
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
    cuts = np.array([*edges, 0][::-1])
    centers: Array = np.diff(s[cuts]) / np.diff(w[cuts]) * scale + mean
    return centers


def _rounds(points: Array, mass: Array, centers: Array) -> Array:
    """Lloyd's rounds: means of the nearest, until no value changes its center; those without values are left out."""
    origin = float(np.average(points, weights=mass))
    w, s = (np.append(0.0, np.cumsum(mass * (points - origin) ** p)) for p in (0, 1))
    cuts = np.full(len(centers), -1)
    for _ in range(ROUNDS):
        before, cuts = cuts, np.searchsorted(points, _borders(centers), side="right")
        if np.array_equal(before, cuts):
            break
        edges = np.concatenate(([0], cuts, [len(points)]))
        heavy = np.diff(w[edges])
        held = np.diff(edges) > 0
        centers = np.where(held, np.diff(s[edges]) / np.where(held, heavy, 1) + origin, centers)
    return centers[np.diff(np.concatenate(([0], cuts, [len(points)]))) > 0]
