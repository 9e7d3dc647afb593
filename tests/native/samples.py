"""Elements and bodies that the tests of chunks share."""

import functools
import random

import numpy as np
from hypothesis import strategies as st

from smelt.native import portable
from smelt.native.portable import encode_chunk
from tests.native import build

SPECIAL = {  # zeros, the least denormal, infinities, NaNs with several payloads
    2: [0, 0x8000, 1, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF, 0x7F80, 0x7F81, 0xFFC0],
    4: [0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x33800000, 0x477FE000, 0x7F802000],
    8: [0, 1 << 63, 1, 0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1, 0x7FF8 << 48, (1 << 64) - 1],
}
WAYS = [(kind, width) for kind, (_, widths) in portable.KINDS.items() for width in widths]


def normal(count: int, dtype: str, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * 0.02).astype(dtype)


def brain(count: int, seed: int = 0) -> np.ndarray:
    return (normal(count, "f4", seed).view("u4") >> 16).astype("u2")


@functools.cache
def samples() -> dict[str, tuple[np.ndarray, str]]:
    rng = np.random.default_rng(1)
    single = normal(3000, "f4")
    special = np.array(SPECIAL[4] * 40, "u4").view("f4")
    return {
        "bf16": (brain(3000), "e8"),
        "bf16, one exponent": (brain(700) & 0x7F | 0x3F80, "e8"),
        "f32": (single, "e8"),
        "f32 of bf16": ((brain(3000).astype("u4") << 16).view("f4"), "e8"),
        "f32 of f16": (single.astype("f2").astype("f4"), "e8"),
        "f32 special": (special, "e8"),
        "f16": (single.astype("f2"), "e5"),
        "f64": (normal(500, "f8"), "e11"),
        "f64 of f32": (single[:500].astype("f8"), "e11"),
        "f8": ((brain(3000) >> 6).astype("u1"), "f8"),
        "bool": (rng.random(3001) < 0.1, "bool"),
        "bool, regular": (np.arange(2000) % 8 == 0, "bool"),
        "i8": (np.round(single * 1500).astype("i1"), "int"),
        "i64, small": (np.round(single * 150).astype("i8"), "int"),
        "i32, steps": (np.arange(2000, dtype="i4") * 700 - 3, "int"),
        "u4, upper": (rng.integers(0, 9, 999, dtype="u4") << 24, "int"),
        "noise": (rng.integers(0, 256, 700, dtype="u1"), "int"),
        "two": (np.array([3, 250] * 50, "u1"), "int"),
        "constant": (np.full(77, -2, "i4"), "int"),
        "one": (np.array([1.5]), "e11"),
    }


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.dtype(f"u{expected.itemsize}") and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@st.composite
def arrays(draw: st.DrawFn, width: int) -> np.ndarray:
    """Bytes of anything, few different values, or numbers with NaNs and the like, 1 to 700 of them."""
    count = draw(st.integers(1, 9) | st.integers(1, 700))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    how = draw(st.sampled_from(["noise", "few", "normal", "small", "bits"]))
    whole = rng.integers(0, 1 << 63, count, dtype="u8") * 2 + rng.integers(0, 2, count, dtype="u8")
    if how == "few":
        whole = rng.choice(whole[: draw(st.integers(1, 40))], count)
    elif how == "small":
        spread = draw(st.sampled_from([1, 3, 100, 1000, 70000, 2**33]))
        whole = (rng.integers(-spread, spread, count) + draw(st.integers(-(2**40), 2**40))).astype("u8")
    elif how == "bits":
        whole = (rng.random(count) < draw(st.floats(0, 1))).astype("u8")
    elif how == "normal" and width > 1:
        whole = normal(count, f"f{width}", seed).view(f"u{width}").astype("u8")
    found = whole.astype(f"u{width}")
    if width > 1 and draw(st.booleans()):
        where = rng.integers(0, count, draw(st.integers(1, 5)))
        found[where] = rng.choice(np.array(SPECIAL[width], f"u{width}"), len(where))
    return found


# ---- bodies by hand


def coded_by_huffman(segments: int, listed: bool, count: int) -> tuple[bytes, bytes]:
    """Symbols and a body of them."""
    lengths = {9 + i * (1 + 2 * listed): min(i + 1, 12) for i in range(13)}
    symbols = random.Random(count).choices(list(lengths), [2.0**-n for n in lengths.values()], k=count)
    return bytes(symbols), b"\x0a" + build.huffman(symbols, lengths, segments, listed=listed)


def coded_by_rans(k: int, lanes: int, p: int) -> tuple[bytes, bytes]:
    """Symbols and a body of them."""
    rng = random.Random(k + lanes + p)
    number = min(rng.choice([2, 3, k // 2, k]), 200)
    frequencies = [1] * number
    for _ in range((1 << p) - number):
        frequencies[min(int(rng.expovariate(8 / number)), number - 1)] += 1
    values = rng.sample(range(256), number)
    symbols = rng.choices(values, frequencies, k=rng.choice([1, 130, 700, 1500]))
    coded = build.rans(symbols, values=values, tables=[frequencies], k=k, p=p, lanes=lanes, last=number - 1)
    return bytes(symbols), b"\x0a" + coded


def several(tables: int, lanes: int, count: int) -> tuple[bytes, bytes]:
    """Symbols and a body of them, with several tables and escapes."""
    rng = random.Random(tables)
    every = [[20 + 3 * t, 100, 1, 0, 256 - 123 - 3 * t, 2] for t in range(tables)]
    chosen = [rng.randrange(tables) for _ in range(-(-count // 1024))]
    symbols: list[int] = []
    for t in chosen:
        symbols += rng.choices([7, 8, 9, 10, 11, 200], every[t], k=1024)
    symbols = [s if s != 200 else rng.randrange(100, 256) for s in symbols[:count]]
    coded = build.rans(
        symbols, values=[7, 8, 9, 10, 11], tables=every, escape=True, listed=False, chosen=chosen, lanes=lanes
    )
    return bytes(symbols), b"\2\0" + coded


# ---- damage

TWO = {"values": [5, 6], "tables": [[200, 56]]}
WRONG = {
    "empty": (b"", 1, 1),
    "kind": (b"\x0b\0", 1, 1),
    "raw, short": (b"\0\1", 2, 1),
    "raw, long": (b"\0\1\2\3", 2, 1),
    "constant, long": (b"\1\1\2", 2, 1),
    "planes of bytes": (b"\3\1\1", 2, 1),
    "upper of bytes": (b"\4\1\1", 2, 1),
    "bits of words": (b"\x08\1\1", 2, 2),
    "symbols of words": (b"\x0a" + build.rans([5, 6], **TWO), 2, 2),
    "half of words": (b"\5\1\1", 2, 2),
    "bits left over": (b"\x08\1\xff", 7, 1),
    "nibble above 15": (b"\x09\1\x10", 7, 1),
    "too deep": (b"\6\0" * 9 + b"\1\0", 7, 1),
    "plane beyond the end": (b"\3\x09\1\1\1\1", 7, 2),
    "no cut": (b"\2\x08", 7, 1),
    "cut, bit 7": (b"\2\x80" + build.rans([5, 6], **TWO), 2, 1),
    "no symbols": (b"\2\4\0", 2, 1),
    "no symbols of bytes": (b"\x0a", 2, 1),
    "symbol of too many bits": (b"\2\6\0\0" + build.rans([5, 6], **TWO), 2, 1),
    "filled part": (b"\2\1\4" + build.rans([5, 6], **TWO), 2, 1),
    "coder": (b"\2\0\x20" + bytes(20), 2, 1),
    "huffman: segments": (b"\2\0\3" + build.huffman([5, 6], {5: 1, 6: 1})[1:], 2, 1),
    "huffman: incomplete": (b"\2\0" + build.huffman([5, 6], {5: 1, 6: 2}), 2, 1),
    "huffman: overfull": (b"\2\0\0\5\2\x11\x10\1", 2, 1),
    "huffman: nibble left over": (b"\2\0\0\5\2\x12\x21\1", 2, 1),
    "huffman: one too long": (b"\2\0\0\5\1\x1d\1", 2, 1),
    "huffman: order": (b"\2\0\4\1\6\5\x11\1", 2, 1),
    "huffman: above 255": (b"\2\0\0\xff\1\x11\1", 2, 1),
    "huffman: bits left over": (b"\2\0\0\5\1\x11\5", 2, 1),
    "huffman: a byte too many": (b"\2\0\0\5\1\x11\1\0", 2, 1),
    "huffman: short": (b"\2\0\0\5\1\x11", 2, 1),
    "huffman: segment beyond the end": (b"\2\0\1\5\1\x11\1\1\7\0\0\0", 4, 1),
    "rans: precision": (b"\2\0" + build.rans([5, 6], values=[5, 6], tables=[[100, 28]], p=7), 2, 1),
    "rans: word too many": (b"\2\0" + build.rans([5, 6], **TWO) + b"\0\0", 2, 1),
    "rans: half a word": (b"\2\0" + build.rans([5, 6] * 30, **TWO)[:-1], 60, 1),
    "rans: word too few": (b"\2\0" + build.rans([5, 6] * 30, **TWO)[:-2], 60, 1),
    "rans: other end": (b"\2\0" + build.rans([5, 6], **TWO)[:-4] + b"\0\1\1\0", 2, 1),
    "rans: low state": (b"\2\0" + build.rans([5, 6], **TWO)[:-2] + b"\0\0", 2, 1),
    "rans: one entry": (b"\2\0\x10\x88\0\5" + bytes(8), 2, 1),
    "rans: sum": (b"\2\0\x10\x88\2\5\6\7" + build.from_high(build.gamma(200) * 2) + bytes(4), 2, 1),
    "rans: all one entry": (b"\2\0\x10\x88\1\5\6" + build.from_high(build.gamma(257)) + bytes(4), 2, 1),
    "rans: many zeros": (b"\2\0\x10\x88\1\5\6" + bytes(20), 2, 1),
    "rans: above 255": (b"\2\0\x10\x80\2\xfe\xff" + bytes(8), 2, 1),
}


def damaged(body: bytes, number: int, seed: int) -> list[bytes]:
    """Cut short, lengthened, or with some bytes changed, mostly at the beginning."""
    rng = random.Random(seed)
    found = [body[:n] for n in {*range(min(len(body), 12)), len(body) - 1, len(body) // 2}] + [body + b"\0"]
    for _ in range(number):
        changed = bytearray(body)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(min(len(body), rng.choice([4, 16, 64, 1 << 20])))
            changed[at] = rng.choice([rng.randrange(256), changed[at] ^ 1 << rng.randrange(8)])
        found.append(bytes(changed))
    return found


@functools.cache
def bodies() -> dict[str, tuple[bytes, int, int]]:
    """Body, count, width."""
    found = {}
    for name, (elements, kind) in samples().items():
        for coder in ("rans", "huffman"):
            found[f"{name}, {coder}"] = (encode_chunk(elements, kind, coder), len(elements), elements.itemsize)
    for tables, lanes in ((2, 7), (8, 1)):
        symbols, body = several(tables, lanes, 3000)
        found[f"{tables} tables"] = (body, len(symbols), 1)
    return found
