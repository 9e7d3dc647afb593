import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import smelt
from smelt.core.method import Stats
from smelt.core.store import store_of
from smelt.methods.quantize.ternary import Ternary

from ..forms.tools import read


def stored(x: torch.Tensor, where: torch.Tensor | None = None, **settings: object) -> torch.Tensor:
    codec = Ternary(**settings)  # type: ignore[arg-type]
    return read(codec.encode(x, codec.fit(x, Stats(where))))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 7), st.sampled_from(["one", "two"]))
def test_exact_is_the_best_of_all_assignments(seed: int, n: int, scales: str) -> None:
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, best = x[0].numpy(), np.inf
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=n):
        s = np.array(signs)
        columns = s[:, None] if scales == "one" else np.stack((s > 0, s < 0), 1).astype(float)
        found = np.linalg.pinv(columns) @ values
        if (found * [1, -1][: len(found)] < 0).any():
            continue  # the values above 0 and below it have each their own
        fit = columns @ found
        best = min(best, float(((values - fit) ** 2).sum()))
    assert float((stored(x, scales=scales) - x).square().sum()) == pytest.approx(best, abs=1e-9)


def test_the_thresholds_of_the_papers() -> None:
    x = torch.tensor([[1.0, -0.2, 0.5, -2.0, 0.1], [3.0, 3.0, -3.0, 3.0, 0.0]])
    # 0.7 mean |x| = 0.532 and 1.68
    assert stored(x, threshold="mean").tolist() == [[1.5, 0.0, 0.0, -1.5, 0.0], [3.0, 3.0, -3.0, 3.0, 0.0]]
    found = stored(x, threshold="mean", ratio=0.5, scales="two")
    torch.testing.assert_close(found[0], torch.tensor([0.75, 0.0, 0.75, -2.0, 0.0]))
    where = torch.tensor([[True, True, True, False, True], [True] * 5])  # 0.7 mean = 0.315
    assert stored(x, where, threshold="mean")[0][where[0]].tolist() == [0.75, 0.0, 0.75, 0.0]


def test_nothing_to_see() -> None:
    for scales in ("one", "two"):
        assert not stored(torch.zeros(3, 4), scales=scales).any()
    assert stored(torch.tensor([[2.0, 0.0]]), scales="two").tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("scales", ["one", "two"])
def test_learned_scales_follow_their_gradient(scales: str) -> None:
    x = torch.tensor([[4.0, -3.0, 0.1, 2.0]], requires_grad=True)
    codec = Ternary(scales=scales, learn=True)
    state = codec.fit(x, Stats())
    slope = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    (codec.simulate(x, state) * slope).sum().backward()
    assert torch.equal(x.grad, slope)  # type: ignore[arg-type]
    gradient = state.get_parameter("scale").grad
    assert gradient is not None
    assert gradient.flatten().tolist() == ([1.0 + 1000 - 10] if scales == "one" else [1001.0, -10.0])


@pytest.mark.parametrize(("scales", "form"), [("one", "affine"), ("two", "codebooks")])
def test_stored_in_two_bits(scales: str, form: str, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Embedding(64, 32), nn.Conv1d(64, 16, 3, bias=False), nn.ConvTranspose1d(16, 8, 2, bias=False)
    )
    recipe = [
        {"prune.weights": {"ratio": 0.3}},
        {"quantize.ternary": {"scales": scales, "stored": "float16"}},
        {"code.bits": {}},
    ]
    result = smelt.compress(model, recipe, smelt.Job(latency=False))
    assert str(store_of(result.model).entries["0.weight"].encoded) == f"sparse(values: {form})"
    result.save(tmp_path / "m.smelt")
    other = nn.Sequential(
        nn.Embedding(64, 32), nn.Conv1d(64, 16, 3, bias=False), nn.ConvTranspose1d(16, 8, 2, bias=False)
    )
    loaded = smelt.load(tmp_path / "m.smelt", into=other)
    for name, p in result.model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], p)
