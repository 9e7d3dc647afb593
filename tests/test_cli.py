"""The command line, called as a function; its streams, files and exit codes."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import smelt
from smelt import cli
from smelt.core import shelf
from smelt.formats.smelt import load
from tests._cli import Out, Smelt, called

MODEL = "lenet(size=8, kernel=3, padding=1, channels=(4, 6), hidden=16)"
SHORT = [{"prune.weights": {"ratio": 0.5}}, {"share.kmeans": {"clusters": 16}}, {"code.huffman": {}}]
TRAINED = [{"train": {"epochs": 1, "with": [{"prune.weights": {"ratio": 0.5}}]}}, {"code.bits": {}}]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Smelt:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return partial(called, capsys)


def one_line(done: Out, code: int, *words: str) -> None:
    assert done.code == code and not done.out
    lines = [line for line in done.err.splitlines() if not line.startswith("smelt: note:")]
    assert len(lines) == 1 and lines[0].startswith("smelt: "), done.err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(smelt.open_model(MODEL)[0].state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"steps": SHORT}))
    return tmp_path / "r.yaml"


@pytest.fixture
def compressed(run: Smelt, weights: Path, recipe: Path, tmp_path: Path) -> Path:
    done = run("compress", MODEL, "--weights", weights, "--recipe", recipe, "-o", "net.smelt", "--no-cache")
    assert done.code == 0, done.err
    return tmp_path / "net.smelt"


def test_compress_prints_tables_and_writes_both_files(run: Smelt, weights: Path, recipe: Path, tmp_path: Path) -> None:
    paths = "-o", "net.smelt", "--report", "net.html"
    done = run("compress", MODEL, "--weights", weights, "--data", "digits", "--recipe", recipe, *paths)
    assert done.code == 0, done.err
    under = f"measured with device cpu, batch size 64, threads {torch.get_num_threads()}, torch {torch.__version__}"
    for word in ("3 code.huffman", "accuracy", "simulated", "wrote net.smelt and net.html", under):
        assert word in done.out
    assert done.err.count("\n") == 3  # one line per step
    assert "code.huffman" in (tmp_path / "net.html").read_text(encoding="utf-8")
    assert load(tmp_path / "net.smelt")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert list((tmp_path / "cache").glob("*.smelt"))


def test_compress_as_json(run: Smelt, weights: Path, recipe: Path, tmp_path: Path) -> None:
    args = "compress", MODEL, "--weights", weights, "--data", "digits", "--recipe", recipe, "--no-latency"
    done = run(*args, "-o", "net.smelt", "--json")
    data = json.loads(done.out)
    assert data["bytes"] == (tmp_path / "net.smelt").stat().st_size and data["ratio"] > 3
    assert data["conditions"]["batch size"] == "64" and "threads" not in data["conditions"]
    assert data["recipe"]["steps"] and data["layers"] and not any(r["measure"] == "latency" for r in data["rows"])


def test_a_model_of_ones_own_with_a_teacher_and_a_metric(run: Smelt, tmp_path: Path) -> None:
    (tmp_path / "cli_own.py").write_text(
        "import torch\n"
        "def net(width=8):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def error(outputs, labels):\n    return (outputs.argmax(1) != labels).float().mean()\n"
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"steps": TRAINED}))
    args = "--data", "digits(held_out=0.8)", "--metric", "cli_own:error", "--recipe", "r.yaml", "--no-latency"
    done = run("compress", "cli_own:net", *args, "--teacher", "cli_own:net", "-o", "own.smelt", "--json")
    assert done.code == 0, done.err
    assert {r["measure"] for r in json.loads(done.out)["rows"]} >= {"error", "file"}
    one_line(run("measure", "own.smelt"), 5, "trust")
    assert run("measure", "own.smelt", "--trust").code == 0


def test_compress_further(run: Smelt, compressed: Path) -> None:
    Path("more.yaml").write_text('steps: [{quantize.affine: {bits: 8, on: "fc*.bias"}}, {code.huffman: {}}]')
    done = run("compress", compressed, "--recipe", "more.yaml", "-o", "less.smelt")
    assert done.code == 0, done.err
    again = run("compress", compressed, "--recipe", "r.yaml", "-o", "no.smelt")
    one_line(again, 2, "no floating values left", "net.smelt")
    assert json.loads(run("show", "less.smelt", "--json").out)["builder"] == "lenet"


def test_an_interruption_says_how_to_go_on(
    run: Smelt, weights: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compress", stop)
    args = "compress", MODEL, "--weights", weights, "--recipe", recipe, "-o", "net.smelt"
    one_line(run(*args), 130, "the same command goes on", "cache")
    one_line(run(*args, "--no-cache"), 130, "nothing was kept", "--no-cache")


def test_measure(run: Smelt, weights: Path, compressed: Path) -> None:
    done = run("measure", compressed, "--data", "digits", "--threads", 1, "--batch-size", 50)
    assert done.code == 0
    for word in (
        "latency",
        "simulated",
        "measured with device cpu, batch size 50, threads 1, torch",
        "smaller than the same model",
    ):
        assert word in done.out
    found = json.loads(run("measure", MODEL, "--weights", weights, "--data", "digits", "--json").out)
    rows = {row["measure"]: row for row in found["rows"]}
    assert set(found["conditions"]) == {"device", "batch size", "threads", "torch"}
    assert rows["latency"]["threads"] == int(found["conditions"]["threads"])
    assert found["ratio"] == 1 and rows["file"]["value"] == found["checkpoint"] and not rows["MACs"]["simulated"]
    assert "--data digits" in run("measure", compressed).out


def test_show(run: Smelt, compressed: Path) -> None:
    done = run("show", compressed)
    for word in ("fc1.weight", "sparse(", "codebook", "huffman", "share.kmeans", "lenet(size=8", "non-zeros"):
        assert word in done.out
    found = json.loads(run("show", compressed, "--json").out)
    assert found["bytes"] == compressed.stat().st_size and len(found["tensors"]) == 8


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"w": torch.linspace(-1, 1, 90000).reshape(300, 300).bfloat16(), "b": torch.zeros(300)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_pack_and_unpack(run: Smelt, checkpoint: Path, tmp_path: Path) -> None:
    done = run("pack", "model.safetensors")
    size = (tmp_path / "model.smelt").stat().st_size
    assert done.code == 0 and done.err.count("\n") == 1
    for word in ("BF16", "F32", "smaller", f"wrote model.smelt: {size:,} bytes", "smaller than model.safetensors"):
        assert word in done.out
    one_line(run("pack", "model.safetensors"), 6, "--force")
    found = json.loads(run("pack", "model.safetensors", "--force", "--threads", 2, "--json").out)
    assert (found["bytes before"], found["bytes after"]) == (checkpoint.stat().st_size, size)
    assert found["ratio"] == pytest.approx(found["bytes before"] / size) and found["seconds"] > 0
    assert [(d["dtype"], d["tensors"], d["before"]) for d in found["dtypes"]] == [("BF16", 1, 180000), ("F32", 1, 1200)]
    one_line(run("unpack", "model.smelt"), 6, "--force")
    done = run("unpack", "model.smelt", "-o", "back.safetensors")
    assert done.code == 0 and "byte for byte" in done.out
    assert (tmp_path / "back.safetensors").read_bytes() == checkpoint.read_bytes()
    assert (
        json.loads(run("unpack", "model.smelt", "-o", "b", "--json").out)["bytes before"] == checkpoint.stat().st_size
    )


def test_pack_a_folder(run: Smelt, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    checkpoint.rename(tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text("{}")
    one_line(run("pack", "hub"), 6, "-o FOLDER")
    done = run("pack", "hub", "-o", "packed")
    assert done.code == 0 and "1 other files copied" in " ".join(done.out.split())
    assert "1 finished before" in " ".join(run("pack", "hub", "-o", "packed").out.split())
    assert run("unpack", "packed", "-o", "back").code == 0
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("hub", "back")]
    assert files[0] == files[1]


def test_an_interrupted_pack_goes_on(run: Smelt, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("smelt.formats._packing.sha256_of", stop)
        one_line(run("pack", "model.safetensors"), 130, "the same command goes on from here")
    assert Path("model.smelt.part").exists() and not Path("model.smelt").exists()
    assert json.loads(run("pack", "model.safetensors", "--json").out)["resumed"] == 181200
    assert not list(Path().glob("*.part*"))
    monkeypatch.setattr("smelt.formats.pack.sha256_of", stop)
    one_line(run("unpack", "model.smelt", "-o", "b"), 130, "no half file was left")
    assert sorted(p.name for p in Path().iterdir() if p.is_file()) == ["model.safetensors", "model.smelt"]


def test_a_packed_checkpoint_is_no_model(run: Smelt, checkpoint: Path) -> None:
    run("pack", "model.safetensors")
    done = run("show", "model.smelt")
    for word in ("a packed checkpoint", "entropy", "300×300"):
        assert word in done.out
    found = json.loads(run("show", "model.smelt", "--json").out)
    assert found["origin"]["bytes"] == checkpoint.stat().st_size and len(found["tensors"]) == 2
    one_line(run("measure", "model.smelt"), 5, "a packed checkpoint", "smelt unpack")
    one_line(run("measure", "model.smelt", "--data", "digits", "--json"), 5, "a packed checkpoint")
    one_line(run("compress", "model.smelt", "--recipe", "demo", "-o", "x.smelt"), 5, "a packed checkpoint")


def test_methods_has_every_method(run: Smelt) -> None:
    done = run("methods")
    assert done.code == 0 and all(name in done.out for name in shelf.names("methods"))
    found = json.loads(run("methods", "--json").out)
    assert sorted(found) == shelf.names("methods")
    assert list(json.loads(run("methods", "prune", "--json").out)) == [n for n in found if n.startswith("prune.")]
    for name, method in found.items():
        smelt.Recipe.of("steps:\n" + method["example"] + "\n")
        one = run("methods", name).out
        assert all(s["name"] in one and s["doc"] for s in method["settings"]), name
    assert "patience" in run("methods", "train").out


BAD = [
    ([], 2, "COMMAND"),
    (["compres"], 2, "compres"),
    (["compress", MODEL, "-o", "x.smelt"], 2, "--recipe"),
    (["compress", MODEL, "--recipe", "no.yaml", "-o", "x.smelt"], 2, "no.yaml"),
    (["compress", MODEL, "--recipe", "bad.yaml", "-o", "x.smelt"], 2, "did you mean 'ratio'"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "x.smelt", "--device", "nowhere"], 2, "nowhere"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "x.smelt", "--batch-size", "0"], 2, "from 1"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "x.smelt", "--teacher", "lenet"], 3, "--teacher-weights"),
    (["compress", "lenett", "--recipe", "r.yaml", "-o", "x.smelt"], 3, "did you mean 'lenet'"),
    (["compress", "net.pt", "--recipe", "r.yaml", "-o", "x.smelt"], 3, "--weights net.pt"),
    (["compress", "no_such:net", "--recipe", "r.yaml", "-o", "x.smelt"], 3, "no_such"),
    (["compress", MODEL, "--weights", "no.pt", "--recipe", "r.yaml", "-o", "x.smelt"], 3, "no.pt"),
    (["compress", MODEL, "--data", "digit", "--recipe", "r.yaml", "-o", "x.smelt"], 4, "did you mean 'digits'"),
    (["compress", MODEL, "--metric", "acuracy", "--recipe", "r.yaml", "-o", "x.smelt"], 4, "'accuracy'"),
    (["compress", "no.smelt", "--recipe", "r.yaml", "-o", "x.smelt"], 5, "no.smelt"),
    (["show", "r.yaml"], 5, "r.yaml"),
    (["measure", "r.yaml"], 5, "r.yaml"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "no/x.smelt"], 6, "'no'"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "r.yaml"], 6, "--force"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "x.smelt", "--report", "no/x.html"], 6, "'no'"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "x.smelt", "--cache", "r.yaml"], 6, "--no-cache"),
    (["compress", MODEL, "--recipe", "r.yaml", "-o", "x.smelt", "--report", "x.smelt"], 6, "both"),
    (["demo", "--out", "r.yaml"], 6, "r.yaml"),
    (["pack"], 2, "FILE.safetensors"),
    (["pack", "no.safetensors"], 5, "no.safetensors"),
    (["pack", "r.yaml"], 5, "no .safetensors file"),
    (["pack", "r.yaml", "-o", "r.yaml", "--force"], 6, "both read and written"),
    (["pack", "r.yaml", "--threads", "0"], 2, "from 1"),
    (["pack", "r.yaml", "-o", "no/x.smelt"], 6, "'no'"),
    (["unpack", "r.yaml"], 5, "no .smelt file"),
    (["unpack", "no.smelt"], 5, "no.smelt"),
    (["methods", "share.kmean"], 2, "did you mean 'share.kmeans'"),
]


@pytest.mark.parametrize(("argv", "code", "word"), BAD, ids=[" ".join(b[0])[:60] or "nothing" for b in BAD])
def test_bad_input_is_one_line(run: Smelt, recipe: Path, argv: list[str], code: int, word: str) -> None:
    Path("bad.yaml").write_text("steps:\n  - prune.weights: {ration: 0.5}\n")
    one_line(run(*argv), code, word)
    assert not Path("x.smelt").exists()


def test_outputs_are_checked_before_the_work(run: Smelt, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "compress", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr(cli.os, "access", lambda *_: False)
    one_line(run("compress", MODEL, "--recipe", recipe, "-o", "x.smelt"), 6, "not writable")


def test_debug_shows_the_traceback(run: Smelt) -> None:
    with pytest.raises(smelt.SmeltError):
        run("measure", "lenett", "--debug")


@pytest.mark.parametrize("verb", ["compress", "measure", "show", "methods", "demo", "pack", "unpack"])
def test_help_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0 and f"examples:\n  smelt {verb}" in capsys.readouterr().out


def test_as_a_process() -> None:
    def call(*argv: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "smelt.cli", *argv], capture_output=True, text=True)

    assert call("--version").stdout.split()[1] == smelt.__version__
    bad = call("show", "no.smelt")
    assert bad.returncode == 5 and not bad.stdout and bad.stderr.count("\n") == 1
