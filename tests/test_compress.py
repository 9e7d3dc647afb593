"""The runner, end to end: measured on the file, repeatable, resumable, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import smelt
from smelt.core.data import Batches, Data
from smelt.core.errors import DataError, ModelError, OutputError, RecipeError, RuleError
from smelt.core.progress import Progress
from smelt.core.report import Report
from smelt.core.store import store_of
from smelt.measures.accuracy import evaluate
from tests.conftest import mlp

RECIPE = """
steps:
  - train:
      epochs: 3
      with:
        - distill.logits: {temperature: 2}
        - prune.weights: {ratio: {ramp: [0, 0.6]}, scope: global}
  - share.kmeans: {clusters: 8}
  - quantize.affine: {on: "*.bias"}
  - code.huffman
"""


def test_every_number_is_that_of_the_written_file(model: nn.Module, job: smelt.Job, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = smelt.compress(model, RECIPE, job)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    path = tmp_path / "m.smelt"
    size = result.save(path)
    assert size == path.stat().st_size == result.report.value("file")
    loaded = smelt.load(path, into=mlp())
    assert job.data is not None and job.data.test is not None
    assert evaluate(loaded, job.data.test, "accuracy") == result.report.value("accuracy")
    assert result.report.value("accuracy") > 85
    assert result.report.ratio() > 5
    zeros = sum(int((p == 0).sum()) for p in loaded.parameters())
    assert result.report.value("non-zeros") == sum(p.numel() for p in loaded.parameters()) - zeros
    steps = [name for _, name in result.report.steps()]
    assert steps == ["original", "train", "share.kmeans", "quantize.affine", "code.huffman"]
    for i in range(len(steps)):
        assert {r.measure for r in result.report if r.step == i} >= {"file", "parameters", "MACs", "accuracy"}
    sizes = [result.report.value("file", i) for i in range(len(steps))]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sizes[-1] < sizes[-2] + 64  # it was coded already; the last file holds a longer report


def test_what_runs_dense_is_called_simulated(model: nn.Module, job: smelt.Job) -> None:
    report = smelt.compress(model, [{"prune.weights": {"ratio": 0.5}}], job).report
    marked = {row.measure: row.simulated for row in report if row.step == 1}
    assert marked["peak memory"] and marked["MACs"]
    assert not marked["file"] and not marked["accuracy"]
    assert any("ran dense" in note for note in report.notes)
    assert not any(row.simulated for row in smelt.compress(model, ["prune.merge"], job).report)


def test_the_same_seed_gives_the_same_bytes(model: nn.Module, job: smelt.Job, tmp_path: Path) -> None:
    files = []
    for i in range(2):
        smelt.compress(model, RECIPE, job).save(tmp_path / f"{i}.smelt")
        files.append((tmp_path / f"{i}.smelt").read_bytes())
    assert files[0] == files[1]


class StopIn(Progress):
    """Ctrl-C during step `index`, or nothing; counts the steps that really ran."""

    def __init__(self, index: int | None = None, batch: int = 0):
        self.index, self.batch, self.now, self.advanced = index, batch, 0, 0

    def begin(self, index: int, count: int, label: str) -> None:
        self.now = index
        if index == self.index and not self.batch:
            raise KeyboardInterrupt

    def advance(self, done: int, total: int, text: str = "") -> None:
        self.advanced += 1
        if self.now == self.index and done == self.batch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [(1, 10), (3, 0)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    model: nn.Module, job: smelt.Job, tmp_path: Path, stop: tuple[int, int]
) -> None:
    whole = smelt.compress(model, RECIPE, job)
    job.cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        smelt.compress(model, RECIPE, job, progress=StopIn(*stop))
    watch = StopIn()
    resumed = smelt.compress(model, RECIPE, job, progress=watch)
    assert watch.advanced < 3 * 8
    whole.save(tmp_path / "a.smelt")
    resumed.save(tmp_path / "b.smelt")
    assert (tmp_path / "a.smelt").read_bytes() == (tmp_path / "b.smelt").read_bytes()
    assert [r for r in resumed.report if r.measure != "latency"] == [r for r in whole.report if r.measure != "latency"]


def test_an_edited_recipe_goes_on_from_the_edit(model: nn.Module, job: smelt.Job, tmp_path: Path) -> None:
    job.cache = tmp_path
    smelt.compress(model, RECIPE, job)
    watch = StopIn()
    edited = smelt.compress(model, RECIPE.replace("clusters: 8", "clusters: 4"), job, progress=watch)
    assert watch.advanced == 0
    assert len(edited.model[2].weight.unique()) <= 5
    other = smelt.compress(mlp(7), RECIPE, job, progress=watch)
    assert watch.advanced > 0 and other.report.value("file") != edited.report.value("file")


def test_a_damaged_cache_is_no_cache(model: nn.Module, job: smelt.Job, tmp_path: Path) -> None:
    job.cache = tmp_path
    first = smelt.compress(model, RECIPE, job)
    for path in tmp_path.glob("*.smelt"):
        path.write_bytes(path.read_bytes()[:-20])
    again = smelt.compress(model, RECIPE, job)
    assert again.report.value("file") == first.report.value("file")


def test_a_compressed_model_is_compressed_further(model: nn.Module, job: smelt.Job, tmp_path: Path) -> None:
    smelt.compress(model, [{"prune.weights": {"ratio": 0.5}}], job).save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=mlp())
    result = smelt.compress(loaded, [{"share.kmeans": {"clusters": 4}}, "code.huffman"], job)
    assert str(store_of(result.model).entries["2.weight"].encoded) == "sparse(values: codebook)"


def test_reports_survive_json(model: nn.Module, job: smelt.Job) -> None:
    report = smelt.compress(model, RECIPE, job).report
    again = Report.from_plain(json.loads(report.to_json()))
    assert again == report
    assert again.conditions["data"] == "moons"
    assert {layer["name"] for layer in again.layers} == {n for n, _ in model.named_parameters()}


def test_without_data_bytes_are_still_measured(model: nn.Module) -> None:
    report = smelt.compress(model, ["quantize.affine", "code.huffman"]).report
    assert set(report.measures()) == {"file", "parameters", "non-zeros"}


def test_rewrite_after_storing_is_refused_with_both_steps(model: nn.Module) -> None:
    with pytest.raises(RuleError, match=r"2: lowrank\.svd changes .*weight, which 1: share\.kmeans has already stored"):
        smelt.compress(model, ["share.kmeans", "lowrank.svd"])


def test_lossy_after_lossy_is_refused_with_both_steps(model: nn.Module) -> None:
    with pytest.raises(RuleError, match=r"2: share\.kmeans: .*no floating values left.*1: quantize\.affine"):
        smelt.compress(model, ["quantize.affine", "share.kmeans"])


def test_a_selector_that_matches_nothing(model: nn.Module) -> None:
    with pytest.raises(RecipeError, match="'fc9' matches no tensor"):
        smelt.compress(model, [{"share.kmeans": {"on": "fc9"}}])


def test_weights_that_are_not_finite(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].bias[3] = math.inf
    with pytest.raises(ModelError, match=r"2\.bias \[64\] holds 1 NaN or infinite"):
        smelt.compress(model, RECIPE)


def test_data_that_cannot_serve(model: nn.Module, data: Data) -> None:
    x, y = torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
    for bad, words in [
        (Data(test=[]), "empty"),
        (Data(test=Batches(x)), "needs labels"),
        (Data(test=[(torch.randn(4, 3), y)]), r"model fails .* float32 \[4, 3\]"),
    ]:
        with pytest.raises((DataError, ModelError), match=words):
            smelt.compress(model, ["code.bits"], smelt.Job(data=bad))
    with pytest.raises(DataError, match="'broken' on batch 1 of the split 'test' is NaN"):
        smelt.compress(model, ["code.bits"], smelt.Job(data=data, metric=broken))
    with pytest.raises(DataError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        smelt.compress(model, ["code.bits"], smelt.Job(data=data, metric="acuracy"))


def broken(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    return math.nan


def test_an_output_that_exists_is_kept(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.smelt"
    path.write_text("precious")
    result = smelt.compress(model, ["code.bits"])
    with pytest.raises(OutputError, match="--force"):
        result.save(path)
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1
    assert result.save(path, force=True) == path.stat().st_size


class Norms(nn.Module):
    """Everything that changes while it runs in training mode."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), act(), nn.Dropout(0.5), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_the_model_the_data_and_the_random_state_of_the_caller_are_not_changed(job: smelt.Job) -> None:
    model = Norms().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first = smelt.compress(model, RECIPE.replace("{temperature: 2}", "{}"), job)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    second = smelt.compress(model, RECIPE.replace("{temperature: 2}", "{}"), job)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_the_cache_knows_what_decides_a_result(model: nn.Sequential, job: smelt.Job, tmp_path: Path) -> None:
    job.cache = tmp_path
    recipe = [{"train": {"epochs": 1}}]

    def ran(given: nn.Module) -> bool:
        watch = StopIn()
        smelt.compress(given, recipe, job, progress=watch)
        return watch.advanced > 0

    assert ran(model) and not ran(model)
    other = mlp()
    other.load_state_dict(model.state_dict())
    other[1] = nn.GELU()
    assert ran(other)
    other[1] = nn.ReLU()
    other[0].requires_grad_(False)
    assert ran(other)
    job.metric = broken_half
    assert ran(model)
    job.loss = lambda outputs, labels: nn.functional.cross_entropy(outputs, labels) * 2
    assert ran(model)
    pruned = smelt.compress(model, [{"prune.weights": {"ratio": 0.0}}]).model
    assert ran(pruned)


def broken_half(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    return 0.5


def test_activation_codecs_are_installed_once(model: nn.Sequential, job: smelt.Job) -> None:
    once = smelt.compress(model, [{"quantize.affine": {"at": "input"}}], job).model
    twice = smelt.compress(once, [{"share.kmeans": {"clusters": 64}}], job).model
    assert len(store_of(twice).activations) == 3
    assert [len(twice[i]._forward_pre_hooks) for i in (0, 2, 4)] == [1, 1, 1]


def test_a_loaded_model_keeps_its_builder_and_its_coder(tmp_path: Path) -> None:
    built, builder, arguments = smelt.open_model("lenet300(inputs=64, hidden=[16, 8])")
    first = smelt.compress(smelt.Source.of(built, builder, arguments), ["quantize.affine", "code.huffman"])
    first.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt")
    smelt.save(loaded, tmp_path / "b.smelt", recipe=first.recipe.to_plain(), report=first.report.short())
    assert (tmp_path / "a.smelt").read_bytes() == (tmp_path / "b.smelt").read_bytes()
    smelt.compress(loaded, [{"share.kmeans": {"clusters": 2, "on": "*.bias"}}]).save(tmp_path / "c.smelt")
    assert type(smelt.load(tmp_path / "c.smelt")) is type(built)


def test_regression_selects_by_its_own_loss() -> None:
    x = torch.randn(64, 2)
    data = Data(Batches(x, x.sum(1, keepdim=True), 16), test=Batches(x, x.sum(1, keepdim=True), 16))
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))

    def error(outputs: torch.Tensor, labels: torch.Tensor) -> float:
        return float((outputs - labels).abs().mean())

    job = smelt.Job(data=data, metric=error, latency=False)
    report = smelt.compress(model, [{"train": {"epochs": 20, "lr": 1e-2}}], job).report
    assert report.value("error") < report.value("error", 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lenet", "takes a torch.nn.Module or a smelt.Source, not a str"),
        (nn.Sequential(nn.LazyLinear(3)), r"0\.weight is not initialised"),
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
    ],
)
def test_what_is_no_model_to_compress(given: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        smelt.compress(given, ["code.bits"])  # type: ignore[arg-type]


def test_causal_masks_may_be_infinite(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    assert smelt.compress(model, ["quantize.affine"]).save(tmp_path / "m.smelt") > 0


def test_a_full_disk_gives_one_line(
    model: nn.Module, job: smelt.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.cache = tmp_path
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match="bytes, and 10 are free"):
        smelt.compress(model, RECIPE, job)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    job.cache = tmp_path / "file"
    with pytest.raises(OutputError, match="cache"):
        smelt.compress(model, RECIPE, job)


def test_selectors_are_checked_before_any_training(model: nn.Module, job: smelt.Job) -> None:
    watch = StopIn()
    with pytest.raises(RecipeError, match="'fc9' matches no tensor"):
        smelt.compress(model, [{"train": {}}, {"share.kmeans": {"on": "fc9"}}], job, progress=watch)
    assert watch.now == 0
