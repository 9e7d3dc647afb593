"""Products of a matrix of codes with a few vectors, y = x W^T + bias: the loops of matvec.c, and the same with NumPy.

    W = scale * values + offset, a scale (and an offset) for every `group` neighbours in a row

    coding     values of the codes
    levels     lowest + code, 256 of them, lowest = -128
    steps      lowest + code, 16 of them: two codes in a byte
    table      table[code], 256 of them
    nibbles    table[code], 16 of them: two codes in a byte
    bytes      levels with one scale a row, where x is rounded to 256 levels first

Before levels and steps x is rounded to whole numbers of 16 bits, of which the largest in every 256 columns of a group
is 32639: an error of 1.5e-5 of that column at most.

A `Matrix` is packed once.  Rows are taken in tiles of 16, the last filled up; matvec.h says how codes lie in a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from smelt.native import library

ROWS = 16
LINE = 64  # bytes of a line of the cache
CODINGS = {"levels": 0, "table": 1, "nibbles": 2, "steps": 3, "bytes": 0}
HALVED = ("nibbles", "steps")
TABLES = {"nibbles": 16, "table": 256}
MOST = 32639
LONGEST = 1 << 16  # columns of bytes: what sums up in 32 bits
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "smelt_matvec_table": (
        *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        *(c_void_p, c_int64, c_void_p, c_void_p, c_int),
    ),
    "smelt_matvec_even": (
        *(c_int, c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_int64),
        *(c_void_p, c_int64, c_void_p, c_void_p, c_int),
    ),
    "smelt_matvec_bytes": (
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_float, c_int),
        *(c_void_p, c_int64, c_void_p, c_void_p, c_int),
    ),
    "smelt_bytes": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
    "smelt_matvec_dense": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_int64, c_void_p),
}


@functools.cache
def functions() -> dict[str, Any] | None:
    """By name; None where the library was not built."""
    found = {name: getattr(library(), name, None) for name in _FUNCTIONS}
    if not all(found.values()):
        return None
    for name, function in found.items():
        function.restype = None if name == "smelt_bytes" else c_int  # type: ignore[union-attr]
        function.argtypes = _FUNCTIONS[name]  # type: ignore[union-attr]
    return found


@dataclass(frozen=True)
class Matrix:
    """A packed matrix.  The arrays are C-contiguous; offset, table and sums are empty where there are none.

    codes: uint32 [tiles, columns / codes of a word, 16].  scale, offset: float32 [tiles, groups, 16].
    table: float32 [16] or [256].  sums: int32 [rows], of the levels of each row.  lowest: of the levels.
    """

    coding: str
    rows: int
    columns: int
    group: int
    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    table: np.ndarray
    sums: np.ndarray
    lowest: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError: arrays that the loops would read beyond their ends."""
        tiles, groups = -(-self.rows // ROWS), -(-self.columns // max(self.group, 1))
        words = self.columns // (8 if self.coding in HALVED else 4)
        wanted: dict[str, tuple[Any, ...]] = {
            "codes": (np.uint32, (tiles, words, ROWS)),
            "scale": (np.float32, (tiles, groups, ROWS)),
            "offset": (np.float32, (tiles, groups, ROWS), (0,)),
            "table": (np.float32, (TABLES.get(self.coding, 0),)),
            "sums": (np.int32, (self.rows if self.coding == "bytes" else 0,)),
        }
        if self.coding not in CODINGS or self.rows < 1 or fault(self.columns, self.group) or not words:
            raise ValueError(f"no matrix of {self.coding}, {self.rows} x {self.columns} in groups of {self.group}")
        if self.coding == "bytes" and (groups > 1 or self.columns > LONGEST or self.offset.size):
            raise ValueError("bytes have one scale a row, no offset and at most 65,536 columns")
        for name, (dtype, *shapes) in wanted.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape not in shapes or not array.flags.c_contiguous:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shapes[0]}")

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.codes, self.scale, self.offset, self.table, self.sums))


def fault(columns: int, group: int) -> str | None:
    """Why a matrix of so many columns in such groups cannot be packed; None: it can."""
    if columns < 8 or columns % 8:
        return f"{columns} columns are no multiple of 8"
    if group < 8 or group % 8:
        return f"groups of {group} are no multiple of 8"
    return None


def pack(
    coding: str,
    codes: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray | None = None,
    table: np.ndarray | None = None,
    group: int = 0,
) -> Matrix:
    """Pack a matrix.

    Args:
        codes: whole numbers [rows, columns]: levels and bytes in -128..127, steps within 16 neighbours, indices below
            16 or 256.
        scale, offset: [rows, groups].
        table: values of indices, at most 16 or 256.
        group: columns of a group; 0 for all of them.

    Raises:
        ValueError: sizes or codes that do not fit.
    """
    (rows, columns), group = codes.shape, group or codes.shape[1]
    if (why := fault(columns, group)) is not None:
        raise ValueError(why)
    first, last = (int(codes.min()), int(codes.max())) if rows else (0, 0)
    low = 0 if coding in TABLES else first if coding == "steps" else -128
    high = low + (16 if coding in HALVED else 256) - 1 if table is None else len(table) - 1
    if not low <= first <= last <= high:
        raise ValueError(f"codes {first}..{last} of {coding} are not in {low}..{high}")
    tiles = -(-rows // ROWS)
    filled = np.zeros((tiles * ROWS, columns), np.uint8)
    filled[:rows] = codes.astype(np.uint8) - np.uint8(low & 255)
    if coding == "nibbles":
        filled = filled[:, 0::2] | filled[:, 1::2] << np.uint8(4)
    elif coding == "steps":
        halves = filled.reshape(tiles * ROWS, -1, 2, 4)
        filled = (halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)).reshape(tiles * ROWS, -1)
    words = np.ascontiguousarray(filled).view("<u4").reshape(tiles, ROWS, -1).transpose(0, 2, 1)
    none = np.zeros(0, np.float32)
    values = none if table is None else np.resize(np.asarray(table, np.float32), TABLES[coding])
    sums = codes.sum(1, dtype=np.int64) if coding == "bytes" else []
    sides = [none if side is None else _tiled(side, tiles) for side in (scale, offset)]
    packed = np.ascontiguousarray(words, np.uint32)
    return Matrix(
        coding, rows, columns, group, packed, sides[0], sides[1], values, np.asarray(sums, np.int32), float(low)
    )


def together(matrices: Sequence[Matrix]) -> list[Matrix]:
    """The same matrices in one piece of memory, which NumPy asks the system to lay out in large pages: reading many
    small matrices in turn is faster so."""
    names = ("codes", "scale", "offset")
    sizes = [[-(-getattr(m, name).nbytes // LINE) * LINE for name in names] for m in matrices]
    room = np.empty(sum(map(sum, sizes)) + LINE, np.uint8)
    at, found = -room.ctypes.data % LINE, []
    for matrix, own in zip(matrices, sizes, strict=True):
        placed = {}
        for name, size in zip(names, own, strict=True):
            array = getattr(matrix, name)
            placed[name] = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            placed[name][...] = array
            at += size
        found.append(replace(matrix, **placed))
    return found


def _tiled(side: np.ndarray, tiles: int) -> np.ndarray:
    filled = np.zeros((tiles * ROWS, side.shape[1]), np.float32)
    filled[: len(side)] = side
    return np.ascontiguousarray(filled.reshape(tiles, ROWS, -1).transpose(0, 2, 1))


def product(
    matrix: Matrix,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    step: float = 0.0,
    zero: float = 0.0,
    apart: bool = False,
    level: int = -1,
) -> np.ndarray:
    """x W^T + bias: float32 [samples, rows].

    Args:
        x: float32 [samples, columns].
        bias: float32 [rows].
        step, zero: the levels (code - zero) * step, code 0..255, that x is rounded to before a matrix of bytes; step 0
            for levels that span x and 0, of each sample apart or of all of them.
        level: of the machine's vector instructions, -1 for the best.

    Raises:
        ValueError: other shapes or dtypes.
    """
    good = x.dtype == np.float32 and x.ndim == 2 and x.shape[1] == matrix.columns and x.flags.c_contiguous
    if not good or (bias is not None and (bias.dtype != np.float32 or bias.shape != (matrix.rows,))):
        raise ValueError(f"x is {x.dtype} {x.shape}, not a contiguous float32 [samples, {matrix.columns}], or its bias")
    y = np.empty((len(x), matrix.rows), np.float32)
    bias = None if bias is None else np.ascontiguousarray(bias)
    if not len(x):
        return y
    if functions() is None:
        return _portable(matrix, x, bias, step, zero, apart)
    call = Call(matrix)
    call(x.ctypes.data, len(x), bias.ctypes.data if bias is not None else None, y.ctypes.data, step, zero, apart, level)
    return y


class Call:
    """The loops of the library, which must be there, over one matrix: by addresses, for those who checked what lies
    there."""

    def __init__(self, matrix: Matrix):
        compiled = functions()
        if compiled is None:
            raise ValueError("the C library was not built")
        self.matrix = matrix  # keeps the arrays alive
        offset, table = (a.ctypes.data if a.size else None for a in (matrix.offset, matrix.table))
        codes, scale, sizes = matrix.codes.ctypes.data, matrix.scale.ctypes.data, (matrix.rows, matrix.columns)
        self.bytes = matrix.coding == "bytes"
        bits = 4 if matrix.coding in HALVED else 8
        if self.bytes:
            self.run = compiled["smelt_matvec_bytes"]
            self.fixed: tuple[Any, ...] = (codes, scale, matrix.sums.ctypes.data, *sizes)
        elif matrix.coding in TABLES:
            self.run = compiled["smelt_matvec_table"]
            self.fixed = (bits, codes, scale, offset, table, *sizes, matrix.group)
        else:
            self.run = compiled["smelt_matvec_even"]
            self.fixed = (bits, codes, scale, offset, matrix.lowest, *sizes, matrix.group)

    def __reduce__(self) -> Any:  # a copy has addresses of its own
        return Call, (self.matrix,)

    def __call__(
        self,
        x: int,
        samples: int,
        bias: int | None,
        y: int,
        step: float = 0.0,
        zero: float = 0.0,
        apart: bool = False,
        level: int = -1,
    ) -> None:
        """x: float32 [samples, columns], y: float32 [samples, rows]: addresses."""
        rounding = (step, zero, int(apart)) if self.bytes else ()
        if result := self.run(*self.fixed, *rounding, x, samples, bias, y, level):
            raise MemoryError("no memory for a product") if result == -2 else ValueError("no such product")


def _portable(
    matrix: Matrix, x: np.ndarray, bias: np.ndarray | None, step: float, zero: float, apart: bool
) -> np.ndarray:
    if matrix.coding == "bytes":
        wide: Any
        zeros: Any
        wide, zeros = (np.float32(step), np.float32(zero)) if step > 0 else _span(x, 1 if apart else None)
        if apart and step <= 0:
            wide, zeros = wide[:, None], zeros[:, None]
        x = (np.rint(np.clip(x / wide + zeros, 0, 255)) - zeros) * wide
    y = (x.astype(np.float64) @ _values(matrix).T.astype(np.float64)).astype(np.float32)
    return y if bias is None else y + bias


def values(matrix: Matrix) -> np.ndarray:
    """The dense matrix, float32 [rows, columns]."""
    if (compiled := functions()) is None:
        return _values(matrix)
    found = np.empty((matrix.rows, matrix.columns), np.float32)
    offset, table = (a.ctypes.data if a.size else None for a in (matrix.offset, matrix.table))
    parts = (matrix.codes.ctypes.data, matrix.scale.ctypes.data, offset, table)
    sizes = (matrix.lowest, matrix.rows, matrix.columns, matrix.group)
    if compiled["smelt_matvec_dense"](CODINGS[matrix.coding], *parts, *sizes, found.ctypes.data):
        raise ValueError("no such matrix")
    return found


def as_bytes(x: np.ndarray, step: float = 0.0, zero: float = 0.0) -> tuple[np.ndarray, float, int]:
    """(codes uint8, step, zero) of a contiguous float32 array, x ~ (code - zero) * step; step 0: levels that span x
    and 0.

    Raises:
        ValueError: another dtype or layout.
    """
    if x.dtype != np.float32 or not x.flags.c_contiguous:
        raise ValueError(f"x is {x.dtype}, not contiguous float32")
    if (compiled := functions()) is None:
        wide, place = (np.float32(step), np.float32(zero)) if step > 0 else _span(x, None)
        return np.rint(np.clip(x / wide + place, 0, 255)).astype(np.uint8), float(wide), int(place)
    codes = np.empty(x.shape, np.uint8)
    own, at = c_float(step), c_float(zero)
    compiled["smelt_bytes"](x.ctypes.data, x.size, byref(own), byref(at), codes.ctypes.data)
    return codes, own.value, int(at.value)


def _span(x: np.ndarray, axis: int | None) -> tuple[Any, Any]:
    """Step and zero of levels that span x and 0."""
    low, high = x.min(axis, initial=0), x.max(axis, initial=0)
    wide = np.maximum(high / np.float32(255) - low / np.float32(255), np.finfo(np.float32).tiny)
    return wide, np.rint(np.minimum(-low / wide, 255))


def _values(matrix: Matrix) -> np.ndarray:
    packed = np.ascontiguousarray(matrix.codes.transpose(0, 2, 1)).view(np.uint8).reshape(-1, matrix.codes.shape[1] * 4)
    codes = packed[: matrix.rows]
    if matrix.coding == "nibbles":
        codes = np.stack((codes & 15, codes >> 4), -1)
    elif matrix.coding == "steps":
        codes = np.stack((codes.reshape(-1, 4) & 15, codes.reshape(-1, 4) >> 4), 1)
    codes = codes.reshape(matrix.rows, matrix.columns)
    dense = matrix.table[codes] if matrix.table.size else codes.astype(np.float32) + np.float32(matrix.lowest)
    sides = (matrix.scale, matrix.offset) if matrix.offset.size else (matrix.scale,)
    spread = [
        side.transpose(0, 2, 1).reshape(-1, side.shape[1])[: matrix.rows].repeat(matrix.group, 1)[:, : matrix.columns]
        for side in sides
    ]
    found: np.ndarray = dense * spread[0] + (spread[1] if len(spread) > 1 else 0)
    return found.astype(np.float32)
