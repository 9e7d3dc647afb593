"""What README and examples tell people to type works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from smelt.cli import main
from smelt.core.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert named == ["demo", "test"] and set(named) <= set(targets)


def test_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    exec(compile(re.sub(r"epochs: \d+", "epochs: 2", code), "README.md", "exec"), {})
    assert (tmp_path / "model.smelt").exists()


def checkpoint(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.zeros(30, 40), "b": torch.arange(9)}, folder / "model.safetensors")


def test_packed_checkpoints_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path)
    assert main(["pack", "model.safetensors"]) == 0
    (code,) = blocks("python")[1:]
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert set(found["tensors"]) == {"w", "b"} and found["rows"].shape == (9,)


def test_recipes_parse() -> None:
    for text in blocks("yaml"):
        assert len(Recipe.of(text)) > 1
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert len(Recipe.of(path)) > 1
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        for word in ("baseline", "result", "command", "date"):
            assert any(word in line for line in head), f"{path.name} has no receipt: {word}"


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    short = (ROOT / "recipes" / "demo.yaml").read_text()
    (tmp_path / "short.yaml").write_text(re.sub(r"epochs: \d+", "epochs: 1", short))
    checkpoint(tmp_path)
    checkpoint(tmp_path / "checkpoint")
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("smelt ")]
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        words = ["short.yaml" if word == "demo" else word for word in words]
        assert main(words) == 0, command
        assert capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for page in ("README.md", "README.zh.md", "docs/architecture.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:src|tests|examples)/[\w/]+\.(?:py|yaml))`", text)
    assert len(named) >= 8
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(example: str, tmp_path: Path) -> None:
    text = (ROOT / "examples" / example).read_text()
    (tmp_path / example).write_text(re.sub(r"epochs: \d+", "epochs: 2", re.sub(r"train\(15", "train(2", text)))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # networks this small only wait for a second thread
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bytes" in done.stdout


def test_the_command_is_installed() -> None:
    assert shutil.which("smelt") or (Path(sys.executable).parent / "smelt").exists()
