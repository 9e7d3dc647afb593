"""A format that a model is exported to: one file on the shelf `formats/`, named as the format ('_' where it has '-').

    smelt.export(model, "onnx", "model.onnx", data=data, activations="static")

A recipe compresses; a format renders what is stored (`core/store.py`).  What it cannot render is written out as its
decoded values, and the notes say so.
"""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from smelt.core import shelf
from smelt.core.data import Data, batch, check_loader, evaluating, move
from smelt.core.errors import DataError, ModelError, OutputError, RecipeError, SmeltError, nearest
from smelt.core.named import first_line
from smelt.core.output import check_output, explained, put
from smelt.core.runtime import needs
from smelt.core.settings import build, check
from smelt.core.target import check_finite, check_usable, targets

# Batches of the data that a format calibrates on.
CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Given:
    """What a format may know besides the model.

    example: inputs of one batch, as a loader yields them, or None.
    batches: calibration batches as a loader yields them, or None.
    """

    example: Any = None
    batches: Iterable[Any] | None = None
    seed: int = 0

    def inputs(self, why: str) -> Any:
        """The example, else the inputs of the first batch, on the CPU.

        Raises DataError: there are none; `why` they are needed completes 'it needs an example of the inputs ...'.
        """
        if self.example is not None:
            return move(self.example, "cpu")
        for item in self.batches or ():
            return move(batch(item)[0], "cpu")
        raise DataError(f"it needs an example of the inputs {why}; give example= or data=")

    def calibration(self, why: str) -> list[Any]:
        """The inputs of some batches, on the CPU.

        Raises DataError: there are none; `why` they are needed completes 'it needs data ...'.
        """
        found = [move(batch(item)[0], "cpu") for item in islice(self.batches or (), CALIBRATION_BATCHES)]
        if not found:
            raise DataError(f"it needs data {why}; give data=")
        return found


class Export(ABC):
    """Base of the formats: a frozen dataclass whose fields are the settings, each with a default.

    suffix: of the file; '' for a folder.
    runtimes: names on the shelf `runtimes/` that run it, the usual one first.
    needs: modules that must be importable; `extra`: what installs them.
    """

    suffix: ClassVar[str]
    runtimes: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """'compressed-tensors' for smelt/formats/compressed_tensors.py; the module's own name elsewhere."""
        path = type(self).__module__
        known = {v: k for k, v in shelf._modules("formats").items()}
        return known.get(path, path).replace("_", "-")

    def __post_init__(self) -> None:
        check(self, self.name)

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be written here, with the command that installs what is missing; None: it can."""
        return needs(cls.needs, cls.extra or cls.__module__.rpartition(".")[2])

    @abstractmethod
    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        """Write `model` to `path` and return notes for the user: what is left in floating point or only simulated, and
        why.

        Args:
            model: a copy, on the CPU, in evaluation mode; it may be changed.
            path: in an empty folder, under the name that it will have; files that belong to it may stand beside it.
        """


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the path, its bytes on disk, and what the user should know of it."""

    path: Path
    bytes: int
    notes: tuple[str, ...]


def formats() -> list[str]:
    """Names of the formats that can be exported to: 'onnx', 'compressed-tensors', ..."""
    return [name.replace("_", "-") for name in shelf.names("formats") if _classes(name)]


def format_of(name: str) -> type[Export]:
    """The format of a name.  Raises RecipeError where there is none, with the nearest."""
    known = formats()
    if name not in known:
        raise RecipeError(f"no format {name!r} to export to{nearest(name, known)}")
    return _classes(name.replace("-", "_"))[0]


def _classes(name: str) -> list[type[Export]]:
    found = shelf.module("formats", name)
    return [
        c
        for c in vars(found).values()
        if isinstance(c, type) and issubclass(c, Export) and c.__module__ == found.__name__
    ]


def export(
    model: nn.Module,
    to: str,
    path: str | Path,
    *,
    example: Any = None,
    data: Data | Iterable[Any] | None = None,
    force: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Exported:
    """Write a model, as it is stored, in a format that a runtime reads.

    The model itself is not changed.  The file is complete or not there at all.

    Args:
        to: 'onnx', 'openvino', 'executorch', 'litert', 'torch', ... (see `smelt export --help`).
        path: of the file, or of the folder where the format is one.
        example: inputs as the model takes them: a tensor, a tuple, a dict; default is the first batch of the data.
        data: a `Data`, of which the training split is used, else the validation split; or batches.
        force: replace `path` if it exists.
        settings: of the format.

    Raises:
        RecipeError: no such format or setting, or a package that it needs is missing.
        ModelError: the model cannot be exported; the message names the module where it can.
        DataError: an example or data is needed, and there is none.
        OutputError: `path` cannot be written, or has another suffix.
    """
    kind = format_of(to)
    if why := kind.missing():
        raise RecipeError(f"the format {to} cannot be written here: {why}")
    form = build(kind, settings, to)
    path = Path(path)
    if path.suffix != kind.suffix and kind.suffix:
        raise OutputError(f"{str(path)!r} does not end in {kind.suffix!r}, as {to} files do")
    _check_place(path, bool(kind.suffix), force)
    given = Given(example, _batches(data), seed)
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model to export is a torch.nn.Module, not a {type(model).__name__}")
    check_usable(model)
    check_finite(targets(model))
    scratch = path.parent / f".smelt-{secrets.token_hex(6)}.part"
    try:
        with explained(path), evaluating(copy.deepcopy(model).cpu()) as copied:
            scratch.mkdir()
            try:
                notes = form.write(copied, scratch / path.name, given)
            except (SmeltError, OSError):
                raise
            except Exception as error:  # exporters raise whatever they like
                raise ModelError(
                    f"{type(model).__name__} cannot be written as {to}: {type(error).__name__}: {first_line(error)}"
                ) from error
            size = sum(p.stat().st_size for p in scratch.rglob("*") if p.is_file())
            for made in sorted(scratch.iterdir(), key=lambda p: p.name == path.name):  # the file itself comes last
                _put(made, path.parent / made.name, force)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(path, size, tuple(notes))


def _batches(data: Any) -> Iterable[Any] | None:
    if data is None:
        return None
    if isinstance(data, Data):
        return data.train if data.train is not None else data.valid
    check_loader(data, "data")
    found: Iterable[Any] = data
    return found


def _check_place(path: Path, file: bool, force: bool) -> None:
    if file or not path.is_dir():
        check_output(path, force)
    elif not force:
        raise OutputError(f"{str(path)!r} exists; to replace it pass force=True or --force")


def _put(made: Path, path: Path, force: bool) -> None:
    """Let a finished file or folder become `path`; a folder that stands there gives way whole."""
    _check_place(path, made.is_file(), force)
    if made.is_file():
        put(made, path, force)
        return
    old = made.with_name(f"{made.name}.old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(made, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
