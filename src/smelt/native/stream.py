"""Streams of the entropy coder: elements, exactly, in chunks that are coded one by one (docs/format.md, "The entropy
stream").

The C library codes them, or NumPy where it was not built.  The bytes may differ; either decodes both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from smelt import native
from smelt.native import portable
from smelt.native._read import Reader, require, varint

SMALLEST, LARGEST = 8, 20  # log2 of the elements of a chunk
WIDTHS = (1, 2, 4, 8)
MOST = 1 << 49  # elements are fewer
TABLE, CHECKS, UNCOUNTED = 4, 8, 16
SMALL = 256  # bytes of a stream from which its chunks have checksums by default
CRC = 4
LEAST = 2  # bytes of a body
GROUPS = 4  # per thread, so that none waits long for another
DAMAGED, NO_MEMORY = -1, -2
LARGE, PAST_CACHE = 1 << 23, 3  # bytes that stay in no cache; the level for them (native.h)

_T = TypeVar("_T")
_NONE = np.empty(0, np.uint8)


def bound(count: int, width: int, chunk: int = LARGEST) -> int:
    """Most bytes that `encode` makes of `count` elements of `width` bytes in chunks of 2^chunk."""
    chunks = -(-count >> chunk) if count > 0 else 0
    return 9 + count * width + chunks * (1 + 2 * CRC)


def encode(
    elements: np.ndarray,
    kind: str = "int",
    *,
    coder: str = "auto",
    chunk: int = LARGEST,
    checks: bool | None = None,
    counted: bool = True,
    ends: bool = False,
    threads: int = 1,
) -> np.ndarray:
    """A stream that holds the elements.

    Args:
        elements: [n], contiguous, of 1, 2, 4 or 8 bytes; any dtype.
        kind: what they are: "int" (anything), "bool" (bytes 0 and 1), "f8" (floats of a byte), "e5" (float16), "e8"
            (bfloat16 or float32), "e11" (float64).
        coder: "rans" (smaller), "huffman", or "auto".
        chunk: log2 of the elements of a chunk, 8 to 20.
        checks: whether every chunk has a checksum; by default if the stream has 256 bytes or more.
        counted: whether the stream says how many elements it has.
        ends: whether it says where it ends even if it is a single chunk, so that something may follow it.
        threads: how many threads code; 0: as many as there are cores.  The bytes do not depend on it.

    Returns:
        uint8 [bytes].
    """
    width = elements.itemsize
    if elements.ndim != 1 or not elements.flags.c_contiguous or width not in WIDTHS:
        raise ValueError("elements: one dimension, contiguous, of 1, 2, 4 or 8 bytes each")
    if kind not in portable.KINDS or width not in portable.KINDS[kind][1] or coder not in portable.CODERS:
        raise ValueError(f"no coding of {width} bytes as {kind!r} with {coder!r}")
    if not SMALLEST <= chunk <= LARGEST or elements.size >= MOST:
        raise ValueError(f"no chunks of 2^{chunk} for {elements.size} elements")
    count = elements.size
    words = elements.view(f"u{width}")
    number = -(-count >> chunk) if count else 0
    table = number > 1 or ends
    # The head, the sizes of the chunks, and for each chunk as much room as it may need.
    head = bytes([0]) + (varint(count) if counted else b"") + bytes([chunk]) * table
    first = len(head) + 4 * number * table
    room, gap = CRC + _bound(min(count, 1 << chunk), width), 0 if checks is False else CRC
    stream = np.empty(first + number * room, np.uint8)
    groups = _in_groups(_writer(words, kind, coder, chunk, stream[first:], room, gap), number, threads)
    sizes = np.array([size for _, found in groups for size in found], np.int64)
    checks = bool(gap) and (bool(checks) or first + int(sizes.sum()) >= SMALL)
    end = first
    for place, found in groups:  # close up
        begin = first + place
        whole = [(0, sum(found) + gap * len(found))]
        for skip, size in whole if checks or not gap else [(gap, size) for size in found]:
            begin += skip
            if end != begin:
                stream[end : end + size] = stream[begin : begin + size]
            begin, end = begin + size, end + size
    stream[: len(head)] = np.frombuffer(head, np.uint8)
    stream[0] = WIDTHS.index(width) | TABLE * table | CHECKS * checks | UNCOUNTED * (not counted)
    if table:
        stream[len(head) : first] = (sizes + CRC * checks).astype("<u4").view(np.uint8)
    stream.resize(end, refcheck=False)
    return stream


def _bound(count: int, width: int) -> int:
    """Most bytes of a body."""
    return 1 + count * width


def _writer(
    words: np.ndarray, kind: str, coder: str, chunk: int, place: np.ndarray, room: int, gap: int
) -> Callable[[Sequence[int]], list[tuple[int, list[int]]]]:
    """What writes the bodies of some chunks one after another, each behind its checksum if there is a gap for it.

    It gives where they begin, which is where the first of them has its room, and their sizes.
    """
    library = native.coder()

    def body(i: int, to: int) -> int:
        here = words[i << chunk : (i + 1) << chunk]
        if library is None:
            coded = portable.encode_chunk(here, kind, coder)
            place[to : to + len(coded)] = np.frombuffer(coded, np.uint8)
            return len(coded)
        source, out = words.ctypes.data + (i << chunk) * words.itemsize, place.ctypes.data + to
        numbers = portable.KINDS[kind][0], portable.CODERS.index(coder)
        size: int = library.smelt_chunk_encode(source, here.size, words.itemsize, *numbers, out, room - CRC)
        _check(size)
        return size

    def write(chunks: Sequence[int]) -> list[tuple[int, list[int]]]:
        begin = to = chunks[0] * room
        sizes = []
        for i in chunks:
            size = body(i, to + gap)
            if gap:
                crc = native.crc32(place[to + gap : to + gap + size])
                place[to : to + gap] = np.frombuffer(crc.to_bytes(gap, "little"), np.uint8)
            sizes.append(size)
            to += gap + size
        return [(begin, sizes)]

    return write


def _check(result: int) -> None:
    """Raises what a result below 0 of the library means."""
    if result >= 0:
        return
    if result == NO_MEMORY:
        raise MemoryError("no memory to code a chunk")
    raise ValueError("damaged" if result == DAMAGED else f"the C library answers {result}")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_groups(work: Callable[[Sequence[int]], list[_T]], chunks: int, threads: int) -> list[_T]:
    """work(range of chunks) for all of them, by so many threads."""
    threads = min(threads or cores(), chunks)
    if threads <= 1:
        return work(range(chunks)) if chunks else []
    size = -(-chunks // (GROUPS * threads))
    groups = [range(begin, min(begin + size, chunks)) for begin in range(0, chunks, size)]
    with ThreadPoolExecutor(threads) as pool:
        return [item for items in pool.map(work, groups) for item in items]


class Stream:
    """A stream at the beginning of `buffer`, which is not copied.

    count, width: of the elements.
    checks: whether chunks have checksums.
    nbytes: bytes of the stream.  One without a table of chunks takes all there are.
    rest: bytes of the buffer behind it.

    Args:
        count: how many elements a stream that does not say it has.

    Raises ValueError: the head is damaged, or the buffer too short.
    """

    __slots__ = ("_at", "_bytes", "_chunk", "_last", "checks", "count", "nbytes", "rest", "width")

    def __init__(self, buffer: bytes | bytearray | memoryview | np.ndarray, count: int | None = None):
        self._bytes = np.frombuffer(buffer, np.uint8)
        self._last = (-1, _NONE)  # the chunk of which a part was wanted last, for whoever wants the next part
        reader = Reader(self._bytes)
        flags = reader.byte()
        require(flags < 2 * UNCOUNTED, "stream: no such flags")
        self.width = 1 << (flags & 3)
        if flags & UNCOUNTED and count is None:
            raise ValueError("stream: it does not say how many elements it has")
        self.count = count if flags & UNCOUNTED and count is not None else reader.varint()
        self.checks = bool(flags & CHECKS)
        self._chunk = LARGEST
        least = LEAST + CRC * self.checks
        # _at: where the chunks begin, and where the last ends
        if flags & TABLE:
            self._chunk = reader.byte()
            require(SMALLEST <= self._chunk <= LARGEST, "stream: no such size of chunks")
            chunks = -(-self.count >> self._chunk) if self.count else 0
            require(chunks * (CRC + least) <= reader.left, "stream: it ends too early")
            sizes = reader.take(4 * chunks).view("<u4")
            require(chunks == 0 or int(sizes.min()) >= least, "stream: a chunk is too short")
            ends = np.cumsum(sizes, dtype=np.int64) + reader.at
            self._at = [reader.at, *ends.tolist()]
            require(self._at[-1] <= reader.size, "stream: it ends too early")
        elif self.count:
            require(self.count <= 1 << LARGEST, "stream: too many elements for one chunk")
            require(reader.left >= least, "stream: it ends too early")
            self._at = [reader.at, reader.size]
        else:
            self._at = [reader.at]
        self.nbytes = self._at[-1]
        self.rest = reader.size - self.nbytes

    def decode_into(self, out: np.ndarray, start: int = 0, threads: int = 1) -> None:
        """Elements start to start + len(out) - 1, into `out`.

        Args:
            out: [m], contiguous and writable, elements as wide as those of the stream; any dtype.
            threads: as many decode; 0: as many as there are cores.

        Raises:
            ValueError: a chunk is damaged; `out` then holds anything.
        """
        if out.ndim != 1 or out.itemsize != self.width or not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(f"decoding needs one dimension, contiguous and writable, of {self.width} bytes each")
        if not 0 <= start <= start + out.size <= self.count:
            raise ValueError(f"no elements {start} to {start + out.size - 1} of {self.count}")
        if not out.size:
            return
        first, last = start >> self._chunk, (start + out.size - 1) >> self._chunk
        read = self._reader(out.view(f"u{self.width}"), start)

        def work(group: Sequence[int]) -> list[None]:
            for i in group:
                read(first + i)
            return []

        _in_groups(work, last - first + 1, threads)

    def _reader(self, out: np.ndarray, start: int) -> Callable[[int], None]:
        """What decodes a chunk into its place in `out`, or the part of it that is wanted."""
        library = native.coder()
        data, width, chunk = self._bytes, self.width, self._chunk
        at, to = data.ctypes.data, out.ctypes.data
        level = PAST_CACHE if out.nbytes >= LARGE else -1
        stop = start + out.size

        def decode(i: int, count: int, place: int) -> np.ndarray:
            """Chunk i at address `place`; without the library as an array instead."""
            begin, end = self._at[i], self._at[i + 1]
            crc = None
            if self.checks:
                begin += CRC
                crc = int.from_bytes(data[begin - CRC : begin], "little")
            if library is None:
                require(crc is None or native.crc32(data[begin:end]) == crc, "its checksum differs")
                return portable.decode_chunk(data[begin:end], count, width)
            if crc is None:
                _check(library.smelt_chunk_decode(at + begin, end - begin, place, count, width, level))
                return _NONE
            result = library.smelt_chunk_decode_checked(at + begin, end - begin, place, count, width, level, crc)
            require(result != DAMAGED or native.crc32(data[begin:end]) == crc, "its checksum differs")
            _check(result)
            return _NONE

        def read(i: int) -> None:
            low, high = i << chunk, min((i + 1) << chunk, self.count)
            try:
                if start <= low and high <= stop and library is not None:
                    decode(i, high - low, to + (low - start) * width)
                    return
                last, found = self._last
                if last != i:
                    found = np.empty(high - low, out.dtype)
                    decoded = decode(i, high - low, found.ctypes.data)
                    found = decoded if library is None else found
                    self._last = (i, found)
            except ValueError as error:
                raise ValueError(f"chunk {i}: {error}") from None
            a, b = max(low, start), min(high, stop)
            out[a - start : b - start] = found[a - low : b - low]

        return read
