"""Tables and progress as text."""

import io

import pytest
from rich.console import Console

from smelt.core.report import Report
from smelt.reports import terminal
from tests.reports.sample import report


def text_of(what: object, width: int = 130) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 130])
def test_stage_table_has_every_number(width: int) -> None:
    text = text_of(terminal.stage_table(report(), width), width)
    for word in ("460 kB", "9.18 kB", "50.1×", "98.11%", "−0.11", "9,714", "260,520", "1.25 ms", "1.05 MB"):
        assert word in text, word
    assert "…" not in text
    assert text.count("simulated") == 3  # two rows, one footnote
    assert "2: left fc.bias alone" in text


def test_the_conditions_stand_below() -> None:
    made = report()
    assert "measured with" not in text_of(terminal.stage_table(made))
    made.conditions |= {"torch": "2.9", "threads": "1", "device": "cpu", "batch size": "128"}
    last = text_of(terminal.stage_table(made)).splitlines()[-1]
    assert last.strip() == "measured with device cpu, batch size 128, threads 1, torch 2.9"


def test_bars_are_in_proportion() -> None:
    lines = text_of(terminal.bars([("a", 1000), ("b", 500), ("c", 0)]), 60).splitlines()
    lengths = [line.count("█") for line in lines]
    assert lengths[0] > 30 and abs(lengths[1] - lengths[0] / 2) <= 1 and lengths[2] == 0


def test_markup_in_names_is_text() -> None:
    made = report()
    made.rows = [type(row)(**{**row.__dict__, "after": "[red]x"}) for row in made.rows]
    assert "[red]x" in text_of(terminal.stage_table(made, 130))


def test_an_empty_report_has_a_table() -> None:
    assert "nothing" in text_of(terminal.stage_table(Report()))


def test_layer_table() -> None:
    text = text_of(terminal.layer_table(report().layers))
    for word in ("fc.weight", "500×200", "sparse(values: codebook)", "6,877", "0.55", "92.6%", "scalar"):
        assert word in text


@pytest.mark.parametrize("width", [80, 160])
def test_methods_table(width: int) -> None:
    cards = {"prune.x": {"does": "Prunes x.", "applies to": "linear"}, "code.y": {"does": "Codes y.", "good at": "z"}}
    text = text_of(terminal.methods_table(cards, width), width)
    for word in ("prune.x", "Prunes x.", "linear", "good at"):
        assert word in text


def test_progress_without_a_terminal_is_one_line_per_step() -> None:
    console = Console(file=io.StringIO(), width=40)
    with terminal.TerminalProgress(console) as progress:
        progress.begin(1, 2, "prune.weights")
        progress.advance(1, 3, "epoch 1/3")
        progress.end("9,183 bytes, accuracy [98.11]%")
        progress.begin(2, 2, "code.huffman")
        progress.end("done")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["1/2 prune.weights: 9,183 bytes, accuracy [98.11]% (0.0 s)", "2/2 code.huffman: done (0.0 s)"]


def test_progress_on_a_terminal_ticks_and_leaves_it_in_order() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with pytest.raises(ZeroDivisionError), terminal.TerminalProgress(console) as progress:
        progress.begin(1, 2, "train")
        for i in range(4):
            progress.advance(i + 1, 4, f"epoch {i + 1}/4")
        progress.end("accuracy 98%")
        progress.begin(2, 2, "code.huffman")
        raise ZeroDivisionError
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "✓" in text and "accuracy 98%" in text and "2/2 code.huffman" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
