"""Recipes: what is read, what is refused and with which words."""

import pytest

from smelt.core.errors import RecipeError, RuleError
from smelt.core.recipe import Recipe, Train
from smelt.core.settings import Ramp
from smelt.methods.prune.weights import Weights

TEXT = """\
steps:
  - train:
      epochs: 3
      with:
        - distill.logits: {temperature: 2}
        - prune.weights: {ratio: {ramp: [0, 0.9]}, scope: global}
  - share.kmeans: {clusters: 32, on: [fc1, "!fc1.bias"]}
  - code.huffman
"""


def test_yaml_to_steps() -> None:
    recipe = Recipe.of(TEXT)
    assert [step.key for step in recipe] == ["train", "share.kmeans", "code.huffman"]
    train = recipe.steps[0]
    assert isinstance(train.act, Train) and train.act.epochs == 3
    assert [piece.key for piece in train.pieces] == ["distill.logits", "prune.weights"]
    assert train.pieces[1].act == Weights(ratio=Ramp(0, 0.9), scope="global")
    assert recipe.steps[1].on == ("fc1", "!fc1.bias")


def test_plain_yaml_and_back() -> None:
    recipe = Recipe.of(TEXT)
    assert Recipe.of(recipe.to_plain()).to_plain() == recipe.to_plain()
    assert Recipe.of(recipe.to_yaml()).to_plain() == recipe.to_plain()


def test_a_list_of_methods_is_a_recipe() -> None:
    assert [s.key for s in Recipe.of([Weights(ratio=0.3), {"code.bits": None}])] == ["prune.weights", "code.bits"]
    assert len(Recipe.of(Weights())) == 1


def test_prefix_hash_depends_on_the_prefix_only() -> None:
    a, b = Recipe.of(TEXT), Recipe.of(TEXT.replace("clusters: 32", "clusters: 16"))
    assert a.prefix_hash(1) == b.prefix_hash(1)
    assert a.prefix_hash(2) != b.prefix_hash(2)


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        ("share.kmeans", "share.kmean", RecipeError, ["line 7", "'share.kmean'", "did you mean 'share.kmeans'"]),
        ("clusters: 32", "cluster: 32", RecipeError, ["line 7", "'cluster'", "did you mean 'clusters'"]),
        ("clusters: 32", "clusters: 0", RecipeError, ["line 7", "share.kmeans.clusters is 0", "1..65536"]),
        ("clusters: 32", "clusters: many", RecipeError, ["line 7", "'many'", "int"]),
        ("scope: global", "scope: globl", RecipeError, ["line 6", "'globl'", "did you mean 'global'"]),
        ("[0, 0.9]", "[0, 1.9]", RecipeError, ["line 6", "1.9", "0..1"]),
        ("[0, 0.9]", "[0]", RecipeError, ["line 6", "ramp"]),
        ("{ramp: [0, 0.9]}", "{choose: [0.5, 0.9]}", RecipeError, ["line 6", "choose", "search"]),
        ("epochs: 3", "epochs: 0", RecipeError, ["line 3", "train.epochs is 0", ">= 1"]),
        ("epochs: 3", "epoch: 3", RecipeError, ["line 3", "did you mean 'epochs'"]),
        ("- code.huffman", "- distill.logits", RuleError, ["line 8", "under train"]),
        ("- code.huffman", "- prune.weights: {ratio: {ramp: [0, 1]}}", RuleError, ["line 8", "ramps"]),
        ("distill.logits: {temperature: 2}", "code.huffman: {}", RuleError, ["line 5", "after train"]),
        ("clusters: 32,", "clusters: 32, at: input,", RecipeError, ["line 7", "'input'"]),
        ("clusters: 32,", "clusters: 32, clusters: 2,", RecipeError, ["line 7", "twice"]),
        ("steps:", "step:", RecipeError, ["steps"]),
        ("- code.huffman", "- {", RecipeError, ["line 9", "YAML"]),
        ("- code.huffman", "- code.huffman: {recover: {}}", RuleError, ["line 8", "loses nothing"]),
        ("clusters: 32", "recover: 3, clusters: 32", RecipeError, ["line 7", "recover takes settings"]),
        ("clusters: 32", "recover: {epoch: 3}, clusters: 32", RecipeError, ["line 7", "recover", "'epochs'"]),
        ("ratio: {ramp: [0, 0.9]}", "recover: {}", RuleError, ["line 6", "after train"]),
        ('[fc1, "!fc1.bias"]', "3", RecipeError, ["line 7", "'on'", "not 3"]),
        ('[fc1, "!fc1.bias"]', "null", RecipeError, ["line 7", "'on'", "not None"]),
        ('[fc1, "!fc1.bias"]', "[]", RecipeError, ["line 7", "'on'", "not []"]),
        ('[fc1, "!fc1.bias"]', "[fc1, 3]", RecipeError, ["line 7", "'on'", "3"]),
        ("epochs: 3", "lr: {ramp: [0.1, 0.01]}", RecipeError, ["line 3", "train.lr cannot ramp", "'with'"]),
        ("epochs: 3", "epochs: {ramp: [1, 9]}", RecipeError, ["line 3", "train.epochs cannot ramp"]),
        ("epochs: 3", "momentum: 1", RecipeError, ["line 3", "train.momentum is 1", "adam", "below 1"]),
        ("[0, 0.9]", "{start: a, end: 1}", RecipeError, ["line 6", "prune.weights.ratio", "start is 'a'"]),
        ("[0, 0.9]", "{start: 0, end: 1, begin: x}", RecipeError, ["line 6", "begin is 'x'"]),
        ("[0, 0.9]", "{start: 0, end: 1, finish: .nan}", RecipeError, ["line 6", "finish is nan"]),
        ("[0, 0.9]", "[0, .inf]", RecipeError, ["line 6", "end is inf"]),
        ("{ramp: [0, 0.9]}", "9" * 400, RecipeError, ["line 6", "prune.weights.ratio"]),
        ("clusters: 32", "clusters: " + "9" * 5000, RecipeError, ["not valid YAML", "4300"]),
        (
            "share.kmeans: {clusters: 32",
            f"quantize.affine: {{group: {10**30}",
            RecipeError,
            ["line 7", "1..2147483648"],
        ),
        ("ratio: {ramp: [0, 0.9]}, scope: global", "pattern: 2:4, ratio: 0.7", RecipeError, ["line 6", "fixes the"]),
        ("- code.huffman", "- &a [*a]", RecipeError, ["alias within itself"]),
    ],
)
def test_errors_name_line_key_and_what_is_right(old: str, new: str, kind: type, words: list[str]) -> None:
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    with pytest.raises(kind) as caught:
        Recipe.of(text)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_and_empty_recipe() -> None:
    with pytest.raises(RecipeError, match=r"no recipe file 'nowhere\.yaml'"):
        Recipe.of("nowhere.yaml")
    for name in ("long" * 100, "nul\0"):
        with pytest.raises(RecipeError, match="no recipe file") as caught:
            Recipe.of(name)
        assert len(str(caught.value)) < 200
    with pytest.raises(RecipeError, match="one step or more"):
        Recipe.of({"steps": []})


def test_a_pattern_is_no_time_of_day() -> None:
    recipe = Recipe.of("steps:\n- prune.weights: {pattern: 2:4, on: 2024-11-05}\n- share.kmeans: {clusters: 8}\n")
    assert recipe.steps[0].act == Weights(pattern="2:4") and recipe.steps[0].on == ("2024-11-05",)
    assert Recipe.of(recipe.to_yaml()).to_plain() == recipe.to_plain()


def test_only_adam_needs_a_momentum_below_one() -> None:
    assert Train(optimizer="sgd", momentum=1).momentum == 1
    with pytest.raises(RecipeError, match="adamw takes it as beta1"):
        Train(optimizer="adamw", momentum=1.0)


@pytest.mark.parametrize(("t", "value"), [(0.0, 0.0), (0.375, 0.9 * (1 - 0.5**3)), (0.75, 0.9), (1.0, 0.9)])
def test_cubic_ramp(t: float, value: float) -> None:
    assert Ramp(0, 0.9).at(t) == pytest.approx(value)


def test_patterns_fix_the_ratio() -> None:
    assert Weights(pattern="2:4").pattern == "2:4"
    with pytest.raises(RecipeError, match="N:M"):
        Weights(pattern="4:2")
    for settings in ({"scope": "global"}, {"ratio": 0.7}, {"ratio": Ramp(0, 0.5)}):
        with pytest.raises(RecipeError, match="fixes the ratio"):
            Weights(pattern="2:4", **settings)  # type: ignore[arg-type]
