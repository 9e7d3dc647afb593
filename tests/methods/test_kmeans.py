"""share.kmeans: what it leaves alone."""

import pytest
import torch
from torch import nn

import smelt
from smelt.core.errors import RuleError
from smelt.core.store import pack, rest_bytes, store_of
from smelt.core.target import targets
from smelt.methods.share.kmeans import KMeans


def refuses(x: torch.Tensor, **settings: object) -> str | None:
    model = nn.Module()
    model.x = nn.Parameter(x)
    return KMeans(**settings).refuses(targets(model)[0])  # type: ignore[arg-type]


def test_small_tensors_that_would_grow_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 64))
    result = smelt.compress(model, [{"share.kmeans": {"clusters": 8, "on": "*.bias"}}])
    assert list(store_of(result.model).entries) == ["1.bias"]
    notes = result.report.notes
    assert any(
        "leaves 0.bias [10] alone: 8 shared values with their indices need 58 bytes, it has 40" in n for n in notes
    )
    with pytest.raises(RuleError, match="finds nothing to act on"):
        smelt.compress(nn.Sequential(nn.Linear(64, 10)), [KMeans(clusters=8), {"share.kmeans": {"on": "*.bias"}}])


@pytest.mark.parametrize("n", [1, 10, 16, 17, 40, 300, 5000])
@pytest.mark.parametrize("clusters", [2, 8, 300, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_stored_is_smaller(n: int, clusters: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    if refuses(x, clusters=clusters) is None:
        codec = KMeans(clusters=clusters, start="quantiles")
        tail = [smelt.make("code.bits")]
        assert rest_bytes(pack(codec.encode(x, codec.fit(x, smelt.Stats())), tail)) < rest_bytes(x)


def test_few_distinct_values_count() -> None:
    assert refuses(torch.zeros(40), clusters=256) is None
    assert "need" in str(refuses(torch.arange(40.0), clusters=256))
    assert refuses(torch.arange(40.0), clusters=4) is None
