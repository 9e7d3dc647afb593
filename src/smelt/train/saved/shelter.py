"""What is stored during forward passes: once for each tensor, and how many bytes that takes."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from smelt.core.method import Codec, Stats
from smelt.grids import masks
from smelt.train.saved.held import Dense, Exact, Gate, Held, Normed, NormedRectified, Piece, Rectified, dense, flat

SMALL = 1024  # elements; fewer are kept as they are
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Seen:
    storage: StorageWeakRef
    version: int
    held: Held


class Shelter:
    """What is known of the tensors of the running forward pass.

    Attributes:
        plain: bytes that autograd would have saved in this forward pass, each storage counted once.
        taken: bytes that are stored instead.
        bits: of each piece, where they are not those of the codec.
        measuring: whether values, bits given and errors of pieces are noted (in a step of the codec's `period`).
        disturb: (index of a piece, seed): what is read of it is changed by noise of the size of its error.
    """

    def __init__(self, codec: Codec, seed: int):
        self.codec, self.seed = codec, seed
        given = {name: getattr(codec, name, None) for name in ("bits", "rest")}
        self._hidden = replace(codec, bits=1) if given["bits"] else codec  # type: ignore[type-var]
        self._rest = replace(codec, bits=given["rest"]) if given["rest"] else codec  # type: ignore[type-var]
        self.bits: dict[int, int] = {}
        self.values: dict[int, int] = {}
        self.given: dict[int, int] = {}
        self.errors: dict[int, float] = {}  # mean squares
        self.measuring = False
        self.disturb: tuple[int, int] | None = None
        self.plain = self.taken = 0
        self._step, self._pass, self._index = -1, 0, 0
        self._seen: dict[tuple[Any, ...], _Seen] = {}
        self._plain: dict[tuple[Any, ...], StorageWeakRef] = {}
        self._pending: tuple[tuple[Any, ...], Normed] | None = None

    def begin(self, step: int) -> None:
        """A forward pass begins, in this optimizer step."""
        self._pass = self._pass + 1 if step == self._step else 0
        self._step, self._index = step, 0
        period = self.codec.period()
        self.measuring = period is not None and step % period == 0 and self._pass == 0
        if self.measuring:
            for noted in (self.values, self.given, self.errors):
                noted.clear()
        self.plain = self.taken = 0
        self._seen.clear()
        self._plain.clear()

    # Values -----------------------------------------------------------------------------------------------------------

    def stored(self, x: Tensor, *, hidden: bool = False, rest: bool = False) -> Piece:
        """Values [n] by the codec.

        hidden: they count for little; rest: by an operation that is not known by name.
        """
        index, self._index = self._index, self._index + 1
        codec = self._hidden if hidden else self._rest if rest else self.codec
        if index in self.bits:
            codec = replace(codec, bits=self.bits[index])  # type: ignore[type-var]
        x = x.contiguous()
        seed = zlib.crc32(struct.pack("<4q", self.seed, self._step, self._pass, index))
        encoded = codec.encode(x, codec.fit(x, Stats(seed=seed)))
        self.taken += encoded.nbytes()
        error = 0.0
        if self.measuring:
            self.values[index], self.given[index] = x.numel(), getattr(codec, "bits", 0)
            error = float((encoded.decode() - x).float().square().mean()) if x.numel() else 0.0
            self.errors[index] = error
        return Piece(self, index, encoded, error)

    def disturbed(self, piece: Piece, x: Tensor) -> Tensor:
        if self.disturb is None or self.disturb[0] != piece.index or piece.error == 0:
            return x
        generator = torch.Generator(x.device).manual_seed(self.disturb[1])
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return x + (noise * math.sqrt(piece.error)).to(x.dtype)

    def held(self, x: Tensor, *, rest: bool = False) -> tuple[Held, Any, Any]:
        """(what stands for a tensor, its size, its stride as `Held` has it); stored now, if it is not yet."""
        x = x.detach()
        if not dense(x):
            x = x.contiguous()
        found = self._find(x)
        if found is None:
            if x.numel() < SMALL or x.dtype not in FLOATS:
                self.taken += x.numel() * x.element_size()
                found = Exact(flat(x).clone())
            else:
                found = Dense(self.stored(flat(x), rest=rest))
            self.put(x, found)
        elif isinstance(found, Rectified):
            found.keep(self, flat(x))
        return found, x.size(), x.stride()

    def gate(self, x: Tensor, where: Tensor | None = None, slope: float = 0.0) -> Gate:
        """The gate of x > 0, or of `where`; of a dense tensor."""
        if where is None:
            mask, count = masks.above(flat(x))
        else:
            mask, count = masks.bits(flat(where)), int(where.sum())
        self.taken += mask.numel()
        return Gate(mask, count, x.numel(), slope)

    def rectified(self, x: Tensor) -> tuple[Gate, Held]:
        """(gate of ReLU at a dense tensor, what will stand for its output)"""
        gate = self.gate(x)
        if self._pending is not None and self._pending[0] == _key(x):
            norm = self._pending[1]
            self._pending = None
            norm.split(self, gate)
            return gate, NormedRectified(norm)
        return gate, Rectified(gate)

    # Tensors ----------------------------------------------------------------------------------------------------------

    def put(self, x: Tensor, held: Held) -> None:
        """From now on `held` stands for this tensor, as it is now."""
        for key in [k for k, seen in self._seen.items() if seen.storage.expired()]:
            del self._seen[key]
        self._seen[_key(x)] = _Seen(StorageWeakRef(x.untyped_storage()), x._version, held)

    def _find(self, x: Tensor) -> Held | None:
        seen = self._seen.get(_key(x))
        return seen.held if seen and not seen.storage.expired() and seen.version == x._version else None

    def promise(self, x: Tensor, norm: Normed) -> None:
        """A norm has given x; how it is stored is decided by what comes next."""
        self.put(x, norm)
        self._pending = (_key(x), norm)

    def awaits(self, x: Tensor) -> bool:
        return self._pending is not None and self._pending[0] == _key(x)

    def settle(self) -> None:
        if self._pending is not None:
            norm = self._pending[1]
            self._pending = None
            norm.settle(self)

    def count(self, *saved: Tensor | None) -> None:
        """Note what autograd would have saved."""
        for x in saved:
            if x is None:
                continue
            key = (*_key(x), x._version)
            if key not in self._plain or self._plain[key].expired():
                self._plain[key] = StorageWeakRef(x.untyped_storage())
                self.plain += x.numel() * x.element_size()

    @contextmanager
    def disturbing(self, index: int, seed: int) -> Iterator[None]:
        self.disturb = (index, seed)
        try:
            yield
        finally:
            self.disturb = None


def _key(x: Tensor) -> tuple[Any, ...]:
    return (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.dtype)
