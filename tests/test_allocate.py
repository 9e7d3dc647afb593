"""One value of a setting for each tensor under a budget: brute force, formulas by hand, and the written file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core import allocate, shelf
from smelt.core.budget import Budget, choose
from smelt.core.choice import Choice
from smelt.core.data import Batches, Data
from smelt.core.errors import DataError, RecipeError, RuleError
from smelt.core.method import Composite, Known, Stats, make
from smelt.core.recipe import Recipe, Step
from smelt.core.settings import Ramp, setting
from smelt.core.store import pack, rest_bytes, store_of
from smelt.core.target import select, targets
from smelt.formats.smelt import File, coders
from smelt.train.loop import task_loss
from tests.conftest import mlp

BITS = (2, 3, 4, 8)
TAIL = coders(())


@dataclass(frozen=True)
class Both(Composite):
    """Prunes, then quantizes."""

    ratio: float | Ramp = setting(0.5, "share of weights that go", low=0, high=1)
    bits: int = setting(8, "bits of what stays", low=2, high=8)
    twice: bool = setting(False, "quantizes twice")

    def steps(self) -> list[Any]:
        return [
            {"prune.weights": {"ratio": self.ratio}},
            *[{"quantize.affine": {"bits": self.bits}}] * (1 + self.twice),
        ]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shelf, "_registered", {"methods": {"test.both": __name__}})
    yield


def recipe(budget: str, by: str = "error", method: str = "quantize.affine", **more: Any) -> dict[str, Any]:
    return {"steps": [{method: {"bits": {"allocate": list(BITS)}, "budget": budget, "by": by, **more}}]}


def picked(model: nn.Module, name: str = "bits") -> dict[str, Any]:
    """Bits of each stored tensor."""
    return {key: getattr(entry.encoded.form, name) for key, entry in store_of(model).entries.items()}


def in_file(model: nn.Module, path: Path) -> int:
    """Bytes of the weights in a file of the model."""
    smelt.save(model, path)
    with File(path) as file:
        return sum(file.rest_bytes(t.name) for t in select(targets(model), "*"))


def priced(model: nn.Module, job: smelt.Job, by: str, method: str = "quantize.affine") -> Any:
    """name -> what each option takes and costs, for all weights."""
    assert job.data is not None
    members, choice = select(targets(model), "*"), Choice("bits", BITS, "1x", by)
    options: list[Any] = [make(method, {"bits": bits}) for bits in BITS]
    known = Known(job.data.train, task_loss)
    with torch.no_grad():
        _, table = allocate._priced(model, members, options, choice, "1: test", known, TAIL)
        return allocate._measured(model, members, table, "1: test", known) if by == "kl" else table


def rounded(x: Tensor, bits: int) -> Tensor:
    codec = make("quantize.affine", {"bits": bits})
    return codec.encode(x, codec.fit(x, Stats())).decode()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(20))
def test_the_program_finds_what_brute_force_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 7)), int(rng.integers(2, 5))
    sizes = rng.integers(10, 10**6, (n, width))
    costs = 10 ** rng.uniform(-9, 2, (n, width)) if seed % 2 else rng.integers(0, 3, (n, width)).astype(float)
    budget = int(rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 1))
    rows = np.arange(n)
    every = [np.array(c) for c in product(range(width), repeat=n)]
    least = min(costs[rows, c].sum() for c in every if sizes[rows, c].sum() <= budget)
    picks = choose(costs, sizes, budget)
    assert sizes[rows, picks].sum() <= budget
    assert costs[rows, picks].sum() == pytest.approx(least, rel=1e-9)


def test_units_of_budgets() -> None:
    layer = targets(nn.Linear(10, 8))[:1]
    found = {
        text: Budget.parse(text, "").bytes(layer) for text in ("90 B", "2kB", "1.5 KiB", "4.5 bits", "0.25x", "1e3 B")
    }
    assert found == {"90 B": 90, "2kB": 2000, "1.5 KiB": 1536, "4.5 bits": 45, "0.25x": 80, "1e3 B": 1000}


@pytest.mark.parametrize("budget", ["2.2 kB", "4.1 bits", "0.1x"])
def test_the_choice_is_the_best_of_all_and_fits_the_file(
    model: nn.Module, job: smelt.Job, budget: str, tmp_path: Path
) -> None:
    result = smelt.compress(model, recipe(budget), job)
    weights = select(targets(model), "*")
    limit = Budget.parse(budget, "").bytes(weights)
    table: list[list[tuple[int, float]]] = []
    for target in weights:
        x, row = target.tensor.detach(), []
        for bits in BITS:
            codec = make("quantize.affine", {"bits": bits})
            tree = codec.encode(x, codec.fit(x, Stats()))
            error = float((tree.decode() - x).square().sum() / x.square().sum())
            row.append((rest_bytes(pack(tree, TAIL)), error))
        table.append(row)
    fits = [c for c in product(range(4), repeat=3) if sum(table[i][j][0] for i, j in enumerate(c)) <= limit]
    best = min(fits, key=lambda c: sum(table[i][j][1] for i, j in enumerate(c)))
    assert list(picked(result.model).values()) == [BITS[j] for j in best]
    assert 0 < in_file(result.model, tmp_path / "a") <= limit
    loaded = smelt.load(tmp_path / "a", into=mlp())
    assert picked(loaded) == picked(result.model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    notes = "\n".join(result.report.notes)
    assert f"of {limit:,} bytes, by error" in notes
    for name, bits in picked(result.model).items():
        assert any(
            line.startswith(f"1: quantize.affine bits {bits}: ") and name in line for line in result.report.notes
        )


def test_a_large_budget_takes_the_most_and_a_small_one_the_least(model: nn.Module, job: smelt.Job) -> None:
    assert set(picked(smelt.compress(model, recipe("1x"), job).model).values()) == {8}
    with pytest.raises(RecipeError, match=r"'1 kB' is 1,000 bytes; .* take from ([\d,]+) to ([\d,]+)") as error:
        smelt.compress(model, recipe("1 kB"), job)
    least = int(str(error.value).split("from ")[-1].split(" to")[0].replace(",", ""))
    assert set(picked(smelt.compress(model, recipe(f"{least} B"), job).model).values()) == {2}
    with pytest.raises(RecipeError, match="take from"):
        smelt.compress(model, recipe(f"{least - 1} B"), job)


def test_costs_of_outputs_are_those_of_the_layers(model: nn.Module, job: smelt.Job) -> None:
    table = priced(model, job, "output")
    assert job.data is not None
    x = torch.cat([inputs for inputs, _ in job.data.train])
    layers = [model[0], model[2], model[4]]  # type: ignore[index]
    with torch.no_grad():
        for layer, entries in zip(layers, table.values(), strict=True):
            plain = x @ layer.weight.T
            for bits, entry in zip(BITS, entries, strict=True):
                off = x @ rounded(layer.weight, bits).T - plain
                assert entry.cost == pytest.approx(float(off.square().sum() / plain.square().sum()), rel=1e-3)
            x = torch.relu(layer(x))


def test_costs_of_the_hessian_are_fisher_times_squared_error(model: nn.Module, job: smelt.Job) -> None:
    table = priced(model, job, "hessian")
    assert job.data is not None
    weight = model[4].weight  # type: ignore[index]
    total = torch.zeros_like(weight)
    pairs = [(x[i : i + 1], y[i : i + 1]) for x, y in job.data.train for i in range(len(y))]
    for x, y in pairs:
        total += torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weight)[0].square()
    for bits, entry in zip(BITS, table["4.weight"], strict=True):
        by_hand = (total / len(pairs) * (rounded(weight.detach(), bits) - weight.detach()).square()).sum() / 2
        assert entry.cost == pytest.approx(float(by_hand), rel=1e-3)


def test_costs_of_kl_are_measured_one_tensor_at_a_time(model: nn.Module, job: smelt.Job) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = priced(model, job, "kl")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert job.data is not None
    other = mlp()
    for name, bits in (("0.weight", 2), ("4.weight", 3)):
        other.load_state_dict({**before, name: rounded(before[name], bits)})
        with torch.no_grad():
            found = [
                nn.functional.kl_div(other(x).log_softmax(1), model(x).softmax(1), reduction="batchmean")
                for x, _ in job.data.train
            ]
        assert table[name][BITS.index(bits)].cost == pytest.approx(float(torch.stack(found).mean()), rel=1e-3)


def test_kl_of_outputs_that_are_no_classes_is_squared_error() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])
    assert allocate._divergence(a, b, None) == 2
    wide = torch.tensor([[1.0, 3.0]])
    assert allocate._divergence(wide, wide + 1, torch.zeros(1, 2)) == 1
    assert allocate._divergence(wide, wide + 1, torch.zeros(1, dtype=torch.int64)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        {"share.kmeans": {"clusters": {"allocate": [4, 16, 64]}, "budget": "4 bits"}},
        {"prune.sparsegpt": {"ratio": {"allocate": [0.25, 0.5, 0.9]}, "budget": "20 bits", "by": "output"}},
        {"prune.weights": {"ratio": {"choose": [0.25, 0.5, 0.9]}, "scope": "global", "budget": "0.5x"}},
    ],
    ids=["share.kmeans", "prune.sparsegpt", "prune.weights"],
)
def test_any_setting_of_any_codec(model: nn.Module, job: smelt.Job, step: Any, tmp_path: Path) -> None:
    result = smelt.compress(model, [step], job)
    limit = Budget.parse(next(iter(step.values()))["budget"], "").bytes(select(targets(model), "*"))
    assert in_file(result.model, tmp_path / "a") <= limit
    assert any("allocated" in note for note in result.report.notes)
    assert result.report.value("accuracy") > 80


def test_what_is_pruned_stays_so_and_is_not_priced(model: nn.Module, job: smelt.Job, tmp_path: Path) -> None:
    steps = [{"prune.weights": {"ratio": 0.75}}, recipe("1.5 kB")["steps"][0]]
    result = smelt.compress(model, steps, job)
    assert in_file(result.model, tmp_path / "a") <= 1500
    assert sum(int((p == 0).sum()) for p in result.model.parameters() if p.dim() > 1) >= 0.7 * 4352


class Attention(nn.Module):
    """Three layers that share their input, and one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))


@pytest.mark.parametrize(("together", "teams"), [("input", ["qkv", "o"]), ("block", ["qkvo"])])
def test_tensors_that_go_together(together: str, teams: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    with torch.no_grad():
        model[0].k.weight[0, 0] = 5.0
        model[0].o.weight[3, 3] = 9.0
    data = Data(train=Batches(torch.randn(8, 5, 16), torch.randn(8, 5, 16), batch_size=4))
    job = smelt.Job(data=data, latency=False, metric="mse")
    free = picked(smelt.compress(model, recipe("7 bits", per="tensor"), job).model)
    bound = picked(smelt.compress(model, recipe("7 bits", per="tensor", together=together), job).model)
    for block, team in product("01", teams):
        assert len({bound[f"{block}.{n}.weight"] for n in team}) == 1
    assert len({free[f"0.{n}.weight"] for n in "qkv"}) > 1 and len(set(bound.values())) > 1


def test_a_composite_hands_the_choice_to_its_codec(model: nn.Module, job: smelt.Job) -> None:
    text = "steps:\n  - test.both: {ratio: 0.25, bits: {allocate: [2, 4]}, budget: 3 bits, by: output, on: ['2', '4']}"
    found = Recipe.of(text)
    assert found.steps[0].choice is None
    assert found.steps[1].choice == Choice("bits", (2, 4), "3 bits", "output")
    assert Recipe.of(found.to_yaml()).to_plain() == found.to_plain()
    report = smelt.compress(model, found, job).report
    assert any(note.startswith("2: quantize.affine (test.both) allocated") for note in report.notes)
    prune = Recipe.of([{"test.both": {"ratio": {"allocate": [0.1, 0.2]}, "budget": "1x"}}])
    assert prune.steps[0].choice is not None and prune.steps[0].choice.name == "ratio"
    with pytest.raises(RuleError, match=r"test.both.bits cannot be allocated: quantize.affine and quantize.affine"):
        Recipe.of([{"test.both": {"bits": {"allocate": [2, 4]}, "budget": "1x", "twice": True}}])
    with pytest.raises(RuleError, match="twice cannot be allocated: it changes which steps"):
        Recipe.of([{"test.both": {"twice": {"allocate": [False, True]}, "budget": "1x"}}])


def test_plain_data_and_back() -> None:
    found = Recipe.of(recipe("100 kB", "hessian", together="block", on="2"))
    assert found.to_plain() == recipe("100 kB", "hessian", together="block", on="2")
    assert (
        Recipe.of(found.to_yaml()).steps[0].choice
        == found.steps[0].choice
        == Choice("bits", BITS, "100 kB", "hessian", "block")
    )
    assert found.prefix_hash(1) != Recipe.of(recipe("101 kB", "hessian", together="block", on="2")).prefix_hash(1)
    assert found.prefix_hash(1) != Recipe.of([{"quantize.affine": {"bits": 2, "on": "2"}}]).prefix_hash(1)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ("bits: {allocate: [2, 4]}", RecipeError, "line 2: quantize.affine.bits is allocated without a budget"),
        ("bits: 4, budget: 1 kB", RecipeError, "line 2: 'budget' goes with a setting to choose"),
        ("bits: 4, by: kl", RecipeError, "'by' goes with"),
        ("bits: {allocate: [2, 4]}, budget: 100", RecipeError, "budget 100 is no number with a unit|takes str"),
        ("bits: {allocate: [2, 4]}, budget: 100 kb", RecipeError, "'100 kb' has no unit that is known; there is B, GB"),
        ("bits: {allocate: [2, 4]}, budget: 0 kB", RecipeError, "'0 kB' leaves nothing"),
        ("bits: {allocate: [2, 4]}, budget: 1.2.3 kB", RecipeError, "'1.2.3 kB' is no number"),
        (
            "bits: {allocate: [2, 4]}, budget: 1 kB, by: hesian",
            RecipeError,
            "no choice 'hesian'; did you mean 'hessian'",
        ),
        ("bits: {allocate: [2, 4]}, budget: 1 kB, together: all", RecipeError, "together: no choice 'all'"),
        ("bits: {allocate: [4]}, budget: 1 kB", RecipeError, "two different values or more, not \\[4\\]"),
        ("bits: {allocate: [4, 4]}, budget: 1 kB", RecipeError, "two different values"),
        ("bits: {allocate: 4}, budget: 1 kB", RecipeError, "two different values"),
        ("bits: {allocate: [4, 99]}, budget: 1 kB", RecipeError, "bits is 99, outside 1..16"),
        ("bit: {allocate: [4, 8]}, budget: 1 kB", RecipeError, "no setting 'bit'; did you mean 'bits'"),
        ("bits: {allocate: [4, 8]}, budget: 1 kB, at: input", RuleError, "cannot be allocated at input"),
        ("bits: {allocate: [4, 8]}, group: {allocate: [8, 16]}, budget: 1 kB", RecipeError, "cannot both be allocated"),
        ("bits: {choose: [4, 8]}", RecipeError, "'choose' needs the search"),
    ],
)
def test_what_is_wrong_is_named(settings: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Recipe.of(f"steps:\n  - quantize.affine: {{{settings}}}")


def test_where_nothing_can_be_chosen(model: nn.Module, job: smelt.Job) -> None:
    step = recipe("1 kB")["steps"][0]
    with pytest.raises(RuleError, match="cannot be allocated inside train"):
        Recipe.of([{"train": {"with": [step]}}])
    with pytest.raises(RuleError, match=r"code.huffman.* cannot be allocated; what can is a setting of a codec"):
        Recipe.of([Step(make("code.huffman"), choice=Choice("x", (1, 2), "1 kB"))])
    with pytest.raises(RecipeError, match=r"prune.channels.ratio: 'allocate' needs a codec"):
        Recipe.of([{"prune.channels": {"ratio": {"allocate": [0.1, 0.2]}}}])
    with pytest.raises(DataError, match=r"1: quantize.affine needs data"):
        smelt.compress(model, recipe("4 bits", "output"))
    with pytest.raises(RuleError, match="what the codec needs to know depends on gather"):
        smelt.compress(model, [{"prune.sparsegpt": {"gather": {"allocate": ["block", "layer"]}, "budget": "1x"}}], job)
