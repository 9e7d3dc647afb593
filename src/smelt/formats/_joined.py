"""One stream of the entropy coder out of several, so that a large tensor can be coded piece by piece."""

from __future__ import annotations

import numpy as np

from smelt.native._read import varint
from smelt.native.stream import CHECKS, TABLE, WIDTHS


class Joined:
    """A stream of `count` elements of `width` bytes in chunks of 2^chunk, with checksums, whose chunks come later.

    Its head has its final length from the beginning, and its final content after the last `add`.
    """

    def __init__(self, count: int, width: int, chunk: int):
        self._start = bytes([WIDTHS.index(width) | TABLE | CHECKS]) + varint(count) + bytes([chunk])
        self._chunk = chunk
        self._sizes = np.zeros(self._chunks(count), "<u4")
        self._known = 0

    def head(self) -> bytes:
        return self._start + self._sizes.tobytes()

    def add(self, stream: np.ndarray, count: int) -> memoryview:
        """The chunks of the stream of the next `count` elements, with checksums; they are full, but for the last."""
        at, chunks = 1 + len(varint(count)), self._chunks(count)
        sizes = np.array([len(stream) - at], "<u4")
        if chunks > 1:
            sizes = stream[at + 1 :][: 4 * chunks].view("<u4")
            at += 1 + 4 * chunks
        self._sizes[self._known : self._known + chunks] = sizes
        self._known += chunks
        return stream[at:].data

    def _chunks(self, count: int) -> int:
        return -(-count >> self._chunk)
