"""What was measured: rows of (step, measure, value, unit, spread, device, threads), and under which conditions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One number.

    step: 0 is the model as it came; i is after step i of the recipe.
    spread: (low, high) of repeated measurements, in `unit`.
    threads: of torch on the CPU, where the number depends on them (latency).
    simulated: the number was taken while something ran dense that the method promises to run otherwise.
    """

    step: int
    after: str
    measure: str
    value: float
    unit: str = ""
    spread: tuple[float, float] | None = None
    device: str = "cpu"
    threads: int | None = None
    simulated: bool = False


@dataclass
class Report:
    """Rows in the order in which they were measured, and what a reader needs to repeat them.

    layers: per tensor {name, shape, stored, bytes, dense_bytes, bits, zeros}.
    notes: what was left alone and why, and what is only simulated.
    """

    rows: list[Row] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def value(self, measure: str, step: int = -1) -> float:
        """A measured value; step -1 is the last.  KeyError when it was not measured."""
        found = {row.step: row.value for row in self.rows if row.measure == measure}
        if not found:
            raise KeyError(f"{measure!r} was not measured; there is {sorted({r.measure for r in self.rows})}")
        return found[max(found) if step == -1 else step]

    def steps(self) -> list[tuple[int, str]]:
        """[(0, 'original'), (1, 'train'), ...]"""
        return sorted({(row.step, row.after) for row in self.rows})

    def measures(self) -> list[str]:
        return list(dict.fromkeys(row.measure for row in self.rows))

    def ratio(self) -> float:
        """Bytes of the checkpoint (safetensors, fp32) over bytes of the final file."""
        return self.value("file", 0) / self.value("file")

    def short(self) -> list[list[Any]]:
        """The rows a file carries inside: bytes and the metric, before and after."""
        last = max((row.step for row in self.rows), default=0)
        keep = [
            row for row in self.rows if row.step in (0, last) and row.measure not in ("latency", "peak memory", "file")
        ]
        return [[row.step, row.measure, round(row.value, 4)] for row in keep]

    def to_plain(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "conditions": self.conditions,
            "recipe": self.recipe,
            "layers": self.layers,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_plain(), indent=1)

    @staticmethod
    def from_plain(data: Mapping[str, Any]) -> Report:
        rows = [Row(**{**row, "spread": tuple(row["spread"]) if row["spread"] else None}) for row in data["rows"]]
        return Report(
            rows, dict(data["conditions"]), dict(data["recipe"]), list(data["layers"]), list(data.get("notes", []))
        )


@dataclass(frozen=True)
class Point:
    """One tensor alone, changed by a method with one value of its setting: bytes of the file, and the metric."""

    tensor: str
    value: float
    bytes: int
    metric: float


@dataclass
class Sensitivity:
    """How a model bears what a method does to its tensors, one at a time; see `smelt.sensitivity`.

    before: the metric of the model as it came; file: bytes of its `.smelt` file.
    better: whether a larger metric is better; None: unknown.
    conditions: device, samples, ... under which the points were taken.
    """

    method: str
    setting: str
    metric: str
    unit: str
    better: bool | None
    before: float
    file: int
    points: list[Point] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tensors(self) -> list[str]:
        return list(dict.fromkeys(point.tensor for point in self.points))

    def values(self) -> list[float]:
        return sorted({point.value for point in self.points})

    def at(self, tensor: str, value: float) -> Point | None:
        return next((p for p in self.points if (p.tensor, p.value) == (tensor, value)), None)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)
