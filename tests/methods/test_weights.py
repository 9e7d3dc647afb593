"""prune.weights against torch.nn.utils.prune and by hand."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import smelt
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Stats, Values
from smelt.core.store import store_of
from smelt.methods.prune.weights import Weights
from tests.conftest import mlp


def pruned(model: nn.Module, method: Weights) -> nn.Module:
    return smelt.compress(model, [method]).model


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.97, 1.0])
def test_local_magnitude_equals_torch(ratio: float) -> None:
    model, reference = mlp(), mlp()
    for i in (0, 2, 4):
        prune.l1_unstructured(reference[i], "weight", ratio)
    ours = pruned(model, Weights(ratio=ratio))
    assert all(torch.equal(ours[i].weight, reference[i].weight) for i in (0, 2, 4))


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_global_magnitude_equals_torch(ratio: float) -> None:
    model, reference = mlp(), mlp()
    prune.global_unstructured([(reference[i], "weight") for i in (0, 2, 4)], prune.L1Unstructured, amount=ratio)
    ours = pruned(model, Weights(ratio=ratio, scope="global"))
    assert all(torch.equal(ours[i].weight, reference[i].weight) for i in (0, 2, 4))


def test_n_of_m_by_hand() -> None:
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.2, -0.4, 0.3]]))
    ours = pruned(nn.Sequential(layer), Weights(pattern="2:4"))
    assert ours[0].weight.tolist() == [[0, -4.0, 3.0, 0, 0, 0, pytest.approx(-0.4), pytest.approx(0.3)]]


def test_rows_that_do_not_divide_are_left_alone_and_named() -> None:
    result = smelt.compress(nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 5)), [Weights(pattern="2:4")])
    assert any("1.weight [5, 3] alone" in note and "groups of 4" in note for note in result.report.notes)
    assert list(store_of(result.model).entries) == ["0.weight"]
    with pytest.raises(RuleError, match="finds nothing to act on"):
        smelt.compress(nn.Sequential(nn.Linear(3, 5)), [Weights(pattern="2:4")])


def test_random_repeats_by_seed_and_differs_between_tensors() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    method = Weights(score="random")
    masks = [[m.weight != 0 for m in smelt.compress(model, [method], smelt.Job(seed=seed)).model] for seed in (0, 0, 1)]
    assert torch.equal(masks[0][0], masks[1][0]) and not torch.equal(masks[0][0], masks[2][0])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert masks[0][0].float().mean() == 0.5


def test_earlier_zeros_count_and_stay() -> None:
    x = torch.tensor([5.0, 4.0, 3.0, 2.0])
    where = torch.tensor([False, True, True, True])
    state = Weights(ratio=0.5).fit(x, Stats(where=where))
    assert state.mask.tolist() == [False, True, True, False]
    twice = smelt.compress(mlp(), [Weights(ratio=0.5), Weights(ratio=0.75)]).model
    assert (twice[2].weight == 0).float().mean() == 0.75


def test_global_plan_respects_what_is_gone() -> None:
    gone = torch.zeros(10, dtype=torch.bool)
    plan = Weights(ratio=0.5, scope="global").plan(
        {"a": Values(torch.full((10,), 9.0), gone), "b": Values(torch.rand(10))}, {}, lambda e: 0
    )
    assert plan["a"].ratio == 1.0 and plan["b"].ratio == 0.0  # type: ignore[attr-defined]


def test_unknown_score() -> None:
    with pytest.raises(RecipeError, match="did you mean 'magnitude'"):
        Weights(score="magnitud")
