import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from smelt.grids import kmeans

Array = NDArray[np.float64]


def inertia(x: Array, centers: Array, weights: Array | None = None) -> float:
    nearest = np.abs(x[:, None] - centers).min(1) ** 2
    return float(nearest @ (np.ones(len(x)) if weights is None else weights))


def brute(x: Array, weights: Array, k: int) -> float:
    """The least inertia over every way to cut the sorted values."""
    order = np.argsort(x)
    x, weights = x[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), min(k, len(x)) - 1):
        parts = zip((0, *cuts), (*cuts, len(x)), strict=True)
        means = [np.average(x[a:b], weights=weights[a:b]) for a, b in parts]
        best = min(best, inertia(x, np.array(means), weights))
    return best


values = st.lists(st.integers(-20, 20) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=10)


@given(values, st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_optimal_equals_brute_force(given_values: list[float], k: int, weighted: bool, seed: int) -> None:
    x = np.array(given_values, float)
    weights = np.random.default_rng(seed).integers(1, 9, len(x)).astype(float) if weighted else None
    centers = kmeans.optimal(x, k, weights)
    assert len(centers) == min(k, len(np.unique(x))) and (np.diff(centers) > 0).all()
    best = brute(x, np.ones(len(x)) if weights is None else weights, k)
    assert inertia(x, centers, weights) <= best * (1 + 1e-9) + 1e-9 * (1 + float(x @ x))


@pytest.mark.parametrize(("n", "k"), [(500, 7), (3000, 2), (2000, 40), (100_000, 12)])
def test_optimal_is_never_worse_than_sklearn(n: int, k: int) -> None:
    x = np.random.default_rng(n).standard_t(4, n).astype(np.float32).astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = np.sort(
            KMeans(k, n_init=1 if n > 10_000 else 3, random_state=0).fit(x[:, None]).cluster_centers_[:, 0]
        )
    ours = kmeans.optimal(x, k)
    assert inertia(x, ours) <= inertia(x, theirs) * (1 + 1e-6)


def test_by_hand() -> None:
    x = np.array([0, 1, 10, 11, 12, 30.0])
    assert kmeans.optimal(x, 3).tolist() == [0.5, 11, 30]
    assert kmeans.optimal(x, 2, np.array([1, 1, 1, 1, 1, 0])).tolist() == [0.5, 11]
    assert kmeans.optimal(np.array([0, 1, 1, 1, 9]), 2).tolist() == [0.75, 9]
    assert kmeans.optimal(np.array([[3, 1], [1, 3]], np.float16), 5).tolist() == [1, 3]
    assert kmeans.optimal(np.array([]), 3).tolist() == []
    assert kmeans.lloyd(x, 3, "line").tolist() == [0.5, 11, 30]
    assert kmeans.lloyd(x, 1, "density") == pytest.approx([x.mean()])
    assert kmeans.assign(np.array([[0.0, 5.7], [5.8, 99]]), np.array([0.5, 11, 30])).tolist() == [[0, 0], [1, 2]]
    assert kmeans.assign(np.array([1.0]), np.array([0.0, 2.0])).tolist() == [0]


def test_an_outlier_does_not_cost_the_others_their_centers() -> None:
    x = np.append(np.random.default_rng(0).normal(0, 0.01, 100_000), 1000.0)
    centers = kmeans.optimal(x, 16)
    assert len(centers) == 16 and centers[-1] == 1000
    assert inertia(x, centers) < 1.001 * inertia(x[:-1], kmeans.optimal(x[:-1][:60_000], 15))


def test_more_centers_than_the_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_t(4, 20_000)
    exact = inertia(x, kmeans.optimal(x, 200))
    monkeypatch.setattr(kmeans, "CELLS", 1)
    spread = kmeans.optimal(x, 200)
    assert 180 <= len(spread) <= 200 and exact <= inertia(x, spread) < 1.3 * exact


def test_far_from_zero_and_tiny() -> None:
    x = np.array([0, 1, 10, 11, 12, 30.0])
    assert np.allclose(kmeans.optimal(x * 1e-200, 3) * 1e200, [0.5, 11, 30])
    assert np.allclose(kmeans.optimal(x + 1e8, 3) - 1e8, [0.5, 11, 30])


@given(values, st.integers(1, 6), st.sampled_from(["quantiles", "line", "density"]))
def test_lloyd_ends_where_nothing_moves(given_values: list[float], k: int, start: str) -> None:
    x = np.array(given_values, float)
    centers = kmeans.lloyd(x, k, start)
    assert 1 <= len(centers) <= k and (np.diff(centers) >= 0).all()
    nearest = kmeans.assign(x, centers)
    means = np.array([x[nearest == i].mean() if (nearest == i).any() else c for i, c in enumerate(centers)])
    assert inertia(x, means) >= inertia(x, centers) * (1 - 1e-6) - 1e-9


@given(values, values)
def test_assign_is_the_nearest(given_values: list[float], given_centers: list[float]) -> None:
    x, centers = np.array(given_values, float), np.unique(given_centers).astype(float)
    found = kmeans.assign(x, centers)
    assert found.dtype == np.uint8
    assert np.allclose(np.abs(x - centers[found]), np.abs(x[:, None] - centers).min(1), rtol=1e-9)


def test_refusals() -> None:
    for wrong in ([np.nan, 1], [np.inf]):
        with pytest.raises(ValueError, match="finite"):
            kmeans.optimal(np.array(wrong), 2)
    for weights in ([1.0], [1.0, -1.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="weights"):
            kmeans.optimal(np.array([1.0, 2.0]), 2, np.array(weights))
    with pytest.raises(ValueError, match="k is at least 1"):
        kmeans.optimal(np.array([1.0]), 0)
    with pytest.raises(ValueError, match="start is"):
        kmeans.lloyd(np.array([1.0, 2.0, 3.0]), 2, "random")
