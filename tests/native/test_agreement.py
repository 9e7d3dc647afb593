"""The C library and NumPy write and read the same chunks, at every level of the machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt import native
from smelt.native import portable
from smelt.native.portable import decode_chunk, encode_chunk
from smelt.native.stream import PAST_CACHE
from tests.native import build
from tests.native.samples import (
    WAYS,
    WRONG,
    arrays,
    bodies,
    coded_by_huffman,
    coded_by_rans,
    damaged,
    normal,
    same,
    samples,
    several,
)


def c_encode(elements: np.ndarray, kind: str, coder: str) -> bytes:
    library = native.coder()
    assert library is not None
    room = int(library.smelt_chunk_bound(len(elements), elements.itemsize))
    out = np.empty(room, np.uint8)
    numbers = portable.KINDS[kind][0], portable.CODERS.index(coder)
    at = elements.ctypes.data
    size = library.smelt_chunk_encode(at, len(elements), elements.itemsize, *numbers, out.ctypes.data, room)
    assert 0 < size <= room
    return out[:size].tobytes()


def c_decode(body: bytes, count: int, width: int, level: int) -> np.ndarray | None:
    """None: damaged."""
    library = native.coder()
    assert library is not None
    out = np.full(count + 16, 0xA5, f"u{width}")
    data = np.frombuffer(body, np.uint8).copy()
    result = library.smelt_chunk_decode(data.ctypes.data, len(data), out.ctypes.data, count, width, level)
    assert result in (0, -1) and (out[count:] == 0xA5).all()
    return out[:count] if result == 0 else None


@pytest.fixture(scope="module")
def levels() -> list[int]:
    library = native.library()
    if library is None or not hasattr(library, "smelt_chunk_encode"):
        pytest.skip("the C library is not built")
    return [-1, *range(int(library.smelt_best_level()) + 1), PAST_CACHE]


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("coder", portable.CODERS)
def test_c_and_numpy_read_each_other(name: str, coder: str, levels: list[int]) -> None:
    elements, kind = samples()[name]
    ours, theirs = encode_chunk(elements, kind, coder), c_encode(elements, kind, coder)
    same(decode_chunk(theirs, len(elements), elements.itemsize), elements)
    for level in levels:
        for body in (ours, theirs):
            found = c_decode(body, len(elements), elements.itemsize, level)
            assert found is not None
            same(found, elements)


@pytest.mark.parametrize(("kind", "width"), WAYS)
def test_c_and_numpy_agree_on_anything(kind: str, width: int, levels: list[int]) -> None:
    @given(data=st.data())
    @settings(max_examples=25, deadline=None, database=None)
    def check(data: st.DataObject) -> None:
        elements = data.draw(arrays(width))
        coder = data.draw(st.sampled_from(portable.CODERS))
        same(decode_chunk(c_encode(elements, kind, coder), len(elements), width), elements)
        body = encode_chunk(elements, kind, coder)
        for level in levels:
            found = c_decode(body, len(elements), width, level)
            assert found is not None
            same(found, elements)

    check()


def test_c_reads_what_no_encoder_writes(levels: list[int]) -> None:
    made = [several(*case) for case in ((2, 7, 5000), (8, 7, 3072), (5, 2, 2500), (3, 5, 100))]
    made += [coded_by_rans(k, lanes, p) for k in build.BUCKETS for lanes in (0, 5, 7) for p in (8, 14)]
    made += [
        coded_by_huffman(n, listed, count) for n in build.SEGMENTS for listed in (False, True) for count in (3, 500)
    ]
    for symbols, body in made:
        for level in levels:
            found = c_decode(body, len(symbols), 1, level)
            assert found is not None and found.tobytes() == symbols


def test_c_reads_classes_and_long_chunks(levels: list[int]) -> None:
    scale = np.repeat(2.0 ** -np.arange(40), 1024)
    elements = ((normal(40 * 1024, "f4") * scale).astype("f4").view("u4") >> 16).astype("u2")[:-3]
    for coder in portable.CODERS:
        ours, theirs = encode_chunk(elements, "e8", coder), c_encode(elements, "e8", coder)
        assert len(theirs) < len(ours) * 1.01
        same(decode_chunk(theirs, len(elements), 2), elements)
        for level in levels:
            for body in (ours, theirs):
                found = c_decode(body, len(elements), 2, level)
                assert found is not None
                same(found, elements)


@pytest.mark.parametrize("count", [300_005, 370_001])
def test_the_last_block_may_lack_what_is_frequent(levels: list[int], count: int) -> None:
    """Its table then has no room for that, and the last step is filled up with something else."""
    rng = np.random.default_rng(0)
    numbers = np.concatenate((rng.standard_normal(count) * 0.02, rng.standard_normal(30_000) * 3e4)).astype("f4")
    elements = (numbers.view("u4") >> 16).astype("u2")
    body = c_encode(elements, "e8", "rans")
    for level in levels:
        found = c_decode(body, len(elements), 2, level)
        assert found is not None
        same(found, elements)


@pytest.mark.parametrize("name", bodies())
def test_c_and_numpy_agree_on_damage(name: str, levels: list[int]) -> None:
    body, count, width = bodies()[name]
    for changed in damaged(body, 25, 4):
        if not changed:
            continue
        try:
            expected = decode_chunk(changed, count, width)
        except ValueError:
            expected = None
        for level in levels:
            found = c_decode(changed, count, width, level)
            if expected is not None:
                assert found is not None
                same(found, expected)


# What only NumPy checks: bits that are dropped change no element.
DROPPED = {"symbol of too many bits", "filled part"}


def test_c_refuses_what_numpy_refuses(levels: list[int]) -> None:
    accepted = [
        (name, level)
        for name, (body, count, width) in WRONG.items()
        for level in levels
        if body and name not in DROPPED and c_decode(body, count, width, level) is not None
    ]
    assert accepted == []
