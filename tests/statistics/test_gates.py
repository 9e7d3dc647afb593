"""Slopes of gates, against gates that are really there."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.errors import DataError
from smelt.core.target import targets
from smelt.statistics._gates import gates

LAYERS = {
    "linear": (nn.Linear(4, 3), (6, 4)),
    "tokens": (nn.Linear(4, 3), (6, 5, 4)),
    "convolution": (nn.Conv2d(4, 3, 3, stride=2, padding=1), (6, 4, 5, 5)),
    "grouped": (nn.Conv1d(4, 6, 2, groups=2), (6, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2), (6, 4, 3, 3)),
}


def loss(y: Tensor, labels: Tensor) -> Tensor:
    return (y.flatten(1).sum(1).tanh() - labels).square().mean()


@pytest.mark.parametrize("name", LAYERS)
def test_slopes_are_those_of_a_gate_before_the_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    model = nn.Sequential(nn.Tanh(), layer)
    x, labels = torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.arange(6.0)
    (weight,) = (t for t in targets(model) if t.is_weight)
    dim = 0 if name == "transposed" else 1
    at = 1 if len(shape) > 3 or name == "grouped" else len(shape) - 1
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    found = gates(model, [(weight, dim)], batches, loss)[weight.name, dim]
    for i in range(6):
        gate = torch.ones(4, requires_grad=True)
        y = layer(x[i : i + 1].tanh() * gate.reshape([-1 if d == at else 1 for d in range(len(shape))]))
        slope = torch.autograd.grad(loss(y, labels[i : i + 1]), gate)[0]
        slope = slope.reshape(2, 2).sum(0) if name == "grouped" else slope
        torch.testing.assert_close(found[i], slope, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_weights_that_others_read_have_one_slope_per_batch() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.layer.weight)

    model, x = Reads(), torch.randn(8, 4)
    weight = targets(model)[0]
    found = gates(model, [(weight, 1)], [(x, torch.zeros(8))], loss)["layer.weight", 1]
    slope = torch.autograd.grad(loss(model(x), torch.zeros(8)), weight.tensor)[0]
    torch.testing.assert_close(found, (weight.tensor * slope).sum(0).detach()[None] * 8**0.5)


def test_values_that_are_not_finite_are_refused() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(DataError, match="NaN or infinite values in the gradient of weight"):
        gates(model, [(targets(model)[0], 1)], [(torch.full((2, 4), torch.nan), torch.zeros(2))], loss)
