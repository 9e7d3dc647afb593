import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.grids import uniform


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    scale, zero = uniform.steps(low, high, bits=bits, symmetric=symmetric)
    scale, zero = scale[:, None], None if zero is None else zero[:, None]
    codes = uniform.quantize(rows, scale, zero, bits=bits, symmetric=symmetric)
    lowest, highest = uniform.limits(bits, symmetric)
    assert int(codes.min()) >= lowest and int(codes.max()) <= highest
    return uniform.dequantize(codes, scale, zero)


def test_by_hand():
    rows = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    low, high = uniform.minmax(rows)
    scale, zero = uniform.steps(low, high, bits=2, symmetric=False)
    assert scale.tolist() == [1.0] and zero is not None and zero.tolist() == [1.0]
    assert uniform.quantize(rows, scale, zero, bits=2, symmetric=False).tolist() == [[0, 1, 1, 3]]
    assert round_trip(rows, low, high, 2, False).tolist() == [[-1, 0, 0, 2]]
    scale, zero = uniform.steps(low, high, bits=3, symmetric=True)  # codes -3..3
    assert zero is None and scale.tolist() == pytest.approx([2 / 3])
    assert uniform.quantize(rows, scale, zero, bits=3, symmetric=True).tolist() == [[-2, 0, 1, 3]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_asymmetric_minmax_is_the_textbook_map(bits):
    x = randn(1, 5000) + 0.7
    low, high = uniform.minmax(x)
    scale, zero = uniform.steps(low, high, bits=bits, symmetric=False)
    codes = uniform.quantize(x, scale, zero, bits=bits, symmetric=False).numpy()
    exact = x.double().numpy()
    exact = (exact - exact.min()) / (exact.max() - exact.min()) * (2**bits - 1)
    clear = np.abs(exact % 1 - 0.5) > 2.0**bits * 1e-6  # float32 cannot tell ties
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(codes[clear], np.round(exact)[clear])
    assert codes.min() == 0 and codes.max() == 2**bits - 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_whole_zero_is_what_torch_computes(bits):
    x = randn(3, 400) + torch.tensor([[0.0], [3.0], [-3.0]])
    scale, zero = uniform.steps(*uniform.minmax(x), bits=bits, symmetric=False, whole=True)
    assert zero is not None and torch.equal(zero, zero.round())
    codes = uniform.quantize(x, scale[:, None], zero[:, None], bits=bits, symmetric=False)
    ours = uniform.dequantize(codes, scale[:, None], zero[:, None])
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), 0, 0, 2**bits - 1)
    torch.testing.assert_close(ours, theirs)
    assert 0 in torch.cat([ours, uniform.dequantize(zero, scale, zero)[:, None]], 1)


def test_symmetric_is_what_torch_computes():
    x = randn(4, 300)
    scale, _ = uniform.steps(*uniform.minmax(x), bits=8, symmetric=True)
    ours = round_trip(x, *uniform.minmax(x), 8, True)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(4, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(round_trip(-x, *uniform.minmax(-x), 8, True), -ours)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_constant_rows_and_huge_ranges_are_kept(bits, symmetric):
    rows = torch.tensor([[0.0] * 3, [2.5] * 3, [-2.5] * 3, [1e-42] * 3])
    kept = round_trip(rows, *uniform.minmax(rows), bits, symmetric)
    torch.testing.assert_close(kept, rows, atol=2e-38, rtol=1e-6)
    wide = torch.tensor([[-3e38, 3e38]])
    assert bool(torch.isfinite(uniform.steps(*uniform.minmax(wide), bits=8, symmetric=False)[0]).all())


def test_percentile_is_numpys():
    x = randn(3, 1000)
    low, high = uniform.percentile(x, share=99.0, symmetric=False)
    np.testing.assert_allclose(low, np.quantile(x.numpy(), 0.005, axis=1), rtol=1e-5)
    np.testing.assert_allclose(high, np.quantile(x.numpy(), 0.995, axis=1), rtol=1e-5)
    low, high = uniform.percentile(x, share=99.0, symmetric=True)
    np.testing.assert_allclose(high, np.quantile(np.abs(x.numpy()), 0.99, axis=1), rtol=1e-5)
    assert torch.equal(low, -high)


def test_what_is_masked_does_not_count():
    x = randn(4, 200, seed=3)
    where = x.abs() > 0.3
    where[2] = False
    loud = torch.where(where, x, 1e9)
    kept = [row[mask] for row, mask in zip(x, where, strict=True)]
    for find in (
        uniform.minmax,
        uniform.magnitude,
        lambda r, w=None: uniform.percentile(r, w, share=95.0, symmetric=False),
        lambda r, w=None: uniform.mse(r, w, bits=3, symmetric=False),
        lambda r, w=None: uniform.mse(r, w, bits=3, symmetric=True),
    ):
        low, high = find(loud, where)
        assert float(low[2]) == 0 and float(high[2]) == 0
        for i in (0, 1, 3):
            a, b = find(kept[i][None])
            torch.testing.assert_close(torch.stack([low[i], high[i]]), torch.cat([a, b]), rtol=1e-4, atol=1e-6)


def test_one_symmetric_bit_is_the_mean_magnitude():
    x = randn(2, 999)
    kept = round_trip(x, *uniform.magnitude(x), 1, True)
    torch.testing.assert_close(kept, x.sign() * x.abs().mean(1, keepdim=True))
    best = uniform.mse(x, bits=1, symmetric=True)[1]
    torch.testing.assert_close(best, x.abs().mean(1), rtol=0.02, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_finds_the_best_clipping(bits, symmetric):
    x = randn(3, 4000, seed=1) + (0 if symmetric else 2)
    low, high = uniform.mse(x, bits=bits, symmetric=symmetric)
    error = (round_trip(x, low, high, bits, symmetric) - x).square().sum(1)
    some = torch.ones(3)
    if symmetric:
        tried = [(-c * some, c * some) for c in torch.linspace(0.5, 5, 200)]
    else:
        tried = [(a * some, b * some) for a in torch.linspace(-2, 1, 31) for b in torch.linspace(3, 6, 31)]
    best = torch.stack([(round_trip(x, *r, bits, symmetric) - x).square().sum(1) for r in tried]).amin(0)
    assert bool((error <= 1.02 * best).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.integers(0, 2**16), st.sampled_from([1e-6, 1.0, 1e6]))
def test_mse_is_never_worse_than_minmax(bits, symmetric, seed, size):
    x = randn(2, 33, seed=seed).pow(3) * size
    errors = [
        (round_trip(x, *r, bits, symmetric) - x).square().sum(1)
        for r in (uniform.mse(x, bits=bits, symmetric=symmetric), uniform.minmax(x))
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


def test_large_tensors_are_worked_on_in_parts(monkeypatch):
    x, where = randn(10, 100), randn(10, 100, seed=9) > 0
    whole = uniform.mse(x, where, bits=4, symmetric=False)
    monkeypatch.setattr(uniform, "BLOCK", 300)
    for a, b in zip(uniform.mse(x, where, bits=4, symmetric=False), whole, strict=True):
        torch.testing.assert_close(a, b)
