"""report.html: one page that needs nothing else, opens offline and can be read on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smelt.core.output import check_output, replacing
from smelt.core.report import Report, Row
from smelt.core.yaml_text import to_yaml
from smelt.reports import _stages as show
from smelt.version import __version__

LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": "--text", "size": 13, "family": "system-ui, sans-serif"},
    "showlegend": False,
    "margin": {"l": 8, "r": 16, "t": 4, "b": 32},
    "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--text"}},
}
AXIS: dict[str, Any] = {"gridcolor": "--line", "zerolinecolor": "--line", "automargin": True, "fixedrange": True}


def write(report: Report, path: str | Path, *, title: str = "smelt", force: bool = False) -> int:
    """Write the page, complete or not at all; returns its bytes.

    Raises:
        OutputError: the path exists (and not `force`), or cannot be written.
    """
    return write_page(lambda: page(report, title), path, force)


def write_page(make: Callable[[], str], path: str | Path, force: bool) -> int:
    """Write what `make` gives; see `write`."""
    path = Path(path)
    check_output(path, force)
    data = make().encode()
    with replacing(path, force, len(data)) as file:
        file.write(data)
    return len(data)


def page(report: Report, title: str = "smelt") -> str:
    """The page as text."""
    stages = show.stages(report.rows)
    footnote = show.simulated(stages).removeprefix("simulated: ")
    return render(
        title,
        _plots(report, stages),
        tables=[("After every step", "step", _columns(report), [_row(report, stage, stages) for stage in stages])],
        facts=_facts(report, stages),
        footnote=footnote and f"{footnote}: taken while what is stored ran dense.",
        layers=_layers(report),
        recipe=to_yaml(report.recipe),
        conditions=list(report.conditions.items()),
        notes=report.notes,
    )


def render(title: str, plots: Sequence[Mapping[str, Any]], **parts: Any) -> str:
    """A page of facts, tables (heading, what a row is, columns, rows), plots and more; see report.html."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    figures = json.dumps([{"data": p["data"], "layout": p["layout"]} for p in plots]).replace("<", "\\u003c")
    template = Environment(autoescape=True).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    plotly, code = Markup(get_plotlyjs()), Markup(figures)
    return template.render(title=title, version=__version__, plots=plots, plotly=plotly, figures=code, **parts)


def _facts(report: Report, stages: Sequence[show.Stage]) -> list[dict[str, str]]:
    """The headline: how much smaller, what it cost, how much is left."""
    if not stages:
        return []
    first, last = stages[0], stages[-1]
    facts = []
    if len(stages) > 1 and "file" in first.rows and "file" in last.rows:
        text = f"smaller: {show.value(first.rows['file'])} to {show.value(last.rows['file'])}"
        facts.append({"number": show.ratio(last, first), "text": text})
    for name in show.metrics(report.rows):
        if name in last.rows:
            moved = show.change(last, first, name)
            unit = " points" if last.rows[name].unit == "%" else ""
            text = f"{name}, {moved}{unit} from {show.value(first.rows[name])}" if moved else name
            facts.append({"number": show.value(last.rows[name]), "text": text})
    if "non-zeros" in last.rows and "parameters" in first.rows and first.rows["parameters"].value:
        share = last.rows["non-zeros"].value / first.rows["parameters"].value
        total = show.count(first.rows["parameters"].value)
        facts.append({"number": f"{share:.1%}", "text": f"of {total} parameters are not zero"})
    return facts


def _columns(report: Report) -> list[str]:
    there = {row.measure for row in report.rows}
    own = [name for name in ("non-zeros", "MACs", "latency", "peak memory") if name in there]
    return ["file", "smaller", *show.metrics(report.rows), *own]


def _row(report: Report, stage: show.Stage, stages: Sequence[show.Stage]) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for name in _columns(report):
        row = stage.rows.get(name)
        if name == "smaller":
            cells.append({"text": show.ratio(stage, stages[0])})
        elif row is None:
            cells.append({"text": ""})
        else:
            exact = f"{row.value:,.6g} {row.unit}" if row.unit != "bytes" else f"{row.value:,.0f} bytes"
            if row.spread:
                exact += f" ({row.spread[0]:.3g} to {row.spread[1]:.3g})"
            note = show.change(stage, stages[0], name) if name in show.metrics(report.rows) else ""
            cells.append({"text": show.value(row), "exact": exact, "note": note, "simulated": row.simulated})
    return {"title": stage.title, "cells": cells, "last": stage is stages[-1]}


def _layers(report: Report) -> list[dict[str, Any]]:
    total = sum(layer["bytes"] for layer in report.layers)
    return [
        {
            "name": layer["name"],
            "shape": show.shape(layer["shape"]),
            "stored": layer["stored"],
            "rest": layer.get("rest", ""),
            "bytes": f"{layer['bytes']:,}",
            "ratio": show.times(layer["dense_bytes"] / layer["bytes"]) if layer["bytes"] else "",
            "bits": f"{layer['bits']:.2f}",
            "zeros": f"{layer['zeros']:.1%}",
            "share": f"{layer['bytes'] / total:.1%}" if total else "",
        }
        for layer in report.layers
    ]


def _plots(report: Report, stages: Sequence[show.Stage]) -> list[dict[str, Any]]:
    """One row per step in every plot."""
    sized = [(s.title, s.rows["file"].value) for s in stages if "file" in s.rows]
    plots = [_bars(sized)] if sized else []
    for name in show.metrics(report.rows):
        plots.append(_dots(name, [(s.title, s.rows[name]) for s in stages if name in s.rows]))
    return plots


def _bars(values: Sequence[tuple[str, float]]) -> dict[str, Any]:
    names, numbers = [name for name, _ in values], [number for _, number in values]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": numbers,
        "y": names,
        "marker": {"color": ["--ore"] * (len(names) - 1) + ["--metal"]},
        "text": [show.size(n) for n in numbers],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:,} bytes<extra></extra>",
    }
    across = {**AXIS, "ticksuffix": "B", "tickformat": "~s", "nticks": 5, "range": [0, 1.25 * max(numbers)]}
    return _plot("File size", names, trace, {"bargap": 0.35, "xaxis": across})


def _dots(name: str, points: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    numbers = [row.value for _, row in points]
    names = [title for title, _ in points]
    low, high = min(numbers), max(numbers)
    room = max(high - low, 0.005 * abs(high), 1e-9)
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": numbers,
        "y": names,
        "cliponaxis": False,
        "line": {"color": "--value", "width": 2},
        "marker": {"size": 9, "color": "--value"},
        "hovertemplate": "%{y}: %{x:.6~g}<extra></extra>",
    }
    line = {"color": "--soft", "width": 1, "dash": "dot"}
    start = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": numbers[0], "x1": numbers[0], "line": line}
    across = {**AXIS, "range": [low - 0.4 * room, high + 0.4 * room], "nticks": 5, "ticksuffix": points[0][1].unit}
    beside: dict[str, Any] = {"xref": "paper", "x": 1.02, "xanchor": "left", "showarrow": False}
    texts = [{**beside, "y": title, "text": show.value(row)} for title, row in points]
    margin = {**LAYOUT["margin"], "r": 12 + 8 * max(len(text["text"]) for text in texts)}
    layout = {"xaxis": across, "shapes": [start], "annotations": texts, "margin": margin}
    return _plot(name[:1].upper() + name[1:], names, trace, layout)


def _plot(title: str, names: Sequence[str], trace: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    down = {
        **AXIS,
        "type": "category",
        "range": [len(names) - 0.4, -0.6],
        "gridcolor": "rgba(0,0,0,0)",
        "ticksuffix": " ",
    }
    return {
        "title": title,
        "height": 60 + 30 * len(names),
        "data": [trace],
        "layout": {**LAYOUT, "yaxis": down, **layout},
    }
