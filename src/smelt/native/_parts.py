"""Elements cut into symbols and raw bits, and binary16 in binary32 (docs/format.md, "The entropy stream")."""

from __future__ import annotations

import functools

import numpy as np

from smelt.native._read import Reader, require

PACK = 128  # elements of a block of narrow parts


def rotated(words: np.ndarray) -> np.ndarray:
    """Words rotated left by one bit: a sign becomes the lowest bit, the exponent the highest ones."""
    return words << 1 | words >> 8 * words.itemsize - 1


def widths(bits: int) -> list[int]:
    """The parts that so many raw bits are cut into, the widest first."""
    return [width for width in (32, 16, 8, 4, 2, 1) if bits & width]


def parts_size(count: int, bits: int) -> int:
    """Bytes of the raw parts of `count` elements."""
    blocks, last = divmod(count, PACK)
    return sum(count * w // 8 if w >= 8 else blocks * 16 * w + (last * w + 7) // 8 for w in widths(bits))


def cut(words: np.ndarray, bits: int) -> bytes:
    """The lowest `bits` bits of every word, as raw parts."""
    found, at = [], 0
    for width in widths(bits):
        part = words >> at
        if width >= 8:
            found.append(part.astype(f"<u{width // 8}").tobytes())
        else:
            found.append(_pack(part.astype(np.uint8) & (1 << width) - 1, width))
        at += width
    return b"".join(found)


def join(reader: Reader, words: np.ndarray, bits: int) -> None:
    """Fills the lowest `bits` bits of words [m], which are 0, from raw parts.  Raises ValueError: they are damaged."""
    count, at = len(words), 0
    for width in widths(bits):
        data = reader.take(parts_size(count, width))
        part = data.view(f"<u{width // 8}") if width >= 8 else _unpack(data, count, width)
        words |= part.astype(words.dtype) << at
        at += width


def _pack(values: np.ndarray, width: int) -> bytes:
    whole = len(values) // PACK * PACK
    return _pack_blocks(values[:whole].reshape(-1, PACK), width) + _pack_blocks(values[None, whole:], width)


def _pack_blocks(blocks: np.ndarray, width: int) -> bytes:
    """Blocks [n, b] of numbers, uint8, of `width` bits."""
    size = -(-blocks.shape[1] * width // 8)
    found = np.zeros((len(blocks), size), np.uint8)
    for i in range(8 // width):
        piece = blocks[:, i * size : (i + 1) * size]
        found[:, : piece.shape[1]] |= piece << i * width
    return found.tobytes()


def _unpack(data: np.ndarray, count: int, width: int) -> np.ndarray:
    whole = count // PACK * PACK
    found = np.empty(count, np.uint8)
    size = whole * width // 8
    _unpack_blocks(data[:size].reshape(-1, 2 * 8 * width), found[:whole].reshape(-1, PACK), width)
    _unpack_blocks(data[None, size:], found[None, whole:], width)
    return found


def _unpack_blocks(data: np.ndarray, found: np.ndarray, width: int) -> None:
    size = data.shape[1]
    for i in range(8 // width):
        numbers = data >> i * width & (1 << width) - 1
        wanted = min(size, max(0, found.shape[1] - i * size))
        found[:, i * size : i * size + wanted] = numbers[:, :wanted]
        require(not numbers[:, wanted:].any(), "bits left over")


@functools.cache
def singles() -> np.ndarray:
    """Of every binary16 number the same binary32 number, both as bits: uint32 [65536].  A NaN's payload moves up."""
    half = np.arange(1 << 16, dtype=np.uint16)
    nan = half & 0x7FFF > 0x7C00
    found = np.where(nan, 0, half).astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    wide = half.astype(np.uint32)
    return np.where(nan, (wide & 0x8000) << 16 | 0x7F800000 | (wide & 0x3FF) << 13, found)


def halves(words: np.ndarray) -> np.ndarray | None:
    """The binary16 numbers, uint16 [m], that binary32 numbers, uint32 [m], are exactly, or None."""
    for some in (words[:1024], words):
        numbers = some.view(np.float32)
        with np.errstate(all="ignore"):
            found = numbers.astype(np.float16).view(np.uint16)
        nan = some & 0x7FFFFFFF > 0x7F800000
        if nan.any():
            found[nan] = (some[nan] >> 16 & 0x8000 | 0x7C00 | some[nan] >> 13 & 0x3FF).astype(np.uint16)
        if not np.array_equal(singles()[found], some):
            return None
    return found
