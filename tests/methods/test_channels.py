"""Cutting units: what is scored, ranked, cut, fitted; against formulas written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import smelt
from smelt.core.edit import Edit, Fill, Keep, Note
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Known, make
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.graph.groups import Group, groups
from smelt.graph.units import Order, coordinates, costs, orders, positions, rows, steps_of, sums
from smelt.measures.macs import macs
from smelt.measures.parameters import parameters
from smelt.models.resnet_digits import build

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.randint(0, 10, (48,), generator=torch.Generator().manual_seed(4))


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(7)
    layers: list[nn.Module] = []
    for a, b in zip((5, *widths), (*widths, 3), strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).eval()


def resnet() -> nn.Module:
    torch.manual_seed(3)
    model = build(channels=(8, 12), blocks=(1, 2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def known(x: Tensor = X, y: Tensor | None = Y, **more: Any) -> Known:
    half = len(x) // 2
    batches = [(x[:half], None if y is None else y[:half]), (x[half:], None if y is None else y[half:])]
    prices = {"parameters": parameters, "macs": lambda model: macs(model, x)}
    return Known(batches, functional.cross_entropy, prices | more.pop("prices", {}), **more)


def plan(model: nn.Module, on: str = "", told: Known | None = None, **settings: Any) -> list[Edit]:
    chosen = [t for t in targets(model) if t.is_weight and on in t.name]
    return make("prune.channels", {"repair": "none", **settings}).plan(model, chosen, told or known())  # type: ignore[no-any-return]


def kept(edits: list[Edit], name: str = "0.weight") -> list[int]:
    return next((list(e.index) for e in edits if isinstance(e, Keep) and (e.tensor, e.dim) == (name, 0)), [])


def notes(edits: list[Edit]) -> dict[str, str]:
    return {e.tensor: e.reason for e in edits if isinstance(e, Note)}


def best(score: Tensor, n: int) -> list[int]:
    return sorted(score.topk(n).indices.tolist())


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), y)


def elementwise(name: str, model: nn.Sequential) -> Tensor:
    """[units]: sums of the score over rows of the first weight and columns of the second."""
    ws = [model[0].weight, model[2].weight]
    if name == "magnitude":
        each = [w.abs() for w in ws]
    elif name == "taylor":
        slopes = [torch.autograd.grad(loss_of(model, X[i : i + 32], Y[i : i + 32]), ws) for i in (0, 32)]
        each = [(w * (a + b) / 2).abs() for w, a, b in zip(ws, *slopes, strict=True)]
    elif name == "hessian":
        slopes = [torch.autograd.grad(loss_of(model, X[i : i + 1], Y[i : i + 1]), ws) for i in range(64)]
        each = [w.square() * sum(s[j].square() for s in slopes) / 64 / 2 for j, w in enumerate(ws)]
    else:
        hidden = model[1](model[0](X))
        each = [torch.zeros_like(ws[0]), ws[1].abs() * hidden.square().mean(0).sqrt()]
    return (each[0].sum(1) + each[1].sum(0)).detach()


def unitwise(name: str, model: nn.Sequential) -> Tensor:
    hidden = model[1](model[0](X))
    if name == "apoz":
        return (hidden != 0).double().mean(0)
    if name == "median":
        rows = model[0].weight.detach()
        return torch.stack([sum((a - b).norm() for b in rows) for a in rows])  # type: ignore[arg-type]
    found = torch.zeros(len(model[0].weight))
    for x, y in zip(X, Y, strict=True):
        gate = torch.ones(len(found), requires_grad=True)
        out = model[2](model[1](model[0](x)) * gate)
        found += torch.autograd.grad(functional.cross_entropy(out, y), gate)[0].square() / 64 / 2
    return found


@pytest.mark.parametrize("score", ["magnitude", "taylor", "hessian", "activation", "apoz", "median", "fisher"])
def test_scores_by_hand(score: str) -> None:
    model = mlp(12)
    wanted = (elementwise if score in ("magnitude", "taylor", "hessian", "activation") else unitwise)(score, model)
    for ratio in (0.25, 0.5, 0.75):
        edits = plan(model, ratio=ratio, scope="local", score=score)
        assert kept(edits) == best(wanted, 12 - int(12 * ratio))


def test_the_batch_norm_score_adds_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3), nn.Flatten(), nn.Linear(32, 10)
    )
    scale = torch.tensor([0.3, -2.0, 0.1, 1.0, -0.2, 0.5])
    model[1].weight.data = scale
    told = known(IMAGES, LABELS)
    edits = plan(model.eval(), told=told, score="batchnorm", scope="local")
    assert kept(edits) == [1, 3, 5]
    assert "finds nothing to tell" in notes(edits)["3.weight"]


def test_random_repeats_and_depends_on_the_seed() -> None:
    found = [kept(plan(mlp(40), score="random", told=known(seed=seed))) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and len(found[0]) == 20


def test_coupled_reads_are_summed_before_they_are_squared() -> None:
    """Two layers read the same units: their slopes cancel where they pull in opposite directions."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).tanh()
            return self.b(y) + self.c(y)

    model = Two()
    with torch.no_grad():
        model.c.weight[:, :2] = -model.b.weight[:, :2]
    assert kept(plan(model, ratio=0.34, scope="local"), "a.weight") == [2, 3, 4, 5]


def test_local_takes_its_share_of_each_group_and_global_of_all() -> None:
    model = mlp(10, 20)
    edits = plan(model, ratio=0.35, scope="local", score="magnitude")
    assert (len(kept(edits)), len(kept(edits, "2.weight"))) == (7, 13)
    with torch.no_grad():
        model[2].weight *= 1e-3
        model[2].bias *= 1e-3
    edits = plan(model, ratio=0.4, score="fisher")
    scores = torch.cat([_fisher(model, i) for i in (0, 1)])
    gone = set(scores.argsort()[:12].tolist())
    assert kept(edits) == [u for u in range(10) if u not in gone] or not kept(edits)
    assert kept(edits, "2.weight") == [u for u in range(20) if u + 10 not in gone]
    assert "40.0% of the units" in notes(edits)[""]


def _fisher(model: nn.Sequential, layer: int) -> Tensor:
    total = torch.zeros(model[2 * layer].out_features)
    for x, y in zip(X, Y, strict=True):
        gate = torch.ones(len(total), requires_grad=True)
        h = x
        for i, module in enumerate(model):
            h = module(h * gate if i == 2 * layer + 2 else h)
        total += torch.autograd.grad(functional.cross_entropy(h, y), gate)[0].square()
    return total


def test_isomorphic_ranks_like_with_like() -> None:
    model = resnet()
    told = known(IMAGES, LABELS)
    found = groups(model, IMAGES)[0]
    edits = plan(model, told=told, score="magnitude", scope="isomorphic")
    first, second = (len(kept(edits, f"stages.1.{i}.conv1.weight")) for i in (0, 1))
    alone = len(kept(edits, "conv.weight"))
    assert len(found) == 5 and alone == 4
    inner = ("stages.0.0", "stages.1.0", "stages.1.1")
    assert sum(len(kept(edits, f"{path}.conv1.weight")) for path in inner) == 16
    assert first + second <= 24


@pytest.mark.parametrize("of", ["parameters", "macs"])
def test_ratios_of_prices_are_met_and_not_by_more_than_a_step(of: str) -> None:
    told = known(IMAGES, LABELS)
    for ratio in (0.3, 0.6):
        model = resnet()
        before = told.prices[of](model)
        apply_edits(model, plan(model, told=told, ratio=ratio, of=of, score="magnitude"), "")
        after = told.prices[of](model)
        assert (1 - ratio) * before * 0.9 < after <= (1 - ratio) * before
        model(IMAGES)


def test_milliseconds_are_measured_again_and_a_target_out_of_reach_is_said() -> None:
    calls = []

    def price(model: nn.Module) -> float:
        calls.append(1)
        return 1.0 + parameters(model) / 1000

    told = known(prices={"milliseconds": price})
    edits = plan(mlp(40), told=told, ratio=0.1, of="milliseconds", score="magnitude")
    assert "ms became" in notes(edits)[""] and len(calls) % 3 == 0
    edits = plan(mlp(40), told=told, ratio=0.9, of="milliseconds", score="magnitude")
    assert len(kept(edits)) == 4
    assert "the milliseconds cannot be cut by 90%; as much was cut as most=0.9 lets go" in notes(edits)[""]


def test_units_that_cost_more_go_first() -> None:
    """Scores are divided by multiplications with `of: macs`, and by parameters with `of: parameters`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4, 40), nn.Tanh(),
        nn.Linear(40, 10),
    ).eval()  # fmt: skip
    gates = {0: torch.ones(48, 4, 1, 1, requires_grad=True), 4: torch.ones(48, 40, requires_grad=True)}
    h = IMAGES
    for i, module in enumerate(model):
        h = module(h * gates[i - 2] if i - 2 in gates else h)
    slopes = torch.autograd.grad(functional.cross_entropy(h, LABELS, reduction="sum"), list(gates.values()))
    score = [s.flatten(1).square().mean(0) for s in slopes]
    told = known(IMAGES, LABELS)
    for of, worth in (("channels", (1, 1)), ("parameters", (10 + 40, 5 + 10)), ("macs", (64 * 9 + 40, 4 + 10))):
        ranked = torch.cat([s / w for s, w in zip(score, worth, strict=True)]).argsort()
        edits = plan(model, told=told, of=of, ratio=0.4)
        found = [kept(edits, f"{i}.weight") or list(range(n)) for i, n in ((0, 4), (4, 40))]
        stays = [*found[0], *(4 + u for u in found[1])]
        assert sorted(ranked[44 - len(stays) :].tolist()) == stays


def test_round_to_and_most() -> None:
    for round_to, wanted in ((1, 7), (4, 8), (8, 8), (16, 16)):
        edits = plan(mlp(20), ratio=0.65, scope="local", score="magnitude", round_to=round_to)
        assert len(kept(edits)) == wanted
    edits = plan(mlp(20), ratio=0.95, scope="local", score="magnitude", most=0.75)
    assert len(kept(edits)) == 5
    order = Order([[i] for i in range(10)], torch.arange(1, 11) / 10, 10)
    assert [len(order.gone(t, 1.0, 1)) for t in (0.0, 0.05, 0.3, 1.0)] == [0, 0, 3, 9]
    assert [len(order.gone(t, 1.0, 4)) for t in (0.1, 0.4, 0.7, 1.0)] == [2, 2, 6, 6]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).relu()).relu().flatten(1))  # type: ignore[no-any-return]


def test_sets_keep_equally_many() -> None:
    sets = torch.tensor([0, 0, 0, 1, 1, 1])
    group = Group("a.weight", 6, (), sets, "channels", 0, True, None, None)  # type: ignore[arg-type]
    steps = steps_of(group, torch.tensor([3.0, 1, 2, 7, 9, 8]))
    assert steps == [[1, 3], [2, 5], [0, 4]]
    order = Order(steps, torch.tensor([0.2, 0.5, 1.0]), 6)
    assert [sorted(order.gone(t, 0.9, n)) for t, n in ((0.1, 1), (0.3, 1), (1, 1), (1, 3), (1, 4))] == [
        [], [1, 3], [1, 2, 3, 5], [], [1, 3]
    ]  # fmt: skip


def test_groups_of_a_convolution_or_channels_within_them() -> None:
    told = known(IMAGES, LABELS)
    widths = []
    for kinds in (("group channels",), ("groups",), ("heads",)):
        model = Grouped()
        edits = plan(model, told=told, score="magnitude", scope="local", kinds=kinds)
        apply_edits(model, edits, "")
        widths.append((model.a.out_channels, model.b.out_channels, model.b.groups))
        assert model(IMAGES).shape == (48, 10)
    assert widths == [(4, 4, 2), (4, 4, 1), (8, 8, 2)]
    assert "none of the kinds to cut" in notes(edits)["a.weight"]


def test_heads_go_and_head_dims_stay() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Flatten(), nn.Linear(80, 3)).eval()
    x = torch.randn(8, 5, 6)
    told = Known([(x, Y[:8])], functional.cross_entropy)
    for repair in ("none", "ridge"):
        edits = plan(model, told=told, scope="local", repair=repair)
    apply_edits(model, edits, "")
    assert (layer.self_attn.num_heads, layer.self_attn.head_dim, layer.linear1.out_features) == (2, 4, 12)
    assert model(x).shape == (8, 3)


def test_groups_are_cut_only_if_all_their_makers_are_selected() -> None:
    model, told = resnet(), known(IMAGES, LABELS)
    edits = plan(model, "stages.0.0.conv", told, scope="local", score="magnitude")
    assert kept(edits, "stages.0.0.conv1.weight") and not kept(edits, "conv.weight")
    assert "go together with those of conv.weight, which is not selected" in notes(edits)["stages.0.0.conv2.weight"]
    assert "fc.weight" in notes(plan(model, told=told)) and "fc.weight" not in notes(edits)


def test_nothing_is_changed_by_a_plan() -> None:
    model = resnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    edits = plan(model, told=known(IMAGES, LABELS), repair="ridge", rounds=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    keeps = [(e.tensor, e.dim) for e in edits if isinstance(e, Keep)]
    assert len(keeps) == len(set(keeps))
    again = plan(model, told=known(IMAGES, LABELS), repair="ridge", rounds=2)
    assert [e.to_plain() for e in edits if e.recorded] == [e.to_plain() for e in again if e.recorded]
    fills = [{e.tensor: e.value for e in some if isinstance(e, Fill)} for some in (edits, again)]
    assert fills[0].keys() == fills[1].keys() and all(torch.equal(v, fills[1][k]) for k, v in fills[0].items())


def test_rounds_reach_the_same_ratio() -> None:
    for rounds in (1, 3):
        for scope, wanted in (("local", [6, 10]), ("global", None)):
            edits = plan(mlp(12, 20), ratio=0.5, scope=scope, rounds=rounds)
            widths = [len(kept(edits, name)) for name in ("0.weight", "2.weight")]
            assert widths == wanted if wanted else sum(widths) == 16


def cut_and_fitted(model: nn.Module, repair: str, told: Known, **settings: Any) -> nn.Module:
    edits = plan(model, told=told, repair=repair, scope="local", **settings)
    apply_edits(model, edits, "")
    return model


def test_ridge_makes_up_for_units_that_others_can_stand_in_for() -> None:
    model = mlp(12)
    with torch.no_grad():
        model[0].weight[6:] = model[0].weight[:6] * torch.arange(2, 8)[:, None]
        model[0].bias[6:] = model[0].bias[:6] * torch.arange(2, 8)
    before = model(X).detach()
    errors = {
        repair: float((cut_and_fitted(mlp_like(model), repair, known(), score="magnitude")(X) - before).detach().norm())
        for repair in ("none", "bias", "ridge")
    }
    assert errors["ridge"] < 0.05 * errors["bias"] and errors["bias"] < errors["none"]


def mlp_like(model: nn.Sequential) -> nn.Sequential:
    new = mlp(12)
    new.load_state_dict(model.state_dict())
    return new


def test_ridge_is_damped_least_squares() -> None:
    model, original = mlp(12, act=nn.Tanh), mlp(12, act=nn.Tanh)
    edits = plan(model, repair="ridge", scope="local", score="magnitude")
    apply_edits(model, edits, "")
    hidden = original[1](original[0](X)).detach()
    a = hidden[:, kept(edits)].double()
    y = original[2](hidden).detach().double()
    w = original[2].weight.detach()[:, kept(edits)].double()
    missed = y - a @ w.T - original[2].bias.detach().double()
    middle = a - a.mean(0)
    gram = middle.T @ middle
    moved = torch.linalg.solve(
        gram + 0.01 * gram.diagonal().mean() * torch.eye(6), middle.T @ (missed - missed.mean(0))
    )
    torch.testing.assert_close(model[2].weight.detach().double(), w + moved.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(X).mean(0).double(), y.mean(0), atol=1e-5, rtol=1e-4)


def test_bias_matches_means_and_batch_norms() -> None:
    model, told = resnet(), known(IMAGES, LABELS)
    seen: dict[str, Tensor] = {}
    cut_and_fitted(model, "bias", told, score="magnitude")
    norm = model.stages[1][1].bn2
    hook = norm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    out = model(IMAGES)
    hook.remove()
    torch.testing.assert_close(norm.running_mean, seen["x"].mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, seen["x"].transpose(0, 1).flatten(1).var(1), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(out.mean(0), resnet()(IMAGES).mean(0), atol=1e-5, rtol=1e-4)


def test_ridge_helps_convolutions() -> None:
    wanted = resnet()(IMAGES)
    errors = [
        float((cut_and_fitted(resnet(), repair, known(IMAGES, LABELS), ratio=0.4)(IMAGES) - wanted).detach().norm())
        for repair in ("none", "bias", "ridge")
    ]
    assert errors[2] < 0.7 * min(errors[:2])


def test_units_arithmetic() -> None:
    model = Grouped()
    by_name = {t.name: t for t in targets(model)}
    group = next(g for g in groups(model, IMAGES)[0] if g.name == "b.weight")
    part = next(p for p in group.parts if p.tensor == "fc.weight")
    weight = model.fc.weight.detach()
    both = [*range(36), *range(144, 180)]  # a channel of each of the two groups
    assert part.dim == 1 and coordinates(part)[0][:72].tolist() == both
    torch.testing.assert_close(sums(weight, part)[0], weight[:, both].sum())
    torch.testing.assert_close(rows(weight, part).sum(1), sums(weight, part))
    each = costs(group, by_name)
    assert each.tolist() == [2 * (4 * 9 + 1 + 360)] * 4
    places = positions(model, IMAGES)
    assert places == {"a": 48 * 64, "b": 48 * 36, "fc": 48}
    assert costs(group, by_name, places).tolist() == [2 * 48 * (36 * 36 + 360)] * 4
    assert coordinates(type(part)("x", 0, (torch.tensor([0, 2]), torch.tensor([1])), "out"))[1].tolist() == [0, 0, 1]


def test_orders_rank_by_score_over_worth() -> None:
    model = mlp(4, 2)
    a, b = groups(model, X)[0]
    scores = {a: torch.tensor([1.0, 2, 3, 4]), b: torch.tensor([3.0, 9])}
    worth = {a: torch.ones(4), b: torch.full((2,), 2.0)}
    sizes = {a.name: 4, b.name: 2}
    found = orders([a, b], scores, {a: 0, b: 0}, worth, sizes)
    assert found[a].when.tolist() == pytest.approx([1 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert found[b].when.tolist() == pytest.approx([2 / 6, 1])
    alone = orders([a, b], scores, None, worth, sizes)
    assert alone[a].when.tolist() == [0.25, 0.5, 0.75, 1]


def test_saved_and_loaded_from_its_builder(tmp_path: Path) -> None:
    model, builder, given = smelt.open_model("resnet_digits", None, {"channels": [8, 12], "blocks": [1, 2]})
    job = smelt.Job(data=smelt.Data(train=[(IMAGES, LABELS)]), latency=False)
    steps = {"steps": [{"prune.channels": {"ratio": 0.4, "of": "macs", "rounds": 2}}, {"quantize.affine": {"bits": 8}}]}
    result = smelt.compress(smelt.Source.of(model, builder, given), steps, job)
    result.save(tmp_path / "m.smelt")
    loaded = smelt.load(tmp_path / "m.smelt")
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    assert result.report.value("MACs", 1) <= 0.6 * result.report.value("MACs", 0)
    assert any("of the macs" in note for note in result.report.notes)


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"prune\.channels\.of: no choice 'flops'"):
        make("prune.channels", {"of": "flops"})
    with pytest.raises(RecipeError, match="outside 0"):
        make("prune.channels", {"ratio": 1.0})
    with pytest.raises(RecipeError, match="no choice 'neurons'"):
        make("prune.channels", {"kinds": ["neurons"]})
    with pytest.raises(RecipeError, match="magnitude"):
        make("prune.channels", {"score": "magnitud"})
    with pytest.raises(RecipeError, match="known only while weights are trained"):
        make("prune.channels", {"score": "movement"})
    model = mlp(8)
    with pytest.raises(DataError, match="it needs data to see which units belong together"):
        plan(model, told=Known())
    with pytest.raises(DataError, match="'bytes' is not measured here"):
        plan(model, of="bytes")
    with pytest.raises(DataError, match="loss"):
        plan(model, told=Known([(X, Y)]))
