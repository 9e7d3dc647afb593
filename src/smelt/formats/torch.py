"""A `.smelt` file that also says which kernels serve its layers in PyTorch: `smelt export net.smelt --to torch`.

    smelt.export(model, "torch", "net.fast.smelt", example=x)
    model = smelt.load_fast("net.fast.smelt")

It is an ordinary `.smelt` file otherwise.  What is kept is the shape of each layer's input and what was measured: on a
machine like the one where it was written nothing is measured again, on any other kernels are timed when it is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from smelt.core.data import evaluating
from smelt.core.encoded import numel
from smelt.core.errors import FileError
from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.core.store import store_of
from smelt.formats import smelt as smelt_file
from smelt.formats._file import File
from smelt.kernels._fast import layers, serve, shapes_of, shared_copy, verdicts
from smelt.kernels._verdicts import Verdict, judged

ELEMENTS = 1 << 28  # that the input of a layer may have


@dataclass(frozen=True)
class Torch(Export):
    """The model as it is stored, with the kernels that were measured to be faster than dense layers here, for the
    batch size of the example."""

    suffix: ClassVar[str] = ".smelt"
    runtimes: ClassVar[tuple[str, ...]] = ("fast", "eager", "compiled")

    rounds: bool = setting(False, "kernels may round inputs to 8 bits where no codec is stored there")

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        shapes = shapes_of(model, given.inputs("for which kernels are timed"))
        served = shared_copy(model)
        used = serve(served, shapes, rounds=self.rounds)
        found = verdicts(served)
        kernels = {
            "rounds": self.rounds,
            "shapes": {name: list(shapes[name]) for name in found},
            "verdicts": {name: asdict(verdict) for name, verdict in used.items()},
        }
        plain = path.with_name(f"{path.stem}.part")
        try:
            smelt_file.save(model, plain)
            smelt_file.save_again(plain, path, kernels=kernels)
        finally:
            plain.unlink(missing_ok=True)
        return _notes(found, len(store_of(served).activations))


def _notes(found: Mapping[str, Verdict], simulated: int) -> list[str]:
    counts = Counter(verdict.kernel for verdict in found.values() if verdict.kernel)
    notes = [f"{number} layer(s) run as {name}" for name, number in sorted(counts.items())]
    for why, tried in (("no kernel serves their form", False), ("no kernel is faster here", True)):
        names = [n for n, v in found.items() if v.kernel is None and bool(v.milliseconds) == tried]
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            notes.append(f"{len(names)} layer(s) stay dense, as {why}: {shown}")
    if simulated:
        notes.append(f"{simulated} codec(s) at inputs or outputs are simulated")
    return notes


def load_fast(
    path: str | Path, into: nn.Module | None = None, *, trust: bool = False, cache: str | Path | None = None
) -> nn.Module:
    """The model of a file that was exported to 'torch', in evaluation mode, its layers run by kernels.

    Args:
        into, trust: as for `smelt.load`.
        cache: the file of verdicts, as for `smelt.fast`; read for a machine that the file does not know.

    Raises:
        FileError: as `smelt.load`; or the file was not exported to 'torch', or speaks of layers that are not there.
        ModelError: as `smelt.load`.
    """
    with File(path) as file:
        shapes, told, rounds = _read(file)
    model = smelt_file.load(path, into, trust=trust)
    there = dict(layers(model))
    for name, shape in shapes.items():
        features = getattr(there.get(name), "in_features", None)
        if name not in there or (features is not None and shape[-1:] != (features,)):
            raise FileError(f"{str(path)!r}: the model has no layer {name!r} for inputs of {list(shape)}")
    with evaluating(model):
        serve(model, shapes, rounds=rounds, cache=cache, told=told)
    return model.eval()


def _read(file: File) -> tuple[dict[str, torch.Size], dict[str, Verdict], bool]:
    kernels = file.kernels
    if not kernels:
        raise file.error("it says nothing of kernels; export it to 'torch', or pass the loaded model to smelt.fast")
    with file.blame("kernels"):
        shapes = {_text(name): _shape(shape) for name, shape in _mapping(kernels.get("shapes")).items()}
        told = {_text(name): judged(entry) for name, entry in _mapping(kernels.get("verdicts")).items()}
        rounds = kernels.get("rounds")
        if not isinstance(rounds, bool):
            raise FileError(f"rounds is {rounds!r}")
    return shapes, told, rounds


def _mapping(data: Any) -> dict[Any, Any]:
    if not isinstance(data, dict):
        raise FileError(f"{str(data)[:80]!r} is no mapping")
    return data


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise FileError(f"{str(name)[:80]!r} is no name")
    return name


def _shape(data: Any) -> torch.Size:
    good = isinstance(data, list) and all(type(n) is int and n > 0 for n in data) and 0 < len(data) <= 8
    if not good or numel(data) > ELEMENTS:
        raise FileError(f"{str(data)[:80]!r} is no shape")
    return torch.Size(data)
