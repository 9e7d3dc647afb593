"""Products with packed matrices: the C library at every level against NumPy in double precision."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt import native
from smelt.native import matvec

BITS = {"levels": 8, "table": 8, "nibbles": 4, "steps": 4, "bytes": 8}
LEVELS = (-1, 0, 1, 2)  # of vector instructions; those that the machine lacks fall back to its best


@pytest.fixture(autouse=True)
def built() -> None:
    if matvec.functions() is None:
        pytest.skip("the C library is not built")


def random_matrix(rng: np.random.Generator, coding: str, rows: int, columns: int, group: int, offset: bool):  # type: ignore[no-untyped-def]
    """(packed, the dense matrix in double precision)"""
    groups = -(-columns // group)
    signed = coding in ("levels", "bytes")
    low = -128 if signed else int(rng.integers(-8, 3)) if coding == "steps" else 0
    codes = rng.integers(low, low + (1 << BITS[coding]), (rows, columns))
    scale = rng.uniform(0.01, 1, (rows, groups)).astype("f4")
    added = rng.standard_normal((rows, groups)).astype("f4") if offset else None
    table = None if signed or coding == "steps" else rng.standard_normal(1 << BITS[coding]).astype("f4")
    dense = codes.astype("f8") if table is None else table.astype("f8")[codes]
    dense *= scale.astype("f8").repeat(group, 1)[:, :columns]
    if added is not None:
        dense += added.astype("f8").repeat(group, 1)[:, :columns]
    return matvec.pack(coding, codes, scale, added, table, group), dense


def close(found: np.ndarray, wanted: np.ndarray, x: np.ndarray, dense: np.ndarray) -> None:
    """Up to rounding in single precision of what is summed up, and of x to 16 bits."""
    most = np.abs(x).astype("f8") @ np.abs(dense).T + 1
    whole = np.abs(x).max(1, keepdims=True) * np.abs(dense).sum(1) * (0.51 / matvec.MOST)
    assert (np.abs(found - wanted) <= 2e-6 * np.sqrt(dense.shape[1]) * most + whole).all()


@given(
    seed=st.integers(0, 1 << 30),
    coding=st.sampled_from(sorted(BITS)),
    rows=st.integers(1, 40),
    words=st.integers(1, 12),
    group=st.sampled_from([8, 16, 24, 64, 1000]),
    samples=st.integers(1, 3),
    offset=st.booleans(),
    biased=st.booleans(),
)
@settings(max_examples=60, deadline=None, database=None)
def test_products(
    seed: int, coding: str, rows: int, words: int, group: int, samples: int, offset: bool, biased: bool
) -> None:
    rng = np.random.default_rng(seed)
    columns = 8 * words
    if coding == "bytes":
        group, offset = columns, False
    packed, dense = random_matrix(rng, coding, rows, columns, group, offset)
    np.testing.assert_allclose(matvec.values(packed), dense, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(matvec._values(packed), matvec.values(packed))
    x = rng.standard_normal((samples, columns)).astype("f4")
    bias = rng.standard_normal(rows).astype("f4") if biased else None
    step, zero = (0.03, 120.0) if offset else (0.0, 0.0)
    seen = x.astype("f8")
    if coding == "bytes":
        codes, step, place = matvec.as_bytes(x)
        zero, seen = float(place), (codes.astype("f8") - place) * step
    wanted = seen @ dense.T + (0 if bias is None else bias)
    for level in LEVELS:
        found = matvec.product(packed, x, bias, step=step, zero=zero, level=level)
        assert found.dtype == np.float32 and found.shape == (samples, rows)
        close(found, wanted, seen, dense)
    close(matvec._portable(packed, x, bias, step, zero, False), wanted, seen, dense)


@given(seed=st.integers(0, 1 << 30), n=st.integers(1, 70), shift=st.floats(-3, 3))
@settings(max_examples=40, deadline=None, database=None)
def test_bytes_are_those_of_the_textbook(seed: int, n: int, shift: float) -> None:
    x = (np.random.default_rng(seed).standard_normal(n) + shift).astype("f4")
    codes, step, zero = matvec.as_bytes(x)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    assert step == pytest.approx((high - low) / 255, rel=1e-5) and zero == pytest.approx(-low / step, abs=0.51)
    np.testing.assert_array_equal(codes, np.clip(np.rint(x / np.float32(step) + np.float32(zero)), 0, 255))
    assert np.abs((codes.astype("f4") - zero) * step - x).max() <= step * 0.51 + 1e-6
    assert matvec.as_bytes(x, 0.5, 3.0)[1:] == (0.5, 3)
    np.testing.assert_array_equal(
        matvec.as_bytes(x, 0.5, 3.0)[0], np.clip(np.rint(x / np.float32(0.5) + np.float32(3)), 0, 255)
    )


def test_each_sample_has_levels_of_its_own() -> None:
    rng = np.random.default_rng(1)
    packed, _ = random_matrix(rng, "bytes", 20, 64, 64, False)
    x = rng.standard_normal((3, 64)).astype("f4") * np.array([[1], [100], [0]], "f4")
    apart = matvec.product(packed, x, apart=True)
    for i in range(3):
        np.testing.assert_array_equal(apart[i], matvec.product(packed, x[i : i + 1])[0])
    np.testing.assert_allclose(matvec._portable(packed, x, None, 0, 0, True), apart, rtol=1e-5, atol=1e-4)
    assert not apart[2].any()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 72)).astype("f4")
    for coding in BITS:
        packed, _ = random_matrix(rng, coding, 19, 72, 72, False)
        compiled, dense, codes = matvec.product(packed, x), matvec.values(packed), matvec.as_bytes(x)
        with monkeypatch.context() as patch:
            patch.setattr(matvec, "functions", lambda: None)
            np.testing.assert_allclose(matvec.product(packed, x), compiled, rtol=1e-3, atol=0.05)
            np.testing.assert_array_equal(matvec.values(packed), dense)
            np.testing.assert_array_equal(matvec.as_bytes(x)[0], codes[0])
            with pytest.raises(ValueError, match="not built"):
                matvec.Call(packed)


def test_a_copy_has_memory_of_its_own() -> None:
    packed, dense = random_matrix(np.random.default_rng(3), "nibbles", 5, 16, 8, True)
    call = matvec.Call(packed)
    again = copy.deepcopy(call)
    assert again.fixed[1] != call.fixed[1] and again.fixed[1] == again.matrix.codes.ctypes.data
    x, y = np.ones((1, 16), "f4"), np.empty((1, 5), "f4")
    again(x.ctypes.data, 1, None, y.ctypes.data)
    np.testing.assert_allclose(y[0], dense.sum(1), rtol=1e-5, atol=1e-5)


def test_long_rows_are_exact_where_16_bits_are() -> None:
    """Pieces of 256 columns, the largest codes and inputs: sums do not run over."""
    columns = 1336
    for coding, top in (("levels", 127), ("levels", -128), ("steps", 15), ("bytes", -128)):
        codes = np.full((3, columns), top)
        codes[0, 0] = 0
        packed = matvec.pack(coding, codes, np.ones((3, 1), "f4"))
        x = np.full((1, columns), -1.0, "f4")
        for level in LEVELS:
            np.testing.assert_allclose(matvec.product(packed, x, level=level)[0], -codes.sum(1), rtol=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    packed, _ = random_matrix(np.random.default_rng(4), "steps", 5, 512, 64, True)
    for wrong in (np.nan, np.inf):
        x = np.ones((1, 512), "f4")
        x[0, 300] = wrong
        assert not np.isfinite(matvec.product(packed, x)).any()


def test_what_does_not_fit_is_refused() -> None:
    codes, scale = np.zeros((4, 16), np.uint8), np.ones((4, 1), "f4")
    for columns, group in ((12, 12), (16, 4), (4, 4)):
        assert matvec.fault(columns, group) is not None
    with pytest.raises(ValueError, match="no multiple of 8"):
        matvec.pack("levels", codes[:, :12], scale)
    with pytest.raises(ValueError, match=r"codes 0..16 of nibbles are not in 0..15"):
        matvec.pack("nibbles", codes + np.uint8(16) * (np.arange(4) == 2)[:, None], scale, None, np.arange(16.0))
    with pytest.raises(ValueError, match="scale is float32"):
        matvec.pack("levels", codes, np.ones((4, 3), "f4"))
    side, none = np.ones((1, 1, 16), "f4"), np.zeros(0, "f4")
    arrays = (np.zeros((1, 4, 16), "u4"), side, none, np.zeros(3, "f4"), np.zeros(0, "i4"))
    with pytest.raises(ValueError, match="table is"):
        matvec.Matrix("table", 4, 16, 16, *arrays)
    packed = matvec.pack("levels", codes, scale)
    for x in (np.zeros((1, 8), "f4"), np.zeros((1, 16)), np.zeros(16, "f4"), np.zeros((1, 32), "f4")[:, ::2]):
        with pytest.raises(ValueError, match="x is"):
            matvec.product(packed, x)
    with pytest.raises(ValueError, match="or its bias"):
        matvec.product(packed, np.zeros((1, 16), "f4"), np.zeros(3, "f4"))
    assert matvec.product(packed, np.zeros((0, 16), "f4")).shape == (0, 4)
    assert native.library() is not None
