import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import smelt
from smelt.core.edit import Note
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Known, make
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.methods.prune.merge import Merge


def net(act: nn.Module, *, bias: bool = True, width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, width), act, nn.Linear(width, 8, bias=bias), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
    )
    return model.eval()


def merge(model: nn.Module, known: Known | None = None, **settings: Any) -> list[str]:
    """Applies the method; returns its notes."""
    weights = [t for t in targets(model) if t.is_weight and Merge().refuses(t) is None]
    edits = Merge(**settings).plan(model, weights, known or Known())
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
    assert any("1 of its units give constants, and 2 has no bias" in n for n in notes) is bool(constant)
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


def neighbours(model: nn.Sequential, keep: int, x: Tensor) -> nn.Sequential:
    """The reference: greedy, cheapest pair of activations first, in plain loops."""
    a = model[1](model[0](x)).detach().double().T
    out = model[2].weight.detach().double().clone()
    alive = list(range(len(a)))
    while len(alive) > keep:
        found = []
        for j in alive:
            for i in alive:
                if i != j:
                    c = float(a[i] @ a[j] / (a[i] @ a[i]))
                    found.append((float((a[j] - c * a[i]).square().sum() * out[:, j].square().sum()), j, i, c))
        _, j, i, c = min(found)
        out[:, i] += c * out[:, j]
        alive.remove(j)
    model[0].weight.data, model[0].bias.data = model[0].weight.data[alive], model[0].bias.data[alive]
    model[2].weight.data = out[:, alive].float()
    return model


def test_ratio_merges_into_the_nearest_neighbour() -> None:
    model = net(nn.Tanh(), width=20)
    known = Known([(X, None)])
    only = [t for t in targets(model) if t.name == "0.weight"]
    edits = Merge(ratio=0.6, by="activations", refit="sum").plan(model, only, known)
    apply_edits(model, edits, "prune.merge")
    assert widths(model) == [8, 8, 3]
    torch.testing.assert_close(model(X), neighbours(net(nn.Tanh(), width=20), 8, X)(X), atol=1e-5, rtol=1e-4)


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
    edits = Merge(ratio=0.5).plan(model, [t for t in targets(model) if t.is_weight], Known())
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
    model = nn.Sequential(nn.Embedding(1, 1), nn.Linear(2, 2), nn.Conv1d(2, 2, 1, groups=2))
    assert "Embedding" in str(Merge().refuses(targets(model)[0]))
    assert "grouped" in str(Merge().refuses(targets(model)[3]))
    assert [Merge().refuses(t) is None for t in targets(model)[1:3]] == [True, False]
    with pytest.raises(DataError, match="needs data to compare activations"):
        merge(net(nn.ReLU()), by="activations")
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


class Maps(nn.Module):
    """conv1 - norm1 - relu - pool - depthwise - norm2 - relu - conv2 - relu - flatten - fc"""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 10, 3, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.norm2 = nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.BatchNorm2d(10)
        self.conv2, self.fc = nn.Conv2d(10, 7, 3, padding=padding), nn.Linear(7 * (16 if padding else 4), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.norm1(self.conv1(x)).relu(), 2)
        x = self.conv2(self.norm2(self.depthwise(x)).relu()).relu()
        return self.fc(x.view(x.size(0), -1))


IMAGES = torch.randn(16, 2, 10, 10, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def maps(padding: int = 1) -> Maps:
    torch.manual_seed(0)
    model = Maps(padding).eval()
    for norm in (model.norm1, model.norm2):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(10) / 2 + (0 if tensor is norm.running_mean else 0.5))
    return model


@torch.no_grad()
def copy_channel(model: Maps, i: int, j: int, scale: float) -> None:
    """Channel j does `scale` times what i does, by another filter and other norms."""
    model.conv1.weight[j] = -3 * model.conv1.weight[i]  # taken back by the norm
    model.norm1.running_mean[j] = -3 * model.norm1.running_mean[i]
    spread = (model.norm1.running_var[[i, j]] + model.norm1.eps).sqrt()
    model.norm1.weight[j] = model.norm1.weight[i] * -2 / 3 * spread[1] / spread[0]
    model.norm1.bias[j] = 2 * model.norm1.bias[i]
    model.depthwise.weight[j] = scale / 2 * model.depthwise.weight[i]
    model.depthwise.bias[j] = scale * model.depthwise.bias[i]
    spread = (model.norm2.running_var[[i, j]] + model.norm2.eps).sqrt()
    model.norm2.running_mean[j] = scale * model.norm2.running_mean[i]
    model.norm2.weight[j] = model.norm2.weight[i] * spread[1] / spread[0]
    model.norm2.bias[j] = scale * model.norm2.bias[i]


def test_channels_norms_and_depthwise_convolutions(tmp_path: Any) -> None:
    model = maps()
    copy_channel(model, 1, 4, 1.0)
    with torch.no_grad():
        model.conv2.weight[:, 6] = 0  # nobody listens
        model.norm2.weight[8], model.norm2.bias[8] = 0, -1  # relu(-1) = 0
        model.conv2.weight[5], model.conv2.bias[5] = 2 * model.conv2.weight[2], 2 * model.conv2.bias[2]
        model.conv2.weight[3], model.conv2.bias[3] = 0, 0.7  # goes into the bias of fc
    before = model(IMAGES)
    result = smelt.compress(model, ["prune.merge"])
    made = result.model
    assert made.conv1.out_channels == made.norm1.num_features == made.depthwise.groups == made.conv2.in_channels == 7
    assert made.conv2.out_channels == 5 and made.fc.in_features == 5 * 16
    result.save(tmp_path / "m.smelt")
    loaded = smelt.load(tmp_path / "m.smelt", into=maps())
    torch.testing.assert_close(loaded(IMAGES), before, atol=1e-6, rtol=0)


def test_channels_that_differ_in_one_of_their_stages_stay() -> None:
    for name in ("conv1.weight", "norm1.bias", "depthwise.weight", "depthwise.bias", "norm2.bias"):
        model = maps()
        copy_channel(model, 1, 4, 1.0)
        with torch.no_grad():
            model.get_parameter(name).view(10, -1)[4, 0] += 0.01
        merge(model)
        assert model.conv1.out_channels == 10, name


@pytest.mark.parametrize("padding", [0, 1])
def test_constant_channels_are_none_beside_zeros(padding: int) -> None:
    model = maps(padding)
    with torch.no_grad():
        model.norm2.weight[8], model.norm2.bias[8] = 0, 1.0
        model.norm2.weight[3], model.norm2.bias[3] = 0, 2.0  # twice as much: both become one
    before = model(IMAGES)
    notes = merge(model)
    assert model.conv1.out_channels == 8 + (padding > 0)
    assert any("1 of its units give constants, and conv2 adds zeros around" in n for n in notes) is bool(padding)
    torch.testing.assert_close(model(IMAGES), before, atol=2e-6, rtol=0)
    model = maps(0)
    with torch.no_grad():  # a constant before zeros come in
        model.norm1.weight[8], model.norm1.bias[8] = 0, 1.0
    before = model(IMAGES)
    merge(model)
    assert model.conv1.out_channels == 10
    torch.testing.assert_close(model(IMAGES), before, atol=1e-6, rtol=0)


def ones(a: Tensor) -> Tensor:
    return torch.cat([a.detach().double(), torch.ones(len(a), 1, dtype=torch.float64)], 1)


def read(layer: nn.Module) -> Tensor:
    """[out, columns + 1]: the bias as one more column."""
    return torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach().double()


def fitted(every: Tensor, now: Tensor, outgoing: Tensor, start: Tensor) -> Tensor:
    """The V of min |every U^T - now V^T|^2 / n + ridge |start - V|^2, as a stacked least-squares problem.

    The last columns are 1, without ridge; those that `start` lacks are taken out.
    """
    damp = (0.01 * float(now[:, :-1].square().mean()) * len(now)) ** 0.5 * torch.eye(now.shape[1], dtype=torch.float64)
    damp[-1, -1] = 0
    right = torch.cat([every @ outgoing.T, damp @ start.T])
    return torch.linalg.lstsq(torch.cat([now, damp]), right).solution.T


def test_ridge_takes_out_what_the_others_can_do() -> None:
    model, original = net(nn.ReLU()), net(nn.ReLU())
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    only = [t for t in targets(model) if t.name == "0.weight"]
    known = Known([(x[:90], None), (x[90:], None)])
    apply_edits(model, Merge(by="activations", ratio=0.5).plan(model, only, known), "prune.merge")
    a, outgoing = ones(original[1](original[0](x))), read(original[2])
    gram = a.T @ a / len(a)
    gram[range(12), range(12)] += 0.01 * gram.diagonal()[:12].mean()

    def fit(alive: list[int]) -> tuple[float, Tensor]:
        v, left = torch.zeros_like(outgoing), [*alive, 12]
        v[:, left] = torch.linalg.solve(gram[left][:, left], (outgoing @ gram)[:, left].T).T
        return float(((outgoing - v) @ gram * (outgoing - v)).sum()), v[:, left]

    alive = list(range(12))
    while len(alive) > 6:
        alive = min(([i for i in alive if i != j] for j in alive), key=lambda rest: fit(rest)[0])
    assert torch.equal(model[0].weight, original[0].weight[alive])
    torch.testing.assert_close(read(model[2]), fit(alive)[1], atol=1e-5, rtol=0)


def test_later_layers_make_up_for_earlier_ones() -> None:
    model, original = net(nn.ReLU(), width=30), net(nn.ReLU(), width=30)
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    merge(model, Known([x]), by="activations", ratio=0.5)
    assert widths(model) == [15, 4, 3]
    now, every = ones(model[:4](x)), ones(original[:4](x))
    errors = {}
    for kept in itertools.combinations(range(8), 4):  # those of which the second layer's rows were refitted
        start = read(original[5])[:, [*kept, 8]]
        errors[kept] = float((fitted(every, now, read(original[5]), start) - read(model[5])).abs().max())
    # The ridge is taken over all units that were there, the reference's over those that are left.
    assert min(errors.values()) < 0.02


@pytest.mark.parametrize("whole", [True, False])
def test_convolutions_are_refitted(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr("smelt.methods.prune.merge.WHOLE", 1)
    images = IMAGES.repeat(4, 1, 1, 1) + 0.3 * torch.randn(64, 2, 10, 10, generator=torch.Generator().manual_seed(4))
    model, original = maps(), maps()
    only = [t for t in targets(model) if t.name == "conv1.weight"]
    apply_edits(model, Merge(by="activations", ratio=0.4).plan(model, only, Known([images])), "prune.merge")
    assert (model.conv1.out_channels, model.conv2.out_channels) == (6, 7)
    plain = maps()
    with torch.no_grad():  # the best that leaving channels out alone can do
        kept = [i for i in range(10) if any(torch.equal(w, original.conv1.weight[i]) for w in model.conv1.weight)]
        plain.conv2.weight[:, [i for i in range(10) if i not in kept]] = 0
        before, after, cut = original(images), model(images), plain(images)
    assert len(kept) == 6
    assert float((after - before).square().mean()) < (0.25 if whole else 0.5) * float((cut - before).square().mean())


def test_what_is_the_same_on_data() -> None:
    model = net(nn.ReLU(), width=12)
    x = X.abs()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = -model[0].weight[2].abs(), -0.1  # dead for such inputs
        model[0].weight[5], model[0].bias[5] = 0, 0.4
        model[0].weight[5, 0] = 1e-9  # all but constant
        model[0].weight[7:9] = model[0].weight[7:9].abs()
        model[0].bias[7:9] = 0.2
        model[0].weight[8] = 2 * model[0].weight[7]
        model[0].bias[8] = 0.4
        x[:, 4] = 0
        model[0].weight[8, 4] = 3.0  # not the same elsewhere
    before = model(x)
    merge(model)
    assert widths(model)[0] == 12
    merge(model, Known([x]), by="activations")
    assert widths(model)[0] <= 9
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)


def test_without_data_the_rest_takes_over_too() -> None:
    model, original = net(nn.ReLU(), width=60), net(nn.ReLU(), width=60)
    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(2))
    merge(model, Known(seed=3), ratio=0.5)
    again = net(nn.ReLU(), width=60)
    merge(again, Known(seed=3), ratio=0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert widths(model) == [30, 4, 3]
    one = net(nn.ReLU(), width=60)
    merge(one, Known(seed=3), ratio=0.5, refit="sum")
    errors = [float((m(x) - original(x)).detach().square().mean()) for m in (model, one)]
    assert errors[0] < errors[1] / 2
    channels = maps()
    merge(channels, Known(), ratio=0.5)
    assert (channels.conv1.out_channels, channels.conv2.out_channels) == (5, 4)
    unfit = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7, 2))  # maps of 7 positions
    assert "no square image fits" in merge(unfit, Known(), ratio=0.5)[-1]
    merge(unfit, Known([torch.randn(20, 1, 3, 9)]), ratio=0.5, by="activations")
    assert unfit[0].out_channels == 2 and unfit[3].in_features == 14
