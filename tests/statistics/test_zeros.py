"""Shares of zeros, counted by hand."""

import torch
from torch import nn

from smelt.core.statistic import gather
from smelt.statistics.zeros import Zeros


def test_shares_of_inputs() -> None:
    x = torch.tensor([[0.0, 1, 0], [0, 0, 2.0]])
    model = nn.Sequential(nn.Linear(3, 2))
    found = gather(model, {"0": [("input", "zeros")]}, [x, torch.zeros(2, 3)])
    assert found["0"]["input", "zeros"].tolist() == [1.0, 0.75, 0.75]


def test_shapes_broadcast_to_the_weight() -> None:
    x = torch.randn(2, 4, 5, 5).relu()
    share = (x == 0).double().mean((0, 2, 3))
    layers = (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 2))
    wanted = (share, share.reshape(2, 2).mean(0), share)
    for layer, each in zip(layers, wanted, strict=True):
        statistic = Zeros(layer)
        statistic.update(x)
        found = statistic.result()
        torch.testing.assert_close(found.flatten(), each)
        assert found.expand_as(layer.weight).shape == layer.weight.shape
