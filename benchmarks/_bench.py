"""What every benchmark shares: flags, cells that resume, rows, a table.

A benchmark is a list of cells; a cell is one call of a top-level function with plain arguments, giving plain data.
Finished cells are kept under `benchmarks/.cache`, so that an interrupted run goes on where it stopped; `--fresh`
forgets them.  Cells run in two processes of one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CACHE = HERE / ".cache"


@dataclass
class Row:
    """One line of a benchmark's result."""

    measure: str
    value: float | None
    unit: str = ""
    peer: str | None = None
    peer_value: float | None = None
    target: str | None = None


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small version that ends within 50 s")
    parser.add_argument("--long", action="store_true", help="the larger grid")
    parser.add_argument("--json", metavar="PATH", help="write the rows as JSON")
    parser.add_argument("--fresh", action="store_true", help="forget the finished cells of earlier runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default 2)")
    return parser.parse_args()


def data_folder(name: str) -> Path | None:
    """SMELT_DATA/name if it is there; otherwise says what is missing and gives None."""
    root = os.environ.get("SMELT_DATA")
    if root and (Path(root) / name).is_dir():
        return Path(root) / name
    where = f"{root} has no folder {name!r}" if root else "SMELT_DATA is not set"
    print(f"missing data: {where}; SMELT_DATA must name a folder that holds {name}/train.npz and {name}/test.npz")
    return None


def run_cells(
    name: str,
    function: Callable[..., Any],
    cells: Sequence[dict[str, Any]],
    *,
    jobs: int,
    fresh: bool,
    seconds: float,
    apart: bool = False,
) -> list[Any]:
    """The results of `function(**cell)` for every cell, from earlier runs where they are kept.

    Args:
        seconds: what one cell is expected to take, for the estimate that is printed first.
        apart: every cell in a process that has done nothing else.
    """
    folder = CACHE / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{_key(function, cell)}.json" for cell in cells]
    if fresh:
        for path in paths:
            path.unlink(missing_ok=True)
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    expected = _minutes(len(todo) * seconds / max(1, jobs))
    print(f"{name}: {len(cells)} cells, {len(cells) - len(todo)} kept; about {expected} to go", flush=True)
    start = time.time()
    if todo:
        context = multiprocessing.get_context("spawn")
        tasks = 1 if apart else None
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread, max_tasks_per_child=tasks) as pool:
            futures = {pool.submit(function, **cells[i]): i for i in todo}
            for count, future in enumerate(as_completed(futures), 1):
                index = futures[future]
                part = paths[index].with_suffix(".part")
                part.write_text(json.dumps(future.result()))
                os.replace(part, paths[index])
                left = (time.time() - start) / count * (len(todo) - count)
                print(f"  cell {index + 1} done ({count} of {len(todo)}), about {_minutes(left)} left", flush=True)
    return [json.loads(path.read_text()) for path in paths]


def finish(rows: Sequence[Row], path: str | None, more: Sequence[Row] = ()) -> None:
    """Print the rows as a Markdown table and write them as JSON; `more` are only written."""
    print("\n| measure | value | unit | peer | peer's value | target |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [row.measure, _number(row.value), row.unit, row.peer or "", _number(row.peer_value), row.target or ""]
        print(f"| {' | '.join(cells)} |")
    if path:
        part = Path(path).with_suffix(".part")
        part.write_text(json.dumps([asdict(row) for row in (*rows, *more)], indent=1))
        os.replace(part, path)


def conditions() -> str:
    import platform

    import torch

    import smelt
    from smelt.compress import processor

    return f"smelt {smelt.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {processor()}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _key(function: Callable[..., Any], cell: dict[str, Any]) -> str:
    """A cell is what it was as long as its benchmark and its arguments are."""
    source = Path(sys.modules[function.__module__].__file__ or "").read_bytes()
    text = json.dumps([function.__name__, cell], sort_keys=True).encode()
    return hashlib.sha256(source + text).hexdigest()[:24]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
