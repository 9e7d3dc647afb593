import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.core.method import State
from smelt.forms.bits import BLOCK
from smelt.forms.bits import Bits as Packed
from smelt.methods.code.bits import Bits

from .tools import bits_of, damaged, read, seeds, shapes, survives

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64),
)


def leaf(shape: tuple[int, ...], dtype: torch.dtype, spread: float, seed: int) -> torch.Tensor:
    x = torch.from_numpy(np.array(np.random.default_rng(seed).normal(0, spread, shape)))
    return x.abs().to(dtype) if str(dtype).startswith("torch.uint") else x.to(dtype)


def packed(*data: int) -> dict[str, torch.Tensor]:
    return {"packed": torch.tensor(data, dtype=torch.uint8)}


@given(shapes, st.sampled_from(DTYPES), st.sampled_from([0.3, 3, 1e4, 1e9]), seeds)
def test_exact_round_trip(shape: tuple[int, ...], dtype: torch.dtype, spread: float, seed: int) -> None:
    x = leaf(shape, dtype, spread, seed)
    encoded = Bits().encode(x, State())
    y = read(encoded)
    assert y.shape == x.shape and y.dtype == x.dtype and bits_of(y) == bits_of(x)
    assert encoded.nbytes() <= x.numel() * x.element_size()


def test_by_hand() -> None:
    encoded = Bits().encode(torch.tensor([[-4, -3], [-2, -5]], dtype=torch.int16), State())
    assert encoded.form == Packed(bits=2, offset=-5)
    assert encoded.parts["packed"].tolist() == [0b01_10_11_00]
    twelve = Encoded(Packed(12), packed(0xAB, 0xCD, 0xEF), torch.Size([2]), torch.int32)
    assert read(twelve).tolist() == [0xABC, 0xDEF]


def test_masks_are_packed_as_numpy_does() -> None:
    mask = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.3
    assert bits_of(Bits().encode(mask, State()).parts["packed"]) == np.packbits(mask.numpy()).tobytes()


def test_extremes_and_several_blocks() -> None:
    for x in (
        torch.tensor([-(2**63), -(2**63) + 9]),
        torch.tensor([2**63 - 1, 2**63 - 4]),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.randint(3, 11, (2 * BLOCK + 5,), dtype=torch.int32, generator=torch.Generator().manual_seed(1)),
    ):
        assert torch.equal(read(Bits().encode(x, State())), x)


@pytest.mark.parametrize(
    ("form", "data", "shape", "dtype"),
    [
        (Packed(1), (1,), (10**12,), torch.bool),
        (Packed(1), (1,), (9,), torch.uint8),
        (Packed(0), (1,), (1,), torch.uint8),
        (Packed(17), (1, 2, 3), (1,), torch.int16),
        (Packed(True), (1,), (8,), torch.uint8),
        (Packed("1"), (1,), (8,), torch.uint8),  # type: ignore[arg-type]
        (Packed(4, 300), (1,), (2,), torch.uint8),
        (Packed(4, 250), (0xFF,), (2,), torch.uint8),
        (Packed(1, 1), (255,), (8,), torch.bool),
        (Packed(2), (255,), (4,), torch.bool),
        (Packed(4), (1,), (2,), torch.float32),
        (Packed(1), (1,), (-8,), torch.uint8),
    ],
)
def test_false_claims(form: Packed, data: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(FileError):
        read(Encoded(form, packed(*data), torch.Size(shape), dtype))


@given(seeds)
def test_damage(seed: int) -> None:
    tree = Bits().encode(leaf((5, 7), DTYPES[seed % len(DTYPES)], 9, seed), State())
    for broken in damaged(tree, seed, 10):
        survives(broken)
