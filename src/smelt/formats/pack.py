"""Checkpoints (`.safetensors`) packed without loss into `.smelt` files, and restored byte for byte.

    pack("model.safetensors")                          # writes model.smelt
    unpack("model.smelt", "copy.safetensors")
    pack("folder", "folder2")                          # every checkpoint in it; the other files are copied

A packed file is a `.smelt` file without a builder, whose meta tells of its origin.  What is packed is read back and
compared (SHA-256) before it gets its name, and so is what is restored.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from smelt.core.errors import FileError, OutputError
from smelt.core.output import check_output, explained, put, replacing
from smelt.core.progress import Progress
from smelt.formats._container import MAGIC
from smelt.formats._file import File
from smelt.formats._folder import copy, make_folders, plan
from smelt.formats._open import is_smelt
from smelt.formats._packing import Count, Packing, make_buffers, restored, sha256_of
from smelt.formats.safetensors import Checkpoint

PLAIN, PACKED = ".safetensors", ".smelt"


@dataclass
class Tally:
    """Tensors of a dtype: how many, their bytes in checkpoints and in packed files."""

    tensors: int = 0
    before: int = 0
    after: int = 0


@dataclass
class Packed:
    """What `pack` or `unpack` did.

    before, after: bytes of the checkpoints, and of the packed files that stand for them.
    dtypes: as safetensors calls them.
    files: checkpoints in all; `skipped` of them were finished before.
    copied: other files of a folder.
    resumed: bytes of tensors that an interrupted run had packed already.
    """

    source: Path
    output: Path
    before: int = 0
    after: int = 0
    dtypes: dict[str, Tally] = field(default_factory=dict)
    files: int = 0
    skipped: int = 0
    copied: int = 0
    resumed: int = 0
    seconds: float = 0.0

    def ratio(self) -> float:
        return self.before / self.after if self.after else 1.0

    def to_plain(self) -> dict[str, Any]:
        """For JSON; the dtype with most bytes comes first."""
        tallies = sorted(self.dtypes.items(), key=lambda item: -item[1].before)
        return {
            **{"source": str(self.source), "output": str(self.output), "bytes before": self.before},
            **{"bytes after": self.after, "ratio": self.ratio(), "seconds": self.seconds, "files": self.files},
            **{"skipped": self.skipped, "copied": self.copied, "resumed": self.resumed},
            "dtypes": [{"dtype": name, **vars(tally), "ratio": _ratio(tally)} for name, tally in tallies],
        }

    def add(self, path: Path) -> str:
        """Count a packed file; returns a line about it."""
        with File(path) as file:
            before, after = file.origin.nbytes, file.nbytes
            for entry in file.origin.header.entries:
                tally = self.dtypes.setdefault(entry.dtype, Tally())
                tally.tensors += 1
                tally.before += entry.nbytes
                tally.after += file.rest_bytes(entry.name)
        self.files += 1
        self.before += before
        self.after += after
        return f"{before:,} bytes, packed {after:,}: {before / after:.3f}x"


def _ratio(tally: Tally) -> float:
    return tally.before / tally.after if tally.after else 1.0


def pack(
    source: str | Path,
    output: str | Path | None = None,
    *,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Packed:
    """Pack a checkpoint, or a folder with checkpoints, without loss.

    An interrupted run leaves `OUTPUT.part` and a journal beside it; the same call goes on from there.

    Args:
        source: a `.safetensors` file, or a folder.
        output: the `.smelt` file to write (by default beside the source), or the folder.  There a checkpoint becomes
            a `.smelt` file of its name, other files are copied, and what is there already is left as it is.
        force: replace files that exist.
        threads: how many code; 0: as many as there are cores.

    Raises:
        FileError: a source that is missing, or is no such file.
        OutputError: the output exists, no space, not writable.
    """
    return _run(_Pack(force, threads, progress or Progress()), Path(source), output)


def unpack(
    source: str | Path,
    output: str | Path | None = None,
    *,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Packed:
    """The inverse of `pack`, with the same arguments: the files as they were, byte for byte.

    Raises:
        FileError: a source that is missing, damaged, or was not packed.
        OutputError: the output exists, no space, not writable.
    """
    return _run(_Unpack(force, threads, progress or Progress()), Path(source), output)


@dataclass
class _Verb(ABC):
    force: bool
    threads: int
    progress: Progress

    suffix = ""

    @abstractmethod
    def name(self, path: Path) -> str | None:
        """What a file of a folder becomes; None: it is copied."""

    @abstractmethod
    def alike(self, source: Path, output: Path) -> bool:
        """Whether the output may be finished, by what is quickly seen."""

    @abstractmethod
    def finished(self, source: Path, output: Path) -> bool:
        """Whether it is, where it may be."""

    @abstractmethod
    def convert(self, source: Path, output: Path) -> int:
        """Do it; returns the bytes that were done before."""

    @abstractmethod
    def packed(self, source: Path, output: Path) -> Path:
        """Which of the two is the packed one."""

    def advance(self, total: int, phases: tuple[str, ...]) -> Count:
        """What counts bytes of which each is dealt with in every phase."""
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            phase = phases[min(done // max(total, 1), len(phases) - 1)]
            self.progress.advance(done, len(phases) * total, phase)

        return count


class _Pack(_Verb):
    suffix = PACKED

    def name(self, path: Path) -> str | None:
        if path.suffix == PACKED and _is_packed(path):
            raise FileError(f"{str(path)!r} is packed already; unpack it first, or take it out of the folder")
        return path.stem + PACKED if path.suffix == PLAIN else None

    def alike(self, source: Path, output: Path) -> bool:
        try:
            with Checkpoint(source) as plain, File(output) as file:
                return (plain.nbytes, plain.header.text) == (file.origin.nbytes, file.origin.header.text)
        except FileError:
            return False

    def finished(self, source: Path, output: Path) -> bool:
        with File(output) as file:
            return file.origin.sha256 == _sha256(source)

    def convert(self, source: Path, output: Path) -> int:
        with Checkpoint(source) as plain, explained(output):
            count = self.advance(plain.header.data_bytes, ("packing", "reading back"))
            packing = Packing(plain, output, self.threads, count)
            packing.run()
            put(packing.part, output, self.force)
            packing.forget()
            return packing.resumed

    def packed(self, source: Path, output: Path) -> Path:
        return output


class _Unpack(_Verb):
    suffix = PLAIN

    def name(self, path: Path) -> str | None:
        return path.stem + PLAIN if path.suffix == PACKED and _is_packed(path) else None

    def alike(self, source: Path, output: Path) -> bool:
        with File(source) as file:
            return file.origin.nbytes == output.stat().st_size

    def finished(self, source: Path, output: Path) -> bool:
        with File(source) as file:
            return file.origin.sha256 == _sha256(output)

    def convert(self, source: Path, output: Path) -> int:
        with File(source, threads=self.threads) as file:
            origin, count = file.origin, self.advance(file.origin.nbytes, ("",))
            with replacing(output, self.force, origin.nbytes) as out:
                if sha256_of(restored(file, make_buffers(self.threads)), count, out.write) != origin.sha256:
                    raise file.error("damaged: what it restores has another SHA-256 than the checkpoint had")
        return 0

    def packed(self, source: Path, output: Path) -> Path:
        return source


def _run(verb: _Verb, source: Path, output: str | Path | None) -> Packed:
    begin = monotonic()
    if source.is_dir():
        if output is None:
            raise OutputError(f"{str(source)!r} is a folder; give another for its files: -o FOLDER")
        found = _folder(verb, source, Path(output))
    else:
        found = _file(verb, source, source.with_suffix(verb.suffix) if output is None else Path(output))
    found.seconds = monotonic() - begin
    return found


def _file(verb: _Verb, source: Path, output: Path) -> Packed:
    if not source.is_file():
        raise FileError(f"no such file or folder: {str(source)!r}")
    if isinstance(verb, _Pack) and is_smelt(source):
        raise FileError(f"{str(source)!r} is a .smelt file already; smelt pack takes .safetensors")
    if isinstance(verb, _Unpack):
        with File(source) as file:
            file.origin  # noqa: B018  it raises where there is none
    if output.exists() and output.samefile(source):
        raise OutputError(f"{str(output)!r} cannot be both read and written; give another -o")
    check_output(output, verb.force)
    found = Packed(source, output)
    verb.progress.begin(1, 1, source.name)
    found.resumed = verb.convert(source, output)
    verb.progress.end(found.add(verb.packed(source, output)))
    return found


def _folder(verb: _Verb, source: Path, output: Path) -> Packed:
    items = plan(source, output, verb.name, verb.alike, verb.force)
    convert = [item for item in items if item.convert]
    if not convert:
        kind = PLAIN if isinstance(verb, _Pack) else f"packed {PACKED}"
        raise FileError(f"{str(source)!r} holds no {kind} file")
    found = Packed(source, output)
    make_folders(source, output)
    for i, item in enumerate(convert, 1):
        verb.progress.begin(i, len(convert), str(item.source.relative_to(source)))
        if item.there and verb.alike(item.source, item.output) and verb.finished(item.source, item.output):
            found.skipped += 1
        else:
            check_output(item.output, verb.force)
            found.resumed += verb.convert(item.source, item.output)
        verb.progress.end(found.add(verb.packed(item.source, item.output)))
    for item in items:
        if not item.convert:
            copy(item, verb.force)
            found.copied += 1
    return found


def _is_packed(path: Path) -> bool:
    with open(path, "rb") as start:
        if start.read(len(MAGIC)) != MAGIC:
            return False
    with File(path) as file:
        return file.packed


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()
