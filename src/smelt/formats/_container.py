"""The bytes of a `.smelt` file; what they mean is in smelt.py, and all of it byte for byte in docs/format.md.

0   magic, version, length of the head, CRC-32 of all that with the head       16 bytes
16  head: the meta (JSON, deflated), the small leaves, a CRC-32 of each other leaf that is not sealed
..  the other leaves

A file that is written as it comes (_growing.py) has the other leaves first, and the head at its end.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.core.errors import FileError, ModelError
from smelt.core.output import check_output, replacing
from smelt.formats._words import WORDS
from smelt.native import crc32

MAGIC = b"\x8bsmelt"
VERSION = 1
AT_END = 1 << 15  # added to the version where the head is at the end
HEADER = struct.Struct("<6sHII")
SMALL = 256  # leaves of fewer bytes lie in the head
ALIGNED_FROM, ALIGNMENT = 4096, 64
DEPTH = 32  # of the meta
ELEMENTS = 1 << 48  # of one leaf or node
# A head of n bytes may hold a meta of at most 32 n + 2^16 bytes: what parses it needs ten times as much memory.
RATIO, ROOM = 32, 1 << 16

DTYPES: dict[str, torch.dtype] = {
    short: getattr(torch, name)
    for short, name in {
        "bool": "bool",
        **{f"{kind[0]}{n}": f"{kind}{n}" for n in (8, 16, 32, 64) for kind in ("uint", "int")},
        **{"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"},
        **{"f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "f8e8m0fnu": "float8_e8m0fnu"},
        **{"f8e4m3fnuz": "float8_e4m3fnuz", "f8e5m2fnuz": "float8_e5m2fnuz"},
        **{"c64": "complex64", "c128": "complex128"},
    }.items()
    if hasattr(torch, name)
}
SHORT = {dtype: short for short, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """Dtype and shape of a leaf or a node."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Byte streams need no alignment."""
        return self.nbytes >= ALIGNED_FROM and not (self.dtype == torch.uint8 and len(self.shape) == 1)


def layout(slots: Sequence[Slot], small_at: int, large_at: int) -> tuple[list[int], int]:
    """Offset of every leaf in the file, and the length of the file."""
    offsets = []
    for slot in slots:
        if slot.nbytes < SMALL:
            offsets.append(small_at)
            small_at += slot.nbytes
        else:
            large_at = begin(slot, large_at)
            offsets.append(large_at)
            large_at += slot.nbytes
    return offsets, large_at


def begin(slot: Slot, at: int) -> int:
    """Where a large leaf begins if the one before it ends at `at`."""
    return at + (-at % ALIGNMENT if slot.aligned else 0)


def write(
    path: Path,
    meta: Mapping[str, Any],
    leaves: Sequence[Tensor],
    *,
    sealed: Collection[int] = (),
    force: bool = False,
) -> int:
    """Write a file, complete or not at all; returns its bytes.

    Args:
        meta: plain data.
        leaves: dense tensors on the CPU.
        sealed: numbers of the leaves that need no checksum.
        force: replace an existing file.

    Raises:
        OutputError: the file exists, no space, not writable.
        ModelError: a leaf of a dtype that files do not have, meta that is no plain data.
    """
    check_output(path, force)
    blobs = [to_bytes(leaf) for leaf in leaves]
    slots = [Slot(leaf.dtype, tuple(leaf.shape)) for leaf in leaves]
    sums = [crc32(blob) for i, blob in enumerate(blobs) if len(blob) >= SMALL and i not in sealed]
    head = make_head(meta, [blob for blob in blobs if len(blob) < SMALL], sums)
    offsets, total = layout(slots, 0, HEADER.size + len(head))
    with replacing(path, force, total) as file:
        file.write(header_of(head, VERSION) + head)
        at = HEADER.size + len(head)
        for slot, offset, blob in zip(slots, offsets, blobs, strict=True):
            if slot.nbytes >= SMALL:
                file.write(bytes(offset - at))
                file.write(blob)
                at = offset + len(blob)
    return total


def make_head(meta: Mapping[str, Any], small: Iterable[bytes | memoryview], sums: Sequence[int]) -> bytes:
    """The head of plain data, the small leaves, and the checksums of the large ones that are not sealed."""
    rest = b"".join([*small, struct.pack(f"<{len(sums)}I", *sums)])
    return deflate(to_json(meta), len(rest)) + rest


def header_of(head: bytes, version: int) -> bytes:
    """The first bytes of a file with this head."""
    start = HEADER.pack(MAGIC, version, len(head), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(head, zlib.crc32(start)))


def to_bytes(leaf: Tensor) -> memoryview:
    """The elements of a tensor in row-major order, little-endian; no copy where it lies so already."""
    check_holds(leaf, "a leaf")
    flat = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(_swapped(flat.view(torch.uint8), leaf.dtype).numpy())  # type: ignore[arg-type]


def check_holds(tensor: Tensor, what: str) -> None:
    """Raise ModelError for a tensor that no file can hold."""
    if tensor.dtype not in SHORT or tensor.layout != torch.strided or tensor.is_meta:
        raise ModelError(f"{what} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; a file cannot hold it")


def _swapped(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes in file order from bytes in memory order, or back."""
    if sys.byteorder == "little":
        return flat
    part = dtype.itemsize // (2 if dtype.is_complex else 1)
    return flat.reshape(-1, part).flip(1).reshape(-1)


def to_json(meta: Any) -> bytes:
    """Compact JSON.  Raises ModelError for what is no plain data."""
    try:
        return json.dumps(_plain(meta, "", 0), separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ModelError("a text for the file holds half a surrogate pair") from None


def _plain(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        return value
    if depth >= DEPTH:
        raise ModelError(f"{where[:80]}: nested deeper than {DEPTH}")
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(value)]
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}: {value!r} is no plain data (text, numbers, lists, mappings)")
    for key in value:
        if not isinstance(key, str):
            raise ModelError(f"{where}: the key {key!r} is no text")
    return {key: _plain(inner, f"{where}.{key}".lstrip("."), depth + 1) for key, inner in value.items()}


def deflate(text: bytes, rest: int) -> bytes:
    """`text` as raw deflate; hardly compressed where a reader would refuse to believe it (`rest`: bytes beside it)."""
    tried = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED):
        c = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy, WORDS)
        tried.append(c.compress(text) + c.flush())
    packed = min(tried, key=len)
    if len(text) > RATIO * (len(packed) + rest) + ROOM:
        c = zlib.compressobj(0, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
        packed = c.compress(text) + c.flush()
    return packed


def _inflate(head: bytes) -> tuple[bytes, bytes]:
    """(text, what lies behind it in the head).  Raises ValueError."""
    most = RATIO * len(head) + ROOM
    d = zlib.decompressobj(-15, zdict=WORDS)
    try:
        text = d.decompress(head, most + 1)
    except zlib.error as error:
        raise ValueError(f"its meta cannot be inflated ({error})") from None
    if len(text) > most:
        raise ValueError("its meta is implausibly large")
    if not d.eof:
        raise ValueError("its meta is cut off")
    return text, d.unused_data


_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")


def from_json(data: bytes) -> Any:
    """Plain data from text that nobody vouches for: no duplicate keys, no endless nesting or digits.

    Raises:
        ValueError: anything else (UnicodeDecodeError among them).
    """
    text = data.decode()
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 21:
            raise ValueError("a number of too many digits")
        return int(digits)

    return json.loads(text, object_pairs_hook=once, parse_int=integer)


class Container:
    """An open file: its `meta`, and its leaves once `place` has said what they are.

    Raises:
        FileError: no file, a foreign or damaged one, or one of a later version; naming the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if not self.path.is_file():
                raise FileError(f"no such file: {str(path)!r}")
            with open(self.path, "rb") as file:
                start = file.read(HEADER.size)
                if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
                    raise self.error("no .smelt file")
                if len(start) < HEADER.size:
                    raise self.error("damaged: it ends within its header")
                # Private: a tensor on it can be written to, the file cannot.
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except FileError:
            raise
        except (OSError, ValueError) as error:
            raise FileError(f"{str(path)!r} cannot be read: {error}") from error
        self.nbytes = len(self._map)
        _, version, length, crc = HEADER.unpack(start)
        self.version: int = version % AT_END
        if self.version > VERSION:
            raise self.error(f"written by a newer smelt: format version {self.version}, this one reads up to {VERSION}")
        head_at = self.nbytes - length if version & AT_END else HEADER.size
        self._head_end = head_at + length
        self._large_at = HEADER.size if version & AT_END else self._head_end
        self._large_end = head_at if version & AT_END else self.nbytes
        if self.version < 1 or not HEADER.size <= head_at <= self._head_end <= self.nbytes:
            raise self.error("damaged: its header is wrong or it is cut off")
        head = bytes(self._map[head_at : self._head_end])
        if zlib.crc32(head, zlib.crc32(start[:-4])) != crc:
            raise self.error("damaged: the checksum of its head is wrong")
        try:
            text, rest = _inflate(head)
            self.meta: Any = from_json(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"damaged: {error}") from None
        self._small_at = self._head_end - len(rest)
        self._slots: list[Slot] = []
        self._offsets: list[int] = []
        self._sums: dict[int, int] = {}

    def error(self, text: str) -> FileError:
        return FileError(f"{str(self.path)!r}: {text}")

    def close(self) -> None:
        """Let go of the map; tensors on it keep it."""
        self._map = memoryview(b"")

    @property
    def closed(self) -> bool:
        return not self._map

    def place(self, slots: Sequence[Slot], sealed: Collection[int] = ()) -> None:
        """Say what the leaves are, and which need no checksum.  Raises FileError unless they fill the file exactly."""
        sizes = [slot.nbytes for slot in slots]
        small = sum(size for size in sizes if size < SMALL)
        checked = [i for i, size in enumerate(sizes) if size >= SMALL and i not in sealed]
        self._slots = list(slots)
        self._offsets, end = layout(slots, self._small_at, self._large_at)
        if self._head_end - self._small_at != small + 4 * len(checked) or end != self._large_end:
            raise FileError(f"its leaves would end at byte {end} instead of {self._large_end}, or its head elsewhere")
        sums = struct.unpack(f"<{len(checked)}I", self._map[self._small_at + small : self._head_end])
        self._sums = dict(zip(checked, sums, strict=True))

    def pieces(self, i: int, size: int) -> Iterator[memoryview]:
        """The bytes of leaf `i`, `size` at a time, each then released; its checksum is checked at the end."""
        begin, end, crc = self._offsets[i], self._offsets[i] + self._slots[i].nbytes, 0
        for at in range(begin, end, size):
            piece = self._map[at : min(at + size, end)]
            crc = crc32(piece, crc) if i in self._sums else 0
            yield piece
            self.release(i)
        self._check(i, crc)

    def _check(self, i: int, crc: int) -> None:
        if self._sums.get(i, crc) != crc:
            begin = self._offsets[i]
            raise FileError(f"the checksum of leaf {i} is wrong (bytes {begin} to {begin + self._slots[i].nbytes})")
        self._sums.pop(i, None)

    def leaf(self, i: int, *, own: bool = False) -> Tensor:
        """Leaf `i`, its checksum checked at the first time.

        Args:
            own: in memory of its own instead of on the mapped file.
        """
        slot, offset = self._slots[i], self._offsets[i]
        data: Any = self._map[offset : offset + slot.nbytes]
        if i in self._sums:
            self._check(i, crc32(data))
        if not slot.nbytes:
            return torch.empty(slot.shape, dtype=slot.dtype)
        if own or offset % slot.dtype.itemsize:
            data = bytearray(data)
        flat = torch.frombuffer(data, dtype=torch.uint8)
        if slot.dtype == torch.bool and int(flat.max()) > 1:
            raise FileError(f"leaf {i} holds truth values other than 0 and 1")
        return _swapped(flat, slot.dtype).view(slot.dtype).reshape(slot.shape)

    def release(self, i: int) -> None:
        """Let go of the memory that leaf `i` of the map takes, and of whatever was written to it there."""
        if hasattr(mmap, "MADV_DONTNEED") and self._slots[i].nbytes >= SMALL:
            first = self._offsets[i] // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.obj.madvise(mmap.MADV_DONTNEED, first, self._offsets[i] + self._slots[i].nbytes - first)  # type: ignore[attr-defined]

    def verify(self) -> None:
        """Check every leaf with a checksum that was not read yet.  Raises FileError for the first damaged one."""
        for i in list(self._sums):
            self.leaf(i)
