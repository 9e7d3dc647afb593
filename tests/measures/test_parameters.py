import torch
from torch import nn

from smelt.measures.parameters import nonzeros, parameters


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert parameters(model) == 12 + 12 + 6
    model[1].weight = model[0].weight
    assert parameters(model) == 12 + 3 + 6


def test_nonzeros():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1, 2], [0, 0, -3], [-0.0, 4, 1e-30]]))
    assert nonzeros(model) == 5
