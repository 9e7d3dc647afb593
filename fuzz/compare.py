"""compare.py FOLDER [CHANGES]: what decode_chunk has kept, and so many changed copies of each, decoded by the C library
and by NumPy.

Where NumPy accepts a body the C library must give the same elements; NumPy refuses with ValueError and nothing else.
Prints how many of each there were, and why NumPy refused what the C library accepts.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smelt import native
from smelt.native.portable import decode_chunk

HEAD, USUAL, LARGE, LARGEST = 4, 70_000, 42, 1 << 20  # as in bodies.h


def parse(data: bytes) -> tuple[bytes, int, int]:
    """Body, count, width."""
    number = int.from_bytes(data[1:HEAD], "little")
    return data[HEAD:], 1 + number % (LARGEST if data[0] >> 2 == LARGE else USUAL), 1 << (data[0] & 3)


def by_library(body: bytes, count: int, width: int, level: int = -1) -> bytes | None:
    """None: damaged."""
    library = native.coder()
    if library is None:
        raise SystemExit("the C library is not built")
    out, data = np.empty(count, f"u{width}"), np.frombuffer(body, np.uint8)
    result = library.smelt_chunk_decode(data.ctypes.data, len(data), out.ctypes.data, count, width, level)
    assert result in (0, -1), result
    return out.tobytes() if result == 0 else None


def changed(data: bytes, rng: random.Random) -> bytes:
    """With some bytes changed, mostly near the beginning of the body."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(HEAD, min(len(found), HEAD + rng.choice([4, 16, 64, 1 << 20])))
        found[at] = rng.choice([rng.randrange(256), found[at] ^ 1 << rng.randrange(8), found[at] + 1 & 255])
    return bytes(found)


def inputs(folder: Path, changes: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(1)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if len(data) > HEAD:
            yield path.name, data
            for i in range(changes):
                yield f"{path.name}, change {i}", changed(data, rng)


def main(folder: str, changes: str = "0") -> int:
    found: Counter[str] = Counter()
    wrong = 0
    for name, data in inputs(Path(folder), int(changes)):
        ours = by_library(*parse(data))
        try:
            theirs = decode_chunk(*parse(data)).tobytes()
        except ValueError as error:
            found["both refuse" if ours is None else f"NumPy alone refuses: {error}"] += 1
            continue
        found["both accept"] += 1
        if theirs != ours:
            print(f"{name}: NumPy gives other elements")
            wrong += 1
    for what, number in found.most_common():
        print(f"{number:7} {what}")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
