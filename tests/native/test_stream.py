"""Streams: they come back whole and in parts, by the C library and by NumPy; heads and checksums are checked."""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt import native
from smelt.native import stream
from smelt.native.stream import Stream, bound, encode

BUILT = native.library() is not None and hasattr(native.library(), "smelt_chunk_encode")


@contextmanager
def path(by: str) -> Iterator[None]:
    """Coding by the C library or by NumPy."""
    library = native.library() if by == "C" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "coder", lambda: library)
        yield


@pytest.fixture(
    params=[pytest.param("C", marks=pytest.mark.skipif(not BUILT, reason="the C library is not built")), "NumPy"]
)
def by(request: pytest.FixtureRequest) -> Iterator[str]:
    with path(request.param):
        yield request.param


def brain(count: int) -> np.ndarray:
    numbers = np.random.default_rng(0).standard_normal(count).astype("f4")
    return (numbers.view("u4") >> 16).astype("u2")


def decoded(buffer: bytes | np.ndarray, dtype: str = "u2", threads: int = 1) -> np.ndarray:
    found = Stream(buffer)
    out = np.empty(found.count, dtype)
    found.decode_into(out, threads=threads)
    return out


@pytest.mark.parametrize("dtype", ["u1", "i1", "?", "i2", "f2", "u4", "f4", "i8", "f8", "c8"])
def test_dtypes(dtype: str, by: str) -> None:
    rng = np.random.default_rng(1)
    kinds = {"?": "bool", "f2": "e5", "f4": "e8", "f8": "e11"}
    for count in (0, 1, 3, 255, 256, 257, 700):
        elements = (rng.standard_normal(count) * 3).astype(dtype)
        coded = encode(elements, kinds.get(dtype, "int"), chunk=8)
        assert coded.dtype == np.uint8 and coded.size <= bound(count, elements.itemsize, 8)
        found = Stream(coded)
        assert (found.count, found.width) == (count, elements.itemsize)
        assert (found.nbytes, found.rest) == (coded.size, 0)
        out = np.empty_like(elements)
        found.decode_into(out)
        assert out.tobytes() == elements.tobytes()


@given(
    count=st.integers(0, 3000),
    chunk=st.integers(8, 11),
    checks=st.booleans(),
    threads=st.integers(0, 3),
    few=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_parts(count: int, chunk: int, checks: bool, threads: int, few: bool, data: st.DataObject) -> None:
    elements = brain(count) // (1000 if few else 1)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    for by in ("C", "NumPy") if BUILT else ("NumPy",):
        with path(by):
            coded = encode(elements, "e8", chunk=chunk, checks=checks, threads=threads)
            assert coded.size <= bound(count, 2, chunk)
            out = np.full(stop - start + 2, 7, "u2")
            Stream(coded).decode_into(out[1:-1], start, threads=threads)
        assert np.array_equal(out, [7, *elements[start:stop], 7])


def test_both_paths_read_each_other() -> None:
    if not BUILT:
        pytest.skip("the C library is not built")
    elements = brain(5000)
    coded = {}
    for by in ("C", "NumPy"):
        with path(by):
            coded[by] = encode(elements, "e8", chunk=10)
    for by, other in (("C", "NumPy"), ("NumPy", "C")):
        with path(by):
            assert np.array_equal(decoded(coded[other]), elements)


def test_threads_make_no_difference(by: str) -> None:
    elements = brain(20000)
    once = encode(elements, "e8", chunk=9)
    for threads in (0, 2, 7):
        assert np.array_equal(encode(elements, "e8", chunk=9, threads=threads), once)
        assert np.array_equal(decoded(once, threads=threads), elements)


def test_heads() -> None:
    assert encode(np.empty(0, "u4")).tobytes() == b"\2\0"
    assert encode(np.empty(0, "u1"), checks=False).tobytes() == b"\0\0"
    assert encode(np.zeros(300, "u1"), checks=False).tobytes() == b"\0\xac\2" + b"\1\0"
    assert encode(np.zeros(300, "u1"), checks=False, chunk=8).tobytes() == bytes.fromhex(
        "04ac0208 02000000 02000000 0100 0100"
    )
    one = encode(np.full(5, 258, "u2"), checks=True)
    assert one.tobytes() == b"\x09\5" + native.crc32(b"\1\2\1").to_bytes(4, "little") + b"\1\2\1"
    assert native.crc32(b"123456789") == 0xCBF43926 == native.crc32(b"6789", native.crc32(b"12345"))
    long = np.arange(9999, dtype="u4").view(np.uint8)
    assert native.crc32(long) == native.crc32(long[5000:], native.crc32(long[:5000])) == native.crc32(long.tobytes())


def test_rest() -> None:
    coded = encode(brain(600), "e8", chunk=8).tobytes()
    found = Stream(coded + b"more")
    assert (found.nbytes, found.rest) == (len(coded), 4)
    assert np.array_equal(decoded(bytearray(coded + b"more")), brain(600))
    assert Stream(b"\2\0abc").rest == 3
    assert Stream(encode(brain(9)).tobytes() + b"more").rest == 0  # the only chunk takes all there is


def test_without_the_count(by: str) -> None:
    assert encode(np.zeros(5, "u1"), counted=False).tobytes() == b"\x10\1\0"
    for count, chunk in ((0, 20), (1, 20), (1000, 20), (1000, 8)):
        coded = encode(brain(count), "e8", chunk=chunk, counted=False)
        found = Stream(coded, count)
        assert (found.count, found.nbytes) == (count, coded.size)
        out = np.empty(count, "u2")
        found.decode_into(out)
        assert np.array_equal(out, brain(count))
        with pytest.raises(ValueError, match="how many"):
            Stream(coded)
    with pytest.raises(ValueError):
        Stream(coded, 1 << 40)


def test_with_its_end(by: str) -> None:
    for count in (0, 1, 1000):
        coded = encode(brain(count), "e8", ends=True)
        found = Stream(coded.tobytes() + b"more")
        assert (found.nbytes, found.rest) == (coded.size, 4)
        assert coded.size <= bound(count, 2)
        assert np.array_equal(decoded(coded), brain(count))


def test_small_streams_have_no_checksum() -> None:
    for count in (10, 100, 130, 200, 300):
        coded = encode(brain(count), "e8")
        assert Stream(coded).checks == (coded.size > 256)


def test_a_wrong_checksum_names_the_chunk(by: str) -> None:
    coded = encode(brain(1000), "e8", chunk=8)
    coded[-1] ^= 1
    with pytest.raises(ValueError, match="chunk 3: its checksum differs"):
        decoded(coded)
    out = np.empty(768, "u2")
    Stream(coded).decode_into(out)
    assert np.array_equal(out, brain(1000)[:768])
    for threads in (1, 2):
        with pytest.raises(ValueError, match="chunk 3"):
            Stream(coded).decode_into(out, 232, threads)


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("chunk", [8, 20])
def test_damage(by: str, checks: bool, chunk: int) -> None:
    elements = brain(1000)
    coded = encode(elements, "e8", chunk=chunk, checks=checks).tobytes()
    rng = random.Random(5)
    for cut in (*range(20), len(coded) // 2, len(coded) - 1):
        with pytest.raises(ValueError):
            decoded(coded[:cut])
    for _ in range(60):
        changed = bytearray(coded)
        at = rng.randrange(rng.choice([3, 20, len(coded)]))
        changed[at] ^= 1 << rng.randrange(8)
        try:
            found = Stream(bytes(changed))
            if found.count > 1 << 20:
                continue
            out = np.empty(found.count, f"u{found.width}")
            found.decode_into(out)
        except ValueError as error:
            assert str(error)
        else:
            assert not checks or out.tobytes() in (elements.tobytes(), elements[: found.count].tobytes(), b"")


def test_wrong_heads() -> None:
    for wrong in (
        b"",
        b"\x20\0",
        b"\x10\1\0",  # does not say how many elements it has
        b"\0",
        b"\0\x80",
        b"\0" + b"\xff" * 7 + b"\0",
        b"\0\1",
        b"\0\x81\x80\x40\1\0",  # more than 2^20 in one chunk
        b"\4\5\7\2\0\0\0\1\0",
        b"\4\5\x15\2\0\0\0\1\0",
        b"\4\5\x08\3\0\0\0\1\0",
        b"\4\5\x08\1\0\0\0\1\0",
        b"\4" + b"\xff" * 6 + b"\x7f\x08" + bytes(99),
    ):
        with pytest.raises(ValueError):
            Stream(wrong)
    assert decoded(b"\4\5\x08\2\0\0\0\1\0", "u1").tobytes() == bytes(5)


def test_wrong_calls() -> None:
    two = np.zeros((2, 2), "u2")
    for elements, options in (
        (two, {}),
        (two.T[0], {}),
        (np.zeros(2, "c16"), {}),
        (np.zeros(2, "u2"), {"kind": "bool"}),
        (np.zeros(2, "u2"), {"kind": "e9"}),
        (np.zeros(2, "u2"), {"coder": "zip"}),
        (np.zeros(2, "u2"), {"chunk": 7}),
        (np.zeros(2, "u2"), {"chunk": 21}),
    ):
        with pytest.raises(ValueError):
            encode(elements, **options)
    found = Stream(encode(brain(9)))
    locked = np.empty(9, "u2")
    locked.flags.writeable = False
    for out, start in ((np.empty(9, "u4"), 0), (np.empty(10, "u2"), 0), (np.empty(9, "u2"), 1), (locked, 0)):
        with pytest.raises(ValueError):
            found.decode_into(out, start)
    for start in (-1, 10):
        with pytest.raises(ValueError):
            found.decode_into(np.empty(0, "u2"), start)


def test_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(native, "notice", said.append)
    monkeypatch.setattr(native, "library", lambda: None)
    native.coder.cache_clear()
    try:
        Stream(b"\2\0")
        assert said == []
        for _ in range(2):
            assert np.array_equal(decoded(encode(brain(9))), brain(9))
        assert len(said) == 1 and "C library" in said[0]
    finally:
        native.coder.cache_clear()


def test_coding_imports_little() -> None:
    code = "import sys; sys.modules['torch'] = None; import smelt.native.stream"
    light = f"import sys, types; p = types.ModuleType('smelt'); p.__path__ = {sys.modules['smelt'].__path__!r}; "
    light += f"sys.modules['smelt'] = p; {code}"
    subprocess.run([sys.executable, "-c", light], check=True)


def test_the_largest_chunk(by: str) -> None:
    elements = np.resize(brain(1 << 16), (1 << 20) + 5)
    coded = encode(elements, "e8", threads=2)
    assert 0.6 < coded.size / elements.nbytes < 0.68
    assert np.array_equal(decoded(coded, threads=2), elements)
    assert stream.LARGEST == 20
