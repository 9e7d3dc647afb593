"""`.safetensors`: the container of checkpoints, read with every claim of its header checked.

0     N, u64, little-endian
8     header, N bytes: a JSON object {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...,
      "__metadata__": {text: text}}, filled up with spaces
8+N   the tensors one after another, without gaps; offsets count from here
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smelt.core.errors import FileError
from smelt.core.named import first_line
from smelt.formats._container import DTYPES, SHORT, from_json
from smelt.formats._meta import brief

HEADER = 100_000_000  # bytes of a header at most, as in the safetensors library
METADATA = "__metadata__"
ORIGIN = {"header": str, "bytes": int, "sha256": str}

# bits of an element, and what files of ours call it
KINDS = {
    **{"BOOL": (8, "bool"), "F16": (16, "f16"), "BF16": (16, "bf16"), "F32": (32, "f32"), "F64": (64, "f64")},
    **{f"{kind}{n}": (n, f"{kind.lower()}{n}") for kind in "UI" for n in (8, 16, 32, 64)},
    **{"F8_E4M3": (8, "f8e4m3fn"), "F8_E5M2": (8, "f8e5m2"), "F8_E8M0": (8, "f8e8m0fnu"), "C64": (64, "c64")},
    **{"F8_E4M3FNUZ": (8, "f8e4m3fnuz"), "F8_E5M2FNUZ": (8, "f8e5m2fnuz")},
    **{"F4": (4, ""), "F6_E2M3": (6, ""), "F6_E3M2": (6, "")},
}
NAMES = {short: name for name, (_, short) in KINDS.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a header; `begin` and `end` count from the first tensor's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for what PyTorch lacks."""
        return DTYPES.get(KINDS.get(self.dtype, (0, ""))[1])


@dataclass(frozen=True)
class Header:
    """A header as it lies in the file, and what it says: the tensors in the order of their offsets."""

    text: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str] | None

    @property
    def raw(self) -> bytes:
        """The file up to the first tensor."""
        text = self.text.encode()
        return struct.pack("<Q", len(text)) + text

    @property
    def data_bytes(self) -> int:
        return self.entries[-1].end if self.entries else 0


@dataclass(frozen=True)
class Origin:
    """The file that a packed one stands for: its header, its size, and the SHA-256 of its bytes in hexadecimal."""

    header: Header
    nbytes: int
    sha256: str

    def to_plain(self) -> dict[str, Any]:
        return {"header": self.header.text, "bytes": self.nbytes, "sha256": self.sha256}

    @staticmethod
    def read(data: Any) -> Origin:
        """The inverse of `to_plain`.  Raises FileError."""
        if not isinstance(data, dict) or {k: type(v) for k, v in data.items()} != ORIGIN:
            raise FileError(f"{brief(data)} is no origin")
        text = data["header"].encode()
        if not re.fullmatch("[0-9a-f]{64}", data["sha256"]):
            raise FileError(f"{brief(data['sha256'])} is no SHA-256")
        return Origin(parse(text, data["bytes"] - 8 - len(text)), data["bytes"], data["sha256"])


def name_of(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype, e.g. 'BF16'."""
    return NAMES.get(SHORT[dtype], SHORT[dtype].upper())


def parse(text: bytes, size: int) -> Header:
    """The header of a checkpoint with `size` bytes of tensors.

    Raises:
        FileError: what could not be restored byte for byte, or that the safetensors library refuses too: no JSON,
            a key that stands twice, sizes that do not fit shapes, tensors that overlap, leave holes or end elsewhere.
    """
    try:
        data = from_json(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"its header is no JSON as safetensors has it: {first_line(error)}") from None
    if not isinstance(data, dict) or not text.startswith(b"{"):
        raise FileError(f"its header is {brief(text[:40])}; it must be a JSON object and begin with '{{'")
    metadata = data.pop(METADATA, None)
    if metadata is not None:
        wrong = not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values())
        if wrong:
            raise FileError(f"its {METADATA} is {brief(metadata)}; it must be an object of texts")
    entries = sorted((_entry(name, info) for name, info in data.items()), key=lambda e: (e.begin, e.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            how = "leaves a hole behind" if entry.begin > at else "overlaps"
            raise FileError(
                f"tensor {brief(entry.name)} begins at byte {entry.begin} and {how} the one before, which ends at {at}"
            )
        at = entry.end
    if at != size:
        raise FileError(f"its tensors end at byte {at} by its header, and {size} bytes of tensors are there")
    return Header(text.decode(), tuple(entries), metadata)


def _entry(name: str, info: Any) -> Entry:
    where = f"tensor {brief(name)}"
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= set(info):
        raise FileError(f"{where} is {brief(info)}; it needs dtype, shape and data_offsets")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FileError(f"{where}: its name holds half a surrogate pair") from None
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str):
        raise FileError(f"{where}: its dtype is {brief(dtype)}; it must be a text such as 'F32'")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 64 for n in shape):
        raise FileError(f"{where}: its shape is {brief(shape)}; it must be a list of whole numbers from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise FileError(f"{where}: its data_offsets are {brief(offsets)}; they must be [begin, end]")
    begin, end = offsets
    if end < begin:
        raise FileError(f"{where}: its data_offsets are {offsets}; the end must not lie before the begin")
    if dtype in KINDS and 8 * (end - begin) != math.prod(shape) * KINDS[dtype][0]:
        needed = f"{math.prod(shape) * KINDS[dtype][0] / 8:,g} bytes"
        raise FileError(f"{where}: {dtype} {shape} takes {needed}, and its data_offsets {offsets} are {end - begin:,}")
    return Entry(name, dtype, tuple(shape), begin, end)


class Checkpoint:
    """An open `.safetensors` file, its header checked; its tensors are read piece by piece.

    Raises:
        FileError: no such file, or not such a file; naming it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileError(f"no such file: {str(path)!r}")
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  it stays open
            stat = os.fstat(self._file.fileno())
            self.nbytes, self.changed = stat.st_size, stat.st_mtime_ns
            start = self._file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(HEADER, self.nbytes - 8):
                most = min(HEADER, max(self.nbytes - 8, 0))
                raise FileError(f"no .safetensors file: a header of {length:,} bytes where at most {most:,} can be")
            self.header = parse(self._read_header(length), self.nbytes - 8 - length)
        except FileError as error:
            self.close()
            raise FileError(f"{str(path)!r}: {error}") from None
        except OSError as error:
            raise FileError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
        self._data_at = 8 + length

    def _read_header(self, length: int) -> bytes:
        text = bytearray(length)
        self._fill(memoryview(text))
        return bytes(text)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def check_unchanged(self) -> None:
        """Raise FileError if the file was changed since it was opened."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise FileError(f"{str(self.path)!r} vanished while it was read: {error.strerror}") from None
        if (stat.st_size, stat.st_mtime_ns) != (self.nbytes, self.changed):
            raise FileError(f"{str(self.path)!r} was changed while it was read; run the same again")

    def pieces(self, begin: int, end: int, buffer: memoryview) -> Iterator[memoryview]:
        """Bytes `begin` to `end` of the tensors, as pieces as long as the buffer, in which each lies in its turn.

        Raises:
            FileError: the file cannot be read there any more.
        """
        try:
            for at in range(begin, end, len(buffer)):
                piece = buffer[: min(len(buffer), end - at)]
                self._file.seek(self._data_at + at)
                self._fill(piece)
                yield piece
        except FileError as error:
            raise FileError(f"{str(self.path)!r}: {error}") from None
        except OSError as error:
            raise FileError(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from error

    def _fill(self, view: memoryview) -> None:
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise FileError("it ends too early; was it cut off while it was read?")
            view = view[count:]
