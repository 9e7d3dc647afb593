"""The rank of a matrix by variational Bayes: how many of its singular values noise alone does not explain."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor


def rank(squares: Tensor, shape: tuple[int, int]) -> int:
    """Number of singular values that empirical variational Bayesian matrix factorization keeps.

    Nakajima et al. 2013, "Global analytic solution of fully-observed variational Bayesian matrix factorization":
    theorem 2 for the threshold, theorem 3 for the variance of the noise, which is found by a bounded search.

    Args:
        squares: squared singular values, falling, as many as the shorter side.
        shape: of the matrix.
    """
    short, long = sorted(shape)
    found = squares.double().cpu().numpy()[:short]
    if not found[0] > 0:
        return 0
    alpha = short / long
    tau = _least_tau(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    variance = _noise(found, long, alpha, edge)
    return int((found >= long * variance * edge).sum())


def _least_tau(alpha: float) -> float:
    """The zero of phi(t) + phi(t / alpha), phi(z) = log(1 + z) / z - 1 / 2."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    return float(brentq(lambda t: phi(t) + phi(t / alpha), 1e-9, 2.6))  # for alpha = 1 it is 2.5129


def _noise(squares: np.ndarray, long: int, alpha: float, edge: float) -> float:
    """Variance of the noise of the least free energy."""
    short = len(squares)
    first = min(math.ceil(short / (1 + alpha)) - 1, short - 1)
    high = float(squares.sum()) / (short * long)
    low = max(float(squares[first]) / (long * edge), float(squares[first:].mean()) / long)
    low = max(low, 1e-12 * high)
    if low >= high:
        return high

    def energy(log: float) -> float:
        x = np.maximum(squares / (long * math.exp(log)), 1e-300)
        free = x - np.log(x)
        above = x > edge
        inner = x[above] - (1 + alpha)
        tau = 0.5 * (inner + np.sqrt(inner**2 - 4 * alpha))
        free[above] += np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
        return float(free.sum())

    grid = np.linspace(math.log(low), math.log(high), 65)  # the energy may have several valleys
    best = int(np.argmin([energy(point) for point in grid]))
    ends = float(grid[max(0, best - 1)]), float(grid[min(64, best + 1)])
    return math.exp(float(minimize_scalar(energy, bounds=ends, method="bounded").x))
