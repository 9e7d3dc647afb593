"""The log of a loop: a CSV file, or TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smelt.core.errors import OutputError
from smelt.core.output import explained

COLUMNS = ("step", "update", "epoch", "loss", "rate", "held out", "seconds")


class Log:
    """Rows with these columns, of one step of a recipe, in a `.csv` file or else as a folder of TensorBoard; what an
    interrupted loop wrote after its checkpoint is forgotten.

    Args:
        path: None for no log.
        step: number of the step in the recipe.
        done: updates of that step that are done.

    Raises:
        OutputError: not writable; TensorBoard is not installed.
    """

    def __init__(self, path: Path | None, step: int, done: int):
        self._file: Any = None
        self._board: Any = None
        self._step = step
        if path is None:
            return
        if path.suffix == ".csv":
            with explained(path):
                rows = _kept(path, step, done)
                self._file = open(path, "w", newline="")  # noqa: SIM115  (closed by `close`)
                self._csv = csv.DictWriter(self._file, COLUMNS)
                self._csv.writeheader()
                self._csv.writerows(rows)
                self._file.flush()
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise OutputError(
                f"the log {str(path)!r} needs TensorBoard, which is not installed: pip install 'smelt[tensorboard]', "
                "or give a path that ends in .csv"
            ) from None
        self._board = SummaryWriter(str(path / f"step{step}"), purge_step=done + 1)

    def write(self, update: int, row: Mapping[str, float]) -> None:
        if self._file is not None:
            self._csv.writerow({"step": self._step, "update": update, **row})
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, update)

    def close(self) -> None:
        for one in (self._file, self._board):
            if one is not None:
                one.close()


def _kept(path: Path, step: int, done: int) -> list[dict[str, str]]:
    """Rows of a log of earlier that still hold."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if set(row) == set(COLUMNS)]
    return [row for row in rows if (int(row["step"]), int(row["update"])) <= (step, done)]
