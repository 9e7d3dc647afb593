"""Outputs are written to a temporary name and renamed: complete, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from smelt.core.errors import OutputError


def check_output(path: Path, force: bool) -> None:
    """Raise OutputError where a file cannot be put."""
    try:
        exists, ordinary, folder = path.exists(), path.is_file(), path.parent.is_dir()
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    if exists and not ordinary:
        raise OutputError(f"{str(path)!r} is no ordinary file and is not written to")
    if exists and not force:
        raise OutputError(f"{str(path)!r} exists; to replace it pass force=True or --force")
    if not folder:
        raise OutputError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")


def _check_space(path: Path, total: int) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return
    if free < total:
        raise OutputError(f"{str(path)!r} needs {total} bytes, and {free} are free in {str(path.parent)!r}")


@contextmanager
def replacing(path: Path, force: bool, total: int) -> Iterator[BinaryIO]:
    """A file beside `path` that becomes `path` when all went well and vanishes otherwise.

    Raises:
        OutputError: `path` exists (and not `force`), fewer than `total` bytes are free, not writable.
    """
    check_output(path, force)
    _check_space(path, total)
    temporary = path.parent / f".smelt-{secrets.token_hex(6)}.part"
    try:
        with explained(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            put(temporary, path, force)
    finally:
        temporary.unlink(missing_ok=True)


def put(temporary: Path, path: Path, force: bool) -> None:
    """Let a finished file beside `path` become `path`."""
    check_output(path, force)
    os.replace(temporary, path)
    with suppress(OSError):  # folders cannot be synced everywhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What goes wrong within while `path` is written is an OutputError that names it."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{str(path)!r}: no space is left for it") from error
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
