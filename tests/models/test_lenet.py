import pytest
import torch

from smelt.core.errors import ModelError
from smelt.measures.parameters import parameters
from smelt.models import lenet


def test_the_count_of_caffe():
    model = lenet.build()
    assert parameters(model) == 431_080
    assert [tuple(p.shape) for n, p in model.named_parameters() if n.endswith("weight")] == [
        (20, 1, 5, 5),
        (50, 20, 5, 5),
        (500, 800),
        (10, 500),
    ]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_version_for_digits():
    model = lenet.build(channels=(4, 6), hidden=7, classes=3, size=8, inputs=2, kernel=3, padding=1)
    assert model(torch.zeros(5, 2, 8, 8)).shape == (5, 3)
    assert parameters(model) == (4 * 2 * 9 + 4) + (6 * 4 * 9 + 6) + (7 * 24 + 7) + (3 * 7 + 3)


def test_what_cannot_be_built():
    with pytest.raises(ModelError, match="nothing is left of size=8"):
        lenet.build(size=8)
    with pytest.raises(ModelError, match="two convolutions"):
        lenet.build(channels=(1, 2, 3))
