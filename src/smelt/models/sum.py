"""Branches that see the same input; their outputs are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.errors import ModelError

BUILDERS = ("chain", "layer", "pivoted")


def build(branches: Sequence[Any] = (("layer", {}),)) -> nn.Module:
    """Submodules '0', '1', ...

    Args:
        branches: [builder, {argument: value}] each; builders are those in `BUILDERS`.

    Raises:
        ModelError: no branches, or something else.
    """
    if isinstance(branches, (str, bytes)) or not isinstance(branches, Sequence) or not branches:
        raise ModelError(f'sum: branches is {branches!r}; it takes a list such as [["layer", {{"kind": "ReLU"}}]]')
    return Sum(_branch(entry, f"sum: branch {i}") for i, entry in enumerate(branches))


def _branch(entry: Any, where: str) -> nn.Module:
    plain = isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)
    if not plain or entry[0] not in BUILDERS:
        raise ModelError(f"{where} is {entry!r}; it takes one of {', '.join(BUILDERS)} and its arguments")
    try:
        return shelf.module("models", entry[0]).build(**entry[1])  # type: ignore[no-any-return]
    except TypeError as error:
        raise ModelError(f"{where}: {entry[0]} does not take {entry[1]}: {error}") from None


class Sum(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self[0](x)
        for branch in self[1:]:
            total = total + branch(x)
        return total
