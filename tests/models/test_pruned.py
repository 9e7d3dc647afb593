"""Models that still carry the masks of torch.nn.utils.prune."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import smelt
from smelt.core.store import store_of
from tests.conftest import mlp


def test_masks_are_taken_over(tmp_path: Path) -> None:
    model, reference = mlp(), mlp()
    for one in (model, reference):
        prune.l1_unstructured(one[0], "weight", 0.5)
        prune.random_unstructured(one[2], "bias", 3)
        prune.ln_structured(one[2], "weight", 0.25, n=2, dim=0)
        prune.l1_unstructured(one[2], "weight", 0.25)
        torch.manual_seed(0)
    x = torch.randn(5, 2)
    expected = model(x).detach()
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    result = smelt.compress(model, [{"prune.weights": {"ratio": 0.1, "on": "4"}}])
    assert [n for n, e in store_of(result.model).entries.items() if e.steps[0] == "torch.nn.utils.prune"] != []
    assert set(store_of(result.model).entries) == {"0.weight", "2.bias", "2.weight", "4.weight"}
    assert any("2.weight" in note and "masks of torch.nn.utils.prune" in note for note in result.report.notes)
    assert set(result.model.state_dict()) == set(mlp().state_dict())
    torch.testing.assert_close(result.model[:4](x), model[:4](x))
    mask = dict(store_of(result.model).entries["2.weight"].encoded.leaves())["mask"]
    assert torch.equal(mask, model[2].weight_mask.bool())
    result.save(tmp_path / "m.smelt")
    loaded = smelt.load(tmp_path / "m.smelt", into=mlp())
    assert torch.equal(loaded(x), result.model(x))
    assert hasattr(model[0], "weight_orig") and torch.equal(model(x), expected)  # it was not changed


def test_recurrent_layers_and_other_hooks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 4))
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append(1))
    prune.l1_unstructured(model[0], "weight_hh_l0", 0.5)
    x = torch.randn(2, 1, 3)
    result = smelt.compress(model, [{"prune.weights": {"ratio": 0, "on": "0.weight_ih_l0"}}])
    assert torch.equal(result.model(x)[0], model(x)[0]) and seen
    assert float((result.model[0].weight_hh_l0 == 0).float().mean()) == 0.5
