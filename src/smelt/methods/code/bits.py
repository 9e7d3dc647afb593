"""Bit packing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Lossless, State
from smelt.forms import bits as form


@dataclass(frozen=True)
class Bits(Lossless):
    """Packs masks and small integers into as few bits as their range needs (1 to 16), without loss.

    applies to: every leaf at rest: masks, indices, integer codes; wider leaves stay as they are
    needs a pretrained model: no
    needs data: no
    needs training: no
    good at: masks and codes that are about equally frequent; the cheapest to read
    bad at: skewed frequencies (code.entropy), floating values (no gain)
    source: https://en.wikipedia.org/wiki/Bit_array
    """

    def encode(self, x: Tensor, state: State) -> Encoded:
        flat = x.detach().cpu().contiguous().reshape(-1)
        kept = _range(flat)
        if kept is None:
            own = flat.view(torch.uint8).clone() if flat.numel() else torch.empty(0, dtype=torch.uint8)
            return Encoded(form.Bits(8 * x.dtype.itemsize), {"packed": own}, x.shape, x.dtype)
        low, bits = kept
        source = flat.numpy()
        blocks = [source[i : i + form.BLOCK] for i in range(0, len(source), form.BLOCK)]
        packed = [form.pack(block.astype(np.int64) - low, bits) for block in blocks]
        stream = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *packed]))
        return Encoded(form.Bits(bits, low), {"packed": stream}, x.shape, x.dtype)


def _range(flat: Tensor) -> tuple[int, int] | None:
    """(smallest element, bits), or None where the leaf is not integral or needs its whole width."""
    if flat.dtype is torch.bool:
        return 0, 1
    if flat.is_floating_point() or flat.is_complex():
        return None
    if not flat.numel():
        return 0, 1
    low, high = int(flat.numpy().min()), int(flat.numpy().max())
    bits = max(1, (high - low).bit_length())
    return (low, bits) if bits < min(17, 8 * flat.dtype.itemsize) and low < 2**62 else None
