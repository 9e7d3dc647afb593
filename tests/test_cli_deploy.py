"""`smelt export` and `smelt bench`: what they print, write and refuse."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import smelt
from smelt.core import shelf
from smelt.core.export import Export, Given
from smelt.core.report import Row
from smelt.core.settings import setting
from tests._cli import Out, Smelt, called

MODEL = "lenet300(inputs=64, hidden=(48, 32))"


@dataclass(frozen=True)
class Sums(Export):
    """The sum of every tensor, one to a line."""

    suffix: ClassVar[str] = ".sums"
    runtimes: ClassVar[tuple[str, ...]] = ("eager",)

    digits: int = setting(3, "decimals of a sum", low=0, high=9)
    inputs: bool = setting(False, "begin with the sum of the inputs")

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        sums = [float(t.sum()) for t in model.state_dict().values()]
        if self.inputs:
            sums = [float(given.inputs("to sum them").sum()), *sums]
        path.write_text("\n".join(f"{s:.{self.digits}f}" for s in sums))
        return ["biases are as they were"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Smelt:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(shelf._registered.setdefault("formats", {}), "sums", __name__)
    return partial(called, capsys)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(smelt.open_model(MODEL)[0].state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def stored(tmp_path: Path, weights: Path) -> Path:
    module, builder, arguments = smelt.open_model(MODEL, weights)
    source = smelt.Source.of(module, builder, arguments)
    smelt.compress(source, [{"quantize.affine": {"bits": 3}}], smelt.Job(latency=False)).save(tmp_path / "net.smelt")
    return tmp_path / "net.smelt"


def fails(done: Out, code: int, *words: str) -> None:
    lines = [line for line in done.err.splitlines() if not line.startswith("smelt: note:")]
    assert done.code == code and len(lines) == 1 and all(word in lines[0] for word in words), done.err


def test_export_writes_the_stored_model(run: Smelt, stored: Path, tmp_path: Path) -> None:
    done = run("export", "net.smelt", "--to", "sums", "--set", "digits=2")
    assert done.code == 0, done.err
    sums = [f"{float(t.sum()):.2f}" for t in smelt.load(stored).state_dict().values()]
    assert (tmp_path / "net.sums").read_text().splitlines() == sums
    assert "wrote net.sums" in done.out and "biases are as they were" in done.out
    fails(run("export", "net.smelt", "--to", "sums"), 6, "net.sums", "--force")
    done = run("export", "net.smelt", "--to", "sums", "--force", "--json", "-o", "net.sums")
    found = json.loads(done.out)
    assert found["bytes"] == (tmp_path / "net.sums").stat().st_size and found["notes"] == ["biases are as they were"]


def test_export_of_a_model_with_data_or_a_shape(run: Smelt, weights: Path, tmp_path: Path) -> None:
    asked = "export", MODEL, "--weights", "net.pt", "--to", "sums", "--set", "inputs=true"
    assert run(*asked, "--data", "digits", "-o", "a.sums").code == 0
    data = smelt.open_data("digits")
    assert data.train is not None
    first = float((tmp_path / "a.sums").read_text().split()[0])
    assert first == pytest.approx(float(next(iter(data.train))[0].sum()), abs=1e-3)
    assert run(*asked, "--data", "digits", "--batch", "3", "-o", "c.sums").code == 0
    assert data.test is not None
    three = float(next(iter(data.test))[0][:3].sum())
    assert float((tmp_path / "c.sums").read_text().split()[0]) == pytest.approx(three, abs=1e-3)
    assert run(*asked, "--shape", "1,8,8", "--seed", "3").code == 0
    drawn = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    assert float((tmp_path / "lenet300.sums").read_text().split()[0]) == pytest.approx(float(drawn.sum()), abs=1e-3)
    fails(run(*asked, "-o", "b.sums"), 4, "it needs an example of the inputs to sum them")
    assert not list(tmp_path.glob("*b.sums*")) and not list(tmp_path.glob(".smelt*"))


def test_formats_and_their_settings_are_shown(run: Smelt) -> None:
    found = json.loads(run("export", "--json").out)
    assert found["sums"]["does"] == "The sum of every tensor, one to a line."
    assert [s["name"] for s in found["sums"]["settings"]] == ["digits", "inputs"]
    text = run("export", "--to", "sums").out
    for word in ("The sum of every tensor", "eager", ".sums", "digits", "0 to 9", "begin with the sum of the inputs"):
        assert word in text
    assert "sums" in run("export").out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["net.smelt"], 2, ["--to is needed", "sums"]),
        (["net.smelt", "--to", "sumz"], 2, ["did you mean 'sums'"]),
        (["net.smelt", "--to", "sums", "--set", "digit=1"], 2, ["'digit'", "did you mean 'digits'"]),
        (["net.smelt", "--to", "sums", "--set", "force=1"], 2, ["no setting 'force'"]),
        (["net.smelt", "--to", "sums", "--set", "digits=12"], 2, ["digits is 12, outside 0..9"]),
        (["net.smelt", "--to", "sums", "--set", "digits"], 2, ["'digits' is not KEY=VALUE"]),
        (["net.smelt", "--to", "sums", "-o", "net.txt"], 6, ["'.sums'"]),
        (["net.smelt", "--to", "sums", "--shape", "1,x"], 2, ["--shape", "'1,x'"]),
        (["net.smelt", "--to", "sums", "--shape", "1", "--data", "digits"], 2, ["--shape", "--data"]),
        (["gone.smelt", "--to", "sums"], 5, ["gone.smelt"]),
    ],
)
def test_what_export_refuses(run: Smelt, stored: Path, options: list[str], code: int, words: list[str]) -> None:
    fails(run("export", *options), code, *words)
    assert not (stored.parent / "net.sums").exists()


def test_bench_prints_tables_warns_and_writes_a_page(run: Smelt, stored: Path, tmp_path: Path) -> None:
    small = "--runtimes", "eager", "--repeats", "3", "--no-memory", "--data", "digits"
    original = "--original", MODEL, "--weights", "net.pt"
    done = run("bench", "net.smelt", *original, *small, "--batch", "1,4", "--tolerance", "60", "--plot", "b.html")
    assert done.code == 0, done.err
    for word in ("original", "net.smelt", "reference", "accuracy", "batch 4, 1 thread", "samples/s", "wrote b.html"):
        assert word in done.out
    assert "WARNING: net.smelt, eager: its outputs differ" in done.out
    page = (tmp_path / "b.html").read_text()
    assert "net.smelt, eager" in page and "dB" in page
    done = run("bench", "net.smelt", *small, "--json")
    found = json.loads(done.out)
    assert [side["file"] for side in found["sides"]] == ["original", "net.smelt"]
    assert found["sides"][1]["bytes"] == stored.stat().st_size and found["sides"][1]["timed"][0]["faster"] > 0
    assert not np.isnan(found["sides"][1]["metric"])


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 4, ["needs inputs"]),
        (["--shape", "1,8,8", "--runtimes", "eagre"], 2, ["did you mean 'eager'"]),
        (["--shape", "1,8,8", "--batch", "0"], 2, ["--batch"]),
        (["--shape", "1,8,8", "--weights", "net.pt"], 2, ["--original"]),
        (["--shape", "1,8,8", "--original", MODEL], 3, ["original", "--weights"]),
        (["gone.smelt", "--shape", "1,8,8"], 5, ["no such file: 'gone.smelt'"]),
        (["--shape", "1,8,8", "--plot", "net.pt"], 6, ["net.pt", "--force"]),
    ],
)
def test_what_bench_refuses(run: Smelt, stored: Path, options: list[str], code: int, words: list[str]) -> None:
    fails(run("bench", "net.smelt", *options), code, *words)


def test_convert_prints_before_and_after(run: Smelt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def convert(path: Path, out: Path, **given: object) -> smelt.Report:
        asked.update(given, path=path, out=out)
        rows = [Row(0, "original", "file", 4000, "bytes"), Row(1, "float16", "file", 1000, "bytes")]
        return smelt.Report([*rows, Row(0, "original", "loss", 0.5, "nats"), Row(1, "float16", "loss", 0.625, "nats")])

    monkeypatch.setattr("smelt._cli_deploy.convert", convert)
    options = "--mode", "float16", "--data", "digits", "--metric", "loss", "--report", "net.html"
    done = run("convert", "net.keras", "-o", "net.tflite", *options)
    assert done.code == 0, done.err
    data = asked.pop("data")
    assert isinstance(data, smelt.Data) and data.name == "digits"
    there = {"path": Path("net.keras"), "out": Path("net.tflite")}
    assert asked == {**there, "mode": "float16", "metric": "loss", "force": False}
    for word in ("original", "float16", "1.00 kB", "+0.125", "wrote net.tflite: 4.00× smaller than net.keras"):
        assert word in done.out
    assert "float16" in (tmp_path / "net.html").read_text()
    found = json.loads(run("convert", "net.keras", "-o", "net.tflite", "--json").out)
    assert found["ratio"] == 4 and asked["mode"] == "int8"
