"""Checkpoints of either kind, tensor by tensor or all at once."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_plain
from torch import Tensor

from smelt.core.errors import FileError, ModelError
from smelt.core.named import first_line
from smelt.formats._container import MAGIC
from smelt.formats._file import File, as_device


def open(path: str | Path, framework: str = "pt", device: str | int | torch.device = "cpu", *, threads: int = 0) -> Any:
    """The tensors of a `.smelt` or `.safetensors` file, read when they are asked for.

        with smelt.open("model.smelt") as file:
            for name in file.keys():
                file.get_tensor(name)
            file.get_slice("embed.weight")[:100]

    Args:
        framework: of the tensors it gives: "pt" (PyTorch) or "np" (NumPy).
        device: where PyTorch's tensors are put.
        threads: how many decode; 0: as many as there are cores.

    Returns:
        Of a `.smelt` file a `File`, which also tells how tensors are stored; of a `.safetensors` file what
        safetensors' `safe_open` gives.  Both have `keys`, `offset_keys`, `metadata`, `get_tensor` and `get_slice`,
        and are context managers.

    Raises:
        FileError: no file, or a foreign, damaged or newer one.
        ModelError: no such framework or device.
    """
    if is_smelt(path):
        return File(path, framework=framework, device=device, threads=threads)
    where = as_device(device)
    try:
        return safe_open(path, framework, device=str(where))
    except SafetensorError as error:
        what = first_line(error)
        if "framework" in what:
            raise ModelError(f"framework {framework!r}: {what}") from None
        raise FileError(f"{str(path)!r} is neither a .smelt nor a .safetensors file: {what}") from None


def load_file(path: str | Path, device: str | int | torch.device = "cpu", threads: int = 0) -> dict[str, Tensor]:
    """All tensors of a `.smelt` or `.safetensors` file by name, in memory of their own, as safetensors' `load_file`.

    The file is mapped, and each tensor decoded straight to where it stays.

    Raises:
        FileError: no file, or a foreign, damaged or newer one.
        ModelError: no such device.
    """
    where = as_device(device)
    if is_smelt(path):
        found = {}
        with File(path, own=True, threads=threads) as file:
            for name in file.names():
                found[name] = file.dense_rows(name).to(where)
                file.release(name)
        return found
    try:
        return load_plain(path, device=str(where))  # type: ignore[no-any-return]
    except SafetensorError as error:
        raise FileError(f"{str(path)!r} is neither a .smelt nor a .safetensors file: {first_line(error)}") from None


def is_smelt(path: str | Path) -> bool:
    """Whether a file begins as `.smelt` files do, or has their name.  Raises FileError where none can be read."""
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{str(path)!r} is a folder; read the .smelt or .safetensors files in it one by one")
    if not path.is_file():
        raise FileError(f"no such file: {str(path)!r}")
    try:
        with builtins.open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix == ".smelt"
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
