"""Both the C loops (skipped where they were not built) and those of NumPy."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from smelt.grids import _kmeans_native, _kmeans_points, kmeans
from smelt.native import library

Array = NDArray[np.float64]


@pytest.fixture(scope="module", params=["native", "numpy"], autouse=True)
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and library() is None:
        pytest.skip("the C library was not built")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(_kmeans_points, "library", lambda: None)
        yield request.param


def by_both(compute: Callable[[], Any], patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    if library() is None:
        pytest.skip("the C library was not built")
    found = []
    for one in (library, lambda: None):
        with patch.context() as inner:
            inner.setattr(_kmeans_points, "library", one)
            found.append(compute())
    return found[0], found[1]


def bfloat16(x: Any) -> NDArray[np.float32]:
    """float32 values that bfloat16 can hold."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def lagrangian(x: Array, centers: Array, borders: Array, price: float, weights: Array | None = None) -> float:
    """sum of weight * (x - c)^2 + price * bits, bits being -log2(share of the index)."""
    found = kmeans.assign(x, centers, borders)
    count = np.bincount(found, minlength=len(centers))
    bits = -np.log2(count[found] / len(x))
    return float((np.ones(len(x)) if weights is None else weights) @ (x - centers[found]) ** 2 + price * bits.sum())


def entropy(x: Array, centers: Array, borders: Array) -> float:
    count = np.bincount(kmeans.assign(x, centers, borders))
    share = count[count > 0] / len(x)
    return float(-(share * np.log2(share)).sum())


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
    for wrong in (np.nan, np.inf):
        many = np.append(np.random.default_rng(0).normal(0, 1, 70_000), wrong)
        for dtype in (np.float32, np.float64):
            for weights in (None, np.ones(70_001), np.append(np.ones(70_000), 0.0)):
                with pytest.raises(ValueError, match="finite"):
                    kmeans.optimal(many.astype(dtype), 2, weights)
        with pytest.raises(ValueError, match="finite"):
            kmeans.constrained(many, 2, 1.0)
        with pytest.raises(ValueError, match="rate is at least 0"):
            kmeans.constrained(np.array([1.0, 2.0]), 2, wrong)
    with pytest.raises(ValueError, match="rate is at least 0"):
        kmeans.constrained(np.array([1.0, 2.0]), 2, -1.0)
    with pytest.raises(ValueError, match="k is at least 1"):
        kmeans.optimal(np.array([1.0]), 0)
    with pytest.raises(ValueError, match="start is"):
        kmeans.lloyd(np.array([1.0, 2.0, 3.0]), 2, "random")


SHAPES: dict[str, Callable[[np.random.Generator], Array]] = {
    "heavy": lambda r: (0.02 * r.standard_t(5, 90_000)).astype(np.float32),
    "few values": lambda r: bfloat16(r.normal(0, 1, 90_000)),
    "half": lambda r: r.normal(0, 1, 20_000).astype(np.float16),
    "whole": lambda r: r.integers(-90_000, 90_000, 200_000),
    "outlier": lambda r: np.append(r.normal(0, 0.01, 90_000), 1000.0),
    "offset": lambda r: r.normal(0, 1, 90_000) + 1e8,
    "tiny": lambda r: (1e-39 * r.normal(0, 1, 90_000)).astype(np.float32),
    "two clumps": lambda r: np.concatenate([r.normal(m, 1e-7, 45_000) for m in (-1, 1)]),
    "zeros": lambda r: np.append(np.zeros(90_000), r.normal(0, 1, 70_000)).astype(np.float32),
    "small": lambda r: r.normal(0, 1, (20, 15)),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_and_numpy_give_the_same(
    shape: str, weighted: bool, loops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loops == "numpy":
        pytest.skip("compared once")
    rng = np.random.default_rng(0)
    x = SHAPES[shape](rng)
    weights = rng.gamma(1, 1, x.shape) * rng.integers(0, 8, x.shape) if weighted else None
    for k in (1, 2, 17):
        ours, theirs = by_both(lambda k=k: kmeans.optimal(x, k, weights), monkeypatch)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        np.testing.assert_array_equal(*by_both(lambda c=ours: kmeans.assign(x, c), monkeypatch))
        ours, theirs = by_both(lambda k=k: kmeans.constrained(x, k, 2.0, weights), monkeypatch)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    ours, theirs = by_both(lambda: kmeans.lloyd(x, 9, "density", weights), monkeypatch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_every_sixteen_bit_value_counts(weighted: bool) -> None:
    """Exact: no worse than the program on all distinct values, with their numbers, in float64."""
    rng = np.random.default_rng(1)
    x = bfloat16(rng.normal(0, 1, 30_000))
    weights = rng.gamma(1, 1, len(x)) if weighted else None
    points, place = np.unique(x, return_inverse=True)
    mass = np.bincount(place, weights)
    exact = kmeans._program(points.astype(np.float64), mass.astype(np.float64), 9)
    found = kmeans.optimal(x, 9, weights)
    assert inertia(x, found, weights) <= inertia(x, exact, weights) * (1 + 1e-12)
    assert kmeans.optimal(x, len(points), weights).tolist() == points.tolist()
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    every = patterns.view(np.float32)[(patterns >> 23 & 255) < 255]
    assert np.array_equal(kmeans.optimal(every, 1 << 16), np.unique(every))
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert np.array_equal(kmeans.optimal(halves[np.isfinite(halves)], 1 << 16), np.unique(halves[np.isfinite(halves)]))


@pytest.mark.parametrize(("n", "k"), [(70_000, 5), (100_000, 40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_values_end_where_nothing_moves(n: int, k: int, weighted: bool) -> None:
    rng = np.random.default_rng(k)
    x = (0.02 * rng.standard_t(5, n)).astype(np.float32)
    weights = rng.gamma(1, 1, n) if weighted else np.ones(n)
    centers = kmeans.optimal(x, k, weights if weighted else None)
    nearest = kmeans.assign(x, centers)
    means = np.bincount(nearest, weights * x.astype(np.float64)) / np.bincount(nearest, weights)
    np.testing.assert_allclose(centers, means, rtol=1e-9, atol=1e-12)


def test_bins_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (0.02 * np.random.default_rng(3).standard_t(5, 80_000)).astype(np.float32)
    binned = kmeans.optimal(x, 32)
    points, mass = np.unique(x, return_counts=True)
    monkeypatch.setattr(_kmeans_points, "OCCUPIED", 1 << 20)  # never enough: then 65,536 bins of sorted values
    assert len(points) > 1 << 16 and mass.sum() == len(x)
    assert inertia(x, binned) <= 1.0003 * inertia(x, kmeans.optimal(x, 32))


def test_weights_that_are_nothing() -> None:
    x = np.array([0, 1, 10, 11, 12, 30.0])
    assert kmeans.optimal(x, 3, np.zeros(6)).tolist() == []
    assert kmeans.optimal(x, 2, np.array([0, 1, 0, 0, 1, 0])).tolist() == [1, 12]
    assert kmeans.optimal(x, 1, np.array([1e-30, 1, 1e-30, 1e-30, 1, 1e-30])).tolist() == [6.5]
    spread = kmeans.optimal(x, 2, np.array([1e-30, 1, 1e-30, 1e-30, 1, 1e-30]))
    assert spread.tolist() == [1, 12]
    wide = 10.0 ** np.random.default_rng(0).uniform(-40, 0, 3000)
    centers = kmeans.optimal(np.random.default_rng(1).normal(0, 1, 3000), 16, wide)
    assert len(centers) <= 16 and (np.diff(centers) > 0).all() and np.abs(centers).max() < 5
    centers, borders = kmeans.constrained(x, 3, 1.0, np.zeros(6))
    assert centers.tolist() == borders.tolist() == []


def test_one_value_and_fewer_than_k() -> None:
    for x in (np.full(5, 3.5), np.array([7], np.int64), np.full(100_000, -2, np.float16)):
        assert kmeans.optimal(x, 4).tolist() == [x[0]]
        assert [part.tolist() for part in kmeans.constrained(x, 4, 2.0)] == [[x[0]], []]
    x = np.array([3.0, -0.0, 0.0, 3.0, 8.0])
    assert kmeans.optimal(x, 9).tolist() == [0, 3, 8]
    centers, borders = kmeans.constrained(x, 9, 5.0)  # without an error, bits are free
    assert centers.tolist() == [0, 3, 8] and borders.tolist() == [1.5, 5.5]
    assert [part.tolist() for part in kmeans.constrained(np.array([]), 3, 1.0)] == [[], []]


@given(values, st.integers(2, 4), st.floats(0.01, 30), st.booleans(), st.integers(0, 2**31))
def test_constrained_is_between_the_best_and_the_optimal(
    given_values: list[float], k: int, rate: float, weighted: bool, seed: int
) -> None:
    x = np.sort(np.array(given_values, float))
    weights = np.random.default_rng(seed).integers(0, 9, len(x)).astype(float) if weighted else None
    plain = kmeans.optimal(x, k, weights)
    centers, borders = kmeans.constrained(x, k, rate, weights)
    assert len(borders) == max(0, len(centers) - 1) and (np.diff(centers) > 0).all() and (np.diff(borders) > 0).all()
    assert len(centers) <= len(plain) <= k
    if not len(plain):
        return
    halves = plain[:-1] + np.diff(plain) / 2
    price = rate * lagrangian(x, plain, halves, 0.0, weights) / len(x)
    ours, theirs = (lagrangian(x, *one, price, weights) for one in ((centers, borders), (plain, halves)))
    assert ours <= theirs * (1 + 1e-9) + 1e-9 * (1 + float(x @ x))
    if weights is None:
        best = np.inf
        for m in range(1, min(k, len(x)) + 1):
            for cuts in itertools.combinations(range(1, len(x)), m - 1):
                parts = [x[a:b] for a, b in zip((0, *cuts), (*cuts, len(x)), strict=True)]
                cost = [((p - p.mean()) ** 2).sum() - price * len(p) * np.log2(len(p) / len(x)) for p in parts]
                best = min(best, float(np.sum(cost)))
        assert ours >= best - 1e-9 * (1 + float(x @ x))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [3000, 90_000])
def test_entropy_falls_as_the_rate_grows(n: int, weighted: bool) -> None:
    rng = np.random.default_rng(n)
    x = (0.02 * rng.standard_t(5, n)).astype(np.float32)
    weights = rng.gamma(1, 1, n) if weighted else None
    plain = kmeans.optimal(x, 16, weights)
    halves = plain[:-1] + np.diff(plain) / 2
    error = lagrangian(x, plain, halves, 0.0, weights) / n
    last = entropy(x, plain, halves)
    for rate in (0.0, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0):
        centers, borders = kmeans.constrained(x, 16, rate, weights)
        bits = entropy(x, centers, borders)
        assert bits <= last + 1e-6 and len(centers) <= 16
        ours, theirs = (lagrangian(x, *c, rate * error, weights) for c in ((centers, borders), (plain, halves)))
        assert ours <= theirs * (1 + 1e-6)
        last = bits
    assert 0 < last < 1.5


def test_a_rate_by_hand() -> None:
    """Three values far off are not worth a center of their own when bits are dear."""
    x = np.repeat([0.0, 1.0, 10.0], [900, 97, 3])
    centers, borders = kmeans.constrained(x, 2, 0.0)
    assert centers == pytest.approx([97 / 997, 10]) and borders == pytest.approx([centers.mean()])
    centers, borders = kmeans.constrained(x, 2, 1000.0)
    assert centers == pytest.approx([x.mean()]) and not len(borders)


@given(values, values, st.sampled_from([np.float16, np.float32, np.float64, np.int32]))
def test_assign_equals_a_binary_search(given_values: list[float], ends: list[float], dtype: Any) -> None:
    borders = np.unique(ends).astype(np.float64)
    x = np.concatenate([np.array(given_values, np.float32).astype(dtype), borders.astype(dtype)])
    x = np.append(x, [np.nan, np.inf, -np.inf, -0.0]).astype(dtype) if dtype is not np.int32 else x
    found = kmeans.assign(x, np.zeros(len(borders) + 1), borders)
    assert found.tolist() == np.searchsorted(borders, x.astype(np.float64)).tolist()


@pytest.mark.parametrize("k", [1, 2, 9, 256, 257, 40_000])
@pytest.mark.parametrize(
    "scale", [1.0, 1e-310, 5e-324, 1e300, 1e-42], ids=["plain", "denormal", "least", "huge", "float32 denormal"]
)
def test_assign_at_all_scales(k: int, scale: float) -> None:
    rng = np.random.default_rng(k)
    with np.errstate(under="ignore"):
        centers = np.unique(np.append(rng.standard_t(2, k) * 1000, 1e7)[:k] * scale)
        borders = centers[:-1] + np.diff(centers) / 2
        x = np.concatenate([rng.standard_t(2, 5000) * 1000 * scale, borders, centers, [0, 1.7e308, -1.7e308, 5e-324]])
    found = kmeans.assign(x, centers)
    assert found.dtype == (np.uint8 if len(centers) <= 256 else np.int16 if len(centers) <= 1 << 15 else np.int32)
    assert np.array_equal(found, np.searchsorted(borders, x))
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float32)
    assert np.array_equal(kmeans.assign(narrow, centers), np.searchsorted(borders, narrow.astype(np.float64)))
    every_other = kmeans.assign(x[::2], centers)
    assert np.array_equal(every_other, found[::2])


def test_wide_borders_and_none() -> None:
    borders = np.array([-1.7e308, 0.0, 1.7e308])
    x = np.array([-1.75e308, -1.7e308, -1.0, 0.0, 5e-324, 1.7e308, 1.75e308])
    assert kmeans.assign(x, np.zeros(4), borders).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert kmeans.assign(x, np.zeros(1)).tolist() == [0] * 7
    assert kmeans.assign(np.array([]), np.arange(3.0)).shape == (0,)


def test_foreign_layouts() -> None:
    x = np.random.default_rng(0).normal(0, 1, (40, 50))
    expected = kmeans.optimal(x, 7)
    for other in (x.T, x[::-1, ::-1], np.asfortranarray(x), x.astype(">f8")):
        np.testing.assert_allclose(kmeans.optimal(other, 7), expected, rtol=1e-12)
        assert np.array_equal(kmeans.assign(other, expected), np.searchsorted(kmeans.halves(expected), other))
    x.flags.writeable = False
    assert np.array_equal(kmeans.optimal(x, 7), expected)


def test_a_wrong_call_of_the_library_is_refused(loops: str) -> None:
    if loops == "numpy":
        pytest.skip("there is none")
    w = np.arange(4.0)
    with pytest.raises(ValueError, match="wrong size"):
        _kmeans_native.program(w, w, w, 3)
    with pytest.raises(ValueError, match="wrong size"):
        _kmeans_native.assign(np.zeros(3), np.arange(300.0), np.uint8)
