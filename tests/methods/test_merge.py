from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.edit import Note
from smelt.core.errors import RecipeError
from smelt.core.method import make
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.methods.prune.merge import Merge


def net(act: nn.Module, *, bias: bool = True, width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, width), act, nn.Linear(width, 8, bias=bias), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
    )
    return model.eval()


def merge(model: nn.Module, **settings: Any) -> list[str]:
    """Applies the method; returns its notes."""
    edits = Merge(**settings).plan(model, [t for t in targets(model) if t.is_weight], {})
    apply_edits(model, edits, "prune.merge")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    return [f"{e.tensor}: {e.reason}" for e in edits if isinstance(e, Note)]


@torch.no_grad()
def twin(layer: nn.Linear, i: int, j: int, scale: float = 1.0) -> None:
    layer.weight[j] = layer.weight[i] * scale
    if layer.bias is not None:
        layer.bias[j] = layer.bias[i] * scale


def widths(model: nn.Sequential) -> list[int]:
    return [m.out_features for m in model if isinstance(m, nn.Linear)]


X = torch.randn(50, 5, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("act", "left"),
    [(nn.ReLU(), 6), (nn.LeakyReLU(0.2), 6), (nn.Identity(), 6), (nn.GELU(), 8), (nn.Sigmoid(), 8)],
    ids=str,
)
def test_twins_and_dead_neurons_go_and_outputs_stay(act: nn.Module, left: int) -> None:
    model = net(act)
    first, second = model[0], model[2]
    twin(first, 2, 5)
    twin(first, 2, 9)
    twin(first, 1, 4, 0.37)  # the same only where f(c x) = c f(x)
    twin(first, 1, 7, 2.0)
    with torch.no_grad():
        first.weight[3] = 0  # gives a constant
        second.weight[:, 6] = 0  # nobody listens
        second.weight[4] = 0
        model[5].weight[:, 4] = 0
    before = model(X)
    merge(model)
    assert widths(model) == [left, 7, 3]
    torch.testing.assert_close(model(X), before, atol=1e-6, rtol=0)


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [0.0]]))
        model[0].bias.copy_(torch.tensor([0.5, 1.0, 3.0]))
        model[2].weight.copy_(torch.tensor([[10.0, 1.0, 2.0]]))
        model[2].bias.copy_(torch.tensor([-1.0]))
    merge(model)
    assert model[0].weight.tolist() == [[1.0]] and model[0].bias.tolist() == [0.5]
    assert model[2].weight.tolist() == [[12.0]]  # 10 + 2 * 1
    assert model[2].bias.tolist() == [5.0]  # -1 + 2 * relu(3)


def test_what_becomes_the_same_later_goes_too() -> None:
    model = net(nn.ReLU())
    twin(model[0], 0, 1)
    with torch.no_grad():  # rows 2 and 3 of the next layer differ only in how they split the twins
        model[2].weight[3] = model[2].weight[2]
        model[2].weight[3, 0] += 0.25
        model[2].weight[3, 1] -= 0.25
        model[2].bias[3] = model[2].bias[2]
        model[5].weight[:, 5] = 0  # neuron 5 is not heard, so neither is the one that only it hears
        model[2].weight[:, 8] = 0
        model[2].weight[5, 8] = 1
    before = model(X)
    merge(model)
    assert widths(model) == [10, 6, 3]
    torch.testing.assert_close(model(X), before, atol=1e-6, rtol=0)


def test_nothing_is_found_in_a_random_network() -> None:
    model = net(nn.ReLU())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert merge(model) == ["5.weight: its output leaves the model"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_constants_need_a_bias_to_go_to(constant: float) -> None:
    model = net(nn.ReLU(), bias=False)
    with torch.no_grad():
        model[0].weight[3:5] = 0
        model[0].bias[3:5] = torch.tensor([constant, -1.0])  # relu(-1) = 0 needs none
    before = model(X)
    notes = merge(model)
    assert widths(model)[0] == (11 if constant else 10)
    assert any("1 of its neurons give constants, and 2 has no bias" in n for n in notes) is bool(constant)
    torch.testing.assert_close(model(X), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["constant", "not heard"])
def test_one_neuron_stays_of_a_dead_layer(kind: str) -> None:
    model = net(nn.Sigmoid())
    with torch.no_grad():
        (model[0] if kind == "constant" else model[2]).weight.zero_()
    before = model(X)
    merge(model)
    assert widths(model)[0] == 1
    torch.testing.assert_close(model(X), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh()], ids=str)
def test_tolerance(act: nn.Module) -> None:
    model = net(act)
    twin(model[0], 0, 1)
    with torch.no_grad():
        model[0].weight[1] *= 1 + 0.01 * torch.randn(5)
    before = model(X)
    merge(model)
    assert widths(model)[0] == 12
    merge(model, tolerance=1e-3)
    assert widths(model)[0] == 11
    assert 1e-6 < float((model(X) - before).detach().abs().max()) < 0.01
    merge(model, tolerance=1)
    assert widths(model)[0] < 11


def neighbours(model: nn.Sequential, keep: int) -> nn.Sequential:
    """The reference: greedy, cheapest pair first, in plain loops."""
    row = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().double()
    out = model[2].weight.detach().double().clone()
    alive = list(range(len(row)))
    while len(alive) > keep:
        found = []
        for j in alive:
            for i in alive:
                if i != j:
                    c = max(0.0, float(row[i] @ row[j] / (row[i] @ row[i])))
                    found.append((float((row[j] - c * row[i]).square().sum() * out[:, j].square().sum()), j, i, c))
        _, j, i, c = min(found)
        out[:, i] += c * out[:, j]
        alive.remove(j)
    model[0].weight.data, model[0].bias.data = model[0].weight.data[alive], model[0].bias.data[alive]
    model[2].weight.data = out[:, alive].float()
    return model


def test_ratio_merges_into_the_nearest_neighbour() -> None:
    model = net(nn.ReLU(), width=20)
    edits = Merge(ratio=0.6).plan(model, [t for t in targets(model) if t.name == "0.weight"], {})
    apply_edits(model, edits, "prune.merge")
    assert widths(model) == [8, 8, 3]
    torch.testing.assert_close(model(X), neighbours(net(nn.ReLU(), width=20), 8)(X), atol=1e-5, rtol=1e-4)


def test_a_merged_neuron_is_better_than_a_deleted_one() -> None:
    torch.manual_seed(1)
    base = torch.randn(10, 20)
    errors = []
    for ratio in (0.5, 0.75):
        model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
        with torch.no_grad():
            model[0].weight.copy_(base.repeat(4, 1) * torch.rand(40, 1) + 0.05 * torch.randn(40, 20))
        x = torch.randn(200, 20)
        before = model(x)
        merge(model, ratio=ratio)
        assert model[0].out_features == 40 - int(40 * ratio)
        errors.append(float((model(x) - before).detach().norm() / before.detach().norm()))
    assert max(errors) < 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_plan_leaves_the_model_alone(dtype: torch.dtype) -> None:
    model = net(nn.ReLU()).to(dtype)
    twin(model[0], 0, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    edits = Merge(ratio=0.5).plan(model, [t for t in targets(model) if t.is_weight], {})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    apply_edits(model, edits, "prune.merge")
    assert {p.dtype for p in model.parameters()} == {dtype}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return y + self.b(y)


def test_refusals() -> None:
    with pytest.raises(RecipeError, match=r"outside 0\.\.0\.99"):
        make("prune.merge", {"ratio": 1})
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(2, 2))
    assert "Conv1d" in str(Merge().refuses(targets(model)[0]))
    assert [Merge().refuses(t) is None for t in targets(model)[2:]] == [True, False]
    assert merge(Residual())[0] == "a.weight: its output has 2 users"


def test_in_a_recipe(model: nn.Sequential, job: smelt.Job, tmp_path: Any) -> None:
    twin(model[0], 0, 1, 3.0)
    result = smelt.compress(model, [{"prune.merge": {}}, {"quantize.affine": {"bits": 8}}], job)
    assert result.model[0].out_features == 63
    result.save(tmp_path / "m.smelt")
    x = torch.randn(10, 2)
    loaded = smelt.load(
        tmp_path / "m.smelt",
        into=nn.Sequential(
            *[type(m)() if isinstance(m, nn.ReLU) else nn.Linear(m.in_features, m.out_features) for m in model]
        ),
    )
    assert torch.equal(loaded(x), result.model(x))
