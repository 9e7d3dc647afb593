"""Milliseconds of calls that run in turn, so that what slows the machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import torch

from smelt.core.errors import RecipeError


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median and the quartiles of `repeats` runs on `threads` threads."""

    median: float
    low: float
    high: float
    repeats: int
    threads: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ms ({self.low:.3g}..{self.high:.3g})"


@dataclass(frozen=True)
class Timing:
    """How long runs took by the clock on the wall, and how long this process (all of its threads) computed."""

    wall: Spread
    cpu: Spread


def latencies(
    sides: Mapping[str, Callable[[], Any]], repeats: int = 30, warmup: int = 5, threads: int | None = None
) -> dict[str, Spread]:
    """Milliseconds of several callables by the clock on the wall; see `timings`."""
    return {name: timing.wall for name, timing in timings(sides, repeats, warmup, threads).items()}


def timings(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    settle: int = 0,
) -> dict[str, Timing]:
    """Milliseconds of several callables, one run of each in turn, so that what slows the machine hits all alike.

    Each side follows each other as often as it is followed: every second round runs backwards.

    Args:
        threads: of torch on the CPU, restored afterwards; None = as they are.
        settle: runs of a side just before the one that counts.  With 1, the processor's caches hold what the side has
            left there, as when it runs by itself; with 0, what the side before it has left.

    Raises:
        RecipeError: a number that is too small.
    """
    for name, value, least in (
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
        ("threads", threads, 1),
        ("settle", settle, 0),
    ):
        if value is not None and value < least:
            raise RecipeError(f"latency: {name} is {value}; it takes a whole number from {least}")
    before = torch.get_num_threads()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        used = torch.get_num_threads()
        for turn in range(warmup + repeats):
            for name, call in list(sides.items())[:: -1 if turn % 2 else 1]:
                for _ in range(settle if turn >= warmup else 0):
                    call()
                taken = _time(call)
                if turn >= warmup:
                    times[name].append(taken)
    finally:
        torch.set_num_threads(before)

    def spread(taken: Sequence[float]) -> Spread:
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, median, high = torch.tensor(taken, dtype=torch.float64).quantile(quartiles).tolist()
        return Spread(median, low, high, repeats, used)

    return {name: Timing(*(spread(kind) for kind in zip(*taken, strict=True))) for name, taken in times.items()}


def _time(call: Callable[[], Any]) -> tuple[float, float]:
    _wait()
    start, computed = perf_counter(), process_time()
    call()
    _wait()
    end = process_time()
    return (perf_counter() - start) * 1000, (end - computed) * 1000


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
