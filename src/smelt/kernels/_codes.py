"""Trees as what the loops of native/matvec.py take: codes, their scales, and what is added to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.forms._sides import spread
from smelt.native import matvec


@dataclass(frozen=True)
class Codes:
    """weight [rows, columns] = scale * (codes - zero); scale, zero: [rows, groups]; zero None for 0.  Codes are whole
    numbers in low..high."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int
    low: int
    high: int


def affine(tree: Encoded | None) -> Codes | None:
    """The codes of a matrix of even levels, pruned or not; None for what has no such codes or other groups."""
    if tree is None or len(tree.shape) != 2:
        return None
    mask, node = None, tree
    if tree.form.name == "sparse" and isinstance(values := tree.parts["values"], Encoded):
        mask, node = tree.parts["mask"], values
    if node.form.name != "affine":
        return None
    form: Any = node.form
    rows, columns = node.shape
    parts = {k: p.decode() if isinstance(p, Encoded) else p for k, p in node.parts.items()}
    sides = {}
    group = form.group or columns
    for name in ("scale", "zero"):
        if name not in parts:
            continue
        side = parts[name].detach().float()
        if form.axis == 0 or (form.axis is None and not form.group):
            side = side.reshape(rows, -1) if form.axis == 0 else side.expand(rows, 1)
        elif form.axis is None and columns % group == 0:
            side = side.reshape(rows, -1)
        else:
            return None
        sides[name] = side.cpu()
    codes, zero = parts["codes"].cpu(), sides.get("zero")
    if isinstance(mask, Tensor):
        if zero is None:
            codes = codes.where(mask.cpu(), 0)
        elif bool((zero == zero.round()).all()):
            whole = spread(zero, node.shape, 0, group) if zero.shape[1] > 1 else zero.expand(node.shape)
            codes = codes.short().where(mask.cpu(), whole.short())
        else:
            return None
    if not codes.numel():
        return None
    low, high = (int(end) for end in codes.aminmax())
    return Codes(codes, sides["scale"] / form.top, zero, group, low, high)


def packed_affine(tree: Encoded | None) -> matvec.Matrix | None:
    """Even levels of up to 8 bits, packed; None for what cannot be."""
    found = affine(tree)
    if found is None or found.high - found.low > 255 or matvec.fault(found.codes.shape[1], found.group):
        return None
    zero, codes, coding = found.zero, found.codes.short(), "steps" if found.high - found.low < 16 else "levels"
    if coding == "levels" and not -128 <= found.low <= found.high < 128:
        shift = found.low + 128
        codes, zero = codes - shift, (torch.zeros_like(found.scale) if zero is None else zero) - shift
    offset = None if zero is None else (-zero * found.scale).numpy()
    return matvec.pack(coding, codes.numpy(), found.scale.numpy(), offset, None, found.group)


def packed_bytes(tree: Encoded | None) -> matvec.Matrix | None:
    """Even levels around 0 of up to 8 bits, one scale a row, packed for rounded inputs; None for what is not so."""
    found = affine(tree)
    if found is None or found.zero is not None or not -128 <= found.low <= found.high < 128:
        return None
    columns = found.codes.shape[1]
    if found.group < columns or columns > matvec.LONGEST or matvec.fault(columns, columns):
        return None
    return matvec.pack("bytes", found.codes.numpy(), found.scale.numpy())


def packed_table(tree: Encoded | None) -> matvec.Matrix | None:
    """A matrix of few different values, however it is stored, packed; None where they are more than 256."""
    if tree is None or len(tree.shape) != 2 or matvec.fault(tree.shape[1], tree.shape[1]):
        return None
    dense = tree.decode().detach().float().cpu()
    if dense[:1].unique().numel() > 256:
        return None
    values, codes = dense.unique(return_inverse=True)
    if len(values) > 256:
        return None
    scale = np.ones((dense.shape[0], 1), np.float32)
    coding = "nibbles" if len(values) <= 16 else "table"
    return matvec.pack(coding, codes.to(torch.uint8).numpy(), scale, None, values.numpy())
