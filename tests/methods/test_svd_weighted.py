"""lowrank.svd by what errors count by: against the bounds of Eckart & Young in each norm, and least squares."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.apply import apply_rewrite, weight_statistics
from smelt.core.edit import Note, Replace
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Known
from smelt.core.recipe import Recipe
from smelt.core.store import store_of
from smelt.core.target import targets
from smelt.graph import factors
from smelt.measures.macs import macs
from smelt.methods.lowrank.svd import SVD


def mean_square(outputs: Tensor, labels: Any) -> Tensor:
    return outputs.square().mean()


def known(*inputs: Tensor, **more: Any) -> Known:
    return Known([(x, torch.zeros(len(x))) for x in inputs], mean_square, **more)


def edits(model: nn.Module, data: Known, **settings: Any) -> list[Any]:
    return SVD(**settings).plan(model, [t for t in targets(model) if t.is_weight], data)


def split(model: nn.Module, data: Known, **settings: Any) -> list[str]:
    (step,) = Recipe.of({"steps": [{"lowrank.svd": settings}]}).steps
    return apply_rewrite(model, step, "svd", data)


def skewed(n: int, k: int, seed: int = 0) -> Tensor:
    """Inputs whose moments are far from the identity, and that are not centred."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=draw) @ torch.randn(k, k, generator=draw).pow(3) / k + 0.5


def product(layer: nn.Module) -> Tensor:
    return layer[1].weight @ layer[0].weight  # type: ignore[index, no-any-return, union-attr]


def model_of(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    for layer in layers:
        for p in layer.parameters():
            nn.init.normal_(p)
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_whitened_error_is_the_bound_of_eckart_and_young(rank: int) -> None:
    model, x = model_of(nn.Linear(12, 30, bias=False), nn.ReLU()), skewed(200, 12).double()
    weight = model[0].weight.detach().clone()
    split(model, known(x), rank=rank, weight="inputs", damp=0.0, on="0")
    error = (x @ (weight - product(model[0])).T).norm()
    s = torch.linalg.svdvals(x @ weight.T)
    torch.testing.assert_close(error, s[rank:].norm())
    plain = weight - torch.linalg.svd(weight)[0][:, :rank] @ torch.linalg.svd(weight)[0][:, :rank].T @ weight
    assert error < (x @ plain.T).norm()


def test_a_bias_takes_over_the_mean() -> None:
    model, x = model_of(nn.Linear(12, 30), nn.ReLU()), skewed(200, 12).double()
    before = model[0](x).detach()
    split(model, known(x), rank=3, weight="inputs", damp=0.0, on="0")
    off = model[0](x) - before
    torch.testing.assert_close(off.mean(0), torch.zeros(30).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(off.norm(), torch.linalg.svdvals(before - before.mean(0))[3:].norm())


def test_inputs_that_never_show_a_direction_cost_nothing() -> None:
    basis = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)).double()
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(4)).double() @ basis
    model = model_of(nn.Linear(12, 30, bias=False), nn.ReLU())
    before = model[0](x).detach()
    split(model, known(x), rank=5, weight="inputs", damp=0.0, on="0")
    torch.testing.assert_close(model[0](x), before)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 20, 3, padding=1, stride=2), nn.Conv1d(4, 16, 5, padding=2)])
def test_convolutions_are_whitened_over_their_patches(layer: nn.Module) -> None:
    model = model_of(layer, nn.ReLU())
    x = skewed(6 * 4, 10).reshape(24, 10).double()
    x = x.reshape(2, 4, 30)[:, : layer.in_channels] if layer.weight.dim() == 3 else x.reshape(2, 120)[:, :108]  # type: ignore[union-attr, operator, index]
    x = x.reshape(2, 3, 6, 6) if layer.weight.dim() == 4 else x  # type: ignore[union-attr, operator]
    before = model[0](x).detach()
    split(model, known(x), rank=4, weight="inputs", damp=0.0, on="0")
    off, rows = model[0](x) - before, before.transpose(0, 1).flatten(1)
    torch.testing.assert_close(off.norm(), torch.linalg.svdvals(rows - rows.mean(1, keepdim=True))[4:].norm())


def test_spatial_factors_by_moments() -> None:
    model, x = model_of(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU()), skewed(40, 27).double().reshape(10, 3, 6, 6)
    before = model[0](x).detach()
    off = {}
    for weight in ("plain", "inputs"):
        copied = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU()).double().eval()
        copied.load_state_dict(model.state_dict())
        split(copied, known(x), rank=3, weight=weight, scheme="spatial", damp=1e-9, on="0")
        off[weight] = float((copied[0](x) - before).detach().norm())
        if weight == "inputs":
            first = copied[0][0](x)  # type: ignore[index, operator]
            patches = nn.functional.unfold(first, (1, 3), padding=(0, 1)).transpose(1, 2).flatten(0, 1)
            ones = torch.cat([patches, torch.ones(len(patches), 1).double()], 1)
            wanted = before.flatten(2).transpose(1, 2).flatten(0, 1)
            fitted = ones @ torch.linalg.lstsq(ones, wanted).solution
            torch.testing.assert_close(off["inputs"], float((fitted - wanted).detach().norm()), rtol=1e-4, atol=1e-6)
    assert off["inputs"] < off["plain"]


def test_embeddings_count_by_how_often_an_entry_is_looked_up() -> None:
    model = model_of(nn.Embedding(20, 8), nn.ReLU())
    ids = torch.randint(0, 20, (50,), generator=torch.Generator().manual_seed(1)).clamp_max(12)
    table = model[0].weight.detach().clone()
    split(model, known(ids), rank=3, weight="inputs", damp=0.0, on="0")
    assert isinstance(model[0], nn.Sequential) and isinstance(model[0][0], nn.Embedding)
    off = (model[0](ids) - table[ids]).norm()
    torch.testing.assert_close(off, torch.linalg.svdvals(table[ids])[3:].norm())
    plain = model_of(nn.Embedding(20, 8), nn.ReLU())
    split(plain, known(), rank=3, on="0")
    torch.testing.assert_close((plain[0](torch.arange(20)) - table).norm(), torch.linalg.svdvals(table)[3:].norm())


def test_fisher_weights_inputs_by_their_row_sums() -> None:
    model, x = model_of(nn.Linear(12, 30, bias=False), nn.ReLU()), skewed(64, 12).double()
    data = Known([(one[None], torch.zeros(1)) for one in x], mean_square)
    found = weight_statistics(model, ("fisher",), [targets(model)[0]], data, "test")
    weight = model[0].weight.detach().clone()
    split(model, data, rank=4, weight="fisher", damp=0.0, on="0")
    scale = found["0.weight"]["fisher"].sum(0).sqrt().diag()
    error = ((weight - product(model[0])) @ scale).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight @ scale)[4:].norm())


def test_loss_weights_both_sides() -> None:
    model, x = model_of(nn.Linear(12, 30, bias=False), nn.Linear(30, 6)), skewed(64, 12).double()
    found = weight_statistics(model, ("slopes",), [targets(model)[0]], known(x), "test")
    weight = model[0].weight.detach().clone()
    split(model, known(x), rank=4, weight="loss", damp=0.0, spread=1e-3, on="0")
    slopes = found["0.weight"]["slopes"][0]
    slopes = slopes + 1e-3 * slopes.diagonal().mean() * torch.eye(30)
    seen = torch.linalg.cholesky(slopes).T @ weight @ torch.linalg.cholesky(x.T @ x / len(x))
    off = torch.linalg.cholesky(slopes).T @ (weight - product(model[0])) @ torch.linalg.cholesky(x.T @ x / len(x))
    torch.testing.assert_close(off.norm(), torch.linalg.svdvals(seen)[4:].norm())


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_refit_is_reduced_rank_regression_on_inputs_as_they_are(kind: str) -> None:
    def make() -> nn.Sequential:
        first = nn.Linear(12, 24, bias=False) if kind == "linear" else nn.Embedding(50, 24)
        return model_of(first, nn.ReLU(), nn.Linear(24, 30), nn.ReLU())

    x = skewed(300, 12).double() if kind == "linear" else torch.arange(300) % 50
    model, original, plain = make(), make(), make()
    split(model, known(x), rank=3, weight="inputs", refit=True, damp=1e-9, on="*")
    split(plain, known(x), rank=3, weight="inputs", damp=1e-9, on="*")
    now, wanted = model[1](model[0](x)).detach(), original[2](original[1](original[0](x))).detach()
    ones = torch.cat([now, torch.ones(300, 1).double()], 1)
    fitted = ones @ torch.linalg.lstsq(ones, wanted).solution  # the best of full rank, of which the best of rank 3
    rest = torch.linalg.svdvals(fitted - fitted.mean(0))[3:]
    bound = ((fitted - wanted).square().sum() + rest.square().sum()).sqrt()
    torch.testing.assert_close((model[2](now) - wanted).norm(), bound, rtol=1e-4, atol=1e-6)
    assert (model[:3](x) - wanted).norm() < 0.99 * (plain[:3](x) - wanted).norm()
    assert torch.equal(original[0].weight, make()[0].weight)


def test_a_budget_of_all_layers_leaves_least() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.ReLU(), nn.Linear(20, 20, bias=False)).eval()
    low = torch.randn(20, 4) @ torch.randn(4, 20)
    with torch.no_grad():
        model[0].weight.copy_(low)
        model[2].weight.copy_(torch.linalg.qr(torch.randn(20, 20))[0])
    found = edits(model, known(), budget="0.7x")
    replaced = {e.path: e for e in found if isinstance(e, Replace)}
    assert list(replaced) == ["0"] and replaced["0"].values["0.weight"].shape[0] == 4
    assert any(isinstance(e, Note) and e.tensor == "2.weight" and "as it is" in e.reason for e in found)
    (note,) = [e.reason for e in found if isinstance(e, Note) and not e.tensor]
    assert note == "560 of 800 parameters of the layers are left, of 560 in the budget"
    with pytest.raises(RecipeError, match=r"the budget '0.05x' of parameters is 40; the layers take from 80 to 800"):
        edits(model, known(), budget="0.05x")


def test_budgets_of_bytes_and_multiplications() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 40)).eval()
    x = torch.randn(2, 3, 8, 8)
    dense = 3 * 16 * 9 + 16 * 64 * 40
    found = edits(net, known(), budget="100 kB")
    left = sum(v.numel() for e in found if isinstance(e, Replace) for k, v in e.values.items() if "weight" in k)
    assert 0.9 * 25_000 < left + (0 if any(getattr(e, "path", "") == "0" for e in found) else 432) <= 25_000 < dense
    before = macs(net, x)
    split(net, known(x), budget="0.5x", of="macs")
    assert 0.45 * before < macs(net, x) <= 0.5 * before


def test_layers_compare_by_what_they_do_to_the_loss() -> None:
    """The second output counts a hundred times as much, so its layer keeps the rank."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), 100 * self.b(x)], 1)

    for weight in ("inputs", "loss"):
        found = edits(Two().eval(), known(torch.randn(100, 20)), budget="0.6x", weight=weight)
        sizes = {e.path: e.values["0.weight"].shape[0] for e in found if isinstance(e, Replace)}
        assert sizes.get("a", 20) < sizes.get("b", 20)


@pytest.mark.parametrize("layer", [nn.Linear(20, 30), nn.Conv2d(6, 16, 3, padding=1, stride=2), nn.Embedding(40, 24)])
def test_pivoted_gives_the_same_with_fewer_numbers(layer: nn.Module) -> None:
    torch.manual_seed(0)
    shapes: dict[type, Any] = {nn.Linear: (5, 20), nn.Conv2d: (2, 6, 9, 9)}
    x = torch.randint(0, 40, (3, 7)) if isinstance(layer, nn.Embedding) else torch.randn(shapes[type(layer)])
    made = []
    for form in ("factors", "pivoted"):
        model = nn.Sequential(copy.deepcopy(layer), nn.ReLU()).eval()
        split(model, known(x), rank=5, form=form, on="0")
        made.append(model)
    torch.testing.assert_close(made[1](x), made[0](x), atol=1e-4, rtol=1e-4)
    count = [sum(p.numel() for n, p in m.named_parameters() if "weight" in n) for m in made]
    assert count[1] == count[0] - 25


def test_weights_beside_the_factors() -> None:
    """A matrix of low rank with a few large entries is found exactly; the entries lie in a sparse form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU()).eval()
    low, spikes = torch.randn(40, 3) @ torch.randn(3, 40), torch.zeros(40, 40)
    spikes.view(-1)[torch.randperm(1600)[:80]] = 10.0
    with torch.no_grad():
        model[0].weight.copy_(low + spikes)
    x = torch.randn(4, 40)
    before = model(x).detach()
    data = smelt.Data(train=[(x, torch.zeros(4))])
    recipe = [{"lowrank.svd": {"rank": 3, "sparse": 0.05, "rounds": 40, "on": "0"}}, {"code.entropy": {}}]
    result = smelt.compress(model, recipe, smelt.Job(data=data, latency=False))
    torch.testing.assert_close(result.model(x), before, atol=1e-3, rtol=1e-3)
    entry = store_of(result.model).entries["0.1.weight"].encoded
    assert entry.form.name == "sparse" and int(entry.parts["mask"].sum()) <= 80
    assert result.report.value("file") < 4 * (240 + 80) + 40 * 4 + 1200


def test_quantized_and_trained_afterwards(tmp_path: Any) -> None:
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 40)).eval()  # noqa: E731
    model, x = make(), torch.randn(64, 40)
    data = smelt.Data(train=smelt.Batches(x, torch.randint(0, 40, (64,)), batch_size=16))
    settings = {"budget": "0.6x", "weight": "inputs", "refit": True, "sparse": 0.05}
    recipe = [
        {"lowrank.svd": {**settings, "form": "pivoted", "on": "0"}},
        {"lowrank.svd": {"ratio": 0.6, "on": "2"}},
        {"quantize.gptq": {"bits": 8, "group": 16}},
        {"train": {"epochs": 1, "lr": 1e-4}},
    ]
    result = smelt.compress(model, recipe, smelt.Job(data=data, latency=False))
    result.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=make())
    assert torch.equal(loaded(x), result.model(x))
    assert {e.encoded.form.name for e in store_of(loaded).entries.values()} == {"affine", "sparse"}
    inside = make()
    with smelt.training(inside, [{"lowrank.svd": settings}], steps=2, calibration=[(x, x)], loss=mean_square) as t:
        optimizer = torch.optim.SGD(t.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            inside(x).square().mean().backward()
            optimizer.step()
            t.step()
    rests = [e.encoded for name, e in store_of(inside).entries.items() if name.endswith(".1.weight")]
    assert rests and all(int((rest.decode() != 0).sum()) == 128 for rest in rests)


def test_what_gets_slower_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 60)), torch.randn(3, 60)
    kinds = {60: 1.0, 40: 9.0}  # the first takes 1 ms whatever it is, the second 9 ms in place of 1

    class Took:
        def __init__(self, median: float) -> None:
            self.median = median

    def clock(sides: Any, *_: Any) -> dict[str, Took]:
        outputs = {name: call() for name, call in sides.items()}
        assert outputs["old"].shape == outputs["new"].shape
        return {"old": Took(2.0), "new": Took(kinds[outputs["new"].shape[1]])}

    monkeypatch.setattr(factors, "latencies", clock)
    found = edits(model.eval(), known(x), rank=5, keep="faster")
    assert [e.path for e in found if isinstance(e, Replace)] == ["2"]
    (note,) = [e for e in found if isinstance(e, Note)]
    assert note == Note("0.weight", "with rank 5 it would take 9 ms in place of 2 ms")


def test_a_budget_of_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 takes 1 ms and 0.1 ms a rank, layer 2 takes 1 ms and 9 with any rank: that one stays dense."""
    model = model_of(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    seen = []

    def clock(self: Any, edit: Replace) -> tuple[float, float]:
        rank = edit.values["0.weight"].shape[0]
        seen.append((edit.path, rank))
        return 1.0, 0.1 * rank if edit.path == "0" else 9.0

    monkeypatch.setattr(factors.Speed, "milliseconds", clock)
    found = edits(model.double(), known(torch.randn(4, 20).double()), budget="0.8x", of="milliseconds")
    (edit,) = [e for e in found if isinstance(e, Replace)]
    assert edit.path == "0" and edit.values["0.weight"].shape[0] == 4  # of 3 ms, 2.4; two layers take 2
    assert Note("", "2,400,000 of 3,000,000 nanoseconds of the layers are left, of 2,400,000 in the budget") in found
    ranks = [rank for path, rank in seen if path == "0"]
    assert ranks == sorted(set(ranks)) and ranks[-1] == 9  # the largest that is smaller than 400 numbers
    with pytest.raises(RecipeError, match=r"the budget '0.5x' of milliseconds is 1,500,000; the layers take from"):
        edits(model, known(torch.randn(4, 20).double()), budget="0.5x", of="milliseconds")


def test_what_is_measured_is_the_layer_on_its_own_inputs() -> None:
    model = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400)).eval()
    found = edits(model, known(torch.randn(256, 400)), budget="0.6x", of="milliseconds")
    assert any(isinstance(e, Replace) for e in found)
    for settings in ({"budget": "0.5x", "of": "milliseconds"},):
        with pytest.raises(DataError, match="to measure layers"):
            edits(model, Known(), **settings)


def test_settings_that_do_not_go_together() -> None:
    for settings, words in (
        ({"budget": "0.5x", "rank": 3}, "rank and budget each fix the rank"),
        ({"budget": "4 bits"}, "a share such as '0.8x'"),
        ({"budget": "1 MB", "of": "macs"}, "a share such as '0.8x'"),
        ({"budget": "3 kB", "of": "milliseconds"}, "a share such as '0.8x'"),
        ({"budget": "some"}, "no number with a unit"),
        ({"of": "macs"}, "give a budget"),
        ({"refit": True}, "weight: inputs"),
        ({"form": "pivoted", "scheme": "spatial"}, "scheme: channel"),
    ):
        with pytest.raises(RecipeError, match=words):
            SVD(**settings)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    for settings in ({"weight": "inputs"}, {"weight": "fisher"}, {"budget": "0.5x", "of": "macs"}):
        with pytest.raises(DataError, match="needs data"):
            edits(model, Known(), **settings)


def test_ranks_are_multiples() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    for settings in ({"ratio": 0.6}, {"rank": 13}, {"budget": "0.6x"}, {"energy": 0.3}):
        found = edits(model, known(), multiple=8, **settings)
        assert all(e.values["0.weight"].shape[0] % 8 == 0 for e in found if isinstance(e, Replace))
        assert any(isinstance(e, Replace) for e in found)
