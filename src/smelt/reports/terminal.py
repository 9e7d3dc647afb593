"""The terminal: one line per step while it runs, and tables of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from types import TracebackType
from typing import Any

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from smelt.core.progress import Progress
from smelt.core.report import Report, Row
from smelt.reports import _stages as show

RUNS = ("MACs", "latency", "peak memory")
CONDITIONS = ("device", "batch size", "threads", "torch")
WIDE, WIDEST = 114, 150
REDRAW = 0.1  # seconds between two redraws of a bar


class _Left(ProgressColumn):
    """Time left while a step runs, time taken once it is finished."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(_clock(task.finished_time or 0), style="dim")
        left = task.time_remaining
        return Text(f"{_clock(left)} left" if left is not None else "", style="cyan")


class TerminalProgress(Progress):
    """One line per step: number, name, bar, epoch, time left; then a tick and what came of it.

    Where the console is no terminal, one plain line per finished step.  Use it as a context manager, so that an
    error leaves the terminal in order.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._task: Any = None
        self._title, self._began, self._drawn = "", 0.0, 0.0

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def begin(self, index: int, count: int, label: str) -> None:
        self._title, self._began, self._drawn = f"{index:>{len(str(count))}}/{count} {label}", monotonic(), 0.0
        if not self.console.is_terminal:
            return
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.fields[mark]}"),
                TextColumn("{task.description}", markup=False),
                BarColumn(24, complete_style="cyan", finished_style="green"),
                _Left(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
                console=self.console,
                refresh_per_second=8,
            )
            self._bars.start()
        self._task = self._bars.add_task(self._title, total=None, mark=" ", note="")

    def advance(self, done: int, total: int, text: str = "") -> None:
        if self._bars is not None and (done >= total or monotonic() - self._drawn > REDRAW):
            self._drawn = monotonic()
            self._bars.update(self._task, completed=min(done, 0.999 * total), total=total, note=text)

    def end(self, text: str = "") -> None:
        if self._bars is not None:
            self._bars.update(self._task, completed=1, total=1, mark="[green]✓[/]", note=text)
        elif not self.console.is_terminal:
            took = _clock(monotonic() - self._began)
            self.console.print(f"{self._title}: {text} ({took})", markup=False, highlight=False, soft_wrap=True)


def stage_table(report: Report, width: int = 80) -> RenderableType:
    """One row per step, a bar chart of file bytes, and the notes; where it is narrow, two tables."""
    stages = show.stages(report.rows)
    if not stages:
        return Text("nothing was measured")
    first = stages[0]
    columns: dict[str, Callable[[show.Stage], str]] = {
        "file": lambda s: _cell(s, "file"),
        "smaller": lambda s: show.ratio(s, first),
    }
    for name in show.metrics(report.rows):
        columns[name] = lambda s, name=name: _cell(s, name)  # type: ignore[misc]
        columns[f"{name} change"] = lambda s, name=name: show.change(s, first, name)  # type: ignore[misc]
    columns["non-zeros"] = lambda s: _cell(s, "non-zeros")
    runs: dict[str, Callable[[show.Stage], str]] = {
        name: lambda s, name=name: _cell(s, name)  # type: ignore[misc]
        for name in RUNS
        if any(name in s.rows for s in stages)
    }
    if any(s.simulated() for s in stages):
        runs["ran as"] = lambda s: "[yellow]simulated[/]" if s.simulated() else ""
    parts = [_stages(stages, c) for c in ([columns | runs] if width >= WIDE else [columns, runs]) if c]
    if footnote := show.simulated(stages):
        parts.append(Text(footnote, "yellow"))
    parts += [Text(), bars([(s.title, s.rows["file"].value) for s in stages if "file" in s.rows])]
    if report.notes:
        parts += [Text(), *(Text(f"- {note}", "dim") for note in report.notes)]
    if any(name in report.conditions for name in CONDITIONS):
        parts += [Text(), conditions_line(report.conditions)]
    return Group(*parts)


def conditions_line(conditions: Mapping[str, str]) -> RenderableType:
    """'measured with device cpu, batch size 128, threads 2, torch 2.9': what of it is known."""
    known = ", ".join(f"{name} {conditions[name]}" for name in CONDITIONS if name in conditions)
    return Text(f"measured with {known}" if known else "", "dim")


def _stages(stages: Sequence[show.Stage], columns: Mapping[str, Callable[[show.Stage], str]]) -> RenderableType:
    table = _table()
    table.add_column("step", no_wrap=True)
    for name in columns:
        table.add_column("change" if name.endswith(" change") else escape(name), justify="right", no_wrap=True)
    for stage in stages:
        last = stage is stages[-1] and len(stages) > 1
        table.add_row(Text(stage.title), *(cell(stage) for cell in columns.values()), style="bold" if last else "")
    return table


def bars(values: Sequence[tuple[str, float]]) -> RenderableType:
    """A bar chart of bytes, the longest bar across the width."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    most = max((v for _, v in values), default=1)
    for i, (name, number) in enumerate(values):
        color = "green" if i == len(values) - 1 and i else "cyan"
        grid.add_row(Text(name), Bar(most, 0, max(number, most / 400), color=color), f"{number:,.0f} bytes")
    return grid


def measure_table(rows: Sequence[Row], title: str = "") -> RenderableType:
    """Every measure of one model."""
    table = _table(escape(title))
    for name, side in (
        ("measure", "left"),
        ("value", "right"),
        ("exactly", "right"),
        ("spread", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in rows:
        exact = f"{row.value:,.0f} {row.unit}" if float(row.value).is_integer() else f"{row.value:.6g} {row.unit}"
        spread = f"{row.spread[0]:.3g} to {row.spread[1]:.3g}" if row.spread else ""
        mark = Text("simulated", "yellow") if row.simulated else ""
        table.add_row(row.measure, Text(show.value(row), "bold"), Text(exact, "dim"), spread, mark)
    return table


def facts(lines: Mapping[str, str]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in lines.items():
        grid.add_row(name, Text(text))
    return grid


def layer_table(layers: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One row per tensor of a file: what it is stored as and what that costs."""
    table = _table()
    for name, side in (
        ("tensor", "left"),
        ("shape", "left"),
        ("stored as", "left"),
        ("bytes", "right"),
        ("bits", "right"),
    ):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    has_zeros = any("zeros" in layer for layer in layers)
    if has_zeros:
        table.add_column("zeros", justify="right")
    for layer in layers:
        cells: list[RenderableType] = [
            Text(str(layer["name"])),
            show.shape(layer["shape"]),
            Text(str(layer["stored"]), "cyan"),
        ]
        cells += [f"{layer['bytes']:,}", f"{layer['bits']:.2f}"]
        if has_zeros:
            cells.append(f"{layer.get('zeros', 0):.1%}")
        table.add_row(*cells)
    return table


def pack_table(dtypes: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One row per dtype of packed checkpoints."""
    table = _table()
    for name in ("dtype", "tensors", "bytes", "packed", "smaller"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for row in dtypes:
        numbers = (f"{row[key]:,}" for key in ("tensors", "before", "after"))
        table.add_row(Text(row["dtype"], "cyan"), *numbers, f"{row['ratio']:.3f}×")
    return table


def methods_table(cards: Mapping[str, Mapping[str, str]], width: int = 80) -> RenderableType:
    """The methods side by side; where the terminal is narrow, one below the other.

    Args:
        cards: `Method.card()` by key.
    """
    columns = list(dict.fromkeys(key for card in cards.values() for key in card))
    if width < WIDEST:
        return Group(*(method_card(key, card) for key, card in cards.items()))
    table = Table(box=SIMPLE_HEAD, show_lines=True, pad_edge=False, header_style="bold")
    table.add_column("method", style="bold cyan", no_wrap=True)
    for column in columns:
        table.add_column(column, overflow="fold", ratio=2 if column.startswith("needs") else 3)
    for key, card in cards.items():
        table.add_row(key, *(Text(card.get(column, "")) for column in columns))
    return table


def method_card(key: str, card: Mapping[str, str]) -> RenderableType:
    lines = {f"  {name}": text for name, text in card.items() if name != "does" and text}
    return Group(Text(key, "bold cyan"), Text(card.get("does", "")), facts(lines), Text())


def settings_table(settings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The settings of a method: name, type, default, range, what it is."""
    table = _table()
    for name in ("setting", "type", "default", "range", "what it is"):
        table.add_column(name, overflow="fold", no_wrap=name == "setting")
    for line in settings:
        table.add_row(*(Text(str(line[key])) for key in ("name", "type", "default", "range", "doc")))
    return table


def _table(title: str = "") -> Table:
    return Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, header_style="bold")


def _cell(stage: show.Stage, measure: str) -> str:
    row = stage.rows.get(measure)
    return show.value(row) if row is not None else ""


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{int(seconds % 60):02d}"
        if minutes >= 60
        else f"{minutes}:{int(seconds % 60):02d}"
    )
