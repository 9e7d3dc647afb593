"""Files beside the original in every runtime: tables, and a page with what each costs and is worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from smelt.core.bench import Bench, Side
from smelt.core.clock import Spread
from smelt.reports import _stages as show
from smelt.reports import html

FACTS = ("bytes", "memory", "largest error", "SQNR")
TIMES = ("latency", "quartiles", "CPU time", "samples/s", "faster")
FASTER = "than the first, by the CPU time of one thread, by the latency of several"
MARK = 12, 44  # pixels across the smallest and the largest mark


def table(bench: Bench) -> RenderableType:
    """What each side is; one table of how fast each is for each number of samples and threads; the warnings."""
    metric = [bench.metric] if bench.metric else []
    parts: list[RenderableType] = [_table(bench, "", (*FACTS, *metric), _facts, True)]
    for batch, threads in bench.settings():
        title = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
        parts.append(_table(bench, title, TIMES, partial(_times, batch=batch, threads=threads), False))
    parts += [Text(f"missing: {name} ({how})", "yellow") for name, how in bench.missing.items()]
    parts += [Text(f"- {note}", "dim") for note in bench.notes]
    parts += [Text(f"WARNING: {warning}", "bold red") for warning in bench.warnings]
    known = ", ".join(f"{name} {value}" for name, value in bench.conditions.items())
    return Group(*parts, Text(f"measured with {known}; faster: {FASTER}", "dim"))


def _table(
    bench: Bench, title: str, columns: tuple[str, ...], cells: Callable[[Bench, Side], list[str]], every: bool
) -> Table:
    made = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", title=title or None, title_justify="left")
    made.add_column("file", overflow="fold")
    made.add_column("runtime", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for side in bench:
        if every or any(found := cells(bench, side)):
            found = cells(bench, side)
            made.add_row(Text(side.file), Text(side.runtime), *map(Text, found), style="dim" if side.original else "")
    return made


def _facts(bench: Bench, side: Side) -> list[str]:
    reference = side.name == bench.reference
    error = "" if side.error is None or reference else f"{side.error:.2g}"
    noise = "reference" if reference else "" if side.sqnr is None else decibels(side.sqnr)
    memory = "" if side.memory is None else show.size(side.memory)
    return [show.size(side.bytes), memory, error, noise, *([_metric(bench, side)] if bench.metric else [])]


def _times(bench: Bench, side: Side, batch: int, threads: int) -> list[str]:
    one, factor = side.at(batch, threads), bench.faster(side, batch, threads)
    if one is None:
        return [""] * len(TIMES)
    wall = one.timing.wall
    spread = f"{_ms(wall.low)} to {_ms(wall.high)}"
    faster = "" if factor is None else "1×" if side.name == bench.baseline else show.times(factor)
    return [f"{_ms(wall.median)} ms", spread, f"{_ms(one.timing.cpu.median)} ms", f"{one.throughput:,.0f}", faster]


def decibels(value: float) -> str:
    """'31.4 dB', 'equal' where nothing differs."""
    return "equal" if value == math.inf else "none" if math.isnan(value) else f"{value:.1f} dB"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _metric(bench: Bench, side: Side) -> str:
    if side.metric is None:
        return ""
    return f"{side.metric:.2f}%" if bench.unit == "%" else f"{side.metric:.4g} {bench.unit}".rstrip()


def write(bench: Bench, path: str | Path, *, title: str = "smelt bench", force: bool = False) -> int:
    """Write the page, complete or not at all; returns its bytes.

    Raises:
        OutputError: the path exists (and not `force`), or cannot be written.
    """
    return html.write_page(lambda: page(bench, title), path, force)


def page(bench: Bench, title: str = "smelt bench") -> str:
    """The page as text."""
    metric = [bench.metric] if bench.metric else []
    tables = [("Files and outputs", "file, runtime", [*FACTS, *metric], _rows(bench, _facts))]
    for batch, threads in bench.settings():
        name = f"Batch {batch}, {threads} thread{'s' * (threads > 1)}"
        rows = _rows(bench, partial(_times, batch=batch, threads=threads))
        tables.append((name, "file, runtime", list(TIMES), rows))
    return html.render(
        title,
        [_plot(bench, *setting) for setting in bench.settings()],
        facts=_headline(bench),
        tables=tables,
        conditions=[*bench.conditions.items(), ("faster", FASTER)],
        notes=[
            *(f"Warning: {warning}" for warning in bench.warnings),
            *(f"missing: {name} ({how})" for name, how in bench.missing.items()),
            *bench.notes,
        ],
    )


def _rows(bench: Bench, cells: Callable[[Bench, Side], list[str]]) -> list[dict[str, Any]]:
    return [{"title": side.name, "cells": [{"text": text} for text in cells(bench, side)]} for side in bench]


def _headline(bench: Bench) -> list[dict[str, str]]:
    """The fastest file and the smallest, at the first setting."""
    facts = []
    batch, threads = bench.settings()[0]
    files = [side for side in bench if not side.original and side.at(batch, threads)]
    speeds = [(bench.faster(side, batch, threads) or 0.0, side) for side in files]
    if speeds:
        factor, side = max(speeds, key=lambda pair: pair[0])
        facts.append({"number": show.times(factor), "text": f"faster than {bench.baseline}: {side.name}"})
        least = min(files, key=lambda s: s.bytes)
        facts.append({"number": show.size(least.bytes), "text": f"the smallest: {least.file}"})
    facts.append({"number": str(len(bench.warnings)), "text": "warnings"})
    return facts


def _plot(bench: Bench, batch: int, threads: int) -> dict[str, Any]:
    """Worth (the metric, else the SQNR of the outputs) against latency; the area of a mark is the bytes."""
    worth: Callable[[Side], float | None] = (lambda s: s.metric) if bench.metric else _finite
    sides = [side for side in bench if side.at(batch, threads) and worth(side) is not None]
    most = max((side.bytes for side in sides), default=1)
    traces = []
    for name in dict.fromkeys(side.runtime for side in sides):
        own = [side for side in sides if side.runtime == name]
        walls = [_wall(side, batch, threads) for side in own]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [wall.median for wall in walls],
                "y": [worth(side) for side in own],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [wall.high - wall.median for wall in walls],
                    "arrayminus": [wall.median - wall.low for wall in walls],
                    "thickness": 1,
                },
                "marker": {
                    "size": [max(MARK[0], MARK[1] * math.sqrt(side.bytes / most)) for side in own],
                    "symbol": ["circle-open" if side.original else "circle" for side in own],
                    "opacity": 0.75,
                },
                "text": [f"{side.file}, {side.bytes:,} bytes" for side in own],
                "hovertemplate": "%{text}<br>%{x:.4~g} ms, %{y:.5~g}<extra>%{fullData.name}</extra>",
            }
        )
    down = (
        {"title": {"text": bench.metric}, "ticksuffix": bench.unit} if bench.metric else {"title": {"text": "SQNR, dB"}}
    )
    layout = {
        **html.LAYOUT,
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.25, "itemsizing": "constant"},
        "xaxis": {**html.AXIS, "title": {"text": "latency, ms"}, "type": "log"},
        "yaxis": {**html.AXIS, **down},
        "margin": {**html.LAYOUT["margin"], "b": 60},
    }
    what = bench.metric or "Outputs"
    title = f"{what[:1].upper() + what[1:]} by latency, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    return {
        "title": f"{title}; area: bytes of the file, hollow: the original",
        "height": 460,
        "data": traces,
        "layout": layout,
    }


def _finite(side: Side) -> float | None:
    """The SQNR that can be drawn: equal outputs are at 150 dB, which fp32 does not reach."""
    if side.sqnr is None or math.isnan(side.sqnr):
        return None
    return max(-20.0, min(side.sqnr, 150.0))


def _wall(side: Side, batch: int, threads: int) -> Spread:
    one = side.at(batch, threads)
    assert one is not None
    return one.timing.wall
