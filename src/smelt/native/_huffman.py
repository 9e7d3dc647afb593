"""Huffman codes of byte symbols in NumPy: as docs/format.md says under "The entropy stream", code words of at most 12
bits, their highest bit first, in bytes that are filled from the lowest bit up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from smelt.native._read import Reader, require, varint

LONGEST = 12
SEGMENTS = (1, 4, 8)
LISTED = 4

DOUBLINGS = 5
STRIDE = 1 << DOUBLINGS  # symbols between the places that are found one after the other
BLOCK = 1 << 13  # bytes of which every bit is looked at at a time: they stay in the cache
BEYOND = STRIDE * LONGEST // 8 + 1  # bytes that a stride may reach beyond its block
WRITTEN = 1 << 18  # symbols written at a time


def lengths(counts: np.ndarray) -> np.ndarray:
    """Lengths of an optimal prefix code of at most 12 bits, by package-merge (Larmore & Hirschberg 1990,
    doi:10.1145/79147.79150).

    Args:
        counts: frequencies, [256], of at least two symbols; unused ones (0) get no code.

    Returns:
        int64 [256], 0 for unused symbols.
    """
    counts = np.asarray(counts)
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    found = np.zeros(len(counts), np.int64)
    weights = counts[order].astype(np.int64)
    merged, levels = weights, [np.ones(len(order), bool)]
    for _ in range(LONGEST - 1):
        pairs = merged[: len(merged) // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate((weights, pairs))
        rank = np.argsort(both, kind="stable")
        merged = both[rank]
        levels.append(rank < len(order))
    take = 2 * len(order) - 2
    for is_symbol in reversed(levels):
        used = int(np.count_nonzero(is_symbol[:take]))
        found[order[:used]] += 1
        take = 2 * (take - used)
    return found


def plan(counts: np.ndarray) -> tuple[float, Callable[[np.ndarray], bytes]]:
    """For symbols that occur `counts` [256] times: their size in bytes, nearly, and what encodes them."""
    found, total = lengths(counts), int(counts.sum())
    way = 0 if total < 1 << 10 else 1 if total < 1 << 14 else 2
    used = np.flatnonzero(found)
    first, span = int(used[0]), int(used[-1] - used[0]) + 1
    if (span + 1) // 2 + 1 <= len(used) + (len(used) + 1) // 2:
        head = bytes([way, first, span - 1]) + _nibbles(found[first : first + span])
    else:
        head = bytes([way + LISTED, len(used) - 1]) + used.astype(np.uint8).tobytes() + _nibbles(found[used])
    size = len(head) + float(counts @ found) / 8 + 2.5 * SEGMENTS[way] - 2
    return size, lambda symbols: head + _write(symbols, found, SEGMENTS[way])


def decode(reader: Reader, count: int) -> np.ndarray:
    """The symbols, uint8 [count].  They reach to the end.  Raises ValueError: they are damaged."""
    how = reader.byte()
    require(how & 3 < 3 and how < 8, "Huffman: no such way of coding")
    table = _table(reader, bool(how & LISTED))
    segments = SEGMENTS[how & 3]
    each = -(-count // segments)
    counts = [min(each, max(0, count - each * i)) for i in range(segments)]
    sizes = [reader.varint() for _ in range(segments - 1)]
    coded = reader.rest()
    sizes.append(coded.size - sum(sizes))
    require(sizes[-1] >= 0, "Huffman: it ends too early")
    fits = all(n <= 8 * s <= LONGEST * n + 7 for n, s in zip(counts, sizes, strict=True))
    require(fits, "Huffman: a segment has another length")
    return _walk(coded, counts, sizes, table)


def _table(reader: Reader, listed: bool) -> np.ndarray:
    """For the next 12 bits, the first of them the lowest: symbol + 256 * length, uint16 [4096]."""
    first = 0 if listed else reader.byte()
    number = reader.byte() + 1
    require(first + number <= 256, "Huffman: a symbol above 255")
    symbols = reader.take(number) if listed else np.arange(first, first + number, dtype=np.uint8)
    require(bool((symbols[1:] > symbols[:-1]).all()), "Huffman: symbols out of order")
    nibbles = reader.take((number + 1) // 2)
    long = np.stack((nibbles >> 4, nibbles & 15), 1).reshape(-1)
    require(not long[number:].any(), "Huffman: bits left over")
    require(int(long.max()) <= LONGEST, "Huffman: a code word of more than 12 bits")
    long = long[:number]
    order = np.argsort(long, kind="stable")
    order = order[long[order] > 0]
    share = 1 << (LONGEST - long[order].astype(np.int64))
    require(int(share.sum()) == 1 << LONGEST, "Huffman: the code is not complete")
    upright = np.repeat(symbols[order] | long[order].astype(np.uint16) << 8, share)
    return upright.take(_reversed(np.arange(1 << LONGEST)))


def _reversed(numbers: np.ndarray) -> np.ndarray:
    """12-bit numbers with their bits in the other order."""
    found = np.zeros_like(numbers)
    for bit in range(LONGEST):
        found |= (numbers >> bit & 1) << (LONGEST - 1 - bit)
    return found


def _walk(coded: np.ndarray, counts: list[int], sizes: list[int], table: np.ndarray) -> np.ndarray:
    """Decode all segments: how far 32 symbols reach from every bit on tells where strides of 32 begin; then all strides
    are decoded side by side."""
    entries, jumps = _every_bit(coded, table)
    ahead = jumps.data
    begins: list[int] = []
    ends = np.cumsum([-(-count // STRIDE) for count in counts])
    stop = 0
    for size, end in zip(sizes, ends, strict=True):
        at, stop = 8 * stop, stop + size
        while len(begins) < end:
            require(at < 8 * stop, "Huffman: it ends too early")
            begins.append(at)
            at += ahead[at]
    places = np.array(begins, np.int64)
    found = np.empty((len(begins), STRIDE), np.uint8)
    for step in range(STRIDE):
        entry = entries[places]
        found[:, step] = entry
        places = np.minimum(places + (entry >> 8), entries.size - 1)
    long = np.zeros(256, np.int64)
    long[table & 255] = table >> 8
    segments, stop = [], 0
    for count, size, last in zip(counts, sizes, ends, strict=True):
        first, stop = int(last) - -(-count // STRIDE), stop + size
        segments.append(found[first:last].reshape(-1)[:count])
        if count:
            bits = begins[last - 1] + int(long[found[last - 1, : (count - 1) % STRIDE + 1]].sum())
            require(-(-bits // 8) == stop, "Huffman: a segment has another length")
            require(bits % 8 == 0 or not coded[stop - 1] >> bits % 8, "Huffman: bits left over")
    return np.concatenate(segments)


def _every_bit(coded: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every bit of the bytes `coded`: the entry of the table, uint16, and how many bits 32 symbols take from there
    on, uint16.  Behind the end zeros are read; one more entry is for the end."""
    padded = np.zeros(coded.size + BEYOND + 3, np.uint8)
    padded[: coded.size] = coded
    entries = np.full(8 * coded.size + 1, table[0])
    jumps = np.empty(8 * coded.size, np.uint16)
    shifts = np.arange(8, dtype=np.uint32)
    for begin in range(0, coded.size, BLOCK):
        here = padded[begin : begin + BLOCK + BEYOND + 2].astype(np.uint32)
        window = here[:-2] | here[1:-1] << 8 | here[2:] << 16
        entry = table[(window[:, None] >> shifts).reshape(-1) & ((1 << LONGEST) - 1)]
        place = np.arange(entry.size, dtype=np.int32)
        after = np.minimum(place + (entry >> 8), entry.size - 1)
        for _ in range(DOUBLINGS):
            after = after[after]
        size = 8 * min(BLOCK, coded.size - begin)
        entries[8 * begin : 8 * begin + size] = entry[:size]
        jumps[8 * begin : 8 * begin + size] = (after - place)[:size]
    return entries, jumps


def _nibbles(long: np.ndarray) -> bytes:
    even = np.append(long, 0)[: (len(long) + 1) // 2 * 2].astype(np.uint8).reshape(-1, 2)
    return (even[:, 0] << 4 | even[:, 1]).tobytes()


def _write(symbols: np.ndarray, long: np.ndarray, segments: int) -> bytes:
    each = -(-len(symbols) // segments)
    code = codes(long)
    parts = [_segment(symbols[i * each : (i + 1) * each], code, long) for i in range(segments)]
    return b"".join([varint(len(part)) for part in parts[:-1]] + parts)


def codes(long: np.ndarray) -> np.ndarray:
    """Canonical code words, uint64 [256], the first bit the lowest, of lengths [256]."""
    order = np.argsort(long, kind="stable")
    order = order[long[order] > 0]
    share = 1 << (LONGEST - long[order])
    found = np.zeros(len(long), np.uint64)
    found[order] = _reversed(np.cumsum(share) - share)
    return found


def _segment(symbols: np.ndarray, code: np.ndarray, long: np.ndarray) -> bytes:
    """Four code words are joined to at most 48 bits, which are then laid over 64-bit words."""
    length = long.astype(np.uint64)
    total = int(np.bincount(symbols, minlength=256) @ long)
    words = np.zeros(total // 64 + 2, np.uint64)
    begin = 0
    for first in range(0, len(symbols), WRITTEN):
        block = symbols[first : first + WRITTEN]
        number, bits = code[block], length[block]
        for _ in range(2):
            if len(bits) % 2:
                number, bits = np.append(number, np.uint64(0)), np.append(bits, np.uint64(0))
            number, bits = number[::2] | number[1::2] << bits[::2], bits[::2] + bits[1::2]
        stops = np.cumsum(bits, dtype=np.int64) + begin
        at = stops - bits.astype(np.int64)
        begin = int(stops[-1])
        shift = (at & 63).astype(np.uint64)
        _lay(words, at >> 6, number << shift)
        _lay(words, (at >> 6) + 1, number >> np.uint64(1) >> (np.uint64(63) - shift))
    return words.astype("<u8").tobytes()[: -(-total // 8)]


def _lay(words: np.ndarray, at: np.ndarray, bits: np.ndarray) -> None:
    """words[at] |= bits, where `at` ascends with repetitions."""
    first = np.flatnonzero(np.diff(at, prepend=-1))
    words[at[first]] |= np.bitwise_or.reduceat(bits, first)
