"""regularize.*: formulas by hand, what they see inside training, what they do to files."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.errors import DataError, ModelError, RecipeError, RuleError
from smelt.core.method import Known, Look, Objective, Seen, Weight
from smelt.core.recipe import Recipe
from smelt.core.settings import Ramp
from smelt.methods.prune.weights import Weights
from smelt.methods.regularize.entropy import Entropy
from smelt.methods.regularize.group import Group
from smelt.methods.regularize.l1 import L1
from smelt.methods.regularize.slimming import Slimming
from smelt.methods.share.kmeans import KMeans

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(3))


def seen(x: Tensor, where: Tensor | None = None, module: nn.Module | None = None) -> Seen:
    return Seen(None, torch.zeros(1), weights={"w": Weight(x, where, module)})


def leaf(*values: Any) -> Tensor:
    return torch.tensor(*values).requires_grad_()


def test_l1_by_hand() -> None:
    x = leaf([[1.0, -2.0], [0.0, 0.5]])
    loss = L1(strength=0.1).loss(seen(x))
    loss.backward()
    assert loss.item() == pytest.approx(0.35)
    assert x.grad is not None and x.grad.tolist() == [
        [pytest.approx(0.1), pytest.approx(-0.1)],
        [0, pytest.approx(0.1)],
    ]


def test_group_by_hand() -> None:
    x = leaf([[3.0, 4.0], [0.0, 0.0]])
    loss = Group(strength=2.0).loss(seen(x))
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.sqrt(2) * 5)
    scale = 2 * math.sqrt(2) / 5
    assert x.grad is not None and torch.allclose(x.grad, torch.tensor([[3 * scale, 4 * scale], [0, 0]]))
    rows = Group(strength=1.0, over="input").loss(seen(x.detach()))
    assert rows.item() == pytest.approx(math.sqrt(2) * (3 + 4))
    kept = Group(strength=1.0).loss(seen(x.detach(), torch.tensor([[True, False], [True, True]])))
    assert kept.item() == pytest.approx(5)  # the group has one weight; a pruned one is 0 in the value


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(4, 6, 3),
        nn.Conv1d(4, 6, 3),
    ],
    ids=str,
)
def test_groups_are_the_channels_of_convolutions(module: Any) -> None:
    """Those weights belong to an output channel on which its value depends; likewise the input."""
    flat = torch.randn(1, 4, *[5] * (module.weight.dim() - 2))
    norms = {"output": 0.0, "input": 0.0}
    for channel in range(6):
        (slope,) = torch.autograd.grad(module(flat)[:, channel].sum(), module.weight)
        own = module.weight.detach()[slope != 0]
        norms["output"] += math.sqrt(own.numel()) * float(own.norm())
    for channel in range(4):
        only = torch.zeros_like(flat)
        only[:, channel] = flat[:, channel]
        (slope,) = torch.autograd.grad(module(only).sum(), module.weight)
        own = module.weight.detach()[slope != 0]
        norms["input"] += math.sqrt(own.numel()) * float(own.norm())
    for over, expected in norms.items():
        loss = Group(strength=1.0, over=over).loss(seen(module.weight, module=module))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_entropy_by_hand() -> None:
    x = leaf([0.0, 1.0, 1.0, -1.0])  # on the levels of a step of 1: each gives 3/4 to its own, 1/8 to both beside
    loss = Entropy(strength=1.0, step=1.0).loss(seen(x))
    p = torch.tensor([1 / 8, 3 / 4 + 1 / 8, 1 / 8 + 3 / 4 + 2 / 8, 1 / 8 + 2 * 3 / 4, 2 / 8]) / 4
    assert loss.item() == pytest.approx(float(-(p * p.log2()).sum()))
    loss.backward()
    q = p.log2()
    expected = torch.stack([q[1] - q[3], q[2] - q[4], q[2] - q[4], q[0] - q[2]]) / 2 / 4
    assert x.grad is not None and torch.allclose(x.grad, expected, atol=1e-6)


def test_entropy_is_that_of_uniform_noise_of_rounding() -> None:
    """The B-spline is the mean of rounding under triangular noise; levels are those of quantize.affine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 500, generator=generator)
    loss = Entropy(strength=1.0, bits=4).loss(seen(x))
    codes = x / x.abs().amax(1, keepdim=True) * 7
    noise = torch.rand(400, 2, *x.shape, generator=generator).sub(0.5).sum(1)
    p = (codes + noise).round().long().flatten().add(8).bincount(minlength=17).double()
    p = p[p > 0] / p.sum()
    assert loss.item() == pytest.approx(float(-(p * p.log2()).sum()), abs=5e-3)


def test_entropy_leaves_pruned_weights_out_and_bounds_its_levels() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    where = torch.tensor([[True, True, False, False]])
    with_mask, without = (
        Entropy(strength=1.0, step=1.0).loss(seen(v, w)).item() for v, w in ((x, where), (x[:, :2], None))
    )
    assert with_mask == without
    with pytest.raises(RecipeError, match="steps from 0"):
        Entropy(step=1e-9).loss(seen(x))


@pytest.mark.parametrize("act", [L1(strength=0.5), Group(strength=0.5), Entropy(strength=0.5)], ids=lambda a: a.name)
def test_gradients_reach_what_learns_in_pruned_shared_and_tied_tensors(act: Any) -> None:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    pruned = smelt.compress(tied, [Weights(ratio=0.5)]).model
    shared = smelt.compress(tied, [KMeans(clusters=4)]).model
    x = torch.randn(2, 8)
    for model in (tied, pruned, shared):
        dense = model[0].weight.detach().clone().requires_grad_()
        where = dense != 0 if model is pruned else None
        act.loss(seen(dense, where, model[0])).backward()
        assert dense.grad is not None
        with smelt.training(model, [act]) as t:
            t.loss(x, model(x)).backward()
            (learns,) = t.parameters()
        if model is shared:
            values = learns.detach()
            expected = torch.stack([dense.grad[dense == v].sum() for v in values])
        else:
            expected = dense.grad if model is tied else dense.grad * (dense != 0)
        assert learns.grad is not None and torch.allclose(learns.grad.reshape(expected.shape), expected, atol=1e-6)
        tied.zero_grad()


def test_a_selector_says_what_is_drawn(model: nn.Sequential) -> None:
    pieces = (
        Recipe.of([{"train": {"with": [{"regularize.l1": {"strength": 1.0, "on": ["2", "4.bias"]}}]}}]).steps[0].pieces
    )
    with smelt.training(model, pieces) as t:
        loss = t.loss(X, model(X)).item()
    assert loss == pytest.approx(
        float(model[2].weight.detach().abs().sum() + model[4].bias.detach().abs().sum()), rel=1e-6
    )
    model[2].weight.requires_grad_(False)
    with smelt.training(model, [L1()]) as t:
        assert t.notes == ["regularize.l1 leaves 2.weight [64, 64] alone: it does not learn"]
    with pytest.raises(RecipeError, match="matches no tensor"), smelt.training(model, [{"regularize.l1": {"on": "7"}}]):
        pass
    with pytest.raises(RecipeError, match=r"distill\.logits looks at no weights"):
        Recipe.of([{"train": {"with": [{"distill.logits": {"on": "2"}}]}}])


def test_a_pruned_value_is_seen_as_it_is_pruned(model: nn.Sequential) -> None:
    """A codec beside the objective acts on what the objective sees."""
    pieces = [Weights(ratio=0.5), L1(strength=1.0)]
    with smelt.training(model, pieces) as t:
        loss = t.loss(X, model(X)).item()
        assert loss == pytest.approx(sum(float(model[i].weight.detach().abs().sum()) for i in (0, 2, 4)), rel=1e-6)
        assert all((model[i].weight == 0).float().mean() == 0.5 for i in (0, 2, 4))


def test_strength_ramps(model: nn.Sequential) -> None:
    total = sum(float(model[i].weight.detach().abs().sum()) for i in (0, 2, 4))
    with pytest.raises(RecipeError, match="steps=N"):
        smelt.training(model, [L1(strength=Ramp(0, 1))])
    found = []
    with smelt.training(model, [L1(strength=Ramp(0, 1, shape="linear", finish=1.0))], steps=4) as t:
        for _ in range(4):
            found.append(t.loss(X, model(X)).item())
            t.step()
        assert t.settled
    assert found == [pytest.approx(total * i / 4, rel=1e-5) for i in range(4)]


def test_slimming_switches_channels_off() -> None:
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    y = (X[:, 0] > 0).long()
    low = {}
    for strength in (0.0, 0.02):
        model = copy.deepcopy(before)
        with smelt.training(model, [Slimming(strength=strength)]) as t:
            assert not t.notes
            optimizer = torch.optim.SGD(t.parameters(), 0.5)
            for _ in range(150):
                out = model(X)
                optimizer.zero_grad()
                t.loss(X, out, y, nn.functional.cross_entropy(out, y)).backward()
                optimizer.step()
        low[strength] = int((model[1].weight.abs() < 0.05).sum())
        assert (model(X).argmax(1) == y).float().mean() > 0.9
    assert low[0.0] == 0 and low[0.02] > 16
    with pytest.raises(RuleError, match="no scale of a batch norm"), smelt.training(nn.Linear(2, 2), [Slimming()]):
        pass


@pytest.fixture(scope="module")
def digits() -> tuple[smelt.Data, nn.Module]:
    data = smelt.open_data("digits")
    model = smelt.open_model("lenet(size=8, kernel=3, padding=1, hidden=300)")[0]
    step = {"train": {"epochs": 10, "lr": 3e-3, "optimizer": "adamw", "weight_decay": 0.3, "keep": "last"}}
    return data, smelt.compress(model, [step], smelt.Job(data=data, latency=False)).model


@pytest.mark.parametrize(("together", "share"), [(False, 0.87), (True, 0.97)], ids=["after", "inside"])
def test_entropy_makes_files_smaller_at_equal_loss(
    digits: tuple[smelt.Data, nn.Module], together: bool, share: float
) -> None:
    data, model = digits
    size, loss = {}, {}
    quantize = {"quantize.affine": {"bits": 4}}
    for strength in (0.0, 1.0):
        pieces = [{"regularize.entropy": {"strength": strength}}, *([quantize] if together else [])]
        train = {"train": {"epochs": 4, "lr": 5e-3, "keep": "last", "with": pieces}}
        job = smelt.Job(data=data, metric="loss", latency=False)
        report = smelt.compress(model, [train] if together else [train, quantize], job).report
        size[strength], loss[strength] = report.value("file"), report.value("loss")
    assert size[1.0] < share * size[0.0]
    assert loss[1.0] < loss[0.0] + 0.04


@dataclass(frozen=True)
class Hint(Objective):
    """The mean square between a hidden layer and the teacher's."""

    needs_teacher = True

    def look(self, model: nn.Module, teacher: Any, known: Known) -> Look:
        return Look(("1",), ("0",))

    def loss(self, seen: Seen) -> Tensor:
        loss: Tensor = (seen.features["1"] - seen.teacher_features["0"]).square().mean()
        return loss


def test_objectives_see_the_hidden_layers_they_ask_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    teacher = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with smelt.training(model, [Hint()], teacher=teacher) as t:
        loss = t.loss(X, model(X), guide=torch.zeros(16, 2))
        loss.backward()
        with pytest.raises(DataError, match="'1' of the model did not run"):
            t.loss(X, torch.zeros(16, 2))
    expected = (torch.relu(model[0](X)) - teacher[0](X)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model[0].weight.grad is not None and teacher[0].weight.grad is None
    assert not model[1]._forward_hooks and not teacher[0]._forward_hooks
    with pytest.raises(DataError, match="no module"), smelt.training(model, [Hint()], teacher=lambda x: x):
        pass
    with pytest.raises(ModelError, match="no module '1'"), smelt.training(model[0], [Hint()], teacher=teacher):
        pass
