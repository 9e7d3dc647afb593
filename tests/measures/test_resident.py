"""Memory as the operating system counts it."""

import numpy as np

from smelt.measures.resident import resident

SIZE = 60_000_000


def test_what_is_touched_counts_and_what_is_not_does_not() -> None:
    touched = resident(lambda: np.ones(SIZE, np.uint8))
    only_asked_for = resident(lambda: np.empty(SIZE, np.uint8))
    assert touched is not None and only_asked_for is not None  # Linux and other Unix
    assert 0.9 * SIZE < touched < 1.5 * SIZE
    assert only_asked_for < 0.5 * SIZE


def test_a_peak_counts_that_is_gone_again() -> None:
    def work() -> None:
        blocks = [np.ones(SIZE // 2, np.uint8) for _ in range(2)]
        blocks.clear()

    found = resident(work)
    assert found is not None and found > 0.9 * SIZE
