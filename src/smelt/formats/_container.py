"""The bytes of a `.smelt` file; what they mean is in smelt.py, and all of it byte for byte in docs/format.md.

0   magic, version, length of the head, CRC-32 of all that with the head       16 bytes
16  head: the meta (JSON, deflated), the small leaves, a CRC-32 of each other leaf
..  the other leaves
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import secrets
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from smelt.core.errors import FileError, ModelError, OutputError

MAGIC = b"\x8bsmelt"
VERSION = 1
HEADER = struct.Struct("<6sHII")
SMALL = 256  # leaves of fewer bytes lie in the head
ALIGNED_FROM, ALIGNMENT = 4096, 64
DEPTH = 32  # of the meta
ELEMENTS = 1 << 48  # of one leaf or node
# A head of n bytes may hold a meta of at most 32 n + 2^16 bytes: what parses it needs ten times as much memory.
RATIO, ROOM = 32, 1 << 16

DTYPES: dict[str, torch.dtype] = {
    short: getattr(torch, name)
    for short, name in {
        "bool": "bool",
        **{f"{kind[0]}{n}": f"{kind}{n}" for n in (8, 16, 32, 64) for kind in ("uint", "int")},
        **{"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"},
        **{"f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "f8e8m0fnu": "float8_e8m0fnu"},
        **{"f8e4m3fnuz": "float8_e4m3fnuz", "f8e5m2fnuz": "float8_e5m2fnuz"},
        **{"c64": "complex64", "c128": "complex128"},
    }.items()
    if hasattr(torch, name)
}
SHORT = {dtype: short for short, dtype in DTYPES.items()}

# What every file would otherwise say again: part of version 1, must not change.
WORDS = (
    b'"u16""u32""u64""i16""i32""f64""c64""f8e4m3fn""f8e5m2"'
    b'"model.embed_tokens.weight","model.layers.0.self_attn.q_proj.weight","k_proj.v_proj.o_proj.mlp.gate_proj.up_proj.down_proj.'
    b'input_layernorm.weight","post_attention_layernorm.weight","model.norm.weight","lm_head.weight","bf16"'
    b'"transformer.wte.wpe.h.0.ln_1.attn.c_attn.c_proj.mlp.c_fc.ln_f.encoder.layer.0.attention.self.query.key.value.output.dense.'
    b'embeddings.word_embeddings.position_embeddings.LayerNorm.intermediate.in_proj_weight","in_proj_bias","out_proj.linear1.norm1.'
    b'features.0.classifier.1.backbone.blocks.0.head.weight_ih_l0","weight_hh_l0","bias_ih_l0","bias_hh_l0",'
    b'"factors",{},"left",[],"right",[],"hashed",{},"binary",{},"signs","float",{},"f16","residual","low","base",'
    b'"edits":[["keep","conv1.weight",0,"0-9,11"],["set","conv1","out_channels",],["set","conv2","in_channels",'
    b'["set","bn1","num_features",["set","fc1","out_features",],["set","fc2","in_features",'
    b'["replace","fc1","chain",{"layers":[["Linear",{"in_features":,"out_features":,"bias":false}],["Conv2d",{"in_channels":,'
    b'"out_channels":,"kernel_size":[3,3],"stride":[1,1],"padding":[1,1],["remove","bn1"],["tie",'
    b'"activations":[["fc1","input","quantize.affine",{},["scale",[],"zero",[]],["scale"]],["conv1","output",'
    b'"recipe":{"steps":[{"prune.channels":{"ratio":0.3,"score":"taylor"}},{"lowrank.svd":{"rank":}},'
    b'{"prune.weights":{"ratio":0.9,"scope":"global"}},{"train":{"epochs":10,"lr":0.001,"optimizer":"sgd","with":['
    b'{"distill.logits":{"temperature":4,"alpha":0.7}},{"prune.weights":{"ratio":{"ramp":[0,0.9]}}},'
    b'{"quantize.affine":{"bits":4,"on":"*.weight"}}]}},{"share.kmeans":{"clusters":16,"on":"fc*"}},'
    b'{"train":{"epochs":2,"lr":0.0001}},{"quantize.affine":{"bits":8,"on":"*.bias"}},{"code.bits":{}},{"code.huffman":{}}]},'
    b'"report":[[0,"checkpoint",[0,"latency",[0,"loss",[0,"macs",2],[0,"parameters",2],[0,"accuracy",0.98],[0,"bytes",1],'
    b'[1,"accuracy",0.97]]'
    b'"layer1.0.downsample.0.weight",["affine",{"axis":0,"bits":4,"group":64,"symmetric":false},[64],"codes",["bits",{"bits":4,'
    b'"offset":-7},"i8","packed",72],"scale",[64],"zero",'
    b'"layer1.0.bn1.weight",["huffman",{},[64],"stream",8],"layer1.0.bn1.bias",[64],"layer1.0.bn1.running_mean",[64],'
    b'"layer1.0.bn1.running_var",[64],"layer1.0.bn1.num_batches_tracked","i64","stages.0.0.conv1.weight",[64,3,3],'
    b'"shortcut.0.weight",[64,1,1],"mask",["bits",{},"bool","packed",'
    b'{"builder":"resnet_digits","arguments":{"classes":10,"channels":[],"size":8,"kernel":3,"padding":1},'
    b'{"builder":"lenet","tensors":["conv1.weight",["affine",{"axis":0,"bits":8},[],"codes",["huffman",{},"i8","stream",1],'
    b'"scale",[20]],"conv1.bias",[20],"conv2.weight",{"builder":"lenet300","tensors":['
    b'"fc1.weight",["sparse",{"packed":true,"gap":63,"columns":true},[300,784],"positions",["huffman",{},1,"stream",1],'
    b'"values",["codebook",{},null,"codebook",[16],"indices",["huffman",{},1,"stream",1]]],'
    b'"fc1.bias",["affine",{},[100],"codes","i8","scale",[]],"fc2.weight",["sparse",{"packed":true,"gap":15},['
)


@dataclass(frozen=True)
class Slot:
    """Dtype and shape of a leaf or a node."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Byte streams need no alignment."""
        return self.nbytes >= ALIGNED_FROM and not (self.dtype == torch.uint8 and len(self.shape) == 1)


def layout(slots: Sequence[Slot], small_at: int, large_at: int) -> tuple[list[int], int]:
    """Offset of every leaf in the file, and the length of the file."""
    offsets = []
    for slot in slots:
        if slot.nbytes < SMALL:
            offsets.append(small_at)
            small_at += slot.nbytes
        else:
            large_at += -large_at % ALIGNMENT if slot.aligned else 0
            offsets.append(large_at)
            large_at += slot.nbytes
    return offsets, large_at


def write(path: Path, meta: Mapping[str, Any], leaves: Sequence[Tensor], *, force: bool = False) -> int:
    """Write a file, complete or not at all; returns its bytes.

    Args:
        meta: plain data.
        leaves: dense tensors on the CPU.
        force: replace an existing file.

    Raises:
        OutputError: the file exists, no space, not writable.
        ModelError: a leaf of a dtype that files do not have, meta that is no plain data.
    """
    check_output(path, force)
    blobs = [to_bytes(leaf) for leaf in leaves]
    slots = [Slot(leaf.dtype, tuple(leaf.shape)) for leaf in leaves]
    small = [blob for blob in blobs if len(blob) < SMALL]
    large = [blob for blob in blobs if len(blob) >= SMALL]
    packed = deflate(to_json(meta), sum(map(len, small)) + 4 * len(large))
    head = b"".join([packed, *small, *(struct.pack("<I", zlib.crc32(blob)) for blob in large)])
    start = HEADER.pack(MAGIC, VERSION, len(head), 0)[:-4]
    start += struct.pack("<I", zlib.crc32(head, zlib.crc32(start))) + head
    offsets, total = layout(slots, HEADER.size + len(packed), len(start))
    _check_space(path, total)
    with _replacing(path, force, total) as file:
        file.write(start)
        at = len(start)
        for slot, offset, blob in zip(slots, offsets, blobs, strict=True):
            if slot.nbytes >= SMALL:
                file.write(bytes(offset - at))
                file.write(blob)
                at = offset + len(blob)
    return total


def to_bytes(leaf: Tensor) -> memoryview:
    """The elements of a tensor in row-major order, little-endian; no copy where it lies so already."""
    check_holds(leaf, "a leaf")
    flat = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(_swapped(flat.view(torch.uint8), leaf.dtype).numpy())  # type: ignore[arg-type]


def check_holds(tensor: Tensor, what: str) -> None:
    """Raise ModelError for a tensor that no file can hold."""
    if tensor.dtype not in SHORT or tensor.layout != torch.strided or tensor.is_meta:
        raise ModelError(f"{what} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; a file cannot hold it")


def _swapped(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes in file order from bytes in memory order, or back."""
    if sys.byteorder == "little":
        return flat
    part = dtype.itemsize // (2 if dtype.is_complex else 1)
    return flat.reshape(-1, part).flip(1).reshape(-1)


def check_output(path: Path, force: bool) -> None:
    """Raise OutputError where a file cannot be put."""
    try:
        exists, ordinary, folder = path.exists(), path.is_file(), path.parent.is_dir()
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    if exists and not ordinary:
        raise OutputError(f"{str(path)!r} is no ordinary file and is not written to")
    if exists and not force:
        raise OutputError(f"{str(path)!r} exists; to replace it pass force=True or --force")
    if not folder:
        raise OutputError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")


def _check_space(path: Path, total: int) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return
    if free < total:
        raise OutputError(f"{str(path)!r} needs {total} bytes, and {free} are free in {str(path.parent)!r}")


@contextmanager
def _replacing(path: Path, force: bool, total: int) -> Iterator[BinaryIO]:
    """A file beside `path` that becomes `path` when all went well and vanishes otherwise."""
    temporary = path.parent / f".smelt-{secrets.token_hex(6)}.part"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_output(path, force)
        os.replace(temporary, path)
        with suppress(OSError):  # folders cannot be synced everywhere
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OutputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{str(path)!r}: no space is left for its {total} bytes") from error
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def to_json(meta: Any) -> bytes:
    """Compact JSON.  Raises ModelError for what is no plain data."""
    try:
        return json.dumps(_plain(meta, "", 0), separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ModelError("a text for the file holds half a surrogate pair") from None


def _plain(value: Any, where: str, depth: int) -> Any:
    if value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        return value
    if depth >= DEPTH:
        raise ModelError(f"{where[:80]}: nested deeper than {DEPTH}")
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(value)]
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}: {value!r} is no plain data (text, numbers, lists, mappings)")
    for key in value:
        if not isinstance(key, str):
            raise ModelError(f"{where}: the key {key!r} is no text")
    return {key: _plain(inner, f"{where}.{key}".lstrip("."), depth + 1) for key, inner in value.items()}


def deflate(text: bytes, rest: int) -> bytes:
    """`text` as raw deflate; hardly compressed where a reader would refuse to believe it (`rest`: bytes beside it)."""
    tried = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED):
        c = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy, WORDS)
        tried.append(c.compress(text) + c.flush())
    packed = min(tried, key=len)
    if len(text) > RATIO * (len(packed) + rest) + ROOM:
        c = zlib.compressobj(0, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
        packed = c.compress(text) + c.flush()
    return packed


def _inflate(head: bytes) -> tuple[bytes, bytes]:
    """(text, what lies behind it in the head).  Raises ValueError."""
    most = RATIO * len(head) + ROOM
    d = zlib.decompressobj(-15, zdict=WORDS)
    try:
        text = d.decompress(head, most + 1)
    except zlib.error as error:
        raise ValueError(f"its meta cannot be inflated ({error})") from None
    if len(text) > most:
        raise ValueError("its meta is implausibly large")
    if not d.eof:
        raise ValueError("its meta is cut off")
    return text, d.unused_data


_STRINGS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")


def from_json(data: bytes) -> Any:
    """Plain data from text that nobody vouches for: no duplicate keys, no endless nesting or digits.

    Raises:
        ValueError: anything else (UnicodeDecodeError among them).
    """
    text = data.decode()
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 21:
            raise ValueError("a number of too many digits")
        return int(digits)

    return json.loads(text, object_pairs_hook=once, parse_int=integer)


class Container:
    """An open file: its `meta`, and its leaves once `place` has said what they are.

    Raises:
        FileError: no file, a foreign or damaged one, or one of a later version; naming the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if not self.path.is_file():
                raise FileError(f"no such file: {str(path)!r}")
            with open(self.path, "rb") as file:
                start = file.read(HEADER.size)
                if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
                    raise self.error("no .smelt file")
                if len(start) < HEADER.size:
                    raise self.error("damaged: it ends within its header")
                # Private: a tensor on it can be written to, the file cannot.
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except FileError:
            raise
        except (OSError, ValueError) as error:
            raise FileError(f"{str(path)!r} cannot be read: {error}") from error
        self.nbytes = len(self._map)
        self.version: int
        _, self.version, length, crc = HEADER.unpack(start)
        if self.version > VERSION:
            raise self.error(f"written by a newer smelt: format version {self.version}, this one reads up to {VERSION}")
        self._large_at = HEADER.size + length
        if self.version < 1 or self._large_at > self.nbytes:
            raise self.error("damaged: its header is wrong or it is cut off")
        head = bytes(self._map[HEADER.size : self._large_at])
        if zlib.crc32(head, zlib.crc32(start[:-4])) != crc:
            raise self.error("damaged: the checksum of its head is wrong")
        try:
            text, rest = _inflate(head)
            self.meta: Any = from_json(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"damaged: {error}") from None
        self._small_at = self._large_at - len(rest)
        self._slots: list[Slot] = []
        self._offsets: list[int] = []
        self._sums: dict[int, int] = {}

    def error(self, text: str) -> FileError:
        return FileError(f"{str(self.path)!r}: {text}")

    def close(self) -> None:
        """Let go of the map; tensors on it keep it."""
        self._map = memoryview(b"")

    def place(self, slots: Sequence[Slot]) -> None:
        """Say what the leaves are.  Raises FileError unless they fill the file exactly."""
        sizes = [slot.nbytes for slot in slots]
        large = [i for i, size in enumerate(sizes) if size >= SMALL]
        in_head = sum(sizes) - sum(sizes[i] for i in large) + 4 * len(large)
        self._slots = list(slots)
        self._offsets, end = layout(slots, self._small_at, self._large_at)
        if self._large_at - self._small_at != in_head or end != self.nbytes:
            raise FileError(f"its leaves would end at byte {end}, and it has {self.nbytes}")
        at = self._large_at - 4 * len(large)
        sums = struct.unpack(f"<{len(large)}I", self._map[at : self._large_at])
        self._sums = dict(zip(large, sums, strict=True))

    def leaf(self, i: int, *, own: bool = False) -> Tensor:
        """Leaf `i`, its checksum checked at the first time.

        Args:
            own: in memory of its own instead of on the mapped file.
        """
        slot, offset = self._slots[i], self._offsets[i]
        data: Any = self._map[offset : offset + slot.nbytes]
        if i in self._sums:
            if zlib.crc32(data) != self._sums[i]:
                raise FileError(f"the checksum of leaf {i} is wrong (bytes {offset} to {offset + slot.nbytes})")
            del self._sums[i]
        if not slot.nbytes:
            return torch.empty(slot.shape, dtype=slot.dtype)
        if own or offset % slot.dtype.itemsize:
            data = bytearray(data)
        flat = torch.frombuffer(data, dtype=torch.uint8)
        if slot.dtype == torch.bool and bool((flat > 1).any()):
            raise FileError(f"leaf {i} holds truth values other than 0 and 1")
        return _swapped(flat, slot.dtype).view(slot.dtype).reshape(slot.shape)

    def verify(self) -> None:
        """Check every leaf that was not read yet.  Raises FileError for the first damaged one."""
        for i in list(self._sums):
            self.leaf(i)
