"""The slots of the alias method (Giesen 2014, arXiv:1402.3392), as docs/format.md deals them to the entries."""

from __future__ import annotations

import numpy as np

SLOT_BITS = 16
SLOTS = 1 << SLOT_BITS
BUCKETS = (16, 32, 256)


def deal(frequencies: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Who owns the slots.

    Args:
        frequencies: of at most `buckets` entries, in slots: they sum to 65,536, each is less.
        buckets: 16, 32 or 256.

    Returns:
        entry, uint8 [65536], and frequency + 65,536 * rank, uint32 [65536], of every slot.
    """
    width = SLOTS // buckets
    rest = [int(f) for f in frequencies] + [0] * (buckets - len(frequencies))
    frequency = np.array(rest, np.int64)
    below, other, bias = [width] * buckets, list(range(buckets)), [0] * buckets
    small: list[int] = []
    large: list[int] = []
    for entry, f in enumerate(rest):
        (small if f < width else large).append(entry)
    while small and large:
        bucket, owner = small.pop(), large[-1]
        below[bucket], other[bucket] = rest[bucket], owner
        rest[owner] -= width - rest[bucket]
        if rest[owner] < width:
            small.append(large.pop())
    offset = below.copy()
    for bucket, owner in enumerate(other):
        if below[bucket] < width:
            bias[bucket] = offset[owner] - below[bucket]
            offset[owner] += width - below[bucket]
    position = np.arange(width)[:, None]
    own = position < np.array(below)
    who = np.where(own, np.arange(buckets), np.array(other))
    rank = position + np.where(own, 0, np.array(bias))
    steps = frequency[who] + (rank << SLOT_BITS)
    return who.astype(np.uint8).reshape(-1), steps.astype(np.uint32).reshape(-1)
