"""What long work tells whoever watches: the base class is silent, `reports/terminal.py` draws."""

from __future__ import annotations


class Progress:
    def begin(self, index: int, count: int, label: str) -> None:
        """Step `index` (from 1) of `count` begins."""

    def advance(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` units (batches, layers) of the step are finished."""

    def end(self, text: str = "") -> None:
        """The step is finished; `text` sums it up."""
