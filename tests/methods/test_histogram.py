import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import smelt
from smelt.core.errors import RecipeError
from smelt.core.method import Stats
from smelt.core.store import store_of
from smelt.methods.quantize.histogram import Histogram

from ..forms.tools import read


def stored(x: torch.Tensor, where: torch.Tensor | None = None, **settings: object) -> torch.Tensor:
    codec = Histogram(**settings)  # type: ignore[arg-type]
    return read(codec.encode(x, codec.fit(x, Stats(where))))


def test_equally_many_in_each_class() -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    codec = Histogram(classes=8)
    indices = codec.encode(x, codec.fit(x, Stats())).parts["indices"]
    assert isinstance(indices, torch.Tensor)
    assert indices.flatten().bincount().tolist() == [250] * 8


def test_chosen_thresholds_and_values() -> None:
    x = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0, 9.0]])
    cuts = {"cut": "thresholds", "thresholds": (0.0, 2.0)}
    assert stored(x, **cuts).tolist() == [[-1.5, -1.5, 0.5, 0.5, 5.5, 5.5]]
    assert stored(x, **cuts, value="median").tolist() == [[-1.5, -1.5, 0.5, 0.5, 5.5, 5.5]]
    assert stored(x, **cuts, value="midpoint").tolist() == [[-1.0, -1.0, 1.0, 1.0, 5.5, 5.5]]
    where = torch.tensor([[True] * 5 + [False]])
    assert stored(x, where, **cuts)[where].tolist() == [-1.5, -1.5, 0.5, 0.5, 2.0]
    assert stored(x, cut="thresholds", thresholds=(20.0,)).tolist() == [[1.5] * 6]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(["otsu", "entropy"]), st.integers(2, 4))
def test_the_best_cuts_of_all(seed: int, cut: str, classes: int) -> None:
    rng = np.random.default_rng(seed)
    x, bins = rng.gamma(1.0, size=200), 8
    edges = np.linspace(x.min(), x.max(), bins + 1)
    counts = np.histogram(x, edges)[0]
    middles = (edges[1:] + edges[:-1]) / 2

    def gain(ends: tuple[int, ...]) -> float:
        total = 0.0
        for a, b in itertools.pairwise((0, *ends, bins)):
            n = counts[a:b]
            if n.sum() and cut == "otsu":
                total -= float((n * (middles[a:b] - np.average(middles[a:b], weights=n)) ** 2).sum())
            elif n.sum():
                p = n[n > 0] / n.sum()
                total -= float((p * np.log(p)).sum())
        return total

    best = max(gain(ends) for ends in itertools.combinations(range(1, bins), classes - 1))
    codec = Histogram(classes=classes, cut=cut, bins=bins)
    borders = codec.fit(torch.from_numpy(x)[None], Stats()).get_buffer("borders").numpy()
    assert gain(tuple(np.abs(edges - b).argmin() for b in borders)) == pytest.approx(best)


def test_channels_are_cut_alone() -> None:
    x = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.1])[:, None]
    found = stored(x, classes=4, per="channel", axis=1)
    for i in range(3):
        assert torch.equal(found[:, i], stored(x[:, i], classes=4))
    groups = stored(x, classes=2, per="group", group=20)
    assert torch.equal(groups[2].flatten()[:20], stored(x[2].flatten()[:20], classes=2))


def test_few_values_and_none() -> None:
    for cut in ("frequency", "otsu", "entropy"):
        assert stored(torch.full((2, 2), 3.0), cut=cut).tolist() == [[3.0, 3.0], [3.0, 3.0]]
        assert torch.isfinite(stored(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool), cut=cut)).all()
        assert stored(torch.tensor([[1.0, 5.0]]), cut=cut, classes=200, bins=20).tolist() == [[1.0, 5.0]]


def test_round_trip(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 40))
    result = smelt.compress(model, [{"quantize.histogram": {"per": "channel", "classes": 4, "codebook": "bfloat16"}}])
    assert str(store_of(result.model).entries["1.weight"].encoded) == "codebooks"
    result.save(tmp_path / "m.smelt")
    loaded = smelt.load(tmp_path / "m.smelt", into=nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 40)))
    assert torch.equal(loaded(torch.arange(30)), result.model(torch.arange(30)))


def test_bad_thresholds() -> None:
    for cuts in (None, (1.0, 1.0), (), ("a",)):
        with pytest.raises(RecipeError, match="thresholds"):
            Histogram(cut="thresholds", thresholds=cuts)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="thresholds"):
        Histogram(thresholds=(1.0,))
