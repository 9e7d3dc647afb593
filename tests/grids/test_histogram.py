import math

import numpy as np
import pytest
import torch

from smelt.grids import histogram, uniform
from smelt.grids.calibrated import calibrated, moving

X = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()


def fine(x: torch.Tensor, bins: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    counts, edges = histogram.histogram(x.reshape(1, -1), bins=bins)
    return counts[0], edges[0]


def error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, **settings: bool | int) -> float:
    whole = bool(settings.pop("whole", False))
    scale, zero = uniform.steps(low.double(), high.double(), whole=whole, **settings)  # type: ignore[arg-type]
    codes = uniform.quantize(x, scale, zero, **settings)  # type: ignore[arg-type]
    return float((uniform.dequantize(codes, scale, zero) - x).square().sum())


def divergence(counts: np.ndarray, edges: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> float:
    """Migacz 2017, written out; low = 0 or low = -high."""
    centres = (edges[1:] + edges[:-1]) / 2
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    p = np.zeros(len(counts))
    p[inside] = counts[inside]
    p[inside[0]] += counts[centres < low].sum()
    p[inside[-1]] += counts[centres > high].sum()
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    bottom = -top if symmetric else 0
    q = np.zeros(len(counts))
    for level in range(bottom, top + 1):
        members = [i for i in inside if min(max(round(centres[i] / (high / top)), bottom), top) == level]
        used = [i for i in members if p[i] > 0]
        for i in used:
            q[i] = sum(counts[j] for j in members) / len(used)
    p, q = p / p.sum(), q / q.sum()
    if ((p > 0) & (q == 0)).any():
        return math.inf
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_least_divergence_by_hand(bits: int, symmetric: bool) -> None:
    x = (X[:600] if symmetric else X[:600].abs()) ** 3
    top = float(x.abs().max())
    counts, edges = np.histogram(x.numpy(), 96, (-top if symmetric else 0, top))
    low, high = histogram.kl(
        torch.tensor(counts).double(), torch.tensor(edges), bits=bits, symmetric=symmetric, whole=not symmetric
    )
    tried = {}
    for i in range(histogram.STEPS):
        t = (1 - i / histogram.STEPS) * top
        if (abs(edges[1:] + edges[:-1]) / 2 <= t).sum() >= (2**bits - 1 if symmetric else 2**bits):
            tried[t] = divergence(counts, edges, -t if symmetric else 0, t, bits, symmetric)
    best = min(tried, key=lambda t: tried[t])
    assert best < 0.9 * top  # something is cut
    assert float(high) == pytest.approx(best) and float(low) == pytest.approx(-best if symmetric else 0)


@pytest.mark.parametrize("share", [90, 99])
def test_percentiles(share: float) -> None:
    low, high = histogram.percentile(*fine(X), share=share, symmetric=False)
    tail = (100 - share) / 2
    theirs = np.percentile(X.numpy(), [tail, 100 - tail])
    np.testing.assert_allclose([low, high], theirs, atol=0.03)
    low, high = histogram.percentile(*fine(X), share=share, symmetric=True)
    assert float(high) == -float(low) == pytest.approx(np.percentile(X.abs().numpy(), share), abs=0.02)
    # by hand: 4 values in [0, 1], 4 zeros, 2 in [1, 3]
    counts, edges = torch.tensor([4.0, 4, 2]).double(), torch.tensor([0.0, 0, 1, 3]).double()
    assert histogram.percentile(counts, edges, share=80, symmetric=True)[1] == pytest.approx(1)
    assert [float(e) for e in histogram.percentile(counts, edges, share=80, symmetric=False)] == pytest.approx([0, 2])
    assert float(histogram.magnitude(counts, edges)) == pytest.approx((4 * 0.5 + 2 * 2) / 10)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_least_square_error(bits: int, symmetric: bool) -> None:
    x = X * X.abs()
    found = histogram.mse(*fine(x), bits=bits, symmetric=symmetric)
    exact = uniform.mse(x[None], bits=bits, symmetric=symmetric)
    mine, theirs = (
        error(x, low, high, bits=bits, symmetric=symmetric) for low, high in (found, (exact[0][0], exact[1][0]))
    )
    assert mine <= 1.04 * theirs
    assert mine < (0.99 if bits == 8 else 0.9) * error(x, x.min(), x.max(), bits=bits, symmetric=symmetric)


def test_rows_have_their_own_ranges_and_what_is_masked_does_not_count() -> None:
    rows = torch.stack([X[:1000], 5 * X[1000:2000].abs(), X[2000:3000]]).float()
    where = torch.ones_like(rows, dtype=torch.bool)
    where[2, 500:] = False
    loud = rows.where(where, 1e6)
    found = histogram.kl_of_rows(loud, where, bits=4, symmetric=True)[1]
    alone = [histogram.kl_of_rows(r[None], bits=4, symmetric=True)[1][0] for r in (rows[0], rows[1], rows[2, :500])]
    assert found.tolist() == pytest.approx([float(a) for a in alone])
    nothing = histogram.kl_of_rows(rows, torch.zeros_like(where), bits=4, symmetric=False)
    assert nothing[0].tolist() == nothing[1].tolist() == [0, 0, 0]


def test_moving_average() -> None:
    lows, highs = torch.tensor([0.0, -2, -4]), torch.tensor([1.0, 3, 1])
    low, high = calibrated((lows, highs), "average", False, bits=8, symmetric=False, whole=True, momentum=0.5)
    assert (float(low), float(high)) == (-2.5, 1.5)
    assert torch.equal(moving(lows, 0.0), lows[-1]) and torch.equal(moving(lows, 1.0), lows[0])
