"""A report as text, the same in the terminal and on the page: one stage per step, its numbers written out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from smelt.core.report import Row

# Every report has these; what else is in it is the metric of the job.
FIXED = ("file", "parameters", "non-zeros", "MACs", "latency", "peak memory")
PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass
class Stage:
    """The numbers after one step, by measure."""

    step: int
    name: str
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.step} {self.name}"

    def simulated(self) -> list[str]:
        return [row.measure for row in self.rows.values() if row.simulated]


def stages(rows: Iterable[Row]) -> list[Stage]:
    found: dict[int, Stage] = {}
    for row in rows:
        found.setdefault(row.step, Stage(row.step, row.after)).rows[row.measure] = row
    return [found[step] for step in sorted(found)]


def metrics(rows: Iterable[Row]) -> list[str]:
    """The measures that say what the model is worth, such as accuracy."""
    return list(dict.fromkeys(row.measure for row in rows if row.measure not in FIXED))


def value(row: Row) -> str:
    """The number with its unit, short: '11.3 kB', '98.22%', '1.2 M', '0.84 ms'."""
    if row.unit == "bytes":
        return size(row.value)
    if row.measure in FIXED and row.unit != "ms":
        return count(row.value)
    if row.unit == "%":
        return f"{row.value:.2f}%"
    return f"{row.value:.{_digits(row.value)}f} {row.unit}".rstrip()


def change(stage: Stage, first: Stage, measure: str) -> str:
    """The difference to the first stage: '-0.11' points, or in the metric's unit."""
    row, before = stage.rows.get(measure), first.rows.get(measure)
    if row is None or before is None or row is before:
        return ""
    digits = 2 if row.unit == "%" else _digits(before.value)
    return f"{row.value - before.value:+.{digits}f}".replace("-", "−")


def ratio(stage: Stage, first: Stage) -> str:
    """How many times smaller than the checkpoint: '42.1x'."""
    now = stage.rows.get("file")
    return times(first.rows["file"].value / now.value) if now and "file" in first.rows else ""


def times(factor: float) -> str:
    return f"{factor:.{2 if factor < 10 else 1 if factor < 100 else 0}f}×"


def size(nbytes: float) -> str:
    """'812 B', '11.3 kB', '1.20 MB': decimal prefixes, three digits."""
    return _scaled(nbytes, "B")


def count(number: float) -> str:
    """'431,080' below a million, then '12.3 M'."""
    return f"{number:,.0f}" if number < 1e6 else _scaled(number, "").rstrip()


def shape(dimensions: Iterable[int]) -> str:
    return "×".join(map(str, dimensions)) or "scalar"


def simulated(found: Iterable[Stage]) -> str:
    """The footnote: which measures were taken while something ran dense, and after which steps; '' if none was."""
    steps: dict[str, list[int]] = {}
    for stage in found:
        for measure in stage.simulated():
            steps.setdefault(measure, []).append(stage.step)
    groups: dict[tuple[int, ...], list[str]] = {}
    for measure, at in steps.items():
        groups.setdefault(tuple(at), []).append(measure)
    parts = [f"{', '.join(names)} (step {_span(at)})" for at, names in groups.items()]
    return f"simulated: {'; '.join(parts)}" if parts else ""


def _span(steps: tuple[int, ...]) -> str:
    if len(steps) > 2 and steps[-1] - steps[0] == len(steps) - 1:
        return f"{steps[0]} to {steps[-1]}"
    return ", ".join(map(str, steps))


def _scaled(number: float, unit: str) -> str:
    power = 0
    while number >= 999.5 and power < len(PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 else _digits(number)
    return f"{number:.{digits}f} {PREFIXES[power]}{unit}"


def _digits(number: float) -> int:
    """Decimals that give three digits, at most four."""
    if not number or not math.isfinite(number):
        return 2
    return min(4, max(0, 2 - math.floor(math.log10(float(f"{abs(number):.3g}")))))
