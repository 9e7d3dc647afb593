"""Files whose head is at the end, and leaves that carry checksums of their own."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smelt.core.errors import FileError
from smelt.formats._container import HEADER, SMALL, Container, Slot, header_of, write
from smelt.formats._file import File
from smelt.formats._growing import Growing, Leaf
from smelt.native.stream import encode

WORDS = np.arange(3000, dtype=np.uint16) % 700
STREAM = torch.from_numpy(encode(WORDS, "int").copy())
NODE = ["entropy", {}, ["i16", 3000], "stream", len(STREAM)]


def grown(path: Path, meta: Any, leaves: list[torch.Tensor], sealed: set[int] = frozenset()) -> Path:  # type: ignore[assignment]
    with open(path, "w+b") as file:
        growing = Growing(file)
        found = []
        for i, leaf in enumerate(leaves):
            raw = leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            pieces = [raw[at : at + 1000] for at in range(0, len(raw), 1000)]
            found.append(growing.leaf(Slot(leaf.dtype, tuple(leaf.shape)), pieces, sealed=i in sealed))
        assert growing.finish(meta, found) == os.fstat(file.fileno()).st_size
    return path


def test_both_layouts_say_the_same(tmp_path: Path) -> None:
    leaves = [torch.arange(5000.0), torch.arange(7), torch.arange(100).char(), torch.arange(300).char(), STREAM]
    meta = {"tensors": ["a", [5000], "b", ["i64", 7], "c", ["i8", 100], "d", ["i8", 300], "e", NODE]}
    write(tmp_path / "x", meta, leaves, sealed={4})
    grown(tmp_path / "y", meta, leaves, {4})
    x, y = ((tmp_path / name).read_bytes() for name in "xy")
    length = HEADER.unpack_from(y)[2]
    assert y[6:8] == b"\x01\x80" and y[-length:] == x[16 : 16 + length]
    with File(tmp_path / "x") as one, File(tmp_path / "y") as other:
        assert one.version == other.version == 1
        other.verify()
        for name in "abcde":
            assert torch.equal(one.tensor(name), other.tensor(name))
        assert other.tensor("a").data_ptr() % 64 == 0
        assert torch.equal(other.tensor("e"), torch.from_numpy(WORDS.astype(np.int16)))


def test_a_leaf_may_be_taken_back(tmp_path: Path) -> None:
    with open(tmp_path / "x", "w+b") as file:
        growing = Growing(file)
        growing.write(b"0123" * 1000)
        growing.back(HEADER.size)
        at = growing.at
        growing.write(bytes(9) + b"rest" * 100)
        large = growing.sealed(at, b"beginning")
        at = growing.at
        growing.write(b"????small")
        small = growing.sealed(at, b"very")
        assert (large, small, growing.at) == (Leaf(409), Leaf(9, None, b"verysmall"), at)
        growing.leaf(Slot(torch.uint8, (300,)), [bytes(300)])
        assert growing.finish({}, []) == os.fstat(file.fileno()).st_size
    assert (tmp_path / "x").read_bytes()[16:425] == b"beginning" + b"rest" * 100


def sums(path: Path) -> int:
    """How many checksums the head has, of leaves that are all large."""
    opened = Container(path)
    return (opened._head_end - opened._small_at) // 4


@pytest.mark.parametrize("first", ["sealed", "plain"])
def test_a_leaf_that_is_not_sealed_everywhere_has_a_checksum(tmp_path: Path, first: str) -> None:
    plain = ["a", len(STREAM), "b", [*NODE[:4], -1]]
    tensors = plain if first == "plain" else ["b", NODE, "a", -1]
    path = tmp_path / "x"
    write(path, {"tensors": tensors}, [STREAM])
    assert sums(path) == 1
    with File(path) as file:
        assert torch.equal(file.tensor("a"), STREAM) and file.tensor("b").numel() == 3000
    write(path, {"tensors": tensors}, [STREAM], sealed={0}, force=True)
    with pytest.raises(FileError, match="its head elsewhere"):
        File(path)


def test_sealed_leaves_have_none_and_are_checked_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"tensors": ["a", NODE, "b", [*NODE[:4], -1]]}, [STREAM], sealed={0})
    assert len(STREAM) > SMALL and sums(path) == 0
    data = path.read_bytes()
    with File(path) as file:
        file.verify()
    for at in range(len(data) - len(STREAM), len(data), 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        with pytest.raises(FileError, match="'a' cannot be decoded"), File(path) as file:
            file.verify()


def test_truncations_and_flipped_bits(tmp_path: Path) -> None:
    path = grown(
        tmp_path / "x", {"tensors": ["a", [600], "e", NODE], "recipe": "x"}, [torch.arange(600.0), STREAM], {1}
    )
    data = path.read_bytes()
    for size in reversed(range(0, len(data), 7)):
        os.truncate(path, size)
        with pytest.raises(FileError, match=r"damaged|no \.smelt file"):
            File(path)
    for more in (b"\0", data):
        path.write_bytes(data + more)
        with pytest.raises(FileError, match="damaged"):
            File(path)
    head = len(data) - HEADER.unpack_from(data)[2]
    for at in (*range(HEADER.size), *range(head, len(data))):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            with pytest.raises(FileError, match=r"damaged|no \.smelt file|newer"):
                File(path)


@pytest.mark.parametrize("length", [0, 4, 1 << 20, (1 << 32) - 1])
def test_lengths_that_are_none(tmp_path: Path, length: int) -> None:
    data = bytearray(grown(tmp_path / "x", {"tensors": ["a", [600]]}, [torch.arange(600.0)]).read_bytes())
    data[8:12] = struct.pack("<I", length)
    data[12:16] = struct.pack("<I", zlib.crc32(data[len(data) - length :], zlib.crc32(data[:12])))
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FileError, match="damaged"):
        File(tmp_path / "x")


def test_a_header_alone_is_no_file(tmp_path: Path) -> None:
    for version in (1, 1 | 1 << 15, 1 << 15, 3, 3 | 1 << 15):
        (tmp_path / "x").write_bytes(header_of(b"", version))
        with pytest.raises(FileError, match="newer" if version % (1 << 15) > 1 else "damaged"):
            File(tmp_path / "x")
