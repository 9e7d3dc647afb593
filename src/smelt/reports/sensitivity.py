"""How a model bears what is done to its tensors, one at a time: a table, and a page with a line for each tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from smelt.core.report import Point, Sensitivity
from smelt.core.yaml_text import to_yaml
from smelt.reports import _stages as show
from smelt.reports import html

# A loss of more than these shares of the metric is marked.
SOME, MUCH = 0.01, 0.1


def table(report: Sensitivity) -> RenderableType:
    """One row per tensor, one column per value of the setting: the metric, then the bytes of the file."""
    parts = [
        _table(
            report, f"{report.metric} (before: {_metric(report, report.before)})", lambda p: _metric(report, p.metric)
        ),
        _table(report, f"bytes of the file (before: {report.file:,})", lambda p: f"{p.bytes:,}"),
    ]
    return Group(*parts, *(Text(f"- {note}", "dim") for note in report.notes))


def _table(report: Sensitivity, title: str, cell: Callable[[Point], str]) -> Table:
    made = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", title=title, title_justify="left")
    made.add_column(f"tensor alone, {report.setting}", overflow="fold")
    for value in report.values():
        made.add_column(f"{value:g}", justify="right", no_wrap=True)
    for tensor in report.tensors():
        points = [report.at(tensor, value) for value in report.values()]
        made.add_row(Text(tensor), *(Text(cell(p), _style(report, p)) if p else "" for p in points))
    return made


def _style(report: Sensitivity, point: Point) -> str:
    if report.better is None:
        return ""
    lost = (report.before - point.metric) * (1 if report.better else -1) / max(abs(report.before), 1e-12)
    return "bold red" if lost > MUCH else "yellow" if lost > SOME else ""


def _metric(report: Sensitivity, value: float) -> str:
    return f"{value:.2f}%" if report.unit == "%" else f"{value:.4g}"


def write(report: Sensitivity, path: str | Path, *, title: str = "smelt", force: bool = False) -> int:
    """Write the page, complete or not at all; returns its bytes.

    Raises:
        OutputError: the path exists (and not `force`), or cannot be written.
    """
    return html.write_page(lambda: page(report, title), path, force)


def page(report: Sensitivity, title: str = "smelt") -> str:
    """The page as text."""
    columns = [f"{value:g}" for value in report.values()]
    facts = [
        {"number": _metric(report, report.before), "text": f"{report.metric} of the model as it came"},
        {"number": show.size(report.file), "text": "its file"},
        {"number": str(len(report.tensors())), "text": f"tensors, each alone under {report.method}"},
    ]
    return html.render(
        title,
        _plots(report),
        facts=facts,
        tables=[
            (
                report.metric,
                f"tensor alone, {report.setting}",
                columns,
                _rows(report, lambda p: _metric(report, p.metric)),
            ),
            ("Bytes of the file", f"tensor alone, {report.setting}", columns, _rows(report, lambda p: f"{p.bytes:,}")),
        ],
        recipe=to_yaml({"steps": [{report.method: {report.setting: report.values(), "on": "<each tensor>"}}]}),
        conditions=list(report.conditions.items()),
        notes=report.notes,
    )


def _rows(report: Sensitivity, cell: Callable[[Point], str]) -> list[dict[str, Any]]:
    rows = []
    for tensor in report.tensors():
        points = [report.at(tensor, value) for value in report.values()]
        rows.append({"title": tensor, "cells": [{"text": cell(p) if p else ""} for p in points]})
    return rows


def _plots(report: Sensitivity) -> list[dict[str, Any]]:
    by_value = [_line(report, tensor, lambda p: p.value) for tensor in report.tensors()]
    by_bytes = [_line(report, tensor, lambda p: p.bytes) for tensor in report.tensors()]
    return [
        _plot(f"{report.metric} by {report.setting}", by_value, {"title": {"text": report.setting}}, report),
        _plot(f"{report.metric} by size of the file", by_bytes, {"ticksuffix": "B", "tickformat": "~s"}, report),
    ]


def _line(report: Sensitivity, tensor: str, across: Callable[[Point], float]) -> dict[str, Any]:
    points = sorted((p for p in report.points if p.tensor == tensor), key=lambda p: p.value)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": tensor,
        "x": [across(p) for p in points],
        "y": [p.metric for p in points],
        "text": [f"{report.setting} {p.value:g}, {p.bytes:,} bytes" for p in points],
        "hovertemplate": "%{y:.6~g}, %{text}<extra>%{fullData.name}</extra>",
    }


def _plot(title: str, lines: list[dict[str, Any]], across: dict[str, Any], report: Sensitivity) -> dict[str, Any]:
    start = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": report.before, "y1": report.before}
    start["line"] = {"color": "--soft", "width": 1, "dash": "dot"}
    layout = {
        **html.LAYOUT,
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.2},
        "xaxis": {**html.AXIS, **across},
        "yaxis": {**html.AXIS, "ticksuffix": report.unit if report.unit == "%" else ""},
        "shapes": [start],
    }
    return {"title": title, "height": 420 + 8 * len(lines), "data": lines, "layout": layout}
