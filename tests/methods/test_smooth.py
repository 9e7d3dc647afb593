"""smooth.gaussian against scipy, and what it does to entropy."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.errors import RuleError
from smelt.core.store import store_of
from smelt.methods.smooth.gaussian import Gaussian

ndimage = pytest.importorskip("scipy.ndimage")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 6, (5, 3)),
        nn.ConvTranspose1d(6, 4, 7),
        nn.Conv2d(4, 4, 1),
        nn.Linear(30, 5),
        nn.Embedding(9, 2),
    )
    return nn.Sequential(*layers)


@pytest.mark.parametrize("edge", ["reflect", "nearest"])
@pytest.mark.parametrize("sigma", [0.3, 0.8, 2.5, 9.0])
def test_equals_scipy(sigma: float, edge: str) -> None:
    model = net()
    result = smelt.compress(model, [Gaussian(sigma=sigma, edge=edge)])
    for i, dims in ((0, (2, 3)), (1, (2,)), (3, (1,)), (4, (1,))):
        before = model[i].weight.detach().double().numpy()
        expected = ndimage.gaussian_filter(before, sigma, axes=dims, mode=edge)
        torch.testing.assert_close(result.model[i].weight.double(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
    assert torch.equal(result.model[2].weight, model[2].weight)
    notes = result.report.notes
    assert any("leaves 2.weight [4, 4, 1, 1] alone" in n and "a kernel of 1 x 1" in n for n in notes)
    assert any(n.startswith("1: smooth.gaussian: smoothing alone makes no file smaller") for n in notes)
    assert not store_of(result.model).edits  # new values are in the leaves


def entropy(x: Tensor, step: float) -> float:
    count = (x / step).round().flatten().unique(return_counts=True)[1].double()
    p = count / count.sum()
    return float(-(p * p.log2()).sum())


def test_entropy_falls_at_a_given_step_and_the_mean_stays() -> None:
    model = net()
    smoothed = smelt.compress(model, [Gaussian(sigma=1.0)]).model
    for i in (0, 1, 3):
        step = float(model[i].weight.detach().std()) / 4
        assert entropy(smoothed[i].weight, step) < entropy(model[i].weight, step) - 0.5
        assert smoothed[i].weight.mean().item() == pytest.approx(model[i].weight.mean().item(), abs=1e-6)


@pytest.mark.parametrize("model", [nn.Conv2d(3, 3, 1), nn.Linear(1, 4)], ids=str)
def test_nothing_to_smooth(model: Any) -> None:
    with pytest.raises(RuleError, match="nothing to smooth"):
        smelt.compress(nn.Sequential(model), [Gaussian()])
