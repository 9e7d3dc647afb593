"""The loops of `kmeans` in C (native/kmeans*.c): the functions of `_kmeans_numpy`, of the same meaning."""

from __future__ import annotations

import functools
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smelt.native import library

Array = NDArray[Any]

MANY_VALUES, NOT_FINITE, OUT_OF_MEMORY = -1, -2, -3  # of kmeans.h
VALUES = (c_void_p, c_int, c_void_p, c_int64)
POINTS = (c_void_p, c_void_p, c_void_p)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "gather": (*VALUES, c_int64, c_void_p, c_void_p, c_void_p),
    "bins": (*VALUES, c_double, c_double, c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "members": (*VALUES, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "program": (*POINTS, c_int64, c_int64, c_void_p),
    "rounds": (*POINTS, c_int64, c_double, c_int64, c_int64, c_void_p, c_void_p),
    "coded": (*POINTS, c_void_p, c_int64, c_double, c_double, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "assign": (c_void_p, c_int, c_int64, c_void_p, c_int64, c_void_p, c_int),
}


@functools.cache
def _functions() -> dict[str, Any]:
    found = {}
    for name, arguments in ARGUMENTS.items():
        found[name] = getattr(library(), f"smelt_kmeans_{name}")
        found[name].argtypes, found[name].restype = arguments, c_int64
    return found


def _call(name: str, *arguments: Any) -> int:
    """What a function returns, arrays being passed by their address."""
    given = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    result = int(_functions()[name](*given))
    if result == NOT_FINITE:
        raise ValueError("values to cluster must be finite")
    if result == OUT_OF_MEMORY:
        raise MemoryError(f"no memory for the k-means of {arguments[3]:,} values or points")
    if result < MANY_VALUES:
        raise ValueError(f"smelt_kmeans_{name} was called with a wrong size")
    return result


def _values(values: Array, weights: Array | None) -> tuple[Any, ...]:
    return values, values.itemsize == 8, weights, values.size


def gather(values: Array, weights: Array | None, room: int) -> tuple[Array, Array, Array] | None:
    points, count, mass = (np.empty(min(room, values.size)) for _ in range(3))
    found = _call("gather", *_values(values, weights), len(points), points, count, mass)
    if found == MANY_VALUES:
        return None
    points, count, mass = points[:found], count[:found], mass[:found]
    if not (points[1:] > points[:-1]).all():
        order = np.argsort(points)
        points, count, mass = points[order], count[order], mass[order]
    return points, count if weights is None else mass, count


def bins(
    values: Array, weights: Array | None, center: float, inverse: float, number: int
) -> tuple[Array, Array, Array, Array, float]:
    where, count, total, squares = np.empty(values.size, np.uint16), np.zeros(number), np.zeros(number), np.zeros(1)
    mass = count if weights is None else np.zeros(number)
    _call("bins", *_values(values, weights), center, inverse, number, where, count, mass, total, squares)
    return where, count, mass, total, float(squares[0])


def members(values: Array, weights: Array | None, where: Array, marks: Array, room: int) -> tuple[Array, Array]:
    points, mass = np.empty(room + 1), np.ones(room + 1)
    _call("members", *_values(values, weights), where, marks, room, points, mass)
    return points[:room], mass[:room]


def program(w: Array, s: Array, q: Array, k: int) -> Array:
    edges = np.empty(k + 1, np.int64)
    _call("program", w, s, q, len(w) - 1, k, edges)
    return edges


def rounds(points: Array, w: Array, s: Array, origin: float, centers: Array, limit: int) -> tuple[Array, Array]:
    centers, edges = np.array(centers, np.float64), np.empty(len(centers) + 1, np.int64)
    _call("rounds", points, w, s, len(points), origin, limit, len(centers), centers, edges)
    return centers, edges


def coded(
    points: Array, sums: tuple[Array, Array, Array], origin: float, price: float, borders: Array, limit: int
) -> tuple[Array, Array, float]:
    borders, centers, cost = np.array(borders, np.float64), np.empty(len(borders) + 1), np.empty(1)
    left = _call("coded", points, *sums, len(points), origin, price, limit, len(centers), borders, centers, cost)
    return centers[:left], borders[: left - 1], float(cost[0])


def assign(values: Array, borders: Array, dtype: Any) -> Array:
    found = np.empty(values.size, dtype)
    _call("assign", values, values.itemsize == 8, values.size, borders, len(borders), found, found.itemsize)
    return found
