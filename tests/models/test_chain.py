import pytest
import torch
from torch import nn

from smelt.core.errors import ModelError
from smelt.models import chain


def test_a_chain():
    model = chain.build(
        [
            ["Conv2d", {"in_channels": 1, "out_channels": 2, "kernel_size": [3, 3]}],
            "ReLU",
            ["Flatten"],
            ["Linear", {"in_features": 8, "out_features": 3, "bias": False}],
        ]
    )
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert model(torch.zeros(5, 1, 4, 4)).shape == (5, 3)


def test_every_allowed_layer_exists():
    assert all(issubclass(getattr(nn, name), nn.Module) for name in chain.LAYERS)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([], "layers is"),
        ("ReLU", "layers is"),
        (None, "layers is"),
        ([["Linearr", {}]], "layer 0: no layer 'Linearr'; did you mean 'Linear'"),
        (["ReLU", ["ModuleList", {}]], "layer 1: no layer 'ModuleList'"),
        (["__class__"], "no layer '__class__'"),
        ([["Linear", {"in_features": 3}]], "layer 0: Linear does not take .*out_features"),
        ([["Linear", {"in_features": "a", "out_features": 2}]], "layer 0: Linear does not take"),
        ([["Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 1, "groups": 2}]], "divisible"),
        ([["Linear", [3, 4]]], "layer 0 is"),
        ([["Linear", {}, 3]], "layer 0 is"),
        ([3], "layer 0 is 3"),
    ],
)
def test_refused(layers, said):
    with pytest.raises(ModelError, match=said) as caught:
        chain.build(layers)
    assert "\n" not in str(caught.value)
