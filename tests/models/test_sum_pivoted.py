import json
from typing import Any

import pytest
import torch
from torch import nn

from smelt.core.errors import ModelError
from smelt.models import pivoted
from smelt.models import sum as sums

LINEAR = ["Linear", {"in_features": 3, "out_features": 2}]
REST = ["Linear", {"in_features": 2, "out_features": 4, "bias": False}]


def test_branches_are_added() -> None:
    branches = [["chain", {"layers": [LINEAR, "ReLU"]}], ["layer", {"kind": LINEAR[0], "arguments": LINEAR[1]}]]
    model = sums.build(json.loads(json.dumps(branches)))
    x = torch.randn(5, 3)
    assert torch.equal(model(x), model[0][0](x).relu() + model[1](x))  # type: ignore[index]
    assert set(model.state_dict()) == {"0.0.weight", "0.0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ([], "takes a list"),
        ("chain", "takes a list"),
        ([["lenet", {}]], "branch 0 is"),
        ([["chain", {}], 3], "layers is"),
        ([["layer", {"kind": "Bilinear"}]], "no layer 'Bilinear'"),
        ([["layer", {"size": 3}]], "branch 0: layer does not take"),
    ],
)
def test_wrong_branches(branches: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        sums.build(branches)


def test_outputs_are_given_and_combined() -> None:
    model = pivoted.build(LINEAR, REST)
    order = torch.tensor([2, 0, 3, 1, 4, 5], dtype=torch.int32)
    model.get_buffer("order").copy_(order)
    x = torch.randn(2, 5, 3)
    some = model.get_submodule("first")(x)
    both = torch.cat([some, model.get_submodule("rest")(some)], -1)
    for i, at in enumerate(order.tolist()):
        assert torch.equal(model(x)[..., i], both[..., at])


def test_of_convolutions_without_a_batch() -> None:
    first = ["Conv2d", {"in_channels": 3, "out_channels": 2, "kernel_size": 3}]
    rest = ["Conv2d", {"in_channels": 2, "out_channels": 5, "kernel_size": 1}]
    assert pivoted.build(first, rest)(torch.randn(3, 6, 6)).shape == (7, 4, 4)
    assert isinstance(pivoted.build(), nn.Module)


@pytest.mark.parametrize(
    ("first", "rest", "words"),
    [
        ("Linear", REST, "first is 'Linear'"),
        (LINEAR, ["ReLU", {}], "rest is"),
        (LINEAR, ["Linear", 3], "rest is"),
        (LINEAR, ["Linear", {"out_features": 3}], "does not take"),
    ],
)
def test_wrong_layers(first: Any, rest: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        pivoted.build(first, rest)
