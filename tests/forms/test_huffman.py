import heapq
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.core.method import State
from smelt.forms import huffman as form
from smelt.methods.code.huffman import Huffman, code_lengths

from .test_bits import DTYPES, leaf
from .tools import bits_of, damaged, read, seeds, shapes, survives


def coded(x: torch.Tensor, **options: int) -> Encoded:
    return Huffman(**options).encode(x, State())


def stream(data: list[int], shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Encoded:
    return Encoded(form.Huffman(), {"stream": torch.tensor(data, dtype=torch.uint8)}, torch.Size(shape), dtype)


def skewed(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).geometric(0.3, n).clip(1, 200).astype(np.uint8))


@settings(max_examples=200)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from([0.0, 0.3, 3, 1e4, 1e9]), st.integers(8, 15), seeds)
def test_exact_round_trip(shape: tuple[int, ...], dtype: torch.dtype, spread: float, longest: int, seed: int) -> None:
    x = leaf(shape, dtype, spread, seed)
    y = read(coded(x, max_length=longest))
    assert y.shape == x.shape and y.dtype == x.dtype and bits_of(y) == bits_of(x)


@pytest.mark.parametrize("n", [4095, 4096, 4097, 8192, 300_001])
@pytest.mark.parametrize("few", [0, 1 << 30], ids=["lanes side by side", "from every bit"])
def test_lanes(n: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "FEW_BITS", few)
    x = skewed(n)
    encoded = coded(x)
    assert torch.equal(read(encoded), x)
    share = torch.bincount(x).double()[torch.bincount(x) > 0] / n
    entropy = float(-(share * share.log2()).sum()) * n / 8
    assert entropy < encoded.nbytes() < entropy * 1.05 + 2 * n / 4096 + 60


def test_by_hand() -> None:
    encoded = coded(torch.tensor([0, 0, 0, 0, 1, 1, 2, 3], dtype=torch.uint8))
    # codes 0, 10, 110, 111: symbols up to 3 of lengths 1 2 3 3, then 0000 1010 1101 11 and two zeros
    assert encoded.parts["stream"].tolist() == [form.DENSE, 3, 0x12, 0x33, 0b00001010, 0b11011100]
    around = coded(torch.tensor([-1, 0, -1, -1, 0, -1, 1, -1, -1, -1], dtype=torch.int8))
    # 0, 1, 255 run through 0: from 255 on, three; lengths 1 (255), 2 (0), 2 (1); codes 0, 10, 11 by symbol
    assert around.parts["stream"].tolist() == [form.RUN, 255, 2, 0x12, 0x20, 0b01000100, 0b11000000]
    assert coded(torch.full((4,), 9, dtype=torch.int32)).parts["stream"].tolist() == [1, 9, 1, 0, 1, 0, 1, 0]
    assert coded(torch.full((4,), -9, dtype=torch.int16)).parts["stream"].tolist() == [129, 0xF7, 0xFF, 0, 1, 0]
    assert coded(torch.zeros(5, 0)).parts["stream"].tolist() == []


def heap_bits(counts: list[int]) -> int:
    heap = [c for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40).filter(lambda c: sum(n > 0 for n in c) > 1))
def test_unlimited_lengths_are_huffmans(counts: list[int]) -> None:
    n = np.array(counts)
    lengths = code_lengths(n, len(counts))
    assert int(n @ lengths) == heap_bits(counts)
    share = n[n > 0] / n.sum()
    entropy = float(-(share * np.log2(share)).sum())
    assert entropy - 1e-9 <= n @ lengths / n.sum() < entropy + 1
    assert ((lengths > 0) == (n > 0)).all()


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=5), st.integers(3, 4))
def test_limited_lengths_are_optimal(counts: list[int], limit: int) -> None:
    lengths = code_lengths(np.array(counts), limit)
    assert lengths.max() <= limit and sum(2.0**-lengths) == 1
    every = itertools.product(range(1, limit + 1), repeat=len(counts))
    best = min(np.dot(counts, tried) for tried in every if sum(2.0 ** -np.array(tried)) <= 1)
    assert np.dot(counts, lengths) == best


def test_a_limit_too_low() -> None:
    with pytest.raises(ValueError, match="no code"):
        code_lengths(np.ones(5), 2)


def test_wide_integers_of_small_range_cost_one_plane() -> None:
    narrow = skewed(5000)
    for offset in (0, -100, 70_000):
        wide = coded(narrow.to(torch.int32) + offset)
        assert coded(narrow).nbytes() <= wide.nbytes() <= coded(narrow).nbytes() + 10


def test_exponents_are_coded() -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    assert coded(x.bfloat16()).nbytes() < 0.68 * 2 * x.numel()
    assert coded(x).nbytes() < 0.84 * 4 * x.numel()


def test_claims_are_paid_for() -> None:
    for x, least in ((torch.zeros(80_000, dtype=torch.uint8), 10_000), (torch.zeros(1 << 16), 128)):
        encoded = coded(x)
        assert encoded.nbytes() == least and torch.equal(read(encoded), x)
        with pytest.raises(FileError, match="cannot hold"):
            read(replace(encoded, parts={"stream": encoded.parts["stream"][:-1]}))  # type: ignore[index]
        assert not survives(replace(encoded, shape=torch.Size([10**12])))


@pytest.mark.parametrize(
    "data",
    [
        [5, 0, 0, 0],
        [form.DENSE + form.OFFSET, 3, 0x12, 0x33, 0x0A, 0xDC],
        [form.DENSE, 3, 0x12, 0x32, 0x0A, 0xDC],  # over-subscribed
        [form.DENSE, 3, 0x12, 0x34, 0x0A, 0xDC],  # incomplete
        [form.DENSE, 3, 0x00, 0x00, 0x0A, 0xDC],
        [form.DENSE, 0, 0x10, 0x0A, 0xDC],  # a code of one symbol
        [form.DENSE, 3, 0x12, 0x33, 0x0A],
        [form.DENSE, 3, 0x12, 0x33, 0x0A, 0xDC, 0],
        [form.LISTED, 1, 7, 7, 0x11, 0],
        [form.LISTED, 200, 7],
        [form.RUN, 1],
        [form.RAW, 1, 2, 3],
        [form.CONSTANT],
        [],
    ],
)
def test_false_streams(data: list[int]) -> None:
    with pytest.raises(FileError):
        read(stream(data, (8,)))


@pytest.mark.parametrize("few", [0, 1 << 30], ids=["lanes side by side", "from every bit"])
def test_false_lanes(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "FEW_BITS", few)
    good = coded(skewed(10_000)).parts["stream"]
    assert isinstance(good, torch.Tensor)
    number = int(good[1]) + 1 if good[0] == form.LISTED else 0
    lanes = 2 + number + -(-number // 2) if number else 2 + -(-(int(good[1]) + 1) // 2)
    for at, value in ((lanes, 1), (lanes + 1, 255), (lanes + 3, 255), (lanes + 3, 0)):
        bad = good.clone()
        bad[at] ^= value
        if not torch.equal(bad, good):
            assert not survives(Encoded(form.Huffman(), {"stream": bad}, torch.Size([10_000]), torch.uint8))
    for size in (lanes, lanes + 2, lanes + 4, len(good) // 2, len(good) - 1):
        assert not survives(Encoded(form.Huffman(), {"stream": good[:size]}, torch.Size([10_000]), torch.uint8))


@given(seeds)
def test_damage(seed: int) -> None:
    x = skewed(9000, seed) if seed % 3 == 0 else leaf((50, 7), DTYPES[seed % len(DTYPES)], 5, seed)
    for broken in damaged(coded(x), seed, 10):
        survives(broken)
