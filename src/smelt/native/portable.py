"""The entropy coder without the C library: the same chunks, coded with NumPy.  docs/format.md says what a chunk is.

Decoding takes every chunk; encoding makes simpler choices than the C library and is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from smelt.native import _huffman, _rans
from smelt.native._parts import cut, halves, join, parts_size, rotated, singles
from smelt.native._read import Reader, require, varint

RAW, CONSTANT, SPLIT, PLANES, UPPER, HALF, OFFSET, LOWER, BITS, NIBBLES, BYTES, NONZERO = range(12)
DEEPEST = 8
WITHIN = 16  # added to the depth inside of NONZERO
MOST = 1 << 20  # bytes that are cut into nibbles
ROTATE = 64

# What elements can be: the number of it in the C library, the widths in bytes.
KINDS = {
    "int": (0, (1, 2, 4, 8)),
    "bool": (1, (1,)),
    "e8": (2, (2, 4)),
    "e5": (3, (2,)),
    "e11": (4, (8,)),
    "f8": (5, (1,)),
}
CODERS = ("auto", "rans", "huffman")

# A size in bytes, nearly, and what writes a body of it.
Plan = tuple[float, Callable[[], bytes]]


def encode_chunk(elements: np.ndarray, kind: str, coder: str = "auto") -> bytes:
    """A body that holds the elements.

    Args:
        elements: [m], m at least 1, of 1, 2, 4 or 8 bytes.
        kind: what they are, of KINDS: "int", "bool" (0 and 1), "f8", "e5" (float16), "e8" (bfloat16, float32),
            "e11" (float64).
        coder: of CODERS; "auto" takes whichever is smaller.
    """
    return _plan(elements.view(f"<u{elements.itemsize}"), kind, coder)[1]()


def decode_chunk(body: bytes | memoryview | np.ndarray, count: int, width: int) -> np.ndarray:
    """The elements of a body as unsigned integers of `width` bytes, [count], count at least 1.

    Raises ValueError: the body is damaged.
    """
    return _decode(Reader(np.frombuffer(body, np.uint8)), count, width, 0)


# ---- decoding


def _decode(reader: Reader, count: int, width: int, depth: int) -> np.ndarray:
    """A body that reaches to the reader's end, inside of `depth` others."""
    require(depth % WITHIN <= DEEPEST, "bodies nested too deep")
    kind = reader.byte()
    if kind in (PLANES, UPPER, LOWER):
        require(width > 1, "no body of bytes")
    if kind in (BITS, NIBBLES, BYTES):
        require(width == 1, "a body of bytes only")
    if kind == RAW:
        require(reader.left == count * width, "raw: another number of elements")
        return reader.rest().view(f"<u{width}").copy()
    if kind == CONSTANT:
        require(reader.left == width, "constant: another number of elements")
        return np.full(count, reader.rest().view(f"<u{width}")[0])
    if kind == SPLIT:
        return _join(reader, count, width)
    if kind == BYTES:
        return _symbols(reader, count)
    if kind == PLANES:
        found = np.empty((count, width), np.uint8)
        for plane in range(width):
            size = reader.varint() if plane < width - 1 else reader.left
            found[:, plane] = _decode(Reader(reader.take(size)), count, 1, depth + 1)
        return found.view(f"<u{width}").reshape(-1)
    if kind in (UPPER, LOWER):
        found = np.zeros((count, 2), f"<u{width // 2}")
        found[:, int(kind == UPPER)] = _decode(reader, count, width // 2, depth + 1)
        return found.view(f"<u{width}").reshape(-1)
    if kind == HALF:
        require(width == 4, "half: of four bytes only")
        return singles().take(_decode(reader, count, 2, depth + 1))
    if kind == OFFSET:
        offset = reader.take(width).view(f"<u{width}")
        found = _decode(reader, count, width, depth + 1)
        found += offset
        return found
    if kind == NONZERO:
        return _spread(reader, count, width, depth)
    if kind == BITS:
        packed = _decode(reader, -(-count // 8), 1, depth + 1)
        require(count % 8 == 0 or not packed[-1] & 255 >> count % 8, "bits: some are left over")
        return np.unpackbits(packed, count=count)
    require(kind == NIBBLES, f"no body of kind {kind}")
    require(count <= MOST, "nibbles: too many")
    found = _decode(reader, 2 * count, 1, depth + 1)
    require(int(found.max()) < 16, "nibbles: one above 15")
    return found[0::2] | found[1::2] << 4


def _spread(reader: Reader, count: int, width: int, depth: int) -> np.ndarray:
    """Elements where a mask is 1, else 0."""
    require(depth < WITHIN, "nonzero within another")
    mask = _decode(Reader(reader.take(reader.varint())), count, 1, depth + WITHIN + 1)
    kept = int(np.count_nonzero(mask))
    require(int(mask.max()) <= 1 and (kept > 0 or not reader.left), "nonzero: no such mask")
    found = np.zeros(count, f"<u{width}")
    if kept:
        found[mask.view(bool)] = _decode(reader, kept, width, depth + WITHIN + 1)
    return found


def _join(reader: Reader, count: int, width: int) -> np.ndarray:
    how = reader.byte()
    bits = how & ROTATE - 1
    require(how < 2 * ROTATE and 1 <= 8 * width - bits <= 8, "split: no such way of splitting")
    words = np.zeros(count, f"<u{width}")
    join(reader, words, bits)
    symbols = _symbols(reader, count)
    require(int(symbols.max()) >> 8 * width - bits == 0, "split: a symbol of too many bits")
    words |= symbols.astype(words.dtype) << bits
    return words >> 1 | words << 8 * width - 1 if how & ROTATE else words


def _symbols(reader: Reader, count: int) -> np.ndarray:
    require(reader.left > 0, "symbols: it ends too early")
    if reader.data[reader.at] & _rans.CODER:
        return _rans.decode(reader, count)
    return _huffman.decode(reader, count)


# ---- encoding


def _plan(words: np.ndarray, kind: str, coder: str) -> Plan:
    """words: unsigned [m]."""
    if bool((words == words[0]).all()):
        return _begun(bytes([CONSTANT]) + words[:1].tobytes(), (0, bytes))
    width = words.itemsize
    if kind == "bool" and int(words.max()) == 1:
        return _best(words, _bits(words, coder))
    if kind == "f8":
        return _best(words, *_splits(words, range(5), coder, rotate=True))
    if kind == "int":
        return _best(words, _integers(words, coder) if width > 1 else _best_split(words, coder))
    if kind == "e8" and width == 4:
        if not words.view("<u2")[0::2].any():
            upper = np.ascontiguousarray(words.view("<u2")[1::2])
            return _begun(bytes([UPPER]), _plan(upper, "e8", coder))
        half = halves(words)
        if half is not None:
            return _begun(bytes([HALF]), _plan(half, "e5", coder))
    if kind.startswith("e") and 16 * np.count_nonzero(words) < 15 * len(words):
        return _best(words, _nonzero(words, kind, coder))
    least = {"e5": 8, "e8": 8 * width - 8, "e11": 56}.get(kind, 0)
    if least:
        bits = range(8, 12) if kind == "e5" else (least,)
        return _best(words, *_splits(words, bits, coder, rotate=True), _planes(words, coder))
    return _best(words, _best_split(words, coder))


def _begun(head: bytes, plan: Plan) -> Plan:
    return len(head) + plan[0], lambda: head + plan[1]()


def _best(words: np.ndarray, *plans: Plan) -> Plan:
    """The smallest, or the words as they are."""
    raw = words.nbytes + 1
    size, write = min(plans, key=lambda plan: plan[0])

    def written() -> bytes:
        body = write() if size < raw else b""
        return body if 0 < len(body) < raw else bytes([RAW]) + words.tobytes()

    return min(size, raw), written


def _splits(words: np.ndarray, bits: Iterable[int], coder: str, *, rotate: bool) -> list[Plan]:
    """With each of these numbers of raw bits."""
    turned = rotated(words) if rotate else words
    top = 8 * words.itemsize - 8
    counts = np.bincount((turned >> top).astype(np.uint8), minlength=256)
    return [_split(turned, r, counts.reshape(-1, 1 << r - top).sum(1), coder, rotate) for r in bits]


def _split(words: np.ndarray, bits: int, counts: np.ndarray, coder: str, rotate: bool) -> Plan:
    """counts: of the symbols, at most [256]."""
    counts = np.pad(counts, (0, 256 - len(counts)))
    one = np.count_nonzero(counts) == 1  # no Huffman code, and rANS takes next to nothing
    plans = []
    if coder != "huffman" or one:
        plans.append(_rans.plan(counts))
    if coder != "rans" and not one:
        plans.append(_huffman.plan(counts))
    size, write = min(plans, key=lambda plan: plan[0])

    def written() -> bytes:
        head = bytes([SPLIT, bits | ROTATE * rotate] if bits or rotate else [BYTES])
        return head + cut(words, bits) + write((words >> bits).astype(np.uint8))

    return 2 + parts_size(len(words), bits) + size, written


def _best_split(words: np.ndarray, coder: str) -> Plan:
    return min(_splits(words, range(5), coder, rotate=False), key=lambda plan: plan[0])


def _bits(words: np.ndarray, coder: str) -> Plan:
    packed = np.packbits(words)
    digits = np.stack((packed & 15, packed >> 4), 1).reshape(-1)
    nibbles = _begun(bytes([NIBBLES]), _plan(digits, "int", coder))
    return _begun(bytes([BITS]), min(_plan(packed, "int", coder), nibbles, key=lambda plan: plan[0]))


def _nonzero(words: np.ndarray, kind: str, coder: str) -> Plan:
    """Where the words are not 0, and those that are not."""
    mask = words != 0
    where, values = _plan(mask.view(np.uint8), "bool", coder), _plan(words[mask], kind, coder)

    def written() -> bytes:
        body = where[1]()
        return bytes([NONZERO]) + varint(len(body)) + body + values[1]()

    return 4 + where[0] + values[0], written


def _planes(words: np.ndarray, coder: str) -> Plan:
    """Byte by byte, each in the best way."""
    width = words.itemsize
    planes = words.view(np.uint8).reshape(-1, width)
    plans = [_plan(np.ascontiguousarray(planes[:, i]), "int", coder) for i in range(width)]

    def written() -> bytes:
        bodies = [write() for _, write in plans]
        return bytes([PLANES]) + b"".join(varint(len(body)) + body for body in bodies[:-1]) + bodies[-1]

    return 1 + 3 * (width - 1) + sum(size for size, _ in plans), written


def _integers(words: np.ndarray, coder: str, *, shifted: bool = False) -> Plan:
    """Integers of more than a byte: fewer bytes where they need no more, minus an offset if that helps, or planes."""
    width = words.itemsize
    low, high = int(words.min()), int(words.max())
    signed = words.view(f"<i{width}")
    lowest = int(signed.min())
    if (span := int(signed.max()) - lowest) < high - low:
        low, high = lowest, lowest + span
    if not shifted and _bytes(high - low) < _bytes(int(words.max())):
        offset = (low % (1 << 8 * width)).to_bytes(width, "little")
        return _begun(
            bytes([OFFSET]) + offset, _integers(words - np.frombuffer(offset, words.dtype), coder, shifted=True)
        )
    pairs = words.view(f"<u{width // 2}")
    if _bytes(int(words.max())) <= width // 2:
        return _begun(bytes([LOWER]), _plan(np.ascontiguousarray(pairs[0::2]), "int", coder))
    if not pairs[0::2].any():
        return _begun(bytes([UPPER]), _plan(np.ascontiguousarray(pairs[1::2]), "int", coder))
    return _planes(words, coder)


def _bytes(number: int) -> int:
    return -(-number.bit_length() // 8)
