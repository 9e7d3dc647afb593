"""What was measured of kernels on this machine, kept in a file."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from smelt.core import shelf
from smelt.core.encoded import Encoded
from smelt.core.kernel import Layer
from smelt.native import library
from smelt.version import __version__


@dataclass(frozen=True)
class Verdict:
    """kernel: the fastest where it is faster than dense, else None.  milliseconds: medians, of 'dense' and of each
    kernel that can serve.  most: samples up to which it is faster, as far as that was tried; None: where it does not
    matter."""

    kernel: str | None
    milliseconds: dict[str, float] = field(default_factory=dict)
    most: int | None = None


def folder() -> Path:
    """Where verdicts are kept: SMELT_CACHE, else smelt/ in the user's folder for caches."""
    if own := os.environ.get("SMELT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smelt"


@functools.cache
def machine(device: str) -> str:
    """The processor (or GPU), what runs on it, and the versions of what was measured."""
    found = library()
    level = -1 if found is None else int(found.smelt_best_level())
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return f"{platform.system()} {platform.machine()} {name}, level {level}, torch {torch.__version__}, {__version__}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def key(layer: Layer, device: str) -> str:
    """Of the machine, the threads, the layer, its form, its input's shape and the kernels that there are."""
    module, codec = layer.module, None if layer.at_input is None else layer.at_input.codec
    parts = [machine(device), torch.get_num_threads(), repr(module), str(next(module.parameters()).dtype)]
    parts += [_form(layer.weight), list(layer.shape), repr(codec), layer.rounds, shelf.names("kernels")]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _form(tree: Any) -> Any:
    """The forms of a tree with their settings, and of what its leaves are."""
    if isinstance(tree, Encoded):
        return [tree.form.name, sorted(tree.form.settings().items()), {k: _form(p) for k, p in tree.parts.items()}]
    return None if tree is None else (list(tree.shape), str(tree.dtype))


class Verdicts:
    """A file of verdicts by key; one that cannot be read counts as empty, one that cannot be written is not kept."""

    def __init__(self, path: Path | None = None):
        self.path = path or folder() / "kernels.json"
        self.known = self._read()

    def _read(self) -> dict[str, Verdict]:
        found: dict[str, Verdict] = {}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            for name, entry in json.loads(self.path.read_text()).items():
                found[str(name)] = judged(entry)
        return found

    def keep(self, name: str, verdict: Verdict) -> None:
        """Add one, beside those that others added meanwhile."""
        self.known = {**self._read(), **self.known, name: verdict}
        temporary = self.path.with_name(f".{self.path.name}-{secrets.token_hex(4)}")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({k: asdict(v) for k, v in self.known.items()}))
            os.replace(temporary, self.path)


def judged(entry: Any) -> Verdict:
    """A verdict from plain data.  Raises TypeError or ValueError: it is none."""
    verdict = Verdict(**entry)
    times = verdict.milliseconds
    good = isinstance(times, dict) and all(isinstance(v, float) for v in times.values())
    good = good and (verdict.most is None or (type(verdict.most) is int and verdict.most > 0))
    if not good or not (verdict.kernel is None or isinstance(verdict.kernel, str)):
        raise ValueError("no verdict")
    return verdict
