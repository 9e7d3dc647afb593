"""A budget of bytes, and the choice of one of several for each part that keeps it at the least cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smelt.core.errors import ModelError, RecipeError, nearest
from smelt.core.target import Target

BYTES = {"B": 1, "bytes": 1}
BYTES |= {f"{big}B": 1000**i for i, big in enumerate(("k", "M", "G"), 1)}
BYTES |= {f"{big}iB": 1024**i for i, big in enumerate(("K", "M", "G"), 1)}
UNITS = (*BYTES, "bits", "x")
# Costs are scaled so that the total is about this: the solver takes totals that differ by less than 1e-6 for equal.
SCALE = 1e4
# Programs that are solved for one choice at most.
ATTEMPTS = 8


@dataclass(frozen=True)
class Budget:
    """'100 kB' (of the file), '4.5 bits' (mean per value) or '0.15x' (of the tensors as fp32)."""

    value: float
    unit: str

    @staticmethod
    def parse(text: Any, where: str) -> Budget:
        """Raises RecipeError: no number with a unit, or nothing positive."""
        found = (
            re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
        )
        try:
            value = float(found[1]) if found else 0.0
        except ValueError:
            found = None
        if found is None:
            raise RecipeError(
                f"{where}: the budget {text!r} is no number with a unit, such as '100 kB', '4.5 bits', '0.15x'"
            )
        if found[2] not in UNITS:
            raise RecipeError(f"{where}: the budget {text!r} has no unit that is known{nearest(found[2], UNITS)}")
        if not 0 < value < math.inf:
            raise RecipeError(f"{where}: the budget {text!r} leaves nothing")
        return Budget(value, found[2])

    def bytes(self, members: Sequence[Target]) -> int:
        """What the members may take together in the file."""
        count = sum(t.tensor.numel() for t in members)
        if self.unit in BYTES:
            return int(self.value * BYTES[self.unit])
        return int(self.value * (count / 8 if self.unit == "bits" else 4 * count))


def choose(costs: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """For each row the column to take, so that the sizes add up to `budget` at most, and the costs to the least.

    An integer program, solved exactly: minimise sum c[i, j] x[i, j], where x is 0 or 1, sum_j x[i, j] = 1, and
    sum b[i, j] x[i, j] <= budget.

    Args:
        costs: [rows, columns], not negative.
        sizes: integers [rows, columns].

    Returns:
        int [rows].

    Raises:
        ValueError: `budget` is less than the smallest columns take.
        ModelError: the solver fails.
    """
    rows = np.arange(len(costs))
    least = np.lexsort((costs, sizes), axis=1)[:, 0]
    if sizes[rows, least].sum() > budget:
        raise ValueError("the budget is below the smallest sizes")
    best = np.lexsort((sizes, costs), axis=1)[:, 0]
    if sizes[rows, best].sum() <= budget:
        return best
    worth, picks, allowed = _worth(costs, sizes), least, budget
    for _ in range(ATTEMPTS):
        total = costs[rows, picks].sum()  # of a choice that is allowed: nothing dearer is in the best one
        found = _solve(costs, sizes, worth & (costs <= total), allowed, SCALE / max(total, 1e-300))
        over = int(sizes[rows, found].sum()) - budget
        if over > 0:
            allowed -= over  # by no more than the solver's tolerance
            continue
        picks = found
        if costs[rows, picks].sum() > total / 4:
            break  # else once more: beside larger costs its tolerance counts less
    return picks


def _solve(costs: np.ndarray, sizes: np.ndarray, open_: np.ndarray, budget: int, scale: float) -> np.ndarray:
    """The columns of the best choice among those that are open, within the solver's tolerances."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, vstack

    row, column = np.nonzero(open_)
    one = np.ones(len(row))
    once = coo_array((one, (row, np.arange(len(row)))), (len(costs), len(row)))
    ends = np.ones(len(costs))
    fits = LinearConstraint(
        vstack([once, coo_array(sizes[row, column][None].astype(float))], format="csc"),
        np.append(ends, -np.inf),
        np.append(ends, budget),
    )
    cost = costs[row, column] * scale
    found = milp(cost, constraints=fits, bounds=Bounds(0, 1), integrality=one, options={"mip_rel_gap": 0.0})
    if found.x is None:
        raise ModelError(f"the choice under a budget of {budget} bytes was not solved: {found.message}")
    picks = np.empty(len(costs), np.int64)
    picks[row[found.x > 0.5]] = column[found.x > 0.5]
    return picks


def _worth(costs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether a column is both smaller than every cheaper one and cheaper than every smaller one, in its row."""
    order = np.lexsort((costs, sizes), axis=1)
    sorted_costs = np.take_along_axis(costs, order, 1)
    before = np.minimum.accumulate(sorted_costs, 1)
    worth = np.ones(costs.shape, bool)
    worth[:, 1:] = sorted_costs[:, 1:] < before[:, :-1]
    found = np.empty(costs.shape, bool)
    np.put_along_axis(found, order, worth, 1)
    return found
