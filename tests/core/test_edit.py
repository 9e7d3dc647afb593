"""Edits change a model, are plain data, and distrust what a file says."""

import pytest
import torch
from torch import nn

from smelt.core.edit import Fill, Keep, Remove, Replace, Set, Tie, apply_all, from_plain, from_ranges, to_ranges
from smelt.core.errors import FileError, ModelError
from smelt.core.store import apply_edits, store_of


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


CUT = [
    Keep("0.weight", 0, (0, 1, 2, 5)),
    Keep("0.bias", 0, (0, 1, 2, 5)),
    Keep("2.weight", 1, (0, 1, 2, 5)),
    Set("0", "out_features", 4),
    Set("2", "in_features", 4),
]


def test_edits_equal_slicing_by_hand() -> None:
    model, before = net(), net()
    apply_edits(model, CUT, "cut")
    x = torch.randn(5, 4)
    index = torch.tensor([0, 1, 2, 5])
    hidden = torch.relu(x @ before[0].weight[index].T + before[0].bias[index])
    assert torch.allclose(model(x), hidden @ before[2].weight[:, index].T + before[2].bias, atol=1e-6)
    assert store_of(model).edits == CUT


def test_replay_on_meta_gives_the_same_shapes() -> None:
    edits = [*CUT, Replace("2", "chain", {"layers": [["Linear", {"in_features": 4, "out_features": 3}]]}), Remove("1")]
    model = net()
    apply_edits(model, edits, "cut")
    with torch.device("meta"):
        bare = net()
    apply_all(bare, [from_plain(e.to_plain()) for e in store_of(model).edits])
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_tie_and_fill() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    apply_edits(model, [Tie("0.weight", "1.weight"), Fill("0.weight", torch.eye(3))], "tie")
    assert model[0].weight is model[1].weight
    assert torch.equal(model[1].weight, torch.eye(3))
    assert [e.kind for e in store_of(model).edits] == ["tie"]


@pytest.mark.parametrize("index", [(0,), (0, 1, 2, 5), (3, 9, 10), tuple(range(100))])
def test_ranges(index: tuple[int, ...]) -> None:
    assert from_ranges(to_ranges(index)) == index


@pytest.mark.parametrize(
    "plain",
    [
        ["burn", "0"],
        ["keep", "0.weight", 0, "5-2"],
        ["keep", "0.weight", 0, "0-99999999999"],
        ["keep", "0.weight", 0, 7],
        ["keep"],
        ["set", 1, "out_features", 2],
        ["replace", "0", "chain", [1]],
        None,
        7,
        "keep",
    ],
)
def test_foreign_data_is_no_edit(plain: object) -> None:
    with pytest.raises(FileError, match="no edit"):
        from_plain(plain)


@pytest.mark.parametrize(
    "edit",
    [
        Keep("0.weight", 0, (0, 6)),
        Keep("0.weight", 3, (0,)),
        Keep("9.weight", 0, (0,)),
        Set("0", "forward", "x"),
        Set("0", "_parameters", {}),
        Set("0", "out_features", "6"),
        Set("0", "training", 1),
        Remove("7"),
        Remove(""),
    ],
)
def test_edits_that_do_not_fit(edit: object) -> None:
    with pytest.raises(ModelError):
        edit.apply(net())  # type: ignore[attr-defined]
