"""Some elements are zero: a mask, and the values that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.core.errors import FileError
from smelt.forms._parts import BYTES, FLOATS, INTEGERS, Claims, aligned, exactly, in_layout, kind, require, whole

CAPS = (15, 63, 255)
KINDS = (*FLOATS, *INTEGERS, torch.bool)


@dataclass(frozen=True)
class Sparse(Form):
    """x = values where mask, else 0; differentiable in the values, whose masked entries get no gradient.

    In memory, both in the tensor's layout:
        mask: bool.  values: a tensor or a tree.
    At rest (`packed`), where elements are walked in the order of memory, or with `columns` so that dimension 0
    runs fastest, which keeps dead inputs together:
        values: the same tree with only the kept entries of every aligned leaf, flat, in the order of the walk.
        positions: with gap 0 the mask, bool [numel].  Else uint8 symbols 0..gap: a symbol s < gap means that s
            zeros are skipped and a kept element follows; the symbol `gap` means that `gap` zeros are skipped.
            The last kept element is one that does not exist, at index numel just past the end.  So symbols
            below gap cover s + 1 elements, others gap, together exactly numel + 1 <= gap * symbols.
            (The gaps with fillers of Han et al. 2016, arXiv:1510.00149, section 2.)
    """

    packed: bool = False
    gap: int = 0
    columns: bool = False

    values: ClassVar[tuple[str, ...]] = ("values",)
    aligned: ClassVar[tuple[str, ...]] = ("mask", "values")

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        require(not self.packed, "form 'sparse': a packed tensor must be awakened before it is decoded")
        for name in ("mask", "values"):
            in_layout(self, name, parts[name], shape)
        return torch.where(parts["mask"], parts["values"], 0)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        for name, flag in (("packed", self.packed), ("columns", self.columns)):
            require(isinstance(flag, bool), f"form 'sparse': {name} is {flag!r}")
        require(self.packed or not (self.gap or self.columns), "form 'sparse': gaps and columns are for packed tensors")
        if not self.packed:
            exactly(self, parts, shape, "mask", "values")
            aligned(self, parts, "mask", (torch.bool,), shape)
            aligned(self, parts, "values", KINDS, shape)
            return
        whole(self, "gap", self.gap, 0, 255)
        require(self.gap in (0, *CAPS), f"form 'sparse': gap is {self.gap}, not one of 0, 15, 63, 255")
        require(not self.columns or len(shape) > 1, "form 'sparse': columns need two dimensions")
        exactly(self, parts, shape, "positions", "values")
        size = kind(self, parts, "positions", (torch.uint8,) if self.gap else (torch.bool,))
        reach = numel(size) * self.gap - 1 if self.gap else numel(size)
        fits = numel(shape) <= reach if self.gap else numel(shape) == reach
        require(len(size) == 1 and fits, f"form 'sparse': {list(size)} positions do not cover {list(shape)}")
        aligned(self, parts, "values", KINDS, shape)

    def where(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        return parts.get("mask")

    def at_rest(self, encoded: Encoded) -> list[Encoded]:
        """Packed candidates: the positions that code best, those of fewest symbols, and the bitmap.

        Masks that stand directly below one another are joined into one.
        """
        mask, values = encoded.parts["mask"], encoded.parts["values"]
        while isinstance(values, Encoded) and isinstance(values.form, Sparse) and values.dtype == encoded.dtype:
            inner = values.parts["mask"]
            if values.form.packed or not (isinstance(mask, Tensor) and isinstance(inner, Tensor)):
                break
            mask, values = mask & inner, values.parts["values"]
        if self.packed or not isinstance(mask, Tensor) or mask.shape != encoded.shape:
            return [encoded]
        mask = mask.detach().cpu()
        walks = {c: _walk(mask, c).numpy() for c in (False, True)[: min(mask.dim(), 2) or 1]}
        guesses = [g for c, walk in walks.items() for g in _guesses(walk, c)]
        coded = min(guesses, key=lambda g: g[0])[2]
        plain = min(guesses, key=lambda g: g[1])[2]
        bitmap = min((g for g in guesses if not g[2].gap), key=lambda g: g[0])[2]
        forms = dict.fromkeys((coded, plain, bitmap))
        flat = {c: _drop(values, mask, c) for c in {f.columns for f in forms}}
        found = []
        for form in forms:
            walk = walks[form.columns]
            positions = torch.from_numpy(to_gaps(walk, form.gap) if form.gap else walk.copy())
            parts = {"positions": positions, "values": flat[form.columns]}
            found.append(Encoded(form, parts, encoded.shape, encoded.dtype))
        return found

    def awake(self, encoded: Encoded) -> Encoded:
        """The mask and every aligned leaf in the tensor's layout.

        Raises:
            FileError: positions that do not end at the end, or leaves with other than the kept entries.
        """
        if not self.packed:
            return encoded
        parts, shape = encoded.parts, encoded.shape
        positions = parts["positions"]
        if not isinstance(positions, Tensor):
            raise FileError("form 'sparse': its positions are no tensor")
        claims = {k: (p.shape, p.dtype) for k, p in parts.items()}
        self.check(claims, shape, encoded.dtype)
        walk = positions.detach().cpu().numpy()
        if self.gap:
            walk = from_gaps(walk, self.gap, numel(shape))
        kept = torch.from_numpy(walk)
        values = _place(parts["values"], kept, shape, self.columns)
        mask = _unwalk(kept, shape, self.columns).to(positions.device)
        return Encoded(Sparse(), {"mask": mask, "values": values}, shape, encoded.dtype)


def to_gaps(walk: np.ndarray, gap: int) -> np.ndarray:
    """A flat boolean mask as gap symbols, uint8; see `Sparse`."""
    ends = np.append(np.flatnonzero(walk), walk.size)
    skipped = np.diff(ends, prepend=-1) - 1
    fillers, rest = np.divmod(skipped, gap)
    last = np.cumsum(fillers + 1)
    symbols = np.full(last[-1], gap, np.uint8)
    symbols[last - 1] = rest
    return symbols


def from_gaps(symbols: np.ndarray, gap: int, count: int) -> np.ndarray:
    """The inverse of `to_gaps`.  Raises FileError: the symbols do not cover exactly `count` elements."""
    require(symbols.size > 0 and int(symbols.max()) <= gap, f"form 'sparse': a gap beyond {gap}")
    ends = np.cumsum(symbols + (symbols < gap), dtype=np.int64)
    require(symbols[-1] < gap and ends[-1] == count + 1, f"form 'sparse': gaps do not end after {count} elements")
    walk = np.zeros(count + 1, bool)
    walk[ends[symbols < gap] - 1] = True
    return walk[:count]


def _walk(x: Tensor, columns: bool) -> Tensor:
    return (x.movedim(0, -1) if columns else x).reshape(-1)


def _unwalk(flat: Tensor, shape: torch.Size, columns: bool) -> Tensor:
    if not columns:
        return flat.reshape(shape).contiguous()
    return flat.reshape(*shape[1:], shape[0]).movedim(-1, 0).contiguous()


def _drop(part: Tensor | Encoded, mask: Tensor, columns: bool) -> Tensor | Encoded:
    if isinstance(part, Tensor):
        return _walk(part.detach(), columns)[_walk(mask, columns).to(part.device)]
    parts = {k: _drop(p, mask, columns) if k in part.form.aligned else p for k, p in part.parts.items()}
    return Encoded(part.form, parts, part.shape, part.dtype)


def _place(part: Tensor | Encoded, kept: Tensor, shape: torch.Size, columns: bool) -> Tensor | Encoded:
    if isinstance(part, Encoded):
        require(part.shape == shape, f"form 'sparse': a tree of {list(part.shape)} below one of {list(shape)}")
        inner = {k: _place(p, kept, shape, columns) if k in part.form.aligned else p for k, p in part.parts.items()}
        return Encoded(part.form, inner, shape, part.dtype)
    entries = int(kept.sum())
    fits = part.shape == (entries,) and part.dtype in (*KINDS, *BYTES)
    require(fits, f"form 'sparse': {list(part.shape)} {part.dtype} are not the {entries} kept entries")
    flat = torch.zeros(kept.numel(), dtype=part.dtype, device=part.device)
    flat[kept.to(part.device)] = part
    return _unwalk(flat, shape, columns)


def _guesses(walk: np.ndarray, columns: bool) -> list[tuple[float, int, Sparse]]:
    """For every gap (bytes of the positions once coded, by about Huffman's lengths; symbols as they are; the form)."""
    skipped = np.bincount(np.diff(np.append(np.flatnonzero(walk), walk.size), prepend=-1) - 1)
    length = np.flatnonzero(skipped)
    found = []
    for gap in (0, *CAPS):
        if gap:
            counts = np.bincount(length % gap, skipped[length], gap + 1)
            counts[gap] = (length // gap * skipped[length]).sum()
        else:
            counts = np.bincount(np.packbits(walk), minlength=256).astype(float)
        used = np.sort(counts[counts > 0])
        total = used.sum()
        # a symbol of more than half the share costs a whole bit, and the others one more than among themselves
        rest = used[:-1] if used.size > 1 and used[-1] > total / 2 else used
        bits = float((rest * np.log2(rest.sum() / rest)).sum()) + (total if rest is not used else 0)
        found.append((bits / 8 + 0.75 * used.size, int(total) if gap else walk.size, Sparse(True, gap, columns)))
    return found
