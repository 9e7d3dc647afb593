"""Huffman coding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Lossless, State
from smelt.core.settings import setting
from smelt.forms import huffman as form

BLOCK = 1 << 18  # symbols written at a time


@dataclass(frozen=True)
class Huffman(Lossless):
    """Codes frequent bytes in fewer bits, without loss: canonical Huffman codes of limited length.

    Elements wider than a byte are coded byte by byte, each with its own table or as it is, whichever is smaller.

    applies to: every leaf at rest: weights, indices, integer codes, masks, gaps
    needs a pretrained model: no
    needs data: no
    needs training: no
    good at: skewed frequencies: indices, codes of few bits, gaps, exponents
    bad at: below one bit per byte (very sparse bitmaps; gaps are better), mantissas, tensors of a few bytes
    source: Huffman 1952, doi:10.1109/JRPROC.1952.273898; limit: Larmore & Hirschberg 1990, doi:10.1145/79147.79150
    """

    max_length: int = setting(form.LONGEST, "longest code in bits", low=8, high=form.LONGEST)

    def encode(self, x: Tensor, state: State) -> Encoded:
        planes, offset = _planes(x.detach().cpu().contiguous().reshape(-1))
        stream = b"".join(self._plane(plane, offset if i == 0 else b"") for i, plane in enumerate(planes))
        stream = stream.ljust(form.least(x.shape, x.dtype), b"\0")
        leaf = torch.from_numpy(np.frombuffer(stream, np.uint8).copy())
        return Encoded(form.Huffman(), {"stream": leaf}, x.shape, x.dtype)

    def _plane(self, plane: np.ndarray, offset: bytes) -> bytes:
        """Kind, offset, table, lanes: the smallest way to write a plane."""
        flag = form.OFFSET if offset else 0
        counts = np.bincount(plane, minlength=256)
        if np.count_nonzero(counts) == 1:
            return bytes([form.CONSTANT + flag]) + offset + plane[:1].tobytes()
        lengths = code_lengths(counts, self.max_length)
        kind, table = min((_dense(lengths), _run(lengths), _listed(lengths)), key=lambda t: len(t[1]))
        lanes = -(-len(plane) // form.LANE)
        size = len(table) + 2 * (lanes - 1) + math.ceil(int(counts @ lengths) / 8)
        if size >= len(plane):
            return bytes([form.RAW + flag]) + offset + plane.tobytes()
        return bytes([kind + flag]) + offset + table + _write(plane, lengths)


def code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Lengths of an optimal prefix code no longer than `limit` bits, by package-merge.

    Args:
        counts: frequencies, any number of symbols up to 2^limit; unused ones (0) get no code.

    Returns:
        int64, one length per symbol, 0 for unused ones; 1 where only one is used.
    """
    counts = np.asarray(counts)
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    weights = counts[order].astype(np.int64)
    lengths = np.zeros(len(counts), np.int64)
    if len(order) < 2:
        lengths[order] = 1
        return lengths
    if len(order) > 1 << limit:
        raise ValueError(f"{len(order)} symbols have no code of at most {limit} bits")
    levels = [np.ones(len(order), bool)]
    merged = weights
    for _ in range(limit - 1):
        pairs = merged[: len(merged) // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate((weights, pairs))
        rank = np.argsort(both, kind="stable")
        merged = both[rank]
        levels.append(rank < len(order))
    take = 2 * len(order) - 2
    for is_symbol in reversed(levels):
        used = int(np.count_nonzero(is_symbol[:take]))
        lengths[order[:used]] += 1
        take = 2 * (take - used)
    return lengths


def _planes(flat: Tensor) -> tuple[list[np.ndarray], bytes]:
    """The planes of symbols, lowest byte first, and the offset as bytes (empty for none)."""
    if not flat.numel():
        return [], b""
    if flat.dtype is torch.bool:
        return [np.packbits(flat.numpy())], b""
    width, offset = flat.dtype.itemsize, b""
    dense = flat.view(torch.uint8).numpy().reshape(-1, width)
    if form.rotates(flat.dtype):
        words = dense.view(form.unsigned(width))
        dense = (words << 1 | words >> 8 * width - 1).view(np.uint8)
    elif form.is_integer(flat.dtype) and width > 1:
        low, high = int(flat.numpy().min()), int(flat.numpy().max())
        if max(1, _bytes(high - low)) < (width if low < 0 else _bytes(high)):
            offset = (low % (1 << 8 * width)).to_bytes(width, "little")
            dense = (dense.view(form.unsigned(width)) - np.frombuffer(offset, form.unsigned(width))).view(np.uint8)
    return [np.ascontiguousarray(dense[:, i]) for i in range(width)], offset


def _bytes(number: int) -> int:
    return -(-number.bit_length() // 8)


def _dense(lengths: np.ndarray) -> tuple[int, bytes]:
    last = int(np.flatnonzero(lengths)[-1])
    return form.DENSE, bytes([last]) + _nibbles(lengths[: last + 1])


def _run(lengths: np.ndarray) -> tuple[int, bytes]:
    """The run of symbols, modulo 256, that leaves out the longest stretch of unused ones."""
    used = np.flatnonzero(lengths)
    skipped = np.diff(used, append=used[0] + 256)
    first = int(used[(int(skipped.argmax()) + 1) % len(used)])
    number = 257 - int(skipped.max())
    return form.RUN, bytes([first, number - 1]) + _nibbles(np.roll(lengths, -first)[:number])


def _listed(lengths: np.ndarray) -> tuple[int, bytes]:
    used = np.flatnonzero(lengths)
    return form.LISTED, bytes([len(used) - 1]) + used.astype(np.uint8).tobytes() + _nibbles(lengths[used])


def _nibbles(lengths: np.ndarray) -> bytes:
    even = np.append(lengths, 0)[: -(-len(lengths) // 2) * 2].astype(np.uint8).reshape(-1, 2)
    return (even[:, 0] << 4 | even[:, 1]).tobytes()


def _write(plane: np.ndarray, lengths: np.ndarray) -> bytes:
    """Lane lengths and lanes.  Four codes are joined to at most 60 bits, which are then laid over 64-bit words."""
    code, length = form.codes(lengths), lengths.astype(np.uint64)
    sizes = np.add.reduceat(lengths[plane], np.arange(0, len(plane), form.LANE))
    total = int(sizes.sum())
    words = np.zeros(total // 64 + 2, np.uint64)
    begin = 0
    for start in range(0, len(plane), BLOCK):
        block = plane[start : start + BLOCK]
        number, bits = code[block], length[block]
        for _ in range(2):
            if len(bits) % 2:
                number, bits = np.append(number, np.uint64(0)), np.append(bits, np.uint64(0))
            number, bits = number[::2] << bits[1::2] | number[1::2], bits[::2] + bits[1::2]
        ends = np.cumsum(bits, dtype=np.int64) + begin
        at = ends - bits.astype(np.int64)
        begin = int(ends[-1])
        left = number << (np.uint64(64) - bits)
        shift = (at & 63).astype(np.uint64)
        _lay(words, at >> 6, left >> shift)
        _lay(words, (at >> 6) + 1, left << np.uint64(1) << (np.uint64(63) - shift))
    return sizes[:-1].astype("<u2").tobytes() + words.astype(">u8").tobytes()[: -(-total // 8)]


def _lay(words: np.ndarray, at: np.ndarray, bits: np.ndarray) -> None:
    """words[at] |= bits, where `at` ascends with repetitions."""
    first = np.flatnonzero(np.diff(at, prepend=-1))
    words[at[first]] |= np.bitwise_or.reduceat(bits, first)
