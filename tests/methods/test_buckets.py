from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import smelt
from smelt.core.method import Stats
from smelt.methods.quantize.buckets import Buckets

from ..forms.tools import read


def test_edges() -> None:
    x = torch.tensor([-8.0, -1.0, 0.5, 1.0, 2.0, 3.0, 5.0, 6.0])
    expected = {
        ("uniform", 4): [-4.5, -1.0, 2.5],
        ("frequency", 4): [0.5, 2.0, 5.0],
        ("power", 4): [-4.0, 0.0, 4.0],
        ("power", 8): [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0],
        ("power", 5): [-4.0, -2.0, 2.0, 4.0],
        ("power", 2): [0.0],
        ("power", 1): [],
    }
    for (edges, count), found in expected.items():
        state = Buckets(buckets=count, edges=edges).fit(x, Stats())
        assert state.get_buffer("edges").tolist() == found, (edges, count)


def test_each_bucket_has_its_grid() -> None:
    x = torch.tensor([[-8.0, -7.0, -6.0, -5.0, 0.25, 0.5, 0.75, 1.0]])
    codec = Buckets(buckets=2, bits=2)
    encoded = codec.encode(x, codec.fit(x, Stats()))
    assert torch.equal(read(encoded), x)
    assert encoded.parts["start"].tolist() == [-8.0, 0.25]  # type: ignore[union-attr]
    assert encoded.parts["codes"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]  # type: ignore[union-attr]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["uniform", "frequency", "power"]), st.integers(1, 9), st.integers(0, 6), st.integers(0, 2**31))
def test_the_error_is_within_the_span_of_a_bucket(edges: str, count: int, bits: int, seed: int) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    codec = Buckets(count, bits, edges)
    state = codec.fit(x, Stats())
    apart = (read(codec.encode(x, state)) - x).square().sum()
    bucket = torch.bucketize(x, state.get_buffer("edges"), right=True)
    plain = torch.zeros(())
    for b in range(count):
        own = x[bucket == b]
        if len(own):
            low, high = own.aminmax()
            step = (high - low) / max((1 << bits) - 1, 1)
            grid = low + step * torch.arange(1 << bits)
            plain = plain + (own[:, None] - grid).abs().amin(1).square().sum()
    assert apart <= plain * (1 + 1e-9) + 1e-12


def test_power_edges_suit_tails() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) ** 3
    codecs = [Buckets(16, 3, edges) for edges in ("power", "uniform")]
    small = x.abs() < 0.5
    power, uniform = ((c.encode(x, c.fit(x, Stats())).decode() - x)[small].norm() for c in codecs)
    assert power < 0.25 * uniform


@pytest.mark.parametrize(("count", "bits"), [(16, 4), (16, 6), (256, 8)])
def test_round_trip_of_wide_codes(count: int, bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 40))
    recipe = [{"prune.weights": {"ratio": 0.5}}, {"quantize.buckets": {"buckets": count, "bits": bits}}]
    result = smelt.compress(model, recipe)
    result.save(tmp_path / "m.smelt")
    loaded = smelt.load(tmp_path / "m.smelt", into=nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 40)))
    assert torch.equal(loaded[1].weight, result.model[1].weight)  # type: ignore[index]
    left = result.model[1].weight != 0  # type: ignore[index]
    assert 0.2 < float(left.float().mean()) < 0.6
    torch.testing.assert_close(loaded[1].weight[left], model[1].weight[left], atol=0.03, rtol=0)
