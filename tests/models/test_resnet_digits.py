import pytest
import torch
from torch import fx, nn

from smelt.core.errors import ModelError
from smelt.measures.parameters import parameters
from smelt.models import resnet_digits


def test_size_and_shape():
    model = resnet_digits.build()
    assert parameters(model) == 315_114
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 13


def test_gradients_reach_everything():
    torch.manual_seed(0)
    model = resnet_digits.build(channels=(4, 8), blocks=(1, 2), classes=3, inputs=2)
    model(torch.randn(4, 2, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_the_shortcut_counts():
    block = resnet_digits.build().stages[0][0].eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
        x = torch.rand(1, 32, 8, 8)
        assert torch.allclose(block(x), x)


def test_it_can_be_traced():
    model = resnet_digits.build().eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("arguments", [{"channels": (4,)}, {"channels": (), "blocks": ()}, {"blocks": (1, 0, 1)}])
def test_stages_that_do_not_match(arguments):
    with pytest.raises(ModelError, match="one entry per stage"):
        resnet_digits.build(**arguments)
