"""The train step: selection, resuming, repeating, refusing."""

from pathlib import Path

import pytest
import torch
from torch import nn

import smelt
from smelt.core.data import Batches, Data
from smelt.core.errors import DataError, ModelError
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step
from smelt.core.store import store_of
from smelt.core.train import Train
from smelt.measures.accuracy import evaluate
from smelt.train.loop import Loop, fit
from smelt.train.rates import rate
from tests.conftest import mlp


def step(**settings: object) -> Step:
    return Recipe.of({"steps": [{"train": {"epochs": 4, **settings}}]}).steps[0]


def score(model: nn.Module, loader: object) -> float:
    return evaluate(model, loader, "accuracy")  # type: ignore[arg-type]


PRUNE = [{"prune.weights": {"ratio": {"ramp": [0, 0.8]}}}]


def test_it_learns(data: Data) -> None:
    model = mlp()
    before = score(model, data.test)
    fit(model, step(lr=1e-2), Loop(data, score=score))
    assert score(model, data.test) > max(before, 90)
    assert not model.training


def test_the_same_seed_gives_the_same_weights(data: Data) -> None:
    states = []
    for _ in range(2):
        model = mlp()
        fit(model, step(**{"with": PRUNE}), Loop(data, score=score, seed=3))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


class StopAfter(Progress):
    """Ctrl-C after so many batches."""

    def __init__(self, batches: int):
        self.batches = batches

    def advance(self, done: int, total: int, text: str = "") -> None:
        if done == self.batches:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_interrupted_loop_resumes_to_the_same_weights(data: Data, tmp_path: Path, optimizer: str) -> None:
    act = step(optimizer=optimizer, **{"with": PRUNE})
    whole = mlp()
    fit(whole, act, Loop(data, score=score))
    loop = Loop(data, score=score, checkpoint=tmp_path / "state.training")
    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), act, loop, StopAfter(8 * 2 + 3))
    assert (tmp_path / "state.training").exists()
    resumed = mlp()
    fit(resumed, act, loop)
    assert not (tmp_path / "state.training").exists()
    expected = whole.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in resumed.state_dict().items())


def test_best_weights_of_the_held_out_split_are_kept(data: Data) -> None:
    values = iter([50.0, 90.0, 60.0, 70.0])
    seen = []

    def fake(model: nn.Module, loader: object) -> float:
        seen.append(model[0].weight.detach().clone())  # type: ignore[index]
        return next(values)

    model = mlp()
    fit(model, step(), Loop(data, score=fake))
    assert torch.equal(model[0].weight, seen[1])


def test_patience_stops_early(data: Data) -> None:
    values = iter([50.0, 40.0, 30.0, 20.0, 10.0])
    notes = fit(mlp(), step(epochs=5, patience=2), Loop(data, score=lambda *_: next(values)))
    assert notes == ["train stopped after epoch 3: no better for 2 epochs"]


def test_schedules() -> None:
    assert rate(Train(warmup=0.2), 0.1) == pytest.approx(0.5)
    assert rate(Train(), 0.5) == pytest.approx(0.5)
    assert rate(Train(schedule="linear"), 0.25) == pytest.approx(0.75)
    assert rate(Train(schedule="constant"), 0.9) == 1.0


def test_bfloat16_arithmetic(data: Data) -> None:
    model = mlp()
    fit(model, step(lr=1e-2, precision="bfloat16"), Loop(data, score=score))
    assert model[0].weight.dtype == torch.float32
    assert score(model, data.test) > 85


def test_what_is_refused(data: Data) -> None:
    with pytest.raises(ModelError, match=r"the loss became nan.*smaller lr"):
        fit(mlp(), step(lr=1e30, optimizer="sgd"), Loop(data))
    with pytest.raises(DataError, match="needs training data"):
        fit(mlp(), step(), Loop(Data(test=data.test)))
    with pytest.raises(DataError, match="no labels and no objective"):
        fit(mlp(), step(hold_out=0), Loop(Data(train=Batches(torch.randn(8, 2)))))


def test_own_loaders_have_no_held_out_split(data: Data) -> None:
    notes = fit(mlp(), step(), Loop(Data(train=list(data.train or []))))
    assert notes == ["train kept the last epoch: a loader of your own needs Data(valid=...) to select on"]


def test_without_labels_the_last_epoch_is_kept() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    teacher = step(**{"with": [{"distill.logits": {"alpha": 0.0}}]})
    for given in (Data(train=Batches(x)), Data(train=Batches(x), valid=Batches(x)), Data(train=[x], valid=[(x, None)])):
        notes = fit(mlp(), teacher, Loop(given, teacher=mlp()))
        assert notes == ["train kept the last epoch: there are no labels to select on"]


def test_ties_do_not_feed_patience(data: Data) -> None:
    notes = fit(mlp(), step(epochs=5, patience=2), Loop(data, score=lambda *_: 1.0))
    assert notes == ["train stopped after epoch 3: no better for 2 epochs"]
    notes = fit(mlp(), step(epochs=5, patience=2, keep="last"), Loop(data, score=lambda *_: 1.0))
    assert notes == ["train stopped after epoch 3: no better for 2 epochs"]


class Viewing(nn.Module):
    """Cannot take channels-last images: `view` needs them contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.fc = nn.Linear(48, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).view(len(x), -1))


def test_models_that_view_their_features_train() -> None:
    images = Batches(torch.randn(16, 2, 6, 6), torch.randint(0, 2, (16,)), 8)
    assert not fit(Viewing(), step(hold_out=0), Loop(Data(train=images)))


def test_a_damaged_checkpoint_is_no_checkpoint(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "state.training"
    whole = mlp()
    fit(whole, step(), Loop(data, score=score))
    loop = Loop(data, score=score, checkpoint=path)
    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), step(), loop, StopAfter(20))
    path.write_bytes(path.read_bytes()[:500])
    again = mlp()
    fit(again, step(), loop)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_denormals_are_only_flushed_inside(data: Data) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), step(), Loop(data), StopAfter(1))
    assert float(torch.tensor(1e-40) * 1) != 0


def test_a_rewrite_inside_applies_at_the_start_and_trains_with_the_codecs_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.randn(64, 8)
    pieces = [
        {"lowrank.svd": {"rank": 4, "on": "2"}},
        {"quantize.affine": {"bits": 4, "learn": True, "range": "lsq", "on": ["0", "2.*"]}},
        {"quantize.affine": {"bits": 4, "learn": True, "zero": "learned", "range": "mse", "at": "input", "on": "2.*"}},
    ]
    steps = [
        {"train": {"epochs": 2, "keep": "last", "hold_out": 0, "with": [*pieces, {"distill.logits": {"alpha": 0}}]}}
    ]
    seen = []

    class Watch(Progress):
        def advance(self, done: int, total: int, text: str = "") -> None:
            seen.append(done)

    job = smelt.Job(data=Data(train=Batches(x, None, 16)), latency=False, cache=tmp_path)
    found = smelt.compress(model, steps, job, progress=Watch())
    assert max(seen) == 8 and type(found.model[2]).__name__ != "Linear"
    stored = store_of(found.model)
    assert {"0.weight", "2.0.weight", "2.1.weight"} == set(stored.entries)
    assert [one.path for one in stored.activations] == ["2.0", "2.1"]
    assert all({"scale", "offset"} == {n for n, _ in one.state.named_parameters()} for one in stored.activations)
    found.save(tmp_path / "a.smelt")
    blank = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    loaded = smelt.load(tmp_path / "a.smelt", into=blank)
    assert torch.equal(loaded(x), found.model(x))


def test_the_last_simulated_outputs_are_those_of_the_stored_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(32, 1, 6, 6)
    pieces = [
        {"quantize.affine": {"bits": 3, "learn": True, "standardize": True, "on": "0"}},
        {"quantize.affine": {"bits": 3, "range": "mse", "learn": True, "on": "4"}},
        {"quantize.affine": {"bits": 3, "range": "kl", "at": "input", "learn": True, "on": "4"}},
    ]
    with smelt.training(model, pieces, steps=4, calibration=[(x, None)]) as t:
        names = {name for name, p in t.named_parameters() if "scale" in name}
        assert names == {"0.weight/link0.scale", "4.weight/link0.scale", "4/input.scale"}
        optimizer = torch.optim.SGD(t.parameters(), 0.1)
        before = {name: p.detach().clone() for name, p in t.named_parameters()}
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            t.step()
        assert all(not torch.equal(before[name], p) for name, p in t.named_parameters() if "scale" in name)
        inside = model.eval()(x).detach()
    torch.testing.assert_close(model(x), inside, rtol=1e-4, atol=1e-5)


def test_inputs_are_calibrated_on_the_weights_that_act() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2)), torch.randn(50, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([0.9, 0.2, 0.2, 0.2])))
    coarse = {"quantize.affine": {"bits": 2, "per": "tensor", "on": "0"}}  # 0.2 becomes 0
    fixed = {"quantize.affine": {"at": "input", "dynamic": False, "symmetric": True, "on": "1"}}
    before = model[0].weight.detach().clone()
    x[:, 0] = 0.01 * x[:, 0]
    with smelt.training(model, [coarse, fixed], calibration=[(x, None)]) as t:
        (one,) = store_of(model).activations
        assert float(one.state.scale) == pytest.approx(float(0.9 * x[:, 0].abs().max()) / 127)
        assert torch.equal(dict(t.named_parameters())["0.weight/"], before)
