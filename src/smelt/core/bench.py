"""What `smelt bench` found: files and the model they come from, each in every runtime, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from smelt.core.clock import Spread, Timing


@dataclass(frozen=True)
class Timed:
    """Runs of one batch on so many threads."""

    batch: int
    threads: int
    timing: Timing

    @property
    def throughput(self) -> float:
        """Samples per second, at the median latency."""
        return 1000 * self.batch / self.timing.wall.median


@dataclass
class Side:
    """One file, or the original model, in one runtime.

    file: its path, or 'original'.
    bytes: of every file that belongs to it; of the original, of its checkpoint in fp32.
    memory: bytes by which a fresh process grew that loaded it and ran one batch; None: not measured.
    error: the largest difference of an output to the reference's over the largest output of that.
    sqnr: power of the reference's outputs over that of the difference, dB; inf = the same to the last bit.
    metric: on the test split.
    failed: why it did not run.
    """

    file: str
    runtime: str
    bytes: int
    original: bool = False
    timed: list[Timed] = field(default_factory=list)
    memory: int | None = None
    error: float | None = None
    sqnr: float | None = None
    metric: float | None = None
    failed: str | None = None

    @property
    def name(self) -> str:
        return f"{self.file}, {self.runtime}"

    def at(self, batch: int, threads: int) -> Timed | None:
        return next((one for one in self.timed if (one.batch, one.threads) == (batch, threads)), None)


@dataclass
class Bench:
    """Sides in the order in which they were given, the original first.

    reference: name of the side whose outputs the others' are compared with.
    baseline: of the side that others are faster or slower than: the original in eager PyTorch, else the first that ran.
    metric, unit: of `Side.metric`; '' without labelled data.
    missing: runtimes that would run one of the files and are not installed -> what installs them.
    warnings: files that are slower than the original, or whose outputs differ.
    """

    sides: list[Side] = field(default_factory=list)
    reference: str = ""
    baseline: str = ""
    metric: str = ""
    unit: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Side]:
        return iter(self.sides)

    def side(self, file: str, runtime: str) -> Side:
        """Raises KeyError where there is none."""
        for side in self.sides:
            if (side.file, side.runtime) == (file, runtime):
                return side
        raise KeyError(f"no side {file}, {runtime}; there is {[side.name for side in self.sides]}")

    def settings(self) -> list[tuple[int, int]]:
        """(batch, threads) of the timed runs, ascending."""
        return sorted({(one.batch, one.threads) for side in self.sides for one in side.timed})

    def cost(self, timed: Timed) -> Spread:
        """What sides are compared by: where one thread of the CPU computes its time, which other programs do not
        stretch; else the time on the wall."""
        alone = timed.threads == 1 and self.conditions.get("device") == "cpu"
        return timed.timing.cpu if alone else timed.timing.wall

    def faster(self, side: Side, batch: int, threads: int) -> float | None:
        """Times that a side is faster than the baseline, by the medians of `cost`; None: not timed."""
        base = next((s for s in self.sides if s.name == self.baseline), None)
        one, other = side.at(batch, threads), base.at(batch, threads) if base else None
        return None if one is None or other is None else self.cost(other).median / self.cost(one).median

    def to_plain(self) -> dict[str, Any]:
        plain = asdict(self)
        for found, side in zip(plain["sides"], self.sides, strict=True):
            for one, timed in zip(found["timed"], side.timed, strict=True):
                one["throughput"] = timed.throughput
                one["faster"] = self.faster(side, timed.batch, timed.threads)
            for key in ("sqnr", "error"):  # JSON has no infinity
                if found[key] is not None and not math.isfinite(found[key]):
                    found[key] = str(found[key])
        return plain
