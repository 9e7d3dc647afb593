"""A method that stands for several steps: each of these is a step of the recipe, with a row in the report."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smelt
from smelt.core import shelf
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Composite, make
from smelt.core.recipe import Recipe, Step
from smelt.core.settings import Ramp, setting
from smelt.core.store import store_of
from smelt.core.train import Train
from smelt.reports._methods import described
from tests.conftest import mlp


@dataclass(frozen=True)
class Both(Composite):
    """Prunes, then quantizes.

    applies to: weights
    """

    ratio: float | Ramp = setting(0.5, "share of weights that go", low=0, high=1)
    bits: int = setting(8, "bits of what stays", low=2, high=8)
    only: str = setting("", "selector of what is quantized; '' for that of the step")

    def steps(self) -> list[Any]:
        last = {"bits": self.bits, **({"on": self.only} if self.only else {})}
        return [{"prune.weights": {"ratio": self.ratio}}, {"quantize.affine": last}]


@dataclass(frozen=True)
class _Nested(Composite):
    def steps(self) -> list[Any]:
        return [Both(bits=4), {"train": {"with": ["distill.logits", Both()]}}, Step(make("code.entropy"), on=("0.*",))]


@dataclass(frozen=True)
class _Empty(Composite):
    def steps(self) -> list[Any]:
        return []


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shelf, "_registered", {"methods": {"test.both": __name__}})
    yield


def test_each_step_has_its_row_and_is_measured(model: nn.Module, job: smelt.Job, tmp_path: Path) -> None:
    result = smelt.compress(model, "steps:\n  - test.both: {bits: 4, on: '2'}\n  - code.entropy", job)
    assert [name for _, name in result.report.steps()] == [
        "original",
        "prune.weights (test.both)",
        "quantize.affine (test.both)",
        "code.entropy",
    ]
    entries = store_of(result.model).entries
    assert set(entries) == {"2.weight"}  # `on` went to both
    assert entries["2.weight"].steps == ("1: prune.weights (test.both)", "2: quantize.affine (test.both)")
    assert result.report.value("non-zeros", 1) == result.report.value("parameters", 0) - 64 * 64 / 2
    alone = smelt.compress(
        model,
        [{"prune.weights": {"ratio": 0.5, "on": "2"}}, {"quantize.affine": {"bits": 4, "on": "2"}}, "code.entropy"],
        job,
    )
    assert result.recipe.to_plain() == alone.recipe.to_plain()
    assert result.recipe.prefix_hash(3) == alone.recipe.prefix_hash(3)
    result.save(tmp_path / "a")
    loaded = smelt.load(tmp_path / "a", into=mlp())
    x = torch.randn(5, 2)
    assert torch.equal(loaded(x), alone.model(x))


def test_what_a_step_says_itself_holds() -> None:
    first, second = Recipe.of([{"test.both": {"only": "4", "on": ["0", "2"]}}])
    assert (first.on, second.on) == (("0", "2"), ("4",))
    assert (first.title, first.origin, first.place) == ("prune.weights (test.both)", "test.both", "recipe, step 1.1")


def test_composites_in_composites_and_in_train() -> None:
    recipe = Recipe.of([Step(_Nested(), on=("2",))])
    assert [step.key for step in recipe] == ["prune.weights", "quantize.affine", "train", "code.entropy"]
    assert {step.origin for step in recipe} == {_Nested().name}
    assert [step.on for step in recipe] == [("2",), ("2",), (), ("0.*",)]
    train = recipe.steps[2]
    assert isinstance(train.act, Train)
    pieces = [(piece.key, piece.on) for piece in train.pieces]
    assert pieces == [("distill.logits", ()), ("prune.weights", ("2",)), ("quantize.affine", ("2",))]
    assert Recipe.of(recipe.to_yaml()).to_plain() == recipe.to_plain()
    ramped = Recipe.of([{"train": {"with": [{"test.both": {"ratio": {"ramp": [0, 0.5]}}}]}}]).steps[0].pieces
    assert ramped[0].act.ratio == Ramp(0.0, 0.5)  # type: ignore[union-attr]


def test_acts_inside_training(model: nn.Module) -> None:
    with smelt.training(model, [Both(ratio=0.25)]) as t:
        assert [piece.key for piece in t.pieces] == ["prune.weights", "quantize.affine"]
    assert float((model[2].weight == 0).float().mean()) >= 0.25  # type: ignore[index]


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(RecipeError, match=r"recipe, step 1: .* stands for no step"):
        Recipe.of([_Empty()])
    with pytest.raises(RecipeError, match=r"recipe, line 2: prune.weights does not act at 'input'"):
        Recipe.of("steps:\n  - test.both: {at: input}")
    with pytest.raises(RecipeError, match=r"recipe, line 2: test.both.bits is 9"):
        Recipe.of("steps:\n  - test.both: {bits: 9}")
    with pytest.raises(RuleError, match=r"recipe, step 1.1: prune.weights.ratio ramps"):
        Recipe.of([Both(ratio=Ramp(0, 0.5))])
    with pytest.raises(RecipeError, match="a train step cannot stand inside another"):
        Recipe.of([{"train": {"with": [_Nested()]}}])


def test_is_listed_with_the_methods() -> None:
    shown = described("test.both", Both)
    assert shown["kind"] == "stands for several steps" and shown["card"]["applies to"] == "weights"
    assert len(Recipe.of("steps:\n" + shown["example"] + "\n")) == 2


def test_sensitivity_of_a_composite(model: nn.Module, job: smelt.Job) -> None:
    found = smelt.sensitivity(model, job, "test.both", setting="ratio", values=[0.5], on="2")
    assert [point.tensor for point in found.points] == ["2.weight"]
