"""Runtimes: what runs a written file (or a module), on one device, with so many threads.

A runtime is a file on the shelf `runtimes/`:

    SUFFIXES = (".onnx",)                          # the files that it runs
    def missing() -> str | None: ...               # why it cannot run here, with the command that installs it
    def open(source, threads=1, device="cpu") -> Session: ...
    MODULES = True                                 # optional: it is for any module, too, one that is not compressed
    def parts(path) -> tuple[Path, ...]: ...       # optional: every file that belongs to `path` (weights beside it)
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.data import samples, tensors
from smelt.core.errors import FileError, ModelError, RecipeError, SmeltError, nearest
from smelt.core.named import first_line


class Session(ABC):
    """A model that is ready to run: `session(*inputs)`, or `session(name=...)`, gives a tensor or a tuple of them.

    names: of the inputs, in order, where they are known; keywords then find their places.
    batch: the one number of samples that it takes; None = any.
    """

    names: tuple[str, ...] = ()
    batch: int | None = None

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        if named:
            absent = [name for name in self.names[len(inputs) :] if name not in named]
            if absent or len(self.names) != len(inputs) + len(named):
                raise ModelError(
                    f"inputs are {', '.join(named)}; it takes {', '.join(self.names) or 'inputs without names'}"
                )
            inputs = (*inputs, *(named[name] for name in self.names[len(inputs) :]))
        found = self.run(inputs)
        return found[0] if len(found) == 1 else tuple(found)

    @abstractmethod
    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs, in order, on the session's device; inputs are there too, and are not changed."""


def needs(modules: Sequence[str], extra: str) -> str | None:
    """What `missing` gives where modules cannot be imported: their names and how they are installed; else None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed; pip install 'smelt[{extra}]'" if absent else None


def file_of(name: str, source: str | Path | nn.Module) -> Path:
    """The file that a runtime is to open.  Raises ModelError: it is a module, which this one does not run."""
    if isinstance(source, nn.Module):
        raise ModelError(f"the runtime {name} runs files; export the module first: smelt.export(model, ..., path)")
    return Path(source)


def file_on_cpu(name: str, source: str | Path | nn.Module, device: str) -> Path:
    """The same for a runtime that computes on the CPU alone.  Raises RecipeError: another device."""
    path = file_of(name, source)
    if device != "cpu":
        raise RecipeError(f"the runtime {name} runs on the device 'cpu' here, not {device!r}")
    return path


def runtime(name: str) -> ModuleType:
    """The runtime of a name.  Raises RecipeError where there is none, with the nearest."""
    return shelf.module("runtimes", name)


def runtimes_of(suffix: str) -> list[str]:
    """Names of the runtimes that run files of a suffix ('.onnx'), installed or not."""
    return [name for name in shelf.names("runtimes") if suffix in runtime(name).SUFFIXES]


def runtimes_for_modules() -> list[str]:
    """Names of the runtimes that run a module as it is."""
    return [name for name in shelf.names("runtimes") if getattr(runtime(name), "MODULES", False)]


def open_session(name: str, source: str | Path | nn.Module, threads: int = 1, device: str = "cpu") -> Session:
    """A file, or a module in evaluation mode, ready to run in the runtime of a name.

    Raises:
        RecipeError: no such runtime, it is not installed, or it does not run such files.
        FileError, ModelError: the file or module cannot be opened in it.
    """
    found = runtime(name)
    if why := found.missing():
        raise RecipeError(f"the runtime {name} cannot be used here: {why}")
    if not isinstance(source, nn.Module):
        source = Path(source)
        if source.suffix not in found.SUFFIXES:
            able = runtimes_of(source.suffix)
            raise RecipeError(f"the runtime {name} does not run {str(source)!r}{nearest(name, able) if able else ''}")
        if not source.exists():
            raise FileError(f"no such file: {str(source)!r}")
    try:
        return found.open(source, threads=threads, device=device)  # type: ignore[no-any-return]
    except SmeltError:
        raise
    except Exception as error:  # a runtime raises whatever it likes
        what = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(source, nn.Module):
            raise ModelError(f"the runtime {name} cannot open the {type(source).__name__}: {what}") from error
        raise FileError(f"{str(source)!r} cannot be opened in the runtime {name}: {what}") from error


def parts_of(path: str | Path) -> tuple[Path, ...]:
    """Every file that an artifact consists of: those in a folder, those that a runtime says belong to it."""
    path = Path(path)
    if path.is_dir():
        return tuple(sorted(p for p in path.rglob("*") if p.is_file()))
    for name in runtimes_of(path.suffix):
        if hasattr(found := runtime(name), "parts"):
            parts: Any = found.parts(path)
            return tuple(parts)
    return (path,)


class Filled(nn.Module):
    """A session as a module that takes any number of samples: `size` at once (or the session's own number), the last
    filled up by repeating its last sample."""

    def __init__(self, session: Session, size: int):
        super().__init__()
        self.session = session
        self.size = session.batch or size

    def forward(self, *inputs: Any, **named: Any) -> Any:
        count = samples((inputs, named))
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, count, self.size):
            given, more = sized((inputs, named), self.size, start)
            kept = min(self.size, count - start)
            found = tuple(tensors(self.session(*given, **more)))
            parts.append(tuple(x[:kept] if x.dim() and len(x) == self.size else x for x in found))
        whole = tuple(torch.cat(several) if several[0].dim() else several[0] for several in zip(*parts, strict=True))
        return whole[0] if len(whole) == 1 else whole


def sized(inputs: Any, size: int, start: int = 0) -> Any:
    """The `size` samples of a batch from `start` on: the last is repeated where a cut runs out, all where it is
    larger than the batch from the first on.

    A tensor without a row for each sample stays as it is.
    """
    count = samples(inputs)
    index = torch.arange(start, start + size)
    index = index % count if not start and size > count else index.clamp(max=count - 1)

    def cut(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return tree[index.to(tree.device)] if tree.dim() and len(tree) == count else tree
        if isinstance(tree, Mapping):
            return {key: cut(value) for key, value in tree.items()}
        return tuple(cut(value) for value in tree) if isinstance(tree, (tuple, list)) else tree

    return cut(inputs)
