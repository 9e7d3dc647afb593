"""Bytes of a file, and of a model as the plain file that a compressed one is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from smelt.core.errors import FileError, ModelError

UNIT = "bytes"


def file_bytes(path: str | Path) -> int:
    """Bytes of a file as it lies on the disk.

    Raises:
        FileError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"no such file: {str(path)!r}")
    return path.stat().st_size


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the model's state as a safetensors file, header included: floats as fp32, tied tensors once.

    The file is really made (in memory), so this takes as much memory as the model does.

    Raises:
        ModelError: a model without data (on the meta device).
    """
    from safetensors.torch import save

    kept: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device and has no data to be written")
        same = (
            tensor.untyped_storage()._cdata,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        kept.setdefault(same, (name, tensor))
    plain = {n: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype) for n, t in kept.values()}
    return len(save({n: t.clone(memory_format=torch.contiguous_format) for n, t in plain.items()}))
