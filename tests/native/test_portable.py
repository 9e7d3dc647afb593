"""Chunks by NumPy: they come back; every kind of body, written by hand; damage."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.native import portable
from smelt.native.portable import decode_chunk, encode_chunk
from tests.native import build
from tests.native.samples import (
    WAYS,
    WRONG,
    arrays,
    bodies,
    coded_by_huffman,
    coded_by_rans,
    damaged,
    same,
    samples,
    several,
)


@pytest.mark.parametrize(("kind", "width"), WAYS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_round_trip(kind: str, width: int, data: st.DataObject) -> None:
    elements = data.draw(arrays(width))
    coder = data.draw(st.sampled_from(portable.CODERS))
    body = encode_chunk(elements, kind, coder)
    assert len(body) <= elements.nbytes + 1
    same(decode_chunk(body, len(elements), width), elements)


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("coder", portable.CODERS)
def test_round_trip_of_samples(name: str, coder: str) -> None:
    elements, kind = samples()[name]
    same(decode_chunk(encode_chunk(elements, kind, coder), len(elements), elements.itemsize), elements)


def test_bodies_are_of_the_expected_kinds() -> None:
    kinds = {name: encode_chunk(*sample)[0] for name, sample in samples().items()}
    assert kinds == {
        "bf16": portable.SPLIT,
        "bf16, one exponent": portable.PLANES,
        "f32": portable.SPLIT,
        "f32 of bf16": portable.UPPER,
        "f32 of f16": portable.HALF,
        "f32 special": portable.NONZERO,
        "f16": portable.SPLIT,
        "f64": portable.PLANES,
        "f64 of f32": portable.PLANES,
        "f8": portable.SPLIT,
        "bool": portable.BITS,
        "bool, regular": portable.BITS,
        "i8": portable.SPLIT,
        "i64, small": portable.OFFSET,
        "i32, steps": portable.OFFSET,
        "u4, upper": portable.UPPER,
        "noise": portable.RAW,
        "two": portable.BYTES,
        "constant": portable.CONSTANT,
        "one": portable.CONSTANT,
    }


@pytest.mark.parametrize("values", [2, 12, 30, 60, 256])
@pytest.mark.parametrize("coder", ["rans", "huffman"])
def test_sizes_come_near_the_entropy(values: int, coder: str) -> None:
    share = 0.7 ** np.arange(values) + 1e-4
    elements = np.random.default_rng(2).choice(values, 1 << 16, p=share / share.sum()).astype("u1")
    counts = np.bincount(elements)
    counts = counts[counts > 0]
    entropy = float(-(counts * np.log2(counts / counts.sum())).sum()) / 8
    size = len(encode_chunk(elements, "int", coder))
    assert entropy < size < entropy * (1.006 if coder == "rans" else 1.12) + 600


# ---- bodies by hand


def test_plain_bodies() -> None:
    same(decode_chunk(b"\0\1\2\3\4", 2, 2), np.array([0x201, 0x403], "u2"))
    same(decode_chunk(b"\1\1\2\3\4", 5, 4), np.full(5, 0x4030201, "u4"))
    same(decode_chunk(b"\3" + b"\2\1\7" + b"\0\1\2\3", 3, 2), np.array([0x107, 0x207, 0x307], "u2"))
    same(decode_chunk(b"\4\0\1\2", 2, 2), np.array([0x100, 0x200], "u2"))
    same(decode_chunk(b"\7\0\1\2", 2, 2), np.array([1, 2], "u2"))
    same(decode_chunk(b"\6\xff\xff\0\1\0\2\0", 2, 2), np.array([0, 1], "u2"))
    same(decode_chunk(b"\x08\0\xa0\x80", 9, 1), np.array([1, 0, 1, 0, 0, 0, 0, 0, 1], "u1"))
    same(decode_chunk(b"\x09\0\1\2\3\4", 2, 1), np.array([0x21, 0x43], "u1"))
    halves = np.array([0, 0x8000, 1, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7C01, 0xFE00], "u2")
    wide = [0, 0x80000000, 0x33800000, 0x3F800000, 0x477FE000, 0x7F800000, 0xFF800000, 0x7F802000, 0xFFC00000]
    same(decode_chunk(b"\5\0" + halves.tobytes(), 9, 4), np.array(wide, "u4"))


@pytest.mark.parametrize("head", [b"\2\0", b"\x0a"])
def test_a_code_by_hand(head: bytes) -> None:
    # a 1, b 01, c 00 with lengths 1, 2, 2: canonical words a 0, b 10, c 11
    body = head + bytes([0, 97, 2, 0x12, 0x20]) + bytes([0b01011010, 0])
    assert decode_chunk(body, 6, 1).tobytes() == b"abcaba"


@pytest.mark.parametrize("r", range(8))
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("count", [1, 5, 127, 128, 300])
def test_raw_parts(r: int, rotate: bool, count: int) -> None:
    for width in (1, 2, 8):
        rng = random.Random(count)
        elements = [rng.getrandbits(8 * width) for _ in range(count)]
        symbols, head = build.cut(elements, width, 8 * width - 8 + r, rotate)
        lengths = {0: 1, 1: 1} if r == 7 else dict.fromkeys(range(1 << 8 - r), 8 - r)
        body = head + build.huffman(symbols, lengths)
        same(decode_chunk(body, count, width), np.array(elements, f"u{width}"))


@pytest.mark.parametrize("segments", build.SEGMENTS)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("count", [1, 3, 9, 100, 2000])
def test_huffman(segments: int, listed: bool, count: int) -> None:
    symbols, body = coded_by_huffman(segments, listed, count)
    assert decode_chunk(body, count, 1).tobytes() == symbols


@pytest.mark.parametrize("k", build.BUCKETS)
@pytest.mark.parametrize("lanes", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("p", [8, 11, 14])
def test_rans(k: int, lanes: int, p: int) -> None:
    symbols, body = coded_by_rans(k, lanes, p)
    assert decode_chunk(body, len(symbols), 1).tobytes() == symbols


@pytest.mark.parametrize("tables", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("lanes", "count"), [(7, 5000), (7, 3072), (2, 2500), (5, 100)])
def test_several_tables_and_escapes(tables: int, lanes: int, count: int) -> None:
    symbols, body = several(tables, lanes, count)
    assert decode_chunk(body, len(symbols), 1).tobytes() == symbols


# ---- damage


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name: str) -> None:
    with pytest.raises(ValueError):
        decode_chunk(*WRONG[name])


def test_escapes_must_be_where_they_are_decoded() -> None:
    symbols, body = several(2, 2, 1500)
    known = build.rans([7, 8], values=[7, 8], tables=[[100, 100, 56]], escape=True, listed=False)
    assert decode_chunk(b"\2\0" + known, 2, 1).tobytes() == b"\7\x08"
    more = known.replace(known[-5:], b"\1\0\7" + known[-4:])
    with pytest.raises(ValueError, match="places"):
        decode_chunk(b"\2\0" + more, 2, 1)
    at = len(body) - 1
    with pytest.raises(ValueError):
        decode_chunk(body[:at], len(symbols), 1)


@pytest.mark.parametrize("name", bodies())
def test_damage_is_a_value_error_or_other_elements(name: str) -> None:
    body, count, width = bodies()[name]
    for changed in damaged(body, 25, 3):
        try:
            assert decode_chunk(changed, count, width).shape == (count,)
        except ValueError as error:
            assert str(error)
