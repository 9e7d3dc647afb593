import pytest
import torch
from torch import nn

from smelt.core.errors import DataError, ModelError, RecipeError
from smelt.core.statistic import gather
from smelt.statistics.range import Range


class Odd(nn.Module):
    """Uses one layer twice, calls another by keyword, never calls the third, and sees whole numbers first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.named, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.embed(x))
        return self.named(input=self.twice(self.twice(h)))


def test_by_hand() -> None:
    statistic = Range(nn.Identity())
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([[-3.0]]), torch.tensor([0.5], dtype=torch.bfloat16)):
        statistic.update(x)
    assert [t.tolist() for t in statistic.result()] == [-3, 2]


def test_one_pass_for_all() -> None:
    torch.manual_seed(0)
    model = Odd().train()
    batches = [(torch.tensor([0, 1]), torch.tensor([0, 0])), (torch.tensor([4, 2]), None), (torch.tensor([3, 3]), None)]
    wanted = {
        "twice": [("input", "range"), ("output", "range")],
        "named": [("input", "range")],
        "embed": [("output", "range")],
    }
    found = gather(model, wanted, batches, limit=2)
    rows = model.embed.weight[[0, 1, 4, 2]].detach()
    assert torch.equal(torch.stack(found["embed"]["output", "range"]), torch.stack(rows.aminmax()))
    once = model.twice(rows).detach()
    both = torch.cat([rows, once])
    torch.testing.assert_close(found["twice"]["input", "range"], (both.min(), both.max()))
    assert set(found["twice"]) == {("input", "range"), ("output", "range")}
    torch.testing.assert_close(found["named"]["input", "range"], tuple(model.twice(once).detach().aminmax()))
    assert model.training and model.drop.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert found["twice"]["input", "range"][0].requires_grad is False


def test_refusals() -> None:
    model, batches = Odd(), [torch.tensor([1])]
    with pytest.raises(DataError, match=r"no calibration batch reaches the input of 'unused'.*'!unused'"):
        gather(model, {"unused": [("input", "range")]}, batches)
    with pytest.raises(DataError, match="input of 'embed'"):  # indices have no range
        gather(model, {"embed": [("input", "range")]}, batches)
    with pytest.raises(RecipeError, match="did you mean 'range'"):
        gather(model, {"twice": [("input", "rnage")]}, batches)
    with pytest.raises(ModelError, match="no module 'nothing'"):
        gather(model, {"nothing": [("input", "range")]}, batches)
    with pytest.raises(ValueError, match="'weight' is no place"):
        gather(model, {"twice": [("weight", "range")]}, batches)
    with torch.no_grad():
        model.embed.weight[1] = torch.nan
    with pytest.raises(DataError, match="input of 'twice': there are NaN"):
        gather(model, {"twice": [("input", "range")]}, batches)
    assert not model.twice._forward_pre_hooks


def test_a_model_that_fails_is_named() -> None:
    with pytest.raises(ModelError, match=r"fails while statistics are gathered, given float32 \[4, 3\]: mat1 and mat2"):
        gather(nn.Sequential(nn.Linear(2, 2)), {"0": [("output", "range")]}, [torch.zeros(4, 3)])
