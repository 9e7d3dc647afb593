from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.core.encoded import Encoded
from smelt.forms.affine import Affine

from .tools import damaged, read, seeds, shapes, survives


def tree(form: Affine, shape: tuple[int, ...], seed: int = 0, codes: torch.dtype = torch.int16) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape)
    side = form.side_shape(size)
    low, high = (-(1 << form.bits - 1), 1 << form.bits - 1) if form.symmetric else (0, 1 << form.bits)
    parts = {"codes": torch.randint(low, high, size, generator=generator, dtype=torch.int64).to(codes)}
    parts["scale"] = torch.rand(side, generator=generator) + 0.1
    if not form.symmetric:
        parts["zero"] = torch.randint(0, high, side, generator=generator, dtype=torch.int64).to(codes)
    return Encoded(form, parts, size, torch.float32)


def slow(encoded: Encoded) -> torch.Tensor:
    """Element by element, from the definition."""
    form, parts = encoded.form, encoded.parts
    assert isinstance(form, Affine)
    dense = np.zeros(encoded.shape)
    for at in np.ndindex(*encoded.shape):
        if form.axis is None:
            side: tuple[int, ...] = ()
        elif not form.group:
            side = (at[form.axis],)
        else:
            side = (at[0], int(np.ravel_multi_index(at[1:], encoded.shape[1:])) // form.group if len(at) > 1 else 0)
        zero = 0 if form.symmetric else parts["zero"][side]  # type: ignore[index]
        dense[at] = float((parts["codes"][at] - zero) * parts["scale"][side])  # type: ignore[index]
    return torch.from_numpy(dense).float()


@given(shapes, st.sampled_from([1, 3, 8]), st.booleans(), st.integers(-1, 3), st.sampled_from([0, 1, 4, 99]), seeds)
def test_equals_its_definition(
    shape: tuple[int, ...], bits: int, symmetric: bool, axis: int, group: int, seed: int
) -> None:
    form = Affine(None if axis < 0 or not shape else axis % len(shape), 0, bits, symmetric)
    if group and shape:
        form = Affine(0, group, bits, symmetric)
    encoded = tree(form, shape, seed)
    assert torch.allclose(read(encoded), slow(encoded), rtol=1e-6, atol=1e-6)


def test_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]], dtype=torch.uint8)
    parts = {
        "codes": codes,
        "scale": torch.tensor([[1.0, 2, 0.5], [1, 10, 100]]),
        "zero": torch.tensor([[0.0, 2, 0.5], [5, 6, 0]]),
    }
    encoded = Encoded(Affine(0, 2, 3, False), parts, codes.shape, torch.float32)
    assert read(encoded).tolist() == [[0, 1, 0, 2, 1.75], [0, 1, 10, -60, 100]]


def test_equals_torch_quantization() -> None:
    x = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    scale, zero = torch.rand(6) * 0.1 + 0.01, torch.randint(-5, 5, (6,))
    reference = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), 0, -128, 127)
    codes = (x / scale[:, None, None] + zero[:, None, None]).round().clamp(-128, 127).to(torch.int8)
    parts = {"codes": codes, "scale": scale, "zero": zero.to(torch.int8)}
    assert torch.allclose(read(Encoded(Affine(0, 0, 8, False), parts, x.shape, torch.float32)), reference, atol=1e-6)


@pytest.mark.parametrize("form", [Affine(None, 0, 4, False), Affine(1, 0, 4, False), Affine(0, 4, 4, False)])
def test_gradients(form: Affine) -> None:
    encoded = tree(form, (3, 5, 2))
    codes = encoded.parts["codes"]
    assert isinstance(codes, torch.Tensor)
    scale, zero = (torch.rand(form.side_shape(codes.shape)).double().requires_grad_() for _ in range(2))

    def decode(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return form.decode({"codes": codes, "scale": scale, "zero": zero}, codes.shape, torch.float64)

    assert torch.autograd.gradcheck(decode, (scale, zero))


def test_sixteen_bits_with_a_half_precision_scale() -> None:
    parts = {"codes": torch.tensor([65535, 65534], dtype=torch.int32), "scale": torch.tensor(2**-10).half()}
    encoded = Encoded(Affine(bits=16), parts, torch.Size([2]), torch.float32)
    assert read(encoded).tolist() == [65535 / 1024, 65534 / 1024]


@pytest.mark.parametrize(
    "changes",
    [
        {"axis": 2},
        {"axis": -1},
        {"axis": "0"},
        {"axis": True},
        {"bits": 0},
        {"bits": 17},
        {"bits": 2},
        {"group": -1},
        {"group": 2},
        {"group": 2, "axis": 1},
        {"group": 10**18, "axis": None},
        {"symmetric": 1},
        {"symmetric": True},
    ],
)
def test_false_fields(changes: dict[str, Any]) -> None:
    good = tree(Affine(0, 0, 4, False), (4, 6))
    form = good.form
    assert isinstance(form, Affine) and survives(good)
    assert not survives(replace(good, form=replace(form, **changes)))


def test_false_claims() -> None:
    good = tree(Affine(0, 0, 4, False), (4, 6))
    for parts in (
        {"scale": torch.ones(6)},
        {"scale": torch.ones(())},
        {"scale": torch.ones(4).int()},
        {"zero": torch.ones(1)},
        {"codes": torch.ones(4, 6)},
        {"codes": torch.ones(4, 6).long()},
        {"codes": torch.ones(6, 4).byte()},
        {"codes": torch.ones(3).byte()},
        {"codes": torch.full((4, 6), 16).byte()},
        {"codes": torch.full((4, 6), -9).to(torch.int8)},
        {"more": torch.ones(3)},
    ):
        assert not survives(replace(good, parts={**good.parts, **parts}))
    assert not survives(replace(good, shape=torch.Size([4, 10**12])))
    assert not survives(replace(good, dtype=torch.bool))
    huge = replace(
        good,
        form=Affine(0, 10**18, 4, False),
        parts={**good.parts, **dict.fromkeys(("scale", "zero"), torch.ones(4, 1))},
    )
    assert survives(huge)


@given(seeds)
def test_damage(seed: int) -> None:
    form = [Affine(None, 0, 4), Affine(1, 0, 4, False), Affine(0, 4, 4, False)][seed % 3]
    for broken in damaged(tree(form, (3, 5, 2), seed), seed, 8):
        survives(broken)
