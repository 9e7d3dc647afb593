"""Bodies written word by word as docs/format.md says, with plain loops: also those that no encoder here writes."""

from __future__ import annotations

from collections.abc import Sequence

BUCKETS = (16, 32, 256)
SEGMENTS = (1, 4, 8)


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def from_high(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


def from_low(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


def gamma(number: int) -> str:
    return "0" * (number.bit_length() - 1) + f"{number:b}"


def slots(frequencies: Sequence[int], k: int) -> list[tuple[int, int]]:
    """Entry and rank of each of the 65,536 slots."""
    w = 65536 // k
    rest = list(frequencies) + [0] * (k - len(frequencies))
    small = [i for i in range(k) if rest[i] < w]
    large = [i for i in range(k) if rest[i] >= w]
    below, other = [w] * k, [-1] * k
    while small and large:
        s, top = small.pop(), large[-1]
        below[s], other[s] = rest[s], top
        rest[top] -= w - rest[s]
        if rest[top] < w:
            small.append(large.pop())
    offset, begin = list(below), [0] * k
    for b in range(k):
        if below[b] < w:
            begin[b] = offset[other[b]]
            offset[other[b]] += w - below[b]
    found = []
    for z in range(65536):
        position, b = divmod(z, k)
        found.append((b, position) if position < below[b] else (other[b], position - below[b] + begin[b]))
    return found


def rans(
    symbols: Sequence[int],
    *,
    values: Sequence[int],
    tables: Sequence[Sequence[int]],
    k: int = 16,
    p: int = 8,
    lanes: int = 0,
    listed: bool = True,
    escape: bool = False,
    chosen: Sequence[int] | None = None,
    last: int = 0,
) -> bytes:
    """values: of the entries but the escape; tables: frequencies that sum to 2^p; lanes: log2 of their number; chosen:
    the table of each block of 1024; last: the entry that fills the last step."""
    known, n = len(values), len(symbols)
    chosen = chosen or [0] * -(-n // 1024)
    found = bytearray([16 + BUCKETS.index(k) + 4 * escape + 8 * (len(tables) > 1)])
    found += bytes([lanes + 8 * listed + 16 * p, len(tables[0]) - 1])
    found += bytes(values) if listed else bytes(values[:1])
    bits = "".join(gamma(f + 1) for table in tables for f in table[:-1])
    if len(tables) > 1:
        found += bytes([len(tables) - 1])
        wide = {2: 1, 3: 2, 4: 2}.get(len(tables), 3)
        bits += "".join(f"{t:0{wide}b}" for t in chosen)
    found += from_high(bits)
    entries = [values.index(s) if s in values else known for s in symbols]
    if escape:
        places = [i for i in range(n) if entries[i] == known]
        found += varint(len(places))
        for before, at in zip([0, *places], places, strict=False):
            found += varint(at - before) + bytes([symbols[at]])
    of_rank = [{who: z for z, who in enumerate(slots([f << 16 - p for f in t], k))} for t in tables]
    number = 1 << lanes
    states, words = [65536] * number, []
    entries += [last] * (-n % number)
    for i in range(len(entries) - 1, -1, -1):
        t = chosen[i // 1024]
        x, f = states[i % number], tables[t][entries[i]] << 16 - p
        if x >= f << 16:
            words.append(x % 65536)
            x //= 65536
        states[i % number] = (x // f << 16) + of_rank[t][entries[i], x % f]
    for x in states:
        found += x.to_bytes(4, "little")
    for word in reversed(words):
        found += word.to_bytes(2, "little")
    return bytes(found)


def words_of(lengths: dict[int, int]) -> dict[int, str]:
    """Canonical code words."""
    found, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in lengths.items() if length):
        code <<= length - before
        found[symbol] = f"{code:0{length}b}"
        code, before = code + 1, length
    return found


def huffman(symbols: Sequence[int], lengths: dict[int, int], segments: int = 1, *, listed: bool = False) -> bytes:
    found = bytearray([SEGMENTS.index(segments) + 4 * listed])
    first, last = min(lengths), max(lengths)
    run = list(lengths) if listed else list(range(first, last + 1))
    found += bytes([len(run) - 1, *sorted(run)]) if listed else bytes([first, len(run) - 1])
    found += from_high("".join(f"{lengths.get(s, 0):04b}" for s in sorted(run)))
    words, each = words_of(lengths), -(-len(symbols) // segments)
    parts = [from_low("".join(words[s] for s in symbols[i * each : (i + 1) * each])) for i in range(segments)]
    return bytes(found) + b"".join(map(varint, map(len, parts[:-1]))) + b"".join(parts)


def raw_parts(rests: Sequence[int], bits: int) -> bytes:
    found, at = bytearray(), 0
    for width in (32, 16, 8, 4, 2, 1):
        if not bits & width:
            continue
        part = [rest >> at & (1 << width) - 1 for rest in rests]
        at += width
        if width >= 8:
            found += b"".join(number.to_bytes(width // 8, "little") for number in part)
            continue
        for begin in range(0, len(part), 128):
            block = part[begin : begin + 128]
            t = -(-len(block) * width // 8)
            packed = bytearray(t)
            for j, number in enumerate(block):
                packed[j % t] |= number << width * (j // t)
            found += packed
    return bytes(found)


def cut(elements: Sequence[int], width: int, r: int, rotate: bool) -> tuple[list[int], bytes]:
    """Symbols; the body up to them."""
    w = 8 * width
    if rotate:
        elements = [(x << 1 | x >> w - 1) & (1 << w) - 1 for x in elements]
    return [x >> r for x in elements], bytes([2, r + 64 * rotate]) + raw_parts([x & (1 << r) - 1 for x in elements], r)
