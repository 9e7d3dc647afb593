"""rANS (Duda 2013, arXiv:1311.2540) of byte symbols in NumPy, all lanes side by side: as docs/format.md says under
"The entropy stream"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smelt.native._alias import BUCKETS, SLOT_BITS, SLOTS, deal
from smelt.native._read import Reader, require, varint

CODER = 16
ESCAPES, SEVERAL = 4, 8  # in the first byte
LISTED = 8  # in the second
BLOCK = 1024
TABLES = 8
LEAST, MOST = 8, 14  # bits of the sum of the frequencies
FEW = 16  # fewer lanes are decoded one after the other
FIRST = 1 << 16  # the state of a lane at the encoder's begin, the decoder's end

LANE_LOG = 7
STEPS = 2048  # where there are more, lanes are added for speed
PER_LANE = 400  # bytes that are worth another lane
ESCAPED = 1 / 16  # of the symbols, at most, so that escapes are looked at


class Escapes(NamedTuple):
    """Symbols that have no entry: where they are, ascending, int64 [e]; which, uint8 [e]."""

    at: np.ndarray
    symbols: np.ndarray


# ---- decoding


def decode(reader: Reader, count: int) -> np.ndarray:
    """The symbols, uint8 [count].  They reach to the end.  Raises ValueError: they are damaged."""
    how, second, number = reader.byte(), reader.byte(), reader.byte() + 1
    require(how & ~15 == CODER and how & 3 < 3, "rANS: no such way of coding")
    buckets, lanes, precision = BUCKETS[how & 3], 1 << (second & 7), second >> 4
    require(LEAST <= precision <= MOST, "rANS: no such precision")
    require(2 <= number <= buckets, "rANS: no such number of entries")
    known = number - bool(how & ESCAPES)
    values = np.zeros(256, np.uint8)
    if second & LISTED:
        values[:known] = reader.take(known)
    else:
        first = reader.byte()
        require(first + known <= 256, "rANS: a value above 255")
        values[:known] = np.arange(first, first + known)
    tables = reader.byte() + 1 if how & SEVERAL else 1
    require(tables <= TABLES and (tables > 1 or not how & SEVERAL), "rANS: no such number of tables")
    frequencies, chosen = _frequencies(reader, tables, number, precision, count)
    escapes = _escapes(reader, count) if how & ESCAPES else None
    dealt = [deal(f << (SLOT_BITS - precision), buckets) for f in frequencies]
    slots = _walk(reader, lanes, count, np.stack([steps for _, steps in dealt]), chosen)
    entries = dealt[0][0][slots] if tables == 1 else _entries(slots, [who for who, _ in dealt], chosen)
    found: np.ndarray = values[entries]
    if escapes is not None:
        require(np.array_equal(np.flatnonzero(entries == known), escapes.at), "rANS: escapes at other places")
        found[escapes.at] = escapes.symbols
    return found


def _frequencies(
    reader: Reader, tables: int, number: int, precision: int, count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The frequencies of the entries of every table, and the number of the table of every block."""
    wide, blocks = (tables - 1).bit_length(), -(-count // BLOCK)
    most = tables * (number - 1) * (2 * MOST + 1) + blocks * wide
    ahead = reader.data[reader.at : reader.at + most // 8 + 1]
    bits = (np.unpackbits(ahead) + np.uint8(48)).tobytes().decode()
    at, found = 0, []
    for _ in range(tables):
        frequencies = np.zeros(number, np.int64)
        for entry in range(number - 1):
            one = bits.find("1", at)
            require(0 <= one - at <= MOST and 2 * one - at < len(bits), "rANS: no such frequency")
            frequencies[entry] = int(bits[one : 2 * one - at + 1], 2) - 1
            at = 2 * one - at + 1
        frequencies[-1] = (1 << precision) - int(frequencies.sum())
        right = int(frequencies[-1]) >= 0 and int(frequencies.max()) < 1 << precision
        require(right, "rANS: the frequencies have another sum")
        found.append(frequencies)
    end = at + blocks * wide
    require(end <= len(bits), "rANS: it ends too early")
    chosen = np.zeros(blocks, np.int64)
    for place in range(wide):
        chosen = 2 * chosen + (np.frombuffer(bits[at + place : end : wide].encode(), np.uint8) - 48)
    require(int(chosen.max()) < tables, "rANS: no such table")
    size = -(-end // 8)
    require("1" not in bits[end : 8 * size], "rANS: bits left over")
    reader.take(size)
    return found, chosen


def _escapes(reader: Reader, count: int) -> Escapes:
    number = reader.varint()
    require(number <= count and 2 * number <= reader.left, "rANS: more escapes than symbols")
    places, symbols = np.empty(number, np.int64), np.empty(number, np.uint8)
    at = 0
    for i in range(number):
        gap = reader.varint()
        require(gap > 0 or i == 0, "rANS: escapes out of order")
        at += gap
        require(at < count, "rANS: an escape beyond the end")
        places[i], symbols[i] = at, reader.byte()
    return Escapes(places, symbols)


def _walk(reader: Reader, lanes: int, count: int, tables: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The slots of the symbols, uint16 [count].

    tables: frequency + 65,536 * rank of every slot, uint32 [tables, 65536]; chosen: the table of every block.
    """
    states = reader.take(4 * lanes).view("<u4").copy()
    require(int(states.min()) >= FIRST, "rANS: a state below its least")
    coded = reader.rest()
    require(coded.size % 2 == 0, "rANS: half a word")
    steps = -(-count // lanes)
    require(coded.size <= 2 * steps * lanes, "rANS: more words than symbols")
    words = coded.view("<u2").copy()  # aligned
    walk = _one_by_one if lanes < FEW else _side_by_side
    slots = np.empty((steps, lanes), np.uint16)
    states, used = walk(states, words, tables, chosen, slots)
    require(used == words.size, "rANS: words left over")
    require(bool((states == FIRST).all()), "rANS: a lane does not end where it began")
    return slots.reshape(-1)[:count]


def _side_by_side(
    states: np.ndarray, words: np.ndarray, tables: np.ndarray, chosen: np.ndarray, slots: np.ndarray
) -> tuple[np.ndarray, int]:
    """Fills slots [steps, lanes]; the last states, and how many words were used."""
    halves = states.view("<u2")
    low, high = halves[0::2], halves[1::2]
    step = np.empty(len(states), np.uint32)
    frequency, rank = step.view("<u2")[0::2], step.view("<u2")[1::2]
    per_block, at, left = BLOCK // len(states), 0, words.size
    words = words.astype(np.uint32)
    for block, number in enumerate(chosen):
        table = tables[number]
        for slot in slots[block * per_block : (block + 1) * per_block]:
            slot[:] = low
            table.take(slot, out=step, mode="clip")
            np.multiply(frequency, high, out=states, dtype=np.uint32)
            states += rank
            empty = (high == 0).nonzero()[0]
            if empty.size > left:
                raise ValueError("rANS: it ends too early")
            states[empty] = states[empty] << 16 | words[at : at + empty.size]
            at += empty.size
            left -= empty.size
    return states, at


def _one_by_one(
    states: np.ndarray, words: np.ndarray, tables: np.ndarray, chosen: np.ndarray, slots: np.ndarray
) -> tuple[np.ndarray, int]:
    """The same for a few lanes, which is faster so."""
    lanes = [int(x) for x in states]
    flat, coming = slots.reshape(-1).data, words.data
    at = 0
    for block, number in enumerate(chosen):
        table = tables[number].data
        for i in range(block * BLOCK, min((block + 1) * BLOCK, slots.size)):
            state = lanes[i % len(lanes)]
            flat[i] = slot = state & 65535
            step = table[slot]
            state = (step & 65535) * (state >> 16) + (step >> 16)
            if state < FIRST:
                if at == words.size:
                    raise ValueError("rANS: it ends too early")
                state = state << 16 | coming[at]
                at += 1
            lanes[i % len(lanes)] = state
    return np.array(lanes, np.uint32), at


def _entries(slots: np.ndarray, tables: list[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    found = np.empty(slots.size, np.uint8)
    for block, number in enumerate(chosen):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        found[here] = tables[number][slots[here]]
    return found


# ---- encoding, with one table


@dataclass(frozen=True)
class Model:
    """How symbols are coded: K, log2 of the lanes, p; the values of the entries, int64 [n]; whether one more entry is
    the escape; the frequencies of all entries, which sum to 2^p; and the size in bytes, nearly."""

    buckets: int
    lanes: int
    precision: int
    values: np.ndarray
    escapes: bool
    frequencies: np.ndarray
    size: float


def plan(counts: np.ndarray) -> tuple[float, Callable[[np.ndarray], bytes]]:
    """For symbols that occur `counts` [256] times: their size in bytes, nearly, and what encodes them."""
    best = min(_models(counts), key=lambda model: model.size)
    return best.size, lambda symbols: _encode(symbols, best)


def _models(counts: np.ndarray) -> list[Model]:
    """One without escapes, and with escapes those of fewer buckets."""
    used, total = np.flatnonzero(counts), int(counts.sum())
    if len(used) == 1:
        used = np.sort(np.append(used, used[0] ^ 1))
    by_count = used[np.argsort(-counts[used], kind="stable")]
    found: list[Model] = []
    for buckets in BUCKETS:
        if len(used) <= buckets:
            return [*found, _fit(counts, total, used, False, buckets)]
        kept = np.sort(by_count[: buckets - 1])
        if total - int(counts[kept].sum()) <= ESCAPED * total:
            found.append(_fit(counts, total, kept, True, buckets))
    return found


def _fit(counts: np.ndarray, total: int, values: np.ndarray, escapes: bool, buckets: int) -> Model:
    span = int(values[-1] - values[0]) + 1
    if span + escapes <= buckets and span - len(values) <= 8 * len(values):
        values = np.arange(values[0], values[-1] + 1)
    weights = counts[values].astype(float)
    if len(values) == 2:
        weights = np.maximum(weights, 1e-3)  # both entries are needed
    extra = 0.0
    if escapes:
        rare = total - float(weights.sum())
        weights = np.append(weights, rare)
        extra = 3 + rare * (2 if total < 128 * rare else 3)
    best: Model | None = None
    for precision in range(LEAST, MOST + 1):
        frequencies = _normalise(weights, precision)
        kept = weights > 0
        bits = float((weights[kept] * (precision - np.log2(frequencies[kept]))).sum())
        bits += sum(2 * int(f + 1).bit_length() - 1 for f in frequencies[:-1])
        lanes = min(LANE_LOG, int(max(bits / 8 / PER_LANE, total / STEPS)).bit_length())
        size = 4 + (0 if _run(values) else len(values) - 1) + extra + 3 * (1 << lanes) + bits / 8
        if best is not None and size > best.size:
            break
        best = Model(buckets, lanes, precision, values, escapes, frequencies, size)
    assert best is not None
    return best


def _run(values: np.ndarray) -> bool:
    return int(values[-1] - values[0]) + 1 == len(values)


def _normalise(weights: np.ndarray, precision: int) -> np.ndarray:
    """Frequencies, int64, that sum to 2^precision, at least 1 where there is a weight."""
    total = 1 << precision
    used = weights > 0
    found: np.ndarray = np.floor(weights * (total / weights.sum()) + 0.5).astype(np.int64)
    found[used] = np.clip(found[used], 1, total - 1)
    while missing := total - int(found.sum()):
        change = 1 if missing > 0 else -1
        able = np.flatnonzero(used & (found + change >= 1) & (found + change < total))
        gain = weights[able] * np.log2((found[able] + change) / found[able])
        able = able[np.argsort(-gain, kind="stable")[: abs(missing)]]
        found[able] += change
    return found


def _encode(symbols: np.ndarray, model: Model) -> bytes:
    lanes, listed = 1 << model.lanes, not _run(model.values)
    how = CODER + BUCKETS.index(model.buckets) + ESCAPES * model.escapes
    second = model.lanes + LISTED * listed + (model.precision << 4)
    parts = [bytes([how, second, len(model.frequencies) - 1])]
    parts.append(model.values.astype(np.uint8).tobytes() if listed else bytes([int(model.values[0])]))
    parts.append(_gamma(model.frequencies[:-1]))
    known = len(model.values)
    entry_of = np.full(256, known, np.int64)
    entry_of[model.values] = np.arange(known)
    entries = entry_of[symbols]
    if model.escapes:
        at = np.flatnonzero(entries == known)
        parts.append(varint(len(at)))
        gaps = np.diff(at, prepend=0).tolist()
        parts += [varint(gap) + bytes([symbol]) for gap, symbol in zip(gaps, symbols[at].tolist(), strict=True)]
    steps = -(-len(symbols) // lanes)
    rows = np.full(steps * lanes, int(model.frequencies.argmax()))
    rows[: len(symbols)] = entries
    in_slots = model.frequencies << (SLOT_BITS - model.precision)
    states, words = _states(rows.reshape(steps, lanes), in_slots, model.buckets)
    return b"".join((*parts, states.astype("<u4").tobytes(), words.astype("<u2").tobytes()))


def _states(rows: np.ndarray, frequencies: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The states of the lanes and the words, both as the decoder begins, for entries [steps, lanes]."""
    who, steps = deal(frequencies, buckets)
    begin = np.cumsum(frequencies) - frequencies
    slot_of = np.empty(SLOTS, np.uint32)  # of the ranks of all entries
    slot_of[begin[who] + (steps >> SLOT_BITS)] = np.arange(SLOTS, dtype=np.uint32)
    frequency, first = frequencies.astype(np.uint32)[rows], begin.astype(np.uint32)[rows]
    states = np.full(rows.shape[1], FIRST, np.uint32)
    high = states.view("<u2")[1::2]
    words = []
    for step in range(len(rows) - 1, -1, -1):
        f = frequency[step]
        full = (high >= f).nonzero()[0]
        written = states[full]
        words.append(written.astype(np.uint16))
        states[full] = written >> 16
        quotient, rank = np.divmod(states, f)
        rank += first[step]
        states[:] = quotient << 16 | slot_of[rank]
    return states, np.concatenate(words[::-1])


def _gamma(numbers: np.ndarray) -> bytes:
    """Gamma codes (Elias 1975, doi:10.1109/TIT.1975.1055349) of numbers + 1, from the highest bit of each byte down."""
    codes = (f"{int(n) + 1:b}" for n in numbers)
    bits = "".join("0" * (len(code) - 1) + code for code in codes)
    size = -(-len(bits) // 8)
    return int(bits.ljust(8 * size, "0"), 2).to_bytes(size, "big")
