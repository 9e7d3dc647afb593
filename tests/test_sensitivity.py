"""smelt.sensitivity and `smelt measure --sensitivity`: every point against doing it by hand."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import smelt
from smelt import cli
from smelt.core.errors import DataError, ModelError, RecipeError
from smelt.core.progress import Progress
from smelt.measures.accuracy import evaluate
from smelt.reports import sensitivity as page
from tests.conftest import mlp


def alone(model: nn.Module, step: dict[str, object], path: Path) -> tuple[nn.Module, int]:
    """The model of a file after one step, and the bytes of that file."""
    changed = smelt.compress(model, [step]).model
    size = smelt.save(changed, path, force=True)
    return smelt.load(path, into=mlp()), size


def test_every_point_is_that_of_a_file_with_one_tensor_changed(
    model: nn.Sequential, job: smelt.Job, tmp_path: Path
) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = smelt.sensitivity(model, job, values=[0.5, 0.9])
    assert (found.method, found.setting, found.metric, found.better) == ("prune.weights", "ratio", "accuracy", True)
    assert found.tensors() == ["0.weight", "2.weight", "4.weight"] and found.values() == [0.5, 0.9]
    assert job.data is not None and job.data.test is not None
    assert found.before == evaluate(model, job.data.test, "accuracy")
    assert found.file == smelt.save(model, tmp_path / "whole.smelt")
    for point in found.points:
        step = {"prune.weights": {"ratio": point.value, "on": point.tensor}}
        loaded, size = alone(model, step, tmp_path / "one.smelt")
        assert point.bytes == size and point.metric == evaluate(loaded, job.data.test, "accuracy")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert min(p.metric for p in found.points) < found.before


def test_any_codec_and_rewrite_by_name(model: nn.Sequential, job: smelt.Job) -> None:
    bits = smelt.sensitivity(model, job, "quantize.affine", on="2")
    assert bits.values() == [2, 3, 4, 5, 6, 7, 8] and bits.tensors() == ["2.weight"]
    size = [p.bytes for p in bits.points]
    assert size == sorted(size)
    rank = smelt.sensitivity(model, job, "lowrank.svd", setting="rank", values=[2, 8], on=["2", "!4"])
    assert [p.value for p in rank.points] == [2, 8] and rank.points[0].bytes < rank.points[1].bytes < rank.file
    shared = smelt.sensitivity(model, job, "share.kmeans", values=[4, 256], on=["0", "4"])
    assert [(p.tensor, p.value) for p in shared.points] == [("0.weight", 4), ("4.weight", 4)]
    assert all("clusters 256: 1: share.kmeans finds nothing to act on" in n for n in shared.notes) and shared.notes


def test_a_limit_uses_the_first_samples(model: nn.Sequential, job: smelt.Job) -> None:
    assert job.data is not None and job.data.test is not None
    found = smelt.sensitivity(model, job, values=[0.9], on="0", limit=200)
    inputs, labels = (torch.cat(parts)[:200] for parts in zip(*job.data.test, strict=True))
    assert found.before == pytest.approx(evaluate(model, [(inputs, labels)], "accuracy"))
    assert found.conditions["samples"] == "200"


def test_an_interrupted_run_goes_on(model: nn.Sequential, job: smelt.Job, tmp_path: Path) -> None:
    class Stop(Progress):
        def __init__(self, at: int):
            self.at, self.seen = at, 0

        def advance(self, done: int, total: int, text: str = "") -> None:
            self.seen += 1
            if done == self.at:
                raise KeyboardInterrupt

    job.cache = tmp_path
    with pytest.raises(KeyboardInterrupt):
        smelt.sensitivity(model, job, values=[0.5, 0.9], progress=Stop(4))
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.point")}
    assert len(kept) == 5  # the model as it came, and four points
    found = smelt.sensitivity(model, job, values=[0.5, 0.9], progress=Stop(99))
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items()) and len(list(tmp_path.glob("*.point"))) == 7
    job.cache = None
    assert found == smelt.sensitivity(model, job, values=[0.5, 0.9])
    job.cache = tmp_path
    next(iter(kept)).write_text("{")
    assert smelt.sensitivity(model, job, values=[0.5, 0.9]) == found


def test_bad_requests(model: nn.Sequential, job: smelt.Job) -> None:
    for method, settings, said in (
        ("code.entropy", {}, "changes no values"),
        ("distill.logits", {}, "changes no values"),
        ("prune.weigths", {}, "did you mean 'prune.weights'"),
        ("prune.weights", {"setting": "rato"}, "did you mean 'ratio'"),
        ("prune.weights", {"values": [1.5]}, "outside 0..1"),
        ("prune.weights", {"on": "9"}, "matches no tensor"),
        ("prune.merge", {"setting": "tolerance"}, "give the values"),
    ):
        with pytest.raises(RecipeError, match=said):
            smelt.sensitivity(model, job, method, **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="give the job data"):
        smelt.sensitivity(model, smelt.Job())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        smelt.sensitivity(model, job)


def test_table_and_page(model: nn.Sequential, job: smelt.Job, tmp_path: Path) -> None:
    found = smelt.sensitivity(model, job, values=[0.5, 0.99])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(page.table(found))
    text = console.export_text()
    worst = found.at("2.weight", 0.99)
    assert worst is not None
    for word in (f"{worst.metric:.2f}%", f"{worst.bytes:,}", "2.weight", f"before: {found.before:.2f}%"):
        assert word in text
    size = page.write(found, tmp_path / "s.html", title="a <b> net")
    written = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert size == (tmp_path / "s.html").stat().st_size and "a &lt;b&gt; net" in written
    figures = json.loads(written.split("const plots = ")[1].split(";\n")[0])
    assert [line["name"] for line in figures[0]["data"]] == found.tensors()
    assert figures[0]["data"][1]["y"][1] == worst.metric and figures[1]["data"][1]["x"][1] == worst.bytes


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    net = "lenet(size=8, kernel=3, padding=1, channels=(2, 3), hidden=8)"
    torch.manual_seed(0)
    torch.save(smelt.open_model(net)[0].state_dict(), "net.pt")
    base = ["measure", net, "--weights", "net.pt", "--data", "digits", "--samples", "64", "--sensitivity"]
    assert cli.main([*base, "--values", "0.5", "--html", "s.html"]) == 0
    done = capsys.readouterr()
    assert "conv2.weight" in done.out and "prune.weights on each tensor" in done.err
    assert (tmp_path / "s.html").exists() and list((tmp_path / "cache").glob("*.point"))
    assert cli.main([*base, "--method", "quantize.affine", "--values", "2,8", "--on", "fc*", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [(p["tensor"], p["value"]) for p in plain["points"]] == [
        (tensor, bits) for tensor in ("fc1.weight", "fc2.weight") for bits in (2, 8)
    ]
    assert cli.main([*base, "--html", "s.html"]) == 6 and "exists" in capsys.readouterr().err
    assert cli.main([*base, "--values", "a"]) == 2 and "no list of numbers" in capsys.readouterr().err
    assert cli.main(["measure", net, "--on", "fc1"]) == 2 and "goes with --sensitivity" in capsys.readouterr().err
