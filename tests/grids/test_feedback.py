"""Rounding with error feedback against optimal brain surgery with inverses, and against the sums it minimises."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from smelt.grids import feedback


def positive(n: int, seed: int) -> Tensor:
    a = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / n + 0.1 * torch.eye(n)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def surgery(w: Tensor, h: Tensor, step: float) -> Tensor:
    """Column after column: the rest moves by -(w_c - q_c) / [H^-1]_cc [H^-1]_c:, inverted anew each time."""
    w = w.clone()
    for c in range(w.shape[1]):
        inverse = torch.linalg.inv(h[c:, c:])
        rounded = (w[:, c] / step).round() * step
        w[:, c:] -= torch.outer((w[:, c] - rounded) / inverse[0, 0], inverse[0])
        w[:, c] = rounded
    return w


@pytest.mark.parametrize("width", [1, 4, 64])
def test_what_is_carried_is_optimal_brain_surgery(width: int) -> None:
    w, h = randn(7, 13), positive(13, 0)
    feed, _ = feedback.factor(h)
    found = feedback.carried(w, feed, lambda *_: lambda c, wanted: (wanted / 0.3).round() * 0.3, width)
    torch.testing.assert_close(found, surgery(w, h, 0.3))


def test_the_error_is_a_sum_over_columns() -> None:
    h, e = positive(9, 1), randn(4, 9)
    feed, cost = feedback.factor(h)
    assert torch.equal(feed, feed.triu()) and torch.equal(feed.diagonal(), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close((((e @ feed) ** 2) * cost).sum(1), ((e @ h) * e).sum(1))


@pytest.mark.parametrize("width", [1, 5, 64])
def test_descent_leaves_every_column_best_given_all_others(width: int) -> None:
    w, h, step = randn(6, 11), positive(11, 2), 0.4
    before = (w / step).round() * step

    def round_(c: int, wanted: Tensor) -> Tensor:
        return (wanted / step).round() * step

    def error(q: Tensor) -> Tensor:
        return (((w - q) @ h) * (w - q)).sum(1)

    errors, q = [error(before)], before
    for _ in range(20):
        q = feedback.descended(w, h, q, round_, width)
        errors.append(error(q))
    assert all(bool((now <= then + 1e-12).all()) for then, now in pairwise(errors))
    assert float(errors[-1].sum()) < float(errors[0].sum())
    for c in range(11):
        for way in (-step, step):
            other = q.clone()
            other[:, c] += way
            assert bool((error(other) >= errors[-1] - 1e-12).all())


@pytest.mark.parametrize("shape", [(6, 5), (5, 9), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("width", [1, 3, 64])
def test_weaving_rounds_each_weight_given_those_above_and_to_the_left(shape: tuple[int, int], width: int) -> None:
    w, g, h = randn(*shape), positive(shape[0], 3), positive(shape[1], 4)
    steps, keep = torch.rand(shape, dtype=torch.float64) + 0.2, torch.rand(shape) > 0.2
    (u, dear_rows), (v, dear_columns) = feedback.factor(g), feedback.factor(h)
    e, expected = torch.zeros_like(w), torch.zeros_like(w)
    for r in range(shape[0]):
        for c in range(shape[1]):
            wanted = w[r, c] + (u.T @ e @ v)[r, c]
            expected[r, c] = (wanted / steps[r, c]).round() * keep[r, c]
            e[r, c] = w[r, c] - expected[r, c] * steps[r, c]
    before = w.clone()

    def begin(now: slice, _: Tensor) -> feedback.Across:
        own, kept = steps[:, now].contiguous(), keep[:, now].contiguous()
        return lambda line, wanted: (wanted / line(own)).round() * line(own) * line(kept)

    torch.testing.assert_close(feedback.woven(w, u, v, begin, width), expected * steps)
    assert torch.equal(w, before)
    terms = dear_rows[:, None] * dear_columns * (u.T @ e @ v) ** 2
    torch.testing.assert_close(terms.sum(), torch.trace(g @ e @ h @ e.T))
