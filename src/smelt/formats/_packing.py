"""One checkpoint into one packed file, unit by unit; what is done is noted, so that the same can go on later.

A unit is a large tensor, or small ones of a dtype that follow each other and share a stream.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError, OutputError
from smelt.core.store import NODE_BYTES
from smelt.formats._container import ELEMENTS, HEADER, Slot
from smelt.formats._file import File
from smelt.formats._growing import Growing, Leaf
from smelt.formats._joined import Joined
from smelt.formats._meta import DIMENSIONS, Writer
from smelt.formats.safetensors import Checkpoint, Entry, Header, Origin
from smelt.forms.entropy import Entropy, kind_of, least
from smelt.native.stream import LARGEST, encode
from smelt.version import __version__

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SMALL = 1 << 16  # tensors of fewer elements share a stream
SHARED = 1 << 20  # elements that share one at most
SHARED_CHUNK = 16  # log2 of the elements of a chunk there: to read a small tensor no more than two are decoded
GROUP = 1 << 23  # bytes; what is read at a time is 2 to 8 of them, and each is whole chunks of elements of any width
LATER = 1 << 16  # bytes that are worth waking another thread for
PART, JOURNAL = ".part", ".part.jsonl"

Count = Callable[[int], None]


@dataclass
class Unit:
    """Tensors that lie side by side in a checkpoint.  `blob`: they are kept as plain bytes."""

    entries: list[Entry]
    dtype: torch.dtype
    blob: bool

    @property
    def begin(self) -> int:
        return self.entries[0].begin

    @property
    def nbytes(self) -> int:
        return self.entries[-1].end - self.begin

    @property
    def count(self) -> int:
        return self.nbytes // self.dtype.itemsize

    @property
    def word(self) -> int:
        """Bytes of what the coder takes for an element: a complex one is two."""
        return self.dtype.itemsize // (2 if self.dtype.is_complex else 1)

    def slot(self, entry: Entry) -> Slot:
        return Slot(torch.uint8, (entry.nbytes,)) if self.blob else Slot(self.dtype, entry.shape)


def units(header: Header) -> list[Unit]:
    """The tensors in the order of their offsets."""
    found: list[Unit] = []
    for entry in header.entries:
        dtype = entry.torch_dtype
        blob = dtype is None or len(entry.shape) > DIMENSIONS or math.prod(max(n, 1) for n in entry.shape) > ELEMENTS
        unit = Unit([entry], torch.uint8 if blob or dtype is None else dtype, blob)
        last = found[-1] if found else unit
        alike = (last.dtype, last.blob) == (unit.dtype, unit.blob) and last.count + unit.count <= SHARED
        most = (SMALL - 1) * unit.dtype.itemsize
        if found and alike and unit.nbytes <= most and last.entries[0].nbytes <= most:
            last.entries.append(entry)
        else:
            found.append(unit)
    return found


@dataclass(frozen=True)
class Done:
    """What became of a unit.

    stream: whether its tensors are one stream, or a leaf each.
    leaves: bytes, checksum, content (in hexadecimal, of a small one).
    at: where the next leaf may begin.
    sha256: of the checkpoint up to the end of the unit.
    """

    blob: bool
    stream: bool
    leaves: list[tuple[int, int | None, str]]
    at: int
    sha256: str


@contextmanager
def _alone(journal: Path, output: Path) -> Iterator[None]:
    """Nobody else writes the same part file meanwhile (where the system has such locks)."""
    with open(journal, "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{str(output)!r}: another smelt pack is writing it") from None
        yield


class Packing:
    """Beside `output` lie the growing file and the journal, which has a line for each unit.

    count: called with the bytes of the checkpoint that were dealt with since the last call, twice for each: packed,
        and compared after they were read back.
    resumed: bytes of the checkpoint that were packed before.
    """

    def __init__(self, source: Checkpoint, output: Path, threads: int, count: Count):
        self.source, self.output, self.threads, self.count = source, output, threads, count
        self.part = output.with_name(output.name + PART)
        self.journal = output.with_name(output.name + JOURNAL)
        for path in (self.part, self.journal):
            if path.exists() and path.samefile(source.path):
                raise OutputError(f"{str(source.path)!r} is what {str(output)!r} would be written through; rename it")
        self.units = units(source.header)
        self.hash = hashlib.sha256(source.header.raw)
        self.buffers = make_buffers(threads)
        self.buffer = next(self.buffers).numpy()
        self.resumed = 0

    def run(self) -> Origin:
        """Write the whole file and compare what it restores.

        Raises:
            OutputError: it would not restore the checkpoint, or somebody else is writing it.
            FileError: the checkpoint changed meanwhile.
        """
        with _alone(self.journal, self.output):
            return self._run()

    def _run(self) -> Origin:
        done = self._before()
        with ThreadPoolExecutor(1) as pool, open(self.part, "r+b" if done else "w+b") as file:
            growing = Growing(file, done[-1].at if done else HEADER.size)
            with open(self.journal, "w", encoding="utf-8") as journal:
                for line in (self._identity(), *map(asdict, done)):
                    print(json.dumps(line), file=journal, flush=True)
                for unit in self.units[len(done) :]:
                    done.append(self._unit(unit, growing, pool))
                    print(json.dumps(asdict(done[-1])), file=journal, flush=True)
            self.source.check_unchanged()
            origin = Origin(self.source.header, self.source.nbytes, self.hash.hexdigest())
            leaves = [Leaf(n, crc, bytes.fromhex(small)) for one in done for n, crc, small in one.leaves]
            growing.finish({"tensors": self._tensors(done), "origin": origin.to_plain()}, leaves)
            os.fsync(file.fileno())
        same = False
        with suppress(FileError), File(self.part, threads=self.threads) as packed:
            same = sha256_of(restored(packed, self.buffers), self.count) == origin.sha256
        if not same:
            self.forget()
            raise OutputError(
                f"{str(self.output)!r} would not restore {str(self.source.path)!r} byte for byte, and was dropped; "
                "run the same again, and check the disk and the memory of this machine"
            )
        self.source.check_unchanged()
        return origin

    def forget(self) -> None:
        """Remove what could be gone on from."""
        self.journal.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a later run to go on."""
        source = self.source
        header = hashlib.sha256(source.header.raw).hexdigest()
        return {"smelt": __version__, "bytes": source.nbytes, "changed": source.changed, "header": header}

    def _before(self) -> list[Done]:
        """What an earlier run did of the same checkpoint, if its beginning is still what it was."""
        done: list[Done] = []
        with suppress(OSError, ValueError, TypeError, IndexError):
            size = self.part.stat().st_size
            lines = self.journal.read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != self._identity():
                return []
            with suppress(ValueError, TypeError):  # the last line may be cut off
                for line in lines[1:]:
                    done.append(Done(**json.loads(line)))
            while done and done[-1].at > size:
                done.pop()
        done = done[: len(self.units)]
        for unit in self.units[: len(done)]:
            for piece in self._read(unit):
                self.hash.update(piece)
                self.count(len(piece))
        if done and self.hash.hexdigest() != done[-1].sha256:
            self.hash = hashlib.sha256(self.source.header.raw)
            return []
        self.resumed = sum(unit.nbytes for unit in self.units[: len(done)])
        return done

    def _read(self, unit: Unit) -> Iterator[memoryview]:
        return self.source.pieces(unit.begin, unit.begin + unit.nbytes, self.buffer.data)

    def _unit(self, unit: Unit, growing: Growing, pool: ThreadPoolExecutor) -> Done:
        if unit.dtype is torch.bool and any(np.frombuffer(piece, np.uint8).max() > 1 for piece in self._read(unit)):
            unit = Unit(unit.entries, torch.uint8, True)
        at, fill = growing.at, least(unit.count, unit.dtype)
        chunk = SHARED_CHUNK if len(unit.entries) > 1 else LARGEST
        joined = Joined(unit.nbytes // unit.word, unit.word, chunk)
        whole = unit.nbytes <= len(self.buffer)
        for piece in self._read(unit):
            hashed = pool.submit(self.hash.update, piece)
            words = np.frombuffer(piece, f"u{unit.word}")
            stream = encode(words, kind_of(unit.dtype), chunk=chunk, checks=True, threads=self.threads)
            whole = whole and len(stream) >= fill  # zeros can follow only what has a table
            if growing.at == at and not whole:
                growing.write(joined.head())
            growing.write(stream.data if whole else joined.add(stream, len(words)))
            hashed.result()
            self.count(len(piece))
        growing.write(bytes(max(0, fill - (growing.at - at))))
        shrinks = growing.at - at + NODE_BYTES * len(unit.entries) < unit.nbytes
        if shrinks:
            leaves = [growing.sealed(at, b"" if whole else joined.head())]
        else:
            growing.back(at)
            alone = [(unit.slot(entry), Unit([entry], unit.dtype, unit.blob)) for entry in unit.entries]
            leaves = [growing.leaf(slot, self._read(one)) for slot, one in alone]
        plain = [(leaf.nbytes, leaf.crc, leaf.small.hex()) for leaf in leaves]
        return Done(unit.blob, shrinks, plain, growing.at, self.hash.copy().hexdigest())

    def _tensors(self, done: list[Done]) -> list[Any]:
        """The tensors of the meta; tensors without memory stand for the leaves."""
        writer, found = Writer(), []
        for unit, one in zip(self.units, done, strict=True):
            unit = Unit(unit.entries, torch.uint8, True) if one.blob else unit
            stream, start = torch.empty(one.leaves[0][0], dtype=torch.uint8, device="meta"), 0
            for entry in unit.entries:
                slot = unit.slot(entry)
                part: Any = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
                if one.stream and slot.numel:
                    part = Encoded(Entropy(start=start), {"stream": stream}, part.shape, part.dtype)
                start += slot.numel
                found += [entry.name, writer.part(part)]
        return found


def make_buffers(threads: int) -> Iterator[torch.Tensor]:
    """Two buffers in turn (uint8), larger for more threads."""
    groups = min(max(2, (threads or os.cpu_count() or 1) // 2), 8)
    return itertools.cycle([torch.empty(groups * GROUP, dtype=torch.uint8) for _ in range(2)])


def restored(file: File, buffers: Iterator[torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the checkpoint that a packed file stands for; a piece lies there until the next but one is taken."""
    yield file.origin.header.raw
    for entry in file.origin.header.entries:
        yield from file.pieces(entry.name, buffers)


def sha256_of(pieces: Iterable[bytes | memoryview], count: Count, write: Callable[[Any], Any] | None = None) -> str:
    """The SHA-256 of pieces; each large one is hashed, and written if anywhere, while the next is made."""
    found = hashlib.sha256()
    takers = [found.update, *([write] if write is not None else [])]
    with ThreadPoolExecutor(len(takers)) as pool:
        taken: list[Future[Any]] = []
        for piece in pieces:
            for before in taken:
                before.result()
            if len(piece) >= LATER:
                taken = [pool.submit(take, piece) for take in takers]
            else:
                taken = []
                for take in takers:
                    take(piece)
            count(len(piece))
        for before in taken:
            before.result()
    return found.hexdigest()
