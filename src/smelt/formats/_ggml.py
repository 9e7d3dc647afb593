"""The bytes of GGUF: keys and values, and the block types of its tensors.

0   "GGUF", version u32, tensors u64, keys u64; all little-endian
24  keys: text, type u32, value            a text: length u64, UTF-8
..  tensors: text, dimensions u32, sizes u64 (the fastest first), type u32, offset u64
..  the tensors, each at a multiple of 32 from where they begin
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt.formats._affine import Grid

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32
# type of a key's value -> (number, format of struct)
KINDS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "text": (8, ""), "array": (9, "")}
# of tensors: number, bytes of a block of 32, the number of a file of mostly such
TYPES = {
    **{"F32": (0, 128, 0), "F16": (1, 64, 1), "BF16": (30, 64, 32)},
    **{"Q4_0": (2, 18, 2), "Q4_1": (3, 20, 3), "Q8_0": (8, 34, 7)},
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type in `TYPES`, its shape as in PyTorch, and its bytes, which are made when written."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        count = int(np.prod(self.shape))
        return count * TYPES[self.kind][1] // BLOCK


def dense(tensor: Tensor, kind: str) -> Entry:
    """A tensor as F32, F16 or BF16."""
    dtype = FLOATS[kind]

    def make() -> np.ndarray:
        flat = tensor.detach().cpu().to(dtype).contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy()

    return Entry(kind, tuple(tensor.shape), make)


def blocks(grid: Grid, kind: str) -> Entry:
    """A matrix on an even grid as Q8_0, Q4_0 or Q4_1; `grid.run` is 32."""
    return Entry(kind, tuple(grid.codes.shape), lambda: _blocks(grid, kind))


def fitting(grid: Grid) -> tuple[str, str]:
    """(the smallest type whose blocks hold the codes of a grid, ''), or ('', why there is none).

    Q4_0  (q - 8) d     whole zero points, code - zero in -8..7
    Q4_1  q d + m       codes in 0..15, any zero points
    Q8_0  q d           whole zero points, code - zero in -128..127
    """
    if grid.codes.shape[1] % BLOCK or grid.run % BLOCK:
        return "", f"their rows or groups are no multiple of {BLOCK}"
    about = (grid.codes - grid.spread(grid.zero)).aminmax()
    (low, high), (first, last) = ((int(n) for n in ends) for ends in (grid.codes.aminmax(), about))
    if grid.whole and first >= -8 and last <= 7:
        return "Q4_0", ""
    if low >= 0 and high <= 15:
        return "Q4_1", ""
    if grid.whole and first >= -128 and last <= 127:
        return "Q8_0", ""
    return "", "their codes need a zero point, which blocks of 8 bits lack (symmetric: true needs none)"


def change(grid: Grid, kind: str) -> float:
    """The largest change, in steps, of a value in blocks, whose scales and minima are halves; 0 where it is exact."""
    step, least = _sides(grid)
    codes = grid.codes.float() if kind == "Q4_1" else grid.codes - grid.spread(grid.zero)
    wide = grid.spread(step.half().float()) * codes
    if kind == "Q4_1":
        wide = wide + grid.spread(least.half().float())
    own = (grid.codes - grid.spread(grid.zero)) * grid.spread(step)
    return float(((wide - own).abs() / grid.spread(step)).max())


def _sides(grid: Grid) -> tuple[Tensor, Tensor]:
    """(d, m) of every block."""
    return grid.scale.float(), (-grid.zero * grid.scale).float()


def _blocks(grid: Grid, kind: str) -> np.ndarray:
    step, least = _sides(grid)
    codes = grid.codes if kind == "Q4_1" else grid.codes - grid.spread(grid.zero).int()
    each = codes.reshape(-1, BLOCK)
    sides = [step.half().reshape(-1, 1)] + ([least.half().reshape(-1, 1)] if kind == "Q4_1" else [])
    head = [side.contiguous().view(torch.uint8).numpy() for side in sides]
    if kind == "Q8_0":
        body = each.to(torch.int8).view(torch.uint8)
    else:
        half = (each + (8 if kind == "Q4_0" else 0)).to(torch.uint8)
        body = half[:, : BLOCK // 2] | half[:, BLOCK // 2 :] << 4
    return np.concatenate([*head, body.numpy()], 1).reshape(-1)


def write(path: Path, keys: Mapping[str, tuple[str, Any]], tensors: Mapping[str, Entry]) -> None:
    """A file.

    Args:
        keys: key -> (type in `KINDS`, value); an array is ('array', (type of its elements, values)).
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    for key, (kind, value) in keys.items():
        head += [_text(key), struct.pack("<I", KINDS[kind][0]), _value(kind, value)]
    at = 0
    for name, entry in tensors.items():
        sizes = entry.shape[::-1]
        head += [_text(name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, TYPES[entry.kind][0], at)]
        at += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    with open(path, "xb") as file:
        file.write(b"".join(head))
        for entry in tensors.values():
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.write(entry.make().tobytes())
        file.write(bytes(-file.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: str, value: Any) -> bytes:
    if kind == "text":
        return _text(value)
    if kind == "array":
        of, values = value
        return struct.pack("<IQ", KINDS[of][0], len(values)) + _elements(of, values)
    return struct.pack(KINDS[kind][1], value)


def _elements(kind: str, values: Sequence[Any]) -> bytes:
    return b"".join(_value(kind, value) for value in values)
