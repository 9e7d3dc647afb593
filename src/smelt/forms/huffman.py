"""Canonical Huffman codes of the bytes of a leaf.

The stream (little-endian, codes from the highest bit down).  Integers wider than a byte whose range fits fewer
bytes that way are stored minus an offset; floating numbers wider than a byte are rotated left by one bit, so that
the exponent begins their highest byte; bool is packed to bits.  Then come `width` planes, the lowest bytes first
(one for bool), each of n bytes, the symbols:

    kind   uint8; + 128 in the first plane where an offset follows it, as wide as the dtype
    0  as they are   n bytes
    1  constant      the symbol
    2  coded         last symbol; lengths of 0..last
    3  coded         first symbol, number - 1; lengths of that many from the first on, modulo 256
    4  coded         number - 1, the symbols, ascending; their lengths

Lengths are nibbles, the high one first, 0 for a symbol that does not occur.  A coded plane goes on with the
lengths in bits (uint16) of its lanes of 4096 symbols, without the last, and the lanes, bit after bit; its last
byte is filled with zeros.  A stream shorter than `least` is filled with zeros to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.forms._parts import Claims, as_tensor, exactly, kind, require

LANE = 4096
LONGEST = 15
RAW, CONSTANT, DENSE, RUN, LISTED = range(5)
OFFSET = 128

# Up to this many bits a plane is decoded from every bit at once, which is faster than few lanes side by side.
FEW_BITS = 1 << 18


@dataclass(frozen=True)
class Huffman(Form):
    """Lossless: any leaf as one stream of bytes, laid out as the module says.

    stream: uint8 [bytes].  Its length bounds what it may claim, see `least`.
    """

    values: ClassVar[tuple[str, ...]] = ("stream",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The leaf, bit for bit.  Raises FileError: the stream is damaged."""
        stream = parts["stream"]
        self.check({"stream": (stream.shape, stream.dtype)}, shape, dtype)
        reader = _Reader(stream.detach().cpu().contiguous().numpy())
        count, planes = symbols(numel(shape), dtype)
        dense = np.empty((count, planes), np.uint8)
        offset = None
        for plane in range(planes if count else 0):
            how = reader.byte()
            if how & OFFSET and plane == 0 and planes > 1 and is_integer(dtype):
                offset = reader.take(planes).view(unsigned(planes))
                how -= OFFSET
            dense[:, plane] = reader.plane(how, count)
        require(reader.at == reader.size or reader.rest_is_fill(least(shape, dtype)), "Huffman stream: bytes left over")
        return _assemble(dense, offset, shape, dtype).to(stream.device)

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        exactly(self, parts, shape, "stream")
        size = kind(self, parts, "stream", (torch.uint8,))
        fits = len(size) == 1 and size[0] >= least(shape, dtype)
        require(fits, f"form 'huffman': {list(size)} bytes cannot hold {list(shape)} {dtype}")

    def awake(self, encoded: Encoded) -> Tensor:
        return encoded.decode()


def least(shape: torch.Size, dtype: torch.dtype) -> int:
    """Fewest bytes of a stream: 1/8 of a uint8 leaf, 1/2048 of others.

    It binds where all planes are constant.  One byte of a uint8 leaf may stand for 255 elements of a sparse
    tensor (a gap); so no byte of a file claims more than 2048 elements.
    """
    size = numel(shape) * dtype.itemsize
    return -(-size // (8 if dtype is torch.uint8 else 2048))


def symbols(count: int, dtype: torch.dtype) -> tuple[int, int]:
    """(symbols in a plane, planes) of a leaf of `count` elements."""
    return (-(-count // 8), 1) if dtype is torch.bool else (count, dtype.itemsize)


def unsigned(width: int) -> str:
    """The NumPy dtype of little-endian words of `width` bytes."""
    return f"<u{width}"


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def rotates(dtype: torch.dtype) -> bool:
    """Whether words of this dtype are rotated left by one bit."""
    return dtype.is_floating_point and dtype.itemsize in (2, 4, 8)


def codes(lengths: np.ndarray) -> np.ndarray:
    """Canonical codes, uint64 [256], of lengths [256]: ordered by length, then by symbol."""
    found = np.zeros(256, np.uint64)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    short = LONGEST - lengths[order].astype(np.int64)
    share = 1 << short
    found[order] = np.cumsum(share) - share >> short
    return found


def _assemble(dense: np.ndarray, offset: np.ndarray | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype is torch.bool:
        return torch.from_numpy(np.unpackbits(dense.reshape(-1), count=numel(shape)).astype(bool)).reshape(shape)
    if offset is not None or rotates(dtype):
        words = dense.view(unsigned(dense.shape[1]))
        if offset is not None:
            words += offset
        else:
            words[:] = words >> 1 | words << 8 * dtype.itemsize - 1
    return as_tensor(dense.reshape(-1), shape, dtype)


class _Reader:
    """Takes the planes from a stream; every method raises FileError where the stream is damaged."""

    def __init__(self, stream: np.ndarray):
        self.stream = stream
        self.size = stream.size
        self.at = 0

    def take(self, count: int) -> np.ndarray:
        require(count <= self.size - self.at, "Huffman stream: it ends too early")
        self.at += count
        return self.stream[self.at - count : self.at]

    def byte(self) -> int:
        return int(self.take(1)[0])

    def rest_is_fill(self, size: int) -> bool:
        return self.size == size and not self.stream[self.at :].any()

    def plane(self, how: int, count: int) -> np.ndarray:
        if how == RAW:
            return self.take(count)
        if how == CONSTANT:
            return self.take(1)
        require(how in (DENSE, RUN, LISTED), f"Huffman stream: no kind of plane {how}")
        require(count <= 8 * (self.size - self.at), "Huffman stream: it ends too early")
        table, longest = self._table(how)
        lanes = -(-count // LANE)
        begin = np.zeros(lanes, np.int64)
        np.cumsum(self.take(2 * (lanes - 1)).view("<u2"), dtype=np.int64, out=begin[1:])
        last = count - LANE * (lanes - 1)
        rest = self.stream[self.at : self.at + (int(begin[-1]) + last * longest) // 8 + 1]
        require(int(begin[-1]) < 8 * rest.size, "Huffman stream: a lane begins beyond its end")
        walk = _from_every_bit if 8 * rest.size <= FEW_BITS else _side_by_side
        found, end = walk(rest, begin, last, table, longest)
        require(np.array_equal(end[:-1], begin[1:]), "Huffman stream: a lane does not end where the next begins")
        require(int(end[-1]) <= 8 * rest.size, "Huffman stream: it ends too early")
        self.take(-(-int(end[-1]) // 8))
        return found

    def _table(self, how: int) -> tuple[np.ndarray, int]:
        """For the next bits: symbol + 256 * length, uint16; and how many bits."""
        first = self.byte() if how == RUN else 0
        number = self.byte() + 1
        listed = self.take(number) if how == LISTED else (first + np.arange(number)) % 256
        require(how != LISTED or bool((listed[1:] > listed[:-1]).all()), "Huffman stream: symbols out of order")
        nibbles = self.take(-(-number // 2))
        lengths = np.zeros(256, np.uint16)
        lengths[listed] = np.stack((nibbles >> 4, nibbles & 15), 1).reshape(-1)[:number]
        longest = int(lengths.max())
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        share = 1 << (longest - lengths[order].astype(np.int64))
        require(longest > 0 and int(share.sum()) == 1 << longest, "Huffman stream: its code is not complete")
        return np.repeat(order.astype(np.uint16) | lengths[order] << 8, share), longest


def _windows(rest: np.ndarray, spare: int) -> np.ndarray:
    """For every byte and `spare` more of zeros, it and the next two as one number, uint32."""
    padded = np.concatenate((rest, np.zeros(spare + 2, np.uint8))).astype(np.uint32)
    return padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]


def _side_by_side(
    rest: np.ndarray, begin: np.ndarray, last: int, table: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decode all lanes in step; the last has `last` symbols.  (Symbols; the bit at which each lane ends.)"""
    windows = _windows(rest, LANE * LONGEST // 8 + 1)
    at, end = begin.copy(), begin.copy()
    found = np.empty((LANE, len(begin)), np.uint8)
    mask = (1 << longest) - 1
    for step in range(LANE):
        if step == last:
            end[-1] = at[-1]
            at = at[:-1]
        entry = table[windows[at >> 3] >> (24 - longest - (at & 7)) & mask]
        found[step, : len(at)] = entry
        at = at + (entry >> 8)
    end[: len(at)] = at
    return found.T.reshape(-1)[: LANE * (len(begin) - 1) + last], end


def _from_every_bit(
    rest: np.ndarray, begin: np.ndarray, last: int, table: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same by doubling: where the next symbol begins, the next but one, the fourth, ... for every bit."""
    size = 8 * rest.size
    shifts = np.arange(24 - longest, 16 - longest, -1, dtype=np.uint32)
    entry = table[(_windows(rest, 0)[:, None] >> shifts).reshape(-1) & ((1 << longest) - 1)]
    after = np.full(size + 2, size + 1, np.int32)  # at size the stream ends; one more symbol leads to size + 1
    np.minimum(np.arange(size, dtype=np.int32) + (entry >> 8), size + 1, out=after[:size])
    following, at = after, begin.astype(np.int32)[None]
    steps = LANE if len(begin) > 1 else last
    while len(at) < steps:
        at = np.concatenate((at, after[at]))[:steps]
        if len(at) < steps:
            after = after[after]
    end = following[at[-1]].astype(np.int64)
    end[-1] = following[at[last - 1, -1]]
    return entry[np.minimum(at, size - 1).T.reshape(-1)[: LANE * (len(begin) - 1) + last]].astype(np.uint8), end
