"""What is compressed: a module, or the lazy tensors of one, and how to build it again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.target import targets


@dataclass
class Source:
    """A model and where it comes from.

    module: the module, or None for a checkpoint that is only read tensor by tensor.
    tensors: name -> function that reads the tensor (lazy; a checkpoint may be larger than memory).
    builder: 'lenet' (a name on the shelf `models/`) or 'module:function'; None when only Python knows.
    arguments: plain keyword arguments of the builder.
    blocks: paths of modules that run one after another, for methods that work block by block.
    """

    module: nn.Module | None = None
    tensors: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    builder: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module | Source, builder: str | None = None, arguments: Mapping[str, Any] | None = None) -> Source:
        if isinstance(model, Source):
            return model
        lazy = {t.name: t.tensor.detach for t in targets(model)}
        return Source(model, lazy, builder, dict(arguments or {}))

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for name, get in self.tensors.items():
            yield name, get()

    def fingerprint(self) -> str:
        """SHA-256 over builder, names, shapes and values; reads every tensor once."""
        digest = hashlib.sha256(repr((self.builder, sorted(self.arguments.items()))).encode())
        for name, tensor in self.read():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
