"""Any leaf comes back bit for bit from the entropy coder, in fewer bytes where there is something to gain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.core.method import State
from smelt.forms import entropy as form
from smelt.methods.code.entropy import Entropy
from smelt.methods.code.huffman import Huffman
from smelt.native.stream import encode

from .test_bits import DTYPES, leaf
from .tools import bits_of, damaged, read, seeds, shapes, survives

MORE = [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2]
CODECS = [Entropy(), Entropy("rans"), Entropy("huffman"), Huffman()]


def coded(x: torch.Tensor, codec: Entropy | Huffman = CODECS[0]) -> Encoded:
    return codec.encode(x, State())


def skewed(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).geometric(0.3, n).clip(1, 200).astype(np.uint8))


def entropy_of(x: torch.Tensor) -> float:
    """Bytes."""
    counts = torch.bincount(x.to(torch.int64)).double()
    share = counts[counts > 0] / x.numel()
    return float(-(share * share.log2()).sum()) * x.numel() / 8


@settings(max_examples=200)
@given(
    shapes,
    st.sampled_from((*DTYPES, *MORE)),
    st.sampled_from([0.0, 0.3, 3, 1e4, 1e9]),
    st.sampled_from(CODECS),
    seeds,
)
def test_exact_round_trip(
    shape: tuple[int, ...], dtype: torch.dtype, spread: float, codec: Entropy | Huffman, seed: int
) -> None:
    x = leaf(shape, dtype, spread, seed)
    y = read(coded(x, codec))
    assert y.shape == x.shape and y.dtype == x.dtype and bits_of(y) == bits_of(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_bit_of_every_number(dtype: torch.dtype) -> None:
    """NaN payloads, signed zeros, denormals, infinities: words at random are all of these."""
    words = np.random.default_rng(0).integers(0, 256, 40_000 * dtype.itemsize, dtype=np.uint8)
    words[: len(words) // 2 : 2] |= 0x7F  # exponents of infinities and NaNs
    x = torch.from_numpy(words).view(dtype)
    for codec in CODECS:
        assert bits_of(read(coded(x, codec))) == bits_of(x)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("n", [1000, 20_000, 1 << 20, (1 << 20) + 1])
def test_size(codec: Entropy | Huffman, n: int) -> None:
    x = skewed(n)
    encoded = coded(x, codec)
    assert torch.equal(read(encoded), x)
    bits = encoded.nbytes() / entropy_of(x)
    assert 0.999 < bits < (1.004 if "huffman" not in str(codec).lower() and n >= 1 << 20 else 1.05) + 40 / entropy_of(x)


def test_wide_integers_of_small_range_cost_no_more() -> None:
    narrow = skewed(5000)
    for offset in (0, -100, 70_000):
        wide = coded(narrow.to(torch.int32) + offset)
        assert coded(narrow).nbytes() <= wide.nbytes() <= coded(narrow).nbytes() + 10


def test_what_floating_numbers_cost() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * 0.02
    for y, most in ((x.bfloat16(), 0.668), (x, 0.835), (x.half(), 0.85)):
        assert coded(y).nbytes() < most * y.numel() * y.element_size()
    for dtype in (torch.bfloat16, torch.float16):  # numbers that were narrower once cost what they did then
        narrow = coded(x.to(dtype)).nbytes()
        assert coded(x.to(dtype).float()).nbytes() <= narrow + 4
    few = x[torch.arange(x.numel()) % 7]
    assert coded(few).nbytes() < 0.4 * 4 * few.numel()


def test_masks() -> None:
    for density, most in ((0.5, 1.01), (0.1, 0.48), (0.01, 0.09)):
        mask = torch.rand(1 << 20, generator=torch.Generator().manual_seed(1)) < density
        encoded = coded(mask)
        assert torch.equal(read(encoded), mask) and encoded.nbytes() * 8 < most * mask.numel()


def test_it_never_costs_more_than_a_few_bytes() -> None:
    for dtype in (torch.uint8, torch.bfloat16, torch.int64):
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 16_000, dtype=np.uint8)).view(dtype)
        assert coded(noise).nbytes() <= 16_000 + 8


def test_threads_give_the_same_bytes() -> None:
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            encoded = coded(x)
            assert torch.equal(read(encoded), x)
            found.append(bits_of(encoded.parts["stream"]))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_tensors_share_a_stream() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    stream = torch.from_numpy(encode(form.elements(x), form.kind_of(x.dtype), chunk=10))
    for start, shape in ((0, (10, 3)), (30, ()), (31, (0, 5)), (1000, (4000,))):
        tree = Encoded(form.Entropy(start), {"stream": stream}, torch.Size(shape), x.dtype)
        assert torch.equal(read(tree).reshape(-1), x[start : start + tree.shape.numel()])
    beyond = Encoded(form.Entropy(1001), {"stream": stream}, torch.Size([4000]), x.dtype)
    with pytest.raises(FileError, match="no elements 1001 to 5000 of 5000"):
        read(beyond)


def test_claims_are_paid_for() -> None:
    for x, least in ((torch.zeros(80_000, dtype=torch.uint8), 10_000), (torch.zeros(1 << 18), 512)):
        encoded = coded(x)
        assert encoded.nbytes() == least and torch.equal(read(encoded), x)
        with pytest.raises(FileError, match="cannot hold"):
            read(replace(encoded, parts={"stream": encoded.parts["stream"][:-1]}))  # type: ignore[index]
        assert not survives(replace(encoded, shape=torch.Size([10**12])))


def test_false_streams() -> None:
    good = encode(skewed(3000).numpy(), checks=True)
    for bad, why in (
        (good[:500], "chunk 0"),
        (np.append(good, np.uint8(0)), "chunk 0"),
        (encode(skewed(3000).numpy(), checks=False), "without checksums"),
        (encode(skewed(3000).numpy().astype("u2"), checks=True), "of 2 bytes each"),
        (encode(skewed(2999).numpy(), checks=True), "no elements"),
    ):
        tree = Encoded(form.Entropy(), {"stream": torch.from_numpy(bad)}, torch.Size([3000]), torch.uint8)
        with pytest.raises(FileError, match=why):
            read(tree)
    twos = Encoded(form.Entropy(), {"stream": torch.tensor([16, 1, 2], dtype=torch.uint8)}, torch.Size([9]), torch.bool)
    with pytest.raises(FileError, match="truth values"):
        read(twos)


@given(seeds)
def test_damage(seed: int) -> None:
    x = skewed(9000, seed) if seed % 3 == 0 else leaf((50, 7), DTYPES[seed % len(DTYPES)], 5, seed)
    for broken in damaged(coded(x), seed, 10):
        survives(broken)
