import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import smelt
from smelt.core.errors import DataError
from smelt.graph.chains import chains
from smelt.graph.flow import Assumed, Measured, moments
from smelt.graph.layers import Layer


def test_assumed_products_are_those_of_the_arc_cosine_kernel() -> None:
    """E relu(a) relu(b) = |w| |v| (sin t + (pi - t) cos t) / 2 pi for standard normal inputs (Cho & Saul 2009)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    links = chains(model)[0]
    seen = moments(Assumed(model, links, 0), links[0], Layer(model, "2", 5), {}, whole=True, constant=True)
    w = model[0].weight.detach().double()
    length = w.norm(dim=1)
    angle = (w @ w.T / (length[:, None] * length)).clamp(-1, 1).acos()
    exact = length[:, None] * length * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    torch.testing.assert_close(seen.gram[:5, :5], exact, atol=0.01, rtol=0.06)
    torch.testing.assert_close(seen.gram[5, :5], length / math.sqrt(2 * math.pi), atol=0.01, rtol=0.05)
    assert seen.gram[5, 5] == 1 and torch.equal(seen.gram, seen.cross)


def test_norms_say_what_their_inputs_are_like() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)).eval()
    with torch.no_grad():
        model[1].running_mean.add_(50.0)  # far from what unit inputs give
        model[1].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
    links = chains(model)[0]
    seen = moments(Assumed(model, links, 0), links[0], Layer(model, "2", 4), {}, whole=False, constant=True)
    torch.testing.assert_close(seen.gram[4, :4], model[1].bias.detach().double(), atol=0.2, rtol=0)
    spread = seen.gram[:4, :4].diagonal() - seen.gram[4, :4].square()
    torch.testing.assert_close(spread.sqrt(), model[1].weight.detach().double(), atol=0, rtol=0.1)


def test_sides_of_assumed_images() -> None:
    model = smelt.open_model("lenet")[0]
    links = chains(model)[0]
    assert {Assumed(model, links, 0).side(link) for link in links} == {28}
    assert Assumed(model, links[2:], 0).side(links[2]) == 0
    free = nn.Sequential(nn.Conv1d(1, 2, 40), nn.ReLU(), nn.Conv1d(2, 2, 3))
    assert Assumed(free, chains(free)[0], 0).side(chains(free)[0][0]) == 64


@pytest.mark.parametrize("convolution", [nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.Conv1d(3, 4, 2, 2, 1)])
def test_measured_columns_are_those_that_the_consumer_multiplies(convolution: nn.Module) -> None:
    torch.manual_seed(0)
    flat = isinstance(convolution, nn.Conv1d)
    model = nn.Sequential((nn.Conv1d if flat else nn.Conv2d)(2, 3, 1), nn.Tanh(), convolution).eval()
    x = torch.randn(7, 2, *[9] * (1 if flat else 2))
    changed = {"0.weight": 2 * model[0].weight.detach()}
    link = chains(model)[0][0]
    second = Layer(model, "2", 3)
    seen = moments(Measured(model, [x]), link, second, changed, whole=True, constant=True)
    rows = second.augmented()
    after = torch.func.functional_call(model, changed, x).detach().double().transpose(0, 1).flatten(1)
    before = model(x).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows @ seen.gram @ rows.T, after @ after.T / after.shape[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows @ seen.cross @ rows.T, before @ after.T / after.shape[1], atol=1e-5, rtol=1e-4)
    alone = moments(Measured(model, [x]), link, second, {}, whole=False, constant=False)
    maps = functional.tanh(model[0](x)).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(alone.gram, maps @ maps.T / maps.shape[1], atol=1e-5, rtol=1e-4)


def test_what_is_not_reached_or_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    link, second = chains(model)[0][0], Layer(model, "2", 3)
    for batches, words in (([], "no calibration batch reaches '2'"), ([torch.full((4, 2), torch.nan)], "NaN")):
        with pytest.raises(DataError, match=words):
            moments(Measured(model, batches), link, second, {}, whole=True, constant=True)
