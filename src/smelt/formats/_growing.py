"""A `.smelt` file that is written leaf by leaf, in little memory; its head comes last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from smelt.formats._container import AT_END, HEADER, SMALL, VERSION, Slot, begin, header_of, make_head
from smelt.native import crc32


@dataclass(frozen=True)
class Leaf:
    """A written leaf: its bytes, its checksum if it has one in the head, what it holds if it lies there itself."""

    nbytes: int
    crc: int | None = None
    small: bytes = b""


class Growing:
    """`at`: where the next byte goes.

    Args:
        file: opened for reading and writing; what it holds beyond `at` is dropped.
    """

    def __init__(self, file: BinaryIO, at: int = HEADER.size):
        self._file = file
        self.back(at)

    def back(self, at: int) -> None:
        """Forget what was written from `at` on."""
        self._file.truncate(at)
        self._file.seek(at)
        self.at = at

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.at += len(data)

    def leaf(self, slot: Slot, pieces: Iterable[bytes | memoryview], *, sealed: bool = False) -> Leaf:
        """A leaf whose bytes come in pieces."""
        if slot.nbytes < SMALL:
            return Leaf(slot.nbytes, small=b"".join(pieces))
        self.write(bytes(begin(slot, self.at) - self.at))
        crc = 0
        for piece in pieces:
            crc = crc if sealed else crc32(piece, crc)
            self.write(piece)
        return Leaf(slot.nbytes, None if sealed else crc)

    def sealed(self, at: int, start: bytes) -> Leaf:
        """The leaf that was written from `at` on, with checksums of its own; `start` takes the place of its start."""
        self._file.seek(at)
        self._file.write(start)
        size = self.at - at
        if size >= SMALL:
            self._file.seek(self.at)
            return Leaf(size)
        self._file.seek(at)
        small = self._file.read(size)
        self.back(at)
        return Leaf(size, small=small)

    def finish(self, meta: Mapping[str, Any], leaves: Sequence[Leaf]) -> int:
        """Write the head for these leaves, and complete the file; returns its bytes."""
        head = make_head(meta, [leaf.small for leaf in leaves], [x.crc for x in leaves if x.crc is not None])
        self.write(head)
        self._file.seek(0)
        self._file.write(header_of(head, VERSION | AT_END))
        self._file.flush()
        return self.at
