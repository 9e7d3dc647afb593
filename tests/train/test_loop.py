"""The train step: selection, resuming, repeating, refusing."""

from pathlib import Path

import pytest
import torch
from torch import nn

from smelt.core.data import Batches, Data
from smelt.core.errors import DataError, ModelError
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step, Train
from smelt.measures.accuracy import evaluate
from smelt.train.loop import Loop, fit, rate
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
