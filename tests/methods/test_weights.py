"""prune.weights against torch.nn.utils.prune and by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import smelt
from smelt.core.errors import DataError, RecipeError, RuleError
from smelt.core.method import Inside, State, Stats, Values
from smelt.core.settings import Ramp
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


def test_random_leaves_as_many_as_torch() -> None:
    reference = nn.Linear(10, 7)
    prune.random_unstructured(reference, "weight", 0.33)
    ours = pruned(nn.Sequential(nn.Linear(10, 7)), Weights(score="random", ratio=0.33))
    assert int((ours[0].weight == 0).sum()) == int((reference.weight == 0).sum()) == 23


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_whole_rows_equal_torch_ln_structured(ratio: float) -> None:
    model, reference = mlp(), mlp()
    for i in (0, 2):
        prune.ln_structured(reference[i], "weight", ratio, n=1, dim=0)
    ours = smelt.compress(model, [{"prune.weights": {"block": [1, -1], "ratio": ratio, "on": ["0", "2"]}}]).model
    assert all(torch.equal(ours[i].weight, reference[i].weight) for i in (0, 2))


def mask(method: Weights, x: Tensor, **known: Tensor) -> list[list[float]]:
    return method.fit(x, Stats(gathered=known)).mask.float().tolist()  # type: ignore[no-any-return,operator]


X = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.4, 0.3, -0.2, 0.1]])


def test_scopes_by_hand() -> None:
    assert mask(Weights(ratio=0.5), X) == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert mask(Weights(ratio=0.5, scope="row"), X) == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert mask(Weights(threshold=0.3), X) == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert mask(Weights(ratio=0.5, block=(1, 2)), X) == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert mask(Weights(ratio=0.5, block=(2, 2)), X) == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert mask(Weights(ratio=0.5, block=(1, 2), scope="row"), X) == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert mask(Weights(ratio=0.5, block=(-1, 1)), X) == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_scores_by_hand() -> None:
    second = torch.tensor([0.0, 1.0, 100.0, 1.0]).double()  # the roots are 0, 1, 10, 1
    assert mask(Weights(score="activation", scope="row"), X, second_moment=second) == [[0, 1, 1, 0], [0, 1, 1, 0]]
    slope = torch.tensor([[0.0, 0.0, -5.0, 4.0], [100.0, 0.0, 90.0, 0.0]])
    assert mask(Weights(score="taylor"), X, gradient=slope) == [[0, 0, 1, 1], [1, 0, 1, 0]]
    assert mask(Weights(score="hessian"), X, fisher=slope.square()) == [[0, 0, 1, 1], [1, 0, 1, 0]]


def test_scores_from_data_are_those_of_their_formulas(data: smelt.Data, model: nn.Sequential) -> None:
    x, y = next(iter(data.train or []))
    small = smelt.Data(train=[(x, y)])
    slopes = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model[2].weight)[0]
    expected = (model[2].weight * slopes).abs().flatten().topk(2048).indices
    ours = smelt.compress(model, [Weights(score="taylor")], smelt.Job(data=small, latency=False)).model
    assert set(expected.tolist()) == set(ours[2].weight.flatten().nonzero().flatten().tolist())
    everything = smelt.compress(model, [Weights(score="hessian", scope="global")], smelt.Job(data=small, latency=False))
    saliency = []
    for i in (0, 2, 4):
        each = [
            torch.autograd.grad(nn.functional.cross_entropy(model(a[None]), b[None]), model[i].weight)[0]
            for a, b in zip(x, y, strict=True)
        ]
        saliency.append((model[i].weight.square() * torch.stack(each).square().mean(0)).flatten())
    gone = torch.cat(saliency).topk(round(0.5 * 4352), largest=False).values.max()
    for i, values in zip((0, 2, 4), saliency, strict=True):
        kept = everything.model[i].weight.flatten() != 0
        assert bool((values[kept] >= gone * 0.999).all()) and bool((values[~kept] <= gone * 1.001).all())


def test_global_scope_with_blocks_counts_blocks() -> None:
    plan = Weights(ratio=0.5, scope="global", block=(2, 2)).plan(
        {"a": Values(torch.full((4, 4), 9.0)), "b": Values(torch.rand(4, 4))}, {}, lambda e: 0
    )
    assert plan["a"].ratio == 0.0 and plan["b"].ratio == 1.0  # type: ignore[attr-defined]


def test_zeros_that_are_there_can_be_taken_over() -> None:
    model = mlp()
    for i in (0, 2, 4):
        prune.l1_unstructured(model[i], "weight", 0.4)
        prune.remove(model[i], "weight")
    result = smelt.compress(model, [{"prune.weights": {"ratio": 0, "zeros": True}}])
    kept = dict(store_of(result.model).entries["2.weight"].encoded.leaves())["mask"]
    assert torch.equal(kept, model[2].weight != 0) and torch.equal(result.model[2].weight, model[2].weight)
    without = smelt.compress(model, [Weights(ratio=0)]).model
    assert bool(dict(store_of(without).entries["2.weight"].encoded.leaves())["mask"].all())
    more = smelt.compress(model, [Weights(ratio=0.5, zeros=True)]).model
    assert float((more[2].weight == 0).float().mean()) == 0.5


def test_regrowth_exchanges_the_lowest_for_the_steepest() -> None:
    x = torch.tensor([[5.0, 4.0, 3.0, 0.1, 0.2, 7.0, 7.0, 7.0]])
    before = State(mask=torch.tensor([[True, True, True, True, False, False, False, False]]))
    slope = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, -3.0, 0.0]])
    method = Weights(ratio=0.5, regrow=0.5)

    def at(progress: float) -> State:
        return method.fit(x, Stats(inside=Inside(progress, before, {"slope": slope})))

    first = at(0.0)  # half of the four go, and as many come
    assert first.mask.tolist() == [[True, True, False, False, False, True, True, False]]
    fresh = method.restarts(before, first)
    assert fresh is not None and fresh.nonzero()[:, 1].tolist() == [5, 6]
    assert at(0.375).mask.tolist() == [[True, True, True, False, False, False, True, False]]  # a quarter
    assert torch.equal(at(0.75).mask, before.mask) and torch.equal(at(1.0).mask, before.mask)  # type: ignore[arg-type]
    assert method.period() == 100 and Weights(every=7).period() == 7 and Weights().period() is None


def test_what_does_not_go_together_is_refused() -> None:
    for settings, message in [
        ({"pattern": "2:4", "ratio": 0.3}, "fixes the ratio"),
        ({"threshold": 0.1, "scope": "global"}, "fixes the ratio"),
        ({"pattern": "2:4", "block": [2, 2]}, "goes with no block"),
        ({"threshold": 0.1, "regrow": 0.3}, "regrow keeps a number"),
        ({"score": "median"}, "how important whole units are"),
        ({"block": [2]}, r"block is \[2\]; it is \[rows, columns\]"),
        ({"block": [0, 2]}, r"\[rows, columns\]"),
    ]:
        with pytest.raises(RecipeError, match=message):
            smelt.make("prune.weights", settings)
    with pytest.raises(RuleError, match="movement' is known in training only"):
        smelt.compress(mlp(), [Weights(score="movement")])
    with pytest.raises(RuleError, match="needs the gradient of each weight"):
        Weights(score="taylor").fit(X, Stats())
    with pytest.raises(DataError, match="needs data to gather statistics from"):
        smelt.compress(mlp(), [Weights(score="taylor")])


def test_what_is_left_alone_is_named() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(6, 5))
    data = smelt.Data(train=[torch.tensor([[0, 1], [2, 5]])])
    method = Weights(score="activation", scope="row")
    notes = smelt.compress(model, [method], smelt.Job(data=data, latency=False)).report.notes
    assert any("0.weight [6, 4] alone" in note and "weighs the inputs" in note for note in notes)
    notes = smelt.compress(copy.deepcopy(model), [Weights(block=(2, 2))]).report.notes
    assert any("2.weight [5, 6] alone" in note and "divide into blocks of [2, 2]" in note for note in notes)
    turned = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Conv1d(4, 4, 3))
    notes = smelt.compress(turned, [Weights(scope="row")]).report.notes
    assert any("lie along dimension 1" in note for note in notes)


def test_thresholds_ramp() -> None:
    assert mask(Weights(threshold=Ramp(0, 0.35)), X) == [[1, 1, 1, 1], [1, 0, 0, 0]]
