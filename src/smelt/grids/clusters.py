"""Rows and columns of a matrix in groups of equal size, so that most of it lies where both are of one group."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS = 50  # turns of rows and columns, at most


def together(energy: Tensor, groups: int, starts: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(group of each row, group of each column), with the largest sum of `energy` inside groups that is found.

    Rows and columns are assigned by turns, each the best assignment given the other (Hungarian method), from the
    order as it is, from the singular vectors of the matrix scaled by its row and column sums (Dhillon 2001,
    doi:10.1145/502512.502550), and from `starts` random ones.

    Args:
        energy: [m, n], not negative; groups divides m and n.
    """
    e = energy.detach().double().cpu().numpy()
    generator = np.random.default_rng(seed)
    n = e.shape[1]
    plain = np.arange(n) * groups // n
    candidates = [plain, _spectral(e, groups), *(generator.permutation(plain) for _ in range(starts))]
    best, found = -1.0, (plain, plain)
    for columns in candidates:
        value, rows = -1.0, plain
        for _ in range(ROUNDS):
            rows = _assign(e @ np.eye(groups)[columns])
            columns = _assign(e.T @ np.eye(groups)[rows])
            before, value = value, float(e[rows[:, None] == columns].sum())
            if value <= before * (1 + 1e-12):
                break
        if value > best * (1 + 1e-9):
            best, found = value, (rows, columns)
    return torch.from_numpy(found[0].copy()), torch.from_numpy(found[1].copy())


def _assign(scores: np.ndarray) -> np.ndarray:
    """Of each member [n, groups] the group, all of one size, with the largest sum of scores."""
    n, groups = scores.shape
    rows, places = linear_sum_assignment(-np.repeat(scores, n // groups, axis=1))
    found = np.empty(n, dtype=np.int64)
    found[rows] = places // (n // groups)
    return found


def _spectral(e: np.ndarray, groups: int) -> np.ndarray:
    """Columns by their directions in the leading singular vectors: around those that differ most."""
    scaled = e / np.sqrt(np.maximum(e.sum(1, keepdims=True) * e.sum(0, keepdims=True), 1e-300))
    points = np.linalg.svd(scaled, full_matrices=False)[2][:groups].T
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-300)
    chosen = [0]
    for _ in range(groups - 1):
        near = np.abs(points @ points[chosen].T).max(1)
        chosen.append(int(near.argmin()))
    return _assign(points @ points[chosen].T)
