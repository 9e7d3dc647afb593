"""One-dimensional k-means: the k centers with the least sum of squared distances to the values.

The loops are those of native/kmeans*.c, or where it was not built of `_kmeans_numpy`, which finds the same centers.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smelt.grids._kmeans_numpy import halves as halves
from smelt.grids._kmeans_points import Points, distinct, flattened, gathered, loops

Array = NDArray[Any]

CELLS = 1 << 25  # centers times points of the dynamic program: 64 MB of choices, some ten seconds of NumPy at most
FEWEST, PER_CENTER = 1 << 12, 32  # bins that the dynamic program gets: the greater, as far as CELLS allows
ROUNDS = 10_000
MARGIN = 16  # bins to either side of a border that are taken apart with its own


def optimal(values: Array, k: int, weights: Array | None = None) -> Array:
    """Centers of least weighted sum of squared distances, by dynamic programming (Wang & Song 2011, R Journal 3/2).

    Exact where there are at most 65,536 distinct values (always for 16-bit weights) and k times their number is
    at most 2^25.  More values are first gathered into the means of 4,096 bins or 32 per center, narrow in the midst
    of the values and wider outward, or where most of these would be empty of 65,536 bins of the sorted values; for
    larger k the program gives way to centers spread by the cube root of the density (Panter & Dite 1951).  Then
    Lloyd's rounds, the bins at the borders taken apart, until no value changes its center: a local optimum of all
    the values.  A weight below 1e-15 of all weight together counts as 0.

    Args:
        values: any shape, finite.
        k: number of centers, at least 1.
        weights: non-negative, one per value; all 1 without.

    Returns:
        The centers, sorted, float64; fewer than k where there are fewer distinct values.

    Raises:
        ValueError: k below 1, values that are not finite, weights that do not fit.
    """
    points = gathered(*_checked(values, weights, k, light=False), k)
    if len(points.x) <= k:
        return points.x
    number = FEWEST
    while number < PER_CENTER * k and 2 * number * k <= CELLS:
        number *= 2
    x, mass = points.few(number)
    if len(x) <= k:
        return x
    return _settled(points, _program(x, mass, k) if k * len(x) <= CELLS else _spread(x, mass, k))


def lloyd(values: Array, k: int, start: str = "quantiles", weights: Array | None = None) -> Array:
    """Centers by Lloyd's rounds from a simple start, until nothing moves: a local optimum.

    start: 'quantiles' (equally many values each), 'line' (evenly from the least to the greatest), 'density'
    (optimal for many values of a normal density with their mean and variance: quantiles of the normal density of
    three times that variance, Panter & Dite 1951).

    Args, Returns and Raises as `optimal`; centers that no value is nearest to are left out.
    """
    points = distinct(*_checked(values, weights, k, light=False))
    x, mass = points.x, points.mass
    if len(x) <= k:
        return x
    share = (np.arange(k) + 0.5) / k
    if start == "quantiles":
        reached = np.cumsum(mass)
        centers = x[np.minimum(np.searchsorted(reached, share * reached[-1]), len(x) - 1)]
    elif start == "line":
        centers = np.linspace(x[0], x[-1], k)
    elif start == "density":
        mean = np.average(x, weights=mass)
        sigma = float(np.sqrt(3 * np.average((x - mean) ** 2, weights=mass)))
        centers = np.array([NormalDist(float(mean), sigma).inv_cdf(p) for p in share])
    else:
        raise ValueError(f"start is 'quantiles', 'line' or 'density', not {start!r}")
    return _settled(points, centers)


def constrained(values: Array, k: int, rate: float, weights: Array | None = None) -> tuple[Array, Array]:
    """At most k centers and the borders between their values, for indices that are entropy coded afterwards.

    What is made small is  J = sum of weight * (x - c)^2 + price * (number of values) * H,  with H the entropy of the
    indices in bits per value, each value counting once however much it weighs, and  price = rate * (mean of weight *
    (x - c)^2 over the values at the centers of `optimal`):  with rate 1, saving a bit per value is worth as much as
    the whole error of `optimal`.  At a price, an error falls by 2 log 2 times itself per bit in the best case, so
    that rates much below 1.4 find little to save.

    The rounds of entropy-constrained scalar quantization (Chou, Lookabaugh & Gray 1989, IEEE Trans. ASSP 37(1)),
    from the centers of `optimal` and from even steps of two widths, which are best for many bits (Gish & Pierce
    1968, IEEE Trans. IT 14(5)); centers that are nowhere the cheapest are dropped.  They run on the distinct values,
    or on the bins of more than 65,536; what they find is measured, and its centers are the means, on all the values.
    Only intervals between borders are looked for; with weights a border lies where it would if the values of its two
    intervals weighed the same.

    Sure is: the result depends on nothing but the arguments, and its J is at most that of `optimal` with values
    assigned to the nearest center (to rounding).  That J is the least possible is not.

    Args:
        rate: at least 0; with 0 the centers are those of `optimal`, the borders half-way.
        values, k, weights: as for `optimal`.

    Returns:
        (centers, borders), sorted, float64: centers [m], m <= k, and borders [m - 1]; see `assign`.

    Raises:
        ValueError: as `optimal`, and for a rate that is negative or not finite.
    """
    if not (rate >= 0 and math.isfinite(rate)):
        raise ValueError(f"rate is at least 0 and finite, not {rate}")
    centers = optimal(values, k, weights)
    borders = halves(centers)
    if rate == 0 or len(centers) < 2:
        return centers, borders
    points = gathered(*_checked(values, weights, k), k)
    points.split(borders)
    with np.errstate(over="ignore", invalid="ignore"):
        error, squares = points.error(borders), points.squares()
    if not error > 1e-12 * squares:  # nothing but rounding, or out of range
        return centers, borders
    price = rate * error / float(points.n[-1])
    found = [_coded(points, price, start, ROUNDS)[1] for start in (borders, *_even(points, price, k))]
    points.split(np.concatenate(found))
    plain = _coded(points, price, borders, 1)[2]
    best = min((_coded(points, price, ends, 1) for ends in found), key=lambda one: one[2])
    return best[:2] if best[2] < plain else (centers, borders)


def assign(values: Array, centers: Array, borders: Array | None = None) -> Array:
    """The index of every value's center, in the values' shape: of the interval between borders that it lies in.

    centers: sorted.  borders: sorted, one less; half-way between the centers without, which is the nearest center.
    A value on a border has the lower index.  Returns uint8 up to 256 centers, int16 up to 32,768, else int32.
    """
    dtype = np.uint8 if len(centers) <= 256 else np.int16 if len(centers) <= 1 << 15 else np.int32
    ends = halves(np.asarray(centers, np.float64)) if borders is None else np.ascontiguousarray(borders, np.float64)
    found: Array = loops().assign(flattened(values), ends, dtype)
    return found.reshape(np.shape(values))


def _checked(values: Array, weights: Array | None, k: int, light: bool = True) -> tuple[Array, Array | None]:
    """Flat values and weights; without those of weight 0 unless `light`."""
    if k < 1:
        raise ValueError(f"k is at least 1, not {k}")
    flat = flattened(values)
    if weights is None:
        return flat, None
    mass = np.ascontiguousarray(np.ravel(weights), np.float64)
    if mass.shape != flat.shape or not np.isfinite(mass).all() or (mass < 0).any():
        raise ValueError("weights are finite, not negative, and as many as the values")
    if mass.any() and not 1e-100 < mass.max() < 1e100:  # whose squares are out of range
        mass = np.ldexp(mass, -np.frexp(mass.max())[1])
    if not light and not mass.all():
        if not np.isfinite(flat).all():
            raise ValueError("values to cluster must be finite")
        flat, mass = flat[mass > 0], mass[mass > 0]
    return flat, mass


def _spread(points: Array, mass: Array, k: int) -> Array:
    """Centers as dense as the cube root of the density: mass / gap, over the gaps between points."""
    reached = np.cumsum(np.cbrt(mass * np.gradient(points) ** 2))
    centers: Array = np.interp((np.arange(k) + 0.5) / k * reached[-1], reached, points)
    return centers


def _program(points: Array, mass: Array, k: int) -> Array:
    """The exact centers of n > k points, from prefix sums of their weights and of x and x^2 (x centered)."""
    mean = np.average(points, weights=mass)
    scale = max(mean - points[0], points[-1] - mean)
    x = (points - mean) / scale
    w, s, q = (np.append(0.0, np.cumsum(mass * x**p)) for p in (0, 1, 2))
    cuts = loops().program(w, s, q, k)
    means = np.diff(s[cuts]) / np.diff(w[cuts]) * scale + mean
    centers: Array = np.clip(means, points[cuts[:-1]], points[cuts[1:] - 1])
    return centers


def _settled(points: Points, centers: Array) -> Array:
    """Centers after Lloyd's rounds on all the values; those that no value is nearest to are left out."""
    margin = max(1, min(MARGIN, MARGIN * 256 // len(centers)))
    while True:
        centers, edges = loops().rounds(points.x, points.w, points.s, points.origin, centers, ROUNDS)
        if not points.split(halves(centers), margin):
            held: Array = centers[np.diff(points.w[edges]) > 0]
            return held
        margin *= 2


def _coded(points: Points, price: float, borders: Array, limit: int) -> tuple[Array, Array, float]:
    """(centers, borders, cost) after at most `limit` entropy-constrained rounds."""
    found: tuple[Array, Array, float] = loops().coded(
        points.x, (points.w, points.s, points.n), points.origin, price, borders, limit
    )
    return found


def _even(points: Points, price: float, k: int) -> list[Array]:
    """Borders of even steps: where an error of step^2 / 12 falls by the price per bit, and half as wide again."""
    found = []
    for factor in (1.0, 1.5):
        step = factor * math.sqrt(6 * price * points.n[-1] / points.w[-1] / math.log(2))
        if step > 0 and math.isfinite(step):
            low = math.floor(max((points.x[0] - points.origin) / step, -(k // 2)))
            high = math.ceil(min((points.x[-1] - points.origin) / step, low + k - 1))
            found.append(points.origin + (np.arange(low, high) + 0.5) * step)
    return found
