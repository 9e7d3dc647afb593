"""Milliseconds of calls that run in turn, so that what slows the machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
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


def latencies(
    sides: Mapping[str, Callable[[], Any]], repeats: int = 30, warmup: int = 5, threads: int | None = None
) -> dict[str, Spread]:
    """Milliseconds of several callables, one run of each in turn, so that what slows the machine hits all alike.

    Each side follows each other as often as it is followed: every second round runs backwards.

    Raises:
        RecipeError: a number that is too small.
    """
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value is not None and value < least:
            raise RecipeError(f"latency: {name} is {value}; it takes a whole number from {least}")
    before = torch.get_num_threads()
    times: dict[str, list[float]] = {name: [] for name in sides}
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        used = torch.get_num_threads()
        for turn in range(warmup + repeats):
            for name, call in list(sides.items())[:: -1 if turn % 2 else 1]:
                taken = _time(call)
                if turn >= warmup:
                    times[name].append(taken)
    finally:
        torch.set_num_threads(before)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    spreads = {n: torch.tensor(t, dtype=torch.float64).quantile(quartiles).tolist() for n, t in times.items()}
    return {n: Spread(median, low, high, repeats, used) for n, (low, median, high) in spreads.items()}


def _time(call: Callable[[], Any]) -> float:
    _wait()
    start = perf_counter()
    call()
    _wait()
    return (perf_counter() - start) * 1000


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
