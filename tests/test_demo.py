"""The demo as a user runs it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from smelt import demo
from smelt.core.errors import OutputError
from smelt.data._read import open_data
from smelt.formats.smelt import load
from smelt.measures.accuracy import evaluate


def test_the_demo(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    report = demo.run(tmp_path, seed=0, console=console)
    file, page = tmp_path / "demo.smelt", tmp_path / "report.html"
    assert file.stat().st_size == report.value("file") and report.ratio() > 40
    assert report.value("file", 0) == 459_632
    accuracy = evaluate(load(file), open_data("digits", None, 0).test or (), "accuracy")
    assert accuracy == report.value("accuracy") > report.value("accuracy", 0) - 1.0
    assert report.value("accuracy", 0) > 97
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5 code.entropy" in text and "█" in text and f"{file.stat().st_size:,} bytes" in text
    assert "fc1.weight" in page.read_text(encoding="utf-8")
    with pytest.raises(OutputError, match="exists"):
        demo.run(tmp_path)


def test_recipes_can_be_read() -> None:
    from smelt.core.recipe import Recipe

    paths = sorted(demo.RECIPES.glob("*.yaml"))
    assert paths and all(len(Recipe.of(path)) for path in paths)
