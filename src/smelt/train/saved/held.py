"""Activations as they wait for the backward pass.

A `Held` stands for one tensor, and is held by every operation that needs it; when the last lets go of it, its memory
is free.  Values are flat, in the order in which they lie in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.grids import masks

if TYPE_CHECKING:
    from smelt.train.saved.shelter import Shelter


class Piece:
    """Values [n] that a codec has stored.

    index: which piece of the forward pass it is.
    error: mean square of what storing changed, where that is being measured.
    """

    def __init__(self, shelter: Shelter, index: int, encoded: Encoded, error: float):
        self.shelter, self.index, self.encoded, self.error = shelter, index, encoded, error

    def read(self, dtype: torch.dtype) -> Tensor:
        wanted = dtype if dtype == torch.bfloat16 else torch.float32
        x = Encoded(self.encoded.form, self.encoded.parts, self.encoded.shape, wanted).decode().to(dtype)
        return self.shelter.disturbed(self, x)


class Held(ABC):
    """One tensor; `read` gives its values [n]."""

    @abstractmethod
    def read(self, dtype: torch.dtype) -> Tensor: ...


class Dense(Held):
    """All values, by the codec."""

    def __init__(self, piece: Piece):
        self.piece = piece

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.piece.read(dtype)


class Exact(Held):
    """The values themselves, of what is too small to be worth it."""

    def __init__(self, x: Tensor):
        self.x = x

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.x.to(dtype)


class Gate:
    """Where the slope of a piecewise linear function is 1 (elsewhere it is `slope`), a bit for each element."""

    def __init__(self, mask: Tensor, count: int, n: int, slope: float = 0.0):
        self.mask, self.count, self.n, self.slope = mask, count, n, slope

    def through(self, g: Tensor) -> Tensor:
        """A gradient [n] at the output as one at the input."""
        inside = masks.kept(g, self.mask)
        return inside if not self.slope else inside.add_(masks.kept(g, self.mask, False).mul_(self.slope))


class Rectified(Held):
    """max(x, 0): the gate, and by the codec the values above 0, once somebody needs them."""

    def __init__(self, gate: Gate):
        self.gate = gate
        self.piece: Piece | None = None

    def keep(self, shelter: Shelter, y: Tensor) -> None:
        """Take in the values of the tensor, flat."""
        if self.piece is None:
            self.piece = shelter.stored(masks.gather(y, self.gate.mask, self.gate.count))

    def read(self, dtype: torch.dtype) -> Tensor:
        assert self.piece is not None
        out = torch.zeros(self.gate.n, dtype=dtype, device=self.gate.mask.device)
        masks.scatter(self.piece.read(dtype), self.gate.mask, out)
        return out


class Normed(Held):
    """What a norm gives, scale * z + shift, by its normalised input z.

    `make` gives z, of which nothing is stored until `settle`: an operation that comes next may know better how.

    Args:
        like: what the norm gives: its layout holds for z too.
        scale, shift: broadcast to it; None for 1 and 0.
    """

    def __init__(self, make: Callable[[], Tensor], like: Tensor, scale: Tensor | None, shift: Tensor | None):
        self.make: Callable[[], Tensor] | None = make
        self.size, self.stride = like.size(), like.stride()
        self.scale, self.shift = scale, shift
        self.gate: Gate | None = None
        self.pieces: list[Piece] = []

    def _flat(self) -> Tensor:
        assert self.make is not None
        z = laid_out(self.make(), self.size, self.stride)
        self.make = None
        return flat(z)

    def settle(self, shelter: Shelter) -> None:
        if self.make is not None:
            self.pieces = [shelter.stored(self._flat())]

    def split(self, shelter: Shelter, gate: Gate) -> None:
        """Of what ReLU hides only the means of the norm's gradient hear: a bit is enough for it."""
        z = self._flat()
        self.gate = gate
        inside, outside = (
            masks.gather(z, gate.mask, k, i) for k, i in ((gate.count, True), (gate.n - gate.count, False))
        )
        self.pieces = [shelter.stored(inside), shelter.stored(outside, hidden=True)]

    def normal(self, dtype: torch.dtype) -> Tensor:
        """z, flat."""
        if self.gate is None:
            return self.pieces[0].read(dtype)
        out = torch.empty(self.gate.n, dtype=dtype, device=self.gate.mask.device)
        for piece, inside in zip(self.pieces, (True, False), strict=True):
            masks.scatter(piece.read(dtype), self.gate.mask, out, inside)
        return out

    def read(self, dtype: torch.dtype) -> Tensor:
        return self._affine(self.pieces[0].read(dtype))

    def rectified(self, dtype: torch.dtype) -> Tensor:
        """What ReLU makes of it, flat."""
        assert self.gate is not None
        z = torch.zeros(self.gate.n, dtype=dtype, device=self.gate.mask.device)
        masks.scatter(self.pieces[0].read(dtype), self.gate.mask, z)
        return masks.kept(self._affine(z), self.gate.mask)

    def _affine(self, z: Tensor) -> Tensor:
        if self.scale is None:
            return z
        x, scale = z.as_strided(self.size, self.stride), self.scale.to(z.dtype)
        return flat(x * scale if self.shift is None else torch.addcmul(self.shift.to(z.dtype), x, scale))


class NormedRectified(Held):
    """What ReLU makes of what a norm gives."""

    def __init__(self, norm: Normed):
        self.norm = norm

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.norm.rectified(dtype)


def dense(x: Tensor) -> bool:
    """Whether the elements lie side by side in memory, in any order, each once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.size(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat(x: Tensor) -> Tensor:
    """The values [n] of a tensor that is dense, in the order of memory, not copied."""
    return x.as_strided((x.numel(),), (1,))


def laid_out(x: Tensor, size: Any, stride: Any) -> Tensor:
    """x in a dense layout."""
    if x.stride() == stride:
        return x
    return torch.empty_strided(size, stride, dtype=x.dtype, device=x.device).copy_(x)
