"""The demo: a small LeNet learns scikit-learn's digits, and Deep Compression makes its file forty times smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from smelt.compress import compress
from smelt.core.data import Data
from smelt.core.errors import FileError, OutputError
from smelt.core.job import Job
from smelt.core.output import check_output
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step
from smelt.core.report import Report
from smelt.core.source import Source
from smelt.core.train import Train
from smelt.data._read import open_data
from smelt.formats import smelt as smelt_file
from smelt.measures.accuracy import evaluate
from smelt.models._open import open_model
from smelt.reports import html, terminal
from smelt.train.loop import Loop, fit
from smelt.version import __version__

RECIPES = Path(__file__).parent / "recipes"
NETWORK: dict[str, Any] = {"size": 8, "kernel": 3, "padding": 1}
LEARN = Train(epochs=60, lr=3e-3, optimizer="adamw", weight_decay=0.3, keep="last")


def run(folder: Path, *, seed: int = 0, force: bool = False, console: Console | None = None) -> Report:
    """Write demo.smelt and report.html into `folder`, which is made if need be, and print what was measured.

    Raises:
        OutputError: a file exists (and not `force`), or cannot be written.
    """
    console = console or Console()
    file, page = folder / "demo.smelt", folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be made: {error.strerror}") from None
    for path in (file, page):
        check_output(path, force)
    data = open_data("digits", None, seed)
    recipe = Recipe.of(RECIPES / "demo.yaml")
    with _one_thread(), terminal.TerminalProgress() as progress:
        source = train_network(data, seed, progress)
        result = compress(source, recipe, Job(data, seed=seed), progress=progress)
    size = result.save(file, force=force)
    accuracy = evaluate(smelt_file.load(file), data.test or (), "accuracy")
    if abs(accuracy - result.report.value("accuracy")) > 1e-9:
        raise FileError(f"{str(file)!r} gives {accuracy} once loaded; please report this")
    html.write(result.report, page, title=f"smelt demo: LeNet on digits, seed {seed}", force=force)
    console.print(terminal.stage_table(result.report, console.width))
    console.print(
        Text(
            f"\n{file} has {size:,} bytes, {result.report.ratio():.1f} times fewer than the checkpoint;\n"
            f"loaded again it is right on {accuracy:.2f}% of the test digits, "
            f"the network before on {result.report.value('accuracy', 0):.2f}%.\n{page} shows everything."
        )
    )
    return result.report


def train_network(data: Data, seed: int = 0, progress: Progress | None = None) -> Source:
    """A trained LeNet, and how it is built."""
    progress = progress or Progress()
    torch.manual_seed(seed)
    model, builder, arguments = open_model("lenet", arguments=NETWORK)
    progress.begin(1, 1, f"smelt {__version__} demo: LeNet learns digits")
    fit(model, Step(LEARN), Loop(data, seed=seed), progress)
    progress.end(f"accuracy {evaluate(model, data.test or (), 'accuracy'):.2f}%")
    assert isinstance(model, nn.Module)
    return Source.of(model, builder, arguments)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads would only wait for each other: this network is that small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
