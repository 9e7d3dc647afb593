import torch

from smelt.measures.parameters import parameters
from smelt.models import lenet300


def test_the_usual_one():
    model = lenet300.build()
    assert parameters(model) == 266_610
    assert [n for n, _ in model.named_parameters()] == [f"fc{i}.{k}" for i in (1, 2, 3) for k in ("weight", "bias")]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_other_widths_and_no_activation_at_the_end():
    model = lenet300.build(inputs=64, hidden=[5], classes=3)
    assert parameters(model) == 64 * 5 + 5 + 15 + 3
    assert bool((model(torch.randn(50, 1, 8, 8)) < 0).any())
    assert [n for n, _ in lenet300.build(4, (), 2).named_children()] == ["flatten", "fc1"]
