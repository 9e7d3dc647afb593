"""Folders of checkpoints: which file becomes which, looked at before anything is written."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from smelt.core.errors import FileError, OutputError
from smelt.core.output import check_output, explained, replacing
from smelt.formats._packing import JOURNAL, PART


@dataclass(frozen=True)
class Item:
    """A file and what it becomes.  `there`: something is there already, perhaps what is wanted."""

    source: Path
    output: Path
    convert: bool
    there: bool


def plan(
    source: Path,
    output: Path,
    name: Callable[[Path], str | None],
    alike: Callable[[Path, Path], bool],
    force: bool,
) -> list[Item]:
    """Every file of a folder and its folders, in order.

    Args:
        name: what a file is called when it is converted, None for one that is copied.
        alike: whether a file that is there may be what a file becomes.

    Raises:
        FileError: something that is neither a file nor a folder, or half a packed file.
        OutputError: folders within each other, two files that would become one, a file that is there.
    """
    inside, outside = source.resolve(), output.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise OutputError(f"{str(output)!r} and {str(source)!r} lie within each other; give another -o")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{str(output)!r} is no folder; {str(source)!r} is one")
    if not output.parent.is_dir():
        raise OutputError(f"{str(output)!r}: there is no folder {str(output.parent)!r}")
    items: dict[Path, Item] = {}
    for path in _files(source):
        if path.name.endswith(PART) and path.with_name(path.name.removesuffix(PART) + JOURNAL).exists():
            raise FileError(f"{str(path)!r} is half a packed file; run the same smelt pack again")
        new = name(path)
        target = output / path.relative_to(source).with_name(new or path.name)
        if target in items:
            raise OutputError(f"{str(items[target].source)!r} and {str(path)!r} would both become {str(target)!r}")
        there = target.exists()
        if there and not force and not (target.is_file() and (alike if new else _sizes)(path, target)):
            check_output(target, force)
        items[target] = Item(path, target, new is not None, there)
    return list(items.values())


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise FileError(f"{error.filename!r} cannot be read: {error.strerror}")

    for where, folders, files in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted([*files, *folders]):
            path = Path(where, name)
            if name in folders and path.is_symlink():
                raise FileError(f"{str(path)!r} is a link to a folder; put the folder itself there")
            if name not in folders:
                if not path.is_file():
                    raise FileError(f"{str(path)!r} is neither a file nor a folder, or a link to nothing")
                yield path


def make_folders(source: Path, output: Path) -> None:
    """The folders of `source` below `output`."""
    with explained(output):
        for where, _, _ in os.walk(source):
            (output / Path(where).relative_to(source)).mkdir(exist_ok=True)


def copy(item: Item, force: bool) -> None:
    """Copy a file with its mode, unless the same is there."""
    if item.there and _sizes(item.source, item.output) and filecmp.cmp(item.source, item.output, shallow=False):
        return
    size = item.source.stat().st_size
    with open(item.source, "rb") as file, replacing(item.output, force, size) as out:
        shutil.copyfileobj(file, out, 1 << 20)
    with explained(item.output):
        shutil.copymode(item.source, item.output)


def _sizes(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size
