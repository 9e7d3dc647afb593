"""corpus.py FOLDER...: chooses tests/native/corpus from the inputs of decode_chunk in folders.

Of the valid bodies: the smallest that together have every trait found in any (kinds, widths, ways of coding, numbers of
lanes, tables, segments).  Of the others: the smallest for every reason to refuse them, and the smallest that is long.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from compare import HEAD, by_library, parse

from smelt.native._parts import parts_size
from smelt.native.portable import decode_chunk

KINDS = [
    "raw",
    "constant",
    "split",
    "planes",
    "upper",
    "half",
    "offset",
    "lower",
    "bits",
    "nibbles",
    "bytes",
    "nonzero",
]
LARGEST = 4096  # bytes of a body
# A raw plane was once taken at any depth: eight offsets around two planes of a byte.
BY_HAND = {"refused-raw-plane-too-deep": bytes([1, 0, 0, 0]) + bytes([6, 0, 0]) * 8 + bytes([3, 2, 0, 7, 0, 7])}
# In each other they would multiply the work.
BY_HAND["refused-nonzero-within-another"] = bytes([0, 9, 0, 0]) + bytes([11, 2, 1, 1]) * 2 + bytes([1, 5])
CORPUS = Path(__file__).parents[1] / "tests/native/corpus"


def varint(body: bytes) -> tuple[int, int]:
    """The number and its bytes."""
    size = next(i for i, byte in enumerate(body) if byte < 128) + 1
    return sum((byte & 127) << 7 * i for i, byte in enumerate(body[:size])), size


def tree(body: bytes, count: int, width: int, depth: int = 0) -> Iterator[str]:
    """The traits of a valid body, its kind first."""
    kind = KINDS[body[0]]
    yield f"{kind} of {width}"
    yield f"{kind} {'at the deepest' if depth == 8 else 'inside' if depth else 'outside'}"
    rest = body[1:]
    if kind == "planes":
        for plane in range(width):
            size, used = varint(rest) if plane < width - 1 else (len(rest), 0)
            yield from tree(rest[used : used + size], count, 1, depth + 1)
            rest = rest[used + size :]
    elif kind in ("upper", "lower", "half"):
        yield from tree(rest, count, width // 2, depth + 1)
    elif kind == "offset":
        yield from tree(rest[width:], count, width, depth + 1)
    elif kind == "bits":
        yield from tree(rest, -(-count // 8), 1, depth + 1)
    elif kind == "nibbles":
        yield from tree(rest, 2 * count, 1, depth + 1)
    elif kind == "nonzero":
        size, used = varint(rest)
        yield from tree(rest[used : used + size], count, 1, depth + 1)
        kept = sum(decode_chunk(rest[used : used + size], count, 1).tolist())
        yield from tree(rest[used + size :], kept, width, depth + 1) if kept else ()
    elif kind == "split":
        yield f"split of {width} at {body[1]}"
        symbols = rest[1 + parts_size(count, body[1] & 63) :]
        yield from (f"{trait}, split" for trait in coded(symbols, count))
    elif kind == "bytes":
        yield from coded(rest, count)


def coded(symbols: bytes, count: int) -> Iterator[str]:
    first, second = symbols[:2]
    long = "long" if count > 16384 else "short" if count < 128 else "some"
    if first < 16:
        yield f"huffman {first}, {long}"
        return
    lanes = 1 << (second & 7)
    words = "many" if lanes == 128 and len(symbols) > 1500 else "few"
    yield f"rans {first - 16:04b}, {long}"
    yield f"rans {first & 3}, {words} words"
    yield f"rans, {lanes} lanes, {'whole' if count % lanes == 0 else 'cut'}"
    yield f"rans, precision {second >> 4}"
    yield f"rans, {'listed' if second & 8 else 'from'}"


def choose(inputs: list[bytes]) -> dict[str, bytes]:
    """By name; smaller ones first."""
    chosen: dict[str, bytes] = {}
    seen: set[str] = set()
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        body, count, width = parse(data)
        try:
            decode_chunk(body, count, width)
        except ValueError as error:
            if by_library(body, count, width) is not None:
                continue
            reason = re.sub("[^a-z]+", "-", f"{error}".lower())
            key = f"refused-{reason}{'-late' if len(body) > 700 else ''}"
            if key not in chosen:
                chosen[key] = data
            continue
        traits = list(tree(body, count, width))
        if new := set(traits) - seen:
            seen |= new
            chosen[f"{KINDS[body[0]]}-{width}-{hashlib.sha256(data).hexdigest()[:6]}"] = data
    for name in list(chosen):  # the large ones may have made small ones needless
        if name.startswith("refused"):
            continue
        others = [parse(data) for other, data in chosen.items() if other != name and not other.startswith("refused")]
        if not set(tree(*parse(chosen[name]))) - {trait for other in others for trait in tree(*other)}:
            del chosen[name]
    return chosen


def main(folders: list[str]) -> None:
    inputs = [path.read_bytes() for folder in folders for path in Path(folder).iterdir()]
    chosen = choose([data for data in inputs if HEAD < len(data) <= LARGEST + HEAD])
    chosen |= BY_HAND
    for path in CORPUS.glob("*.body"):
        path.unlink()
    index = {}
    for name, data in sorted(chosen.items()):
        body, count, width = parse(data)
        found = by_library(body, count, width)
        (CORPUS / f"{name}.body").write_bytes(body)
        index[name] = {"width": width, "count": count, "sha256": found and hashlib.sha256(found).hexdigest()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in index.items())
    (CORPUS / "index.json").write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(chosen)} bodies of {sum(len(data) - HEAD for data in chosen.values())} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
