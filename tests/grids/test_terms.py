from itertools import pairwise

import pytest
import torch
from torch import Tensor

from smelt.grids.terms import Outer, Rows, Supported, columns, error, fit


def problem(seed: int, m: int = 7, c: int = 5, taps: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, c * taps, generator=generator, dtype=torch.float64)
    return torch.randn(m, c * taps, generator=generator, dtype=torch.float64), x.T @ x / 40


def rows(kind: str, metric: Tensor, r: int = 5, c: int = 5, taps: int = 4) -> Rows:
    generator = torch.Generator().manual_seed(9)
    b = torch.randn(r, c, generator=generator, dtype=torch.float64)
    k = torch.randn(r, taps, generator=generator, dtype=torch.float64)
    if kind == "outer":
        return Outer(metric, b, k)
    places = torch.arange(c * taps).reshape(c, taps)
    start = torch.zeros(r, c, taps, dtype=torch.float64)
    start[torch.arange(r), torch.arange(r) % c] = k
    return Supported(metric, start.flatten(1), [j % c for j in range(r)], places)


@pytest.mark.parametrize("kind", ["outer", "supported"])
@pytest.mark.parametrize("fast", [False, True])
def test_no_turn_makes_the_error_larger_and_rows_stay_of_their_kind(kind: str, fast: bool) -> None:
    w, metric = problem(0)
    left = torch.eye(7, dtype=torch.float64)[:, :5] if fast else None
    found = [fit(w, metric, rows(kind, metric), left, turns=n, tolerance=0) for n in range(8)]
    errors = [f.error for f in found]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors)) and errors[-1] < 0.95 * errors[0]
    last = found[-1]
    root = torch.linalg.cholesky(metric)
    assert last.error == pytest.approx(float(((w - last.left @ last.right) @ root).square().sum()))
    for j, row in enumerate(last.right.reshape(-1, 5, 4)):
        if kind == "outer":
            assert float(torch.linalg.svdvals(row)[1]) < 1e-9
        else:
            assert not bool(row[torch.arange(5) != j % 5].any())
    if fast:
        assert left is not None and torch.equal(last.left, left)


def test_columns_are_the_least_squares_solution() -> None:
    w, metric = problem(1)
    right = rows("outer", metric).start()
    root = torch.linalg.cholesky(metric)
    expected = torch.linalg.lstsq((right @ root).T, (w @ root).T).solution.T
    assert torch.allclose(columns(w, metric, right), expected, atol=1e-6)


def test_one_row_over_everything_is_the_leading_singular_vector() -> None:
    w, _ = problem(2)
    eye = torch.eye(20, dtype=torch.float64)
    start = torch.ones(1, 20, dtype=torch.float64)
    found = fit(w, eye, Supported(eye, start, [0], torch.arange(20)[None]), turns=500, tolerance=0)
    assert found.error == pytest.approx(float(torch.linalg.svdvals(w)[1:].square().sum()))
    assert error(w, eye, w) == 0
