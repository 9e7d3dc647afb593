"""recover: after every lossy step, without labels, towards the model as it came."""

from pathlib import Path

import pytest
import torch
from torch import nn

import smelt
from smelt.core.data import Batches, Data
from smelt.core.errors import DataError, RuleError
from smelt.core.recipe import Recipe
from smelt.core.store import store_of
from smelt.core.train import Recover, Train
from smelt.methods.share.kmeans import KMeans
from tests.conftest import mlp, two_moons


def distance(model: nn.Module, teacher: nn.Module) -> float:
    x = two_moons(256, 9)[0]
    with torch.no_grad():
        return float((model(x).softmax(-1) - teacher(x).softmax(-1)).abs().mean())


def job(labels: bool = False) -> smelt.Job:
    x, y = two_moons(512, 1)
    return smelt.Job(data=Data(train=Batches(x, y if labels else None, 32, shuffle=True)), latency=False)


LOSSY = [
    {"share.kmeans": {"clusters": 3}},
    {"prune.weights": {"ratio": 0.85}},
    {"quantize.affine": {"bits": 2}},
    {"quantize.affine": {"bits": 2, "at": "input", "dynamic": False}},
    {"prune.channels": {"ratio": 0.5}},
    {"lowrank.svd": {"rank": 3}},
]


@pytest.mark.parametrize("lossy", LOSSY, ids=lambda step: f"{next(iter(step))}-{len(str(step))}")
def test_every_lossy_step_comes_closer_to_the_model_as_it_came(lossy: dict[str, dict], model: nn.Module) -> None:
    key, settings = next(iter(lossy.items()))
    plain = smelt.compress(model, [{key: settings}], job()).model
    result = smelt.compress(model, [{key: {**settings, "recover": {"epochs": 10, "lr": 1e-2}}}], job())
    assert [name for _, name in result.report.steps()] == ["original", key, "recover"]
    assert distance(result.model, model) < 0.8 * distance(plain, model)
    assert str(store_of(plain).describe("2.weight")) == str(store_of(result.model).describe("2.weight"))


def test_it_follows_the_model_and_neither_the_labels_nor_the_teacher_of_the_job(model: nn.Module) -> None:
    teacher = mlp(7)
    wrong = job(labels=True)
    assert wrong.data is not None and isinstance(wrong.data.train, Batches)
    wrong.data.train.labels = 1 - wrong.data.train.labels  # type: ignore[operator]
    wrong.teacher = teacher
    steps = [{"prune.weights": {"ratio": 0.85, "recover": {}}}]
    ends = [smelt.compress(model, steps, one).model for one in (wrong, job())]
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True))


def test_a_student_cut_from_its_teacher_learns_from_it(model: nn.Module) -> None:
    cut = {"prune.channels": {"ratio": 0.8, "score": "random", "repair": "none"}}
    learn = {"epochs": 6, "lr": 3e-3, "hold_out": 0, "keep": "last"}
    pieces = [{"distill.logits": {"alpha": 0}}, {"distill.features": {"layers": 2}}]
    student, taught = (
        smelt.compress(model, steps, job()).model for steps in ([cut], [cut, {"train": learn | {"with": pieces}}])
    )
    assert student[2].weight.shape == taught[2].weight.shape != model[2].weight.shape  # type: ignore[index]
    assert distance(taught, model) < 0.7 * distance(student, model)


def test_the_recipe_holds_it_as_a_step(tmp_path: Path) -> None:
    recipe = Recipe.of("steps:\n  - share.kmeans: {clusters: 4, on: '2', recover: {epochs: 1, steps: 5}}\n  - recover")
    assert recipe.to_plain() == {
        "steps": [{"share.kmeans": {"clusters": 4, "on": "2"}}, {"recover": {"epochs": 1, "steps": 5}}, {"recover": {}}]
    }
    assert Recipe.of(recipe.to_plain()).to_plain() == recipe.to_plain()
    act = recipe.steps[1].act
    assert isinstance(act, Recover) and isinstance(act, Train) and act.steps == 5 and act.hold_out == 0
    assert [piece.to_plain() for piece in recipe.steps[1].pieces] == [{"distill.logits": {"alpha": 0.0}}]
    assert Recipe.of([KMeans(), Recover()]).to_plain()["steps"][1] == {"recover": {}}
    assert Recipe.of([{"share.kmeans": {"recover": None}}]).to_plain()["steps"] == [
        {"share.kmeans": {}},
        {"recover": {}},
    ]
    chosen = Recipe.of([{"share.kmeans": {"clusters": {"allocate": [2, 4]}, "budget": "2 bits", "recover": {}}}])
    assert [step.key for step in chosen] == ["share.kmeans", "recover"] and chosen.steps[0].choice is not None
    other = Recipe.of([{"share.kmeans": {"recover": {"with": ["distill.features"]}}}])
    assert other.steps[1].pieces[0].key == "distill.features"


def test_what_is_refused(model: nn.Module) -> None:
    with pytest.raises(RuleError, match=r"code\.bits loses nothing"):
        Recipe.of([{"code.bits": {"recover": {}}}])
    with pytest.raises(RuleError, match="inside train"):
        Recipe.of([{"train": {"with": [{"share.kmeans": {"recover": {}}}]}}])
    with pytest.raises(DataError, match="recover needs training data"):
        smelt.compress(model, [{"share.kmeans": {"recover": {}}}], smelt.Job(latency=False))
