"""Levels against published tables and formulas; scaled, float and exponent trees; what hostile files may claim."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.forms.affine import Affine
from smelt.forms.exponent import Exponent
from smelt.forms.float import Float
from smelt.forms.levels import Levels
from smelt.forms.scaled import Scaled
from smelt.forms.sparse import Sparse

from .tools import damaged, read, seeds, shapes, survives

# The table of bitsandbytes (functional.py).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]

KINDS = [Levels("normal", 4), Levels("normal", 2), Levels("float", 4, 2), Levels("float", 8, 4), Levels("log", 4, 2)]
KINDS += [Levels("sums", 5), Levels("mu", 4, 255.0), Levels("power", 8, 0.5)]


def codes(form: Levels, shape: tuple[int, ...], seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 1 << form.bits, shape, generator=generator, dtype=torch.uint8)
    return Encoded(form, {"codes": found}, torch.Size(shape), torch.float32)


def scaled(inner: Tensor | Encoded, axis: int | None = None, group: int = 0, seed: int = 0) -> Encoded:
    form = Scaled(axis, group)
    scale = torch.rand(form.side_shape(inner.shape), generator=torch.Generator().manual_seed(seed)) + 0.1
    return Encoded(form, {"values": inner, "scale": scale}, inner.shape, torch.float32)


def test_nf4_is_the_published_table() -> None:
    assert torch.equal(Levels("normal", 4).table(), torch.tensor(NF4))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_normal_levels_are_quantiles(bits: int) -> None:
    half = 1 << bits - 1
    outer = ((1 - 1 / (4 * half)) + (1 - 1 / (4 * half - 2))) / 2
    positive = norm.ppf(np.linspace(outer, 0.5, half + 1)[:-1])
    negative = -norm.ppf(np.linspace(outer, 0.5, half)[:-1])
    table = np.sort([*positive, *negative, 0.0]) / positive.max()
    np.testing.assert_allclose(Levels("normal", bits).table().numpy(), table, atol=1e-5)


def test_small_floats_are_those_of_the_standard() -> None:
    """OCP Microscaling Formats 1.0, section 5.3: the largest, smallest normal and subnormal numbers."""
    assert Levels("float", 4, 2).table()[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for form, most, normal, least in (
        (Levels("float", 6, 2), 7.5, 1.0, 0.125),
        (Levels("float", 6, 3), 28, 0.25, 2**-4),
    ):
        table = form.table()
        mantissa = form.bits - 1 - int(form.parameter)
        assert [float(table[m]) for m in (31, 1 << mantissa, 1)] == [most, normal, least]
        assert torch.equal(table[32:], -table[:32]) and form.top() == most


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float8_e4m3fn, 4), (torch.float8_e5m2, 5)])
def test_eight_bits_are_those_of_torch(dtype: torch.dtype, exponent: int) -> None:
    theirs = torch.arange(256).byte().view(dtype).float()
    finite = torch.isfinite(theirs)
    assert torch.equal(Levels("float", 8, exponent).table()[finite], theirs[finite])


def test_curves_by_their_formulas() -> None:
    m = np.arange(1, 8)
    for form, positive in (
        (Levels("log", 4, 1), 2.0 ** (m - 7)),
        (Levels("log", 4, 2), np.sqrt(2) ** (m - 7)),
        (Levels("mu", 4, 255.0), (256.0 ** (m / 7) - 1) / 255),
        (Levels("power", 4, 0.5), (m / 7) ** 2),
    ):
        table = form.table().numpy()
        np.testing.assert_allclose(table[1:8], positive, rtol=1e-6)
        np.testing.assert_array_equal(table[8:], -table[:8])
        assert table[0] == 0


def test_sums_of_powers_of_two() -> None:
    """APoT's published levels of 4 (before the sign: 0, 1 | 1/2, 1/4, 1/16 + 1/8) and 5 bits."""
    four = [0, 1, 2, 3, 4, 6, 8, 10]
    assert np.allclose(Levels("sums", 4).table()[:8], np.array(four) / 10)
    pairs = sorted(a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32))
    assert np.allclose(Levels("sums", 5).table()[:16], np.array(pairs) / 1.5)
    assert len(set(Levels("sums", 8).table().tolist())) == 255


@given(shapes, st.sampled_from(KINDS), st.integers(-1, 3), st.sampled_from([0, 1, 3, 99]), seeds)
def test_a_tree_equals_its_definition(shape: tuple[int, ...], form: Levels, axis: int, group: int, seed: int) -> None:
    inner = codes(form, shape, seed)
    side = None if axis < 0 or not shape else 0 if group else axis % len(shape)
    tree = scaled(inner, side, group, seed)
    table, found = form.table().numpy(), inner.parts["codes"].numpy()  # type: ignore[union-attr]
    scale = tree.parts["scale"].numpy()  # type: ignore[union-attr]
    dense = np.zeros(shape, np.float32)
    for at in np.ndindex(*shape):
        where: Any = () if side is None else at[side]
        if group and side is None:
            where = (int(np.ravel_multi_index(at, shape)) if at else 0) // group
        elif group:
            where = (at[0], (int(np.ravel_multi_index(at[1:], shape[1:])) if len(at) > 1 else 0) // group)
        dense[at] = table[found[at]] * scale[where]
    np.testing.assert_array_equal(read(tree).numpy(), dense)


def test_powers_of_two_are_exact() -> None:
    whole = torch.arange(-127, 128, dtype=torch.int8)
    tree = Encoded(Exponent(), {"exponents": whole}, whole.shape, torch.float32)
    assert torch.equal(read(tree).double(), torch.pow(torch.tensor(2.0, dtype=torch.float64), whole.double()))
    assert not survives(replace(tree, parts={"exponents": torch.full((255,), -128, dtype=torch.int8)}))
    assert not survives(replace(tree, dtype=torch.float16)) and not survives(replace(tree, dtype=torch.int8))
    assert not survives(replace(tree, parts={"exponents": whole.int()}))


def test_affine_with_a_scale_that_is_stored_in_another_form() -> None:
    whole = torch.randint(-127, 128, (3, 8), dtype=torch.int8)
    side = Encoded(
        Exponent(), {"exponents": torch.tensor([-3, 0, 5], dtype=torch.int8)}, torch.Size([3]), torch.float32
    )
    tree = Encoded(Affine(0, 0, 8), {"codes": whole, "scale": side}, whole.shape, torch.float32)
    assert torch.equal(read(tree), whole * torch.tensor([0.125, 1, 32])[:, None])
    assert list(tree.carriers()) == ["codes"]
    wrong = replace(side, parts={"exponents": torch.zeros(4, dtype=torch.int8)}, shape=torch.Size([4]))
    assert not survives(replace(tree, parts={**tree.parts, "scale": wrong}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_leaves(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6).to(dtype)
    assert torch.equal(read(Encoded(Float(), {"values": x}, x.shape, torch.float32)), x.float())
    tree = scaled(x, 0)
    assert torch.equal(read(tree), x.float() * tree.parts["scale"][:, None])  # type: ignore[index]
    mask = torch.rand(4, 6) > 0.5
    rest = Encoded(Sparse(), {"mask": mask, "values": tree}, x.shape, torch.float32)
    for candidate in rest.form.at_rest(rest):
        assert torch.equal(read(candidate), read(tree) * mask)
    assert not survives(replace(tree, parts={**tree.parts, "values": x.to(torch.float32).int()}))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "none"},
        {"kind": 3},
        {"bits": 1},
        {"bits": 9},
        {"bits": 3},
        {"bits": True},
        {"parameter": 1},
        {"kind": "float", "parameter": 0},
        {"kind": "float", "parameter": 4},
        {"kind": "float", "parameter": 1.5},
        {"kind": "log", "parameter": 0},
        {"kind": "log", "parameter": 1e9},
        {"kind": "mu", "parameter": 0},
        {"kind": "mu", "parameter": float("nan")},
        {"kind": "power", "parameter": -1},
        {"kind": "power", "parameter": "1"},
    ],
)
def test_false_levels(changes: dict[str, Any]) -> None:
    good = codes(Levels("normal", 4), (4, 6))
    good.parts["codes"][0, 0] = 15  # type: ignore[index]
    assert survives(good)
    assert not survives(replace(good, form=replace(good.form, **changes)))  # type: ignore[type-var]


@pytest.mark.parametrize(
    "changes", [{"axis": 2}, {"axis": True}, {"group": -1}, {"axis": 1, "group": 2}, {"axis": None}]
)
def test_false_sides(changes: dict[str, Any]) -> None:
    good = scaled(codes(Levels(), (4, 6)), 0)
    assert survives(good)
    assert not survives(replace(good, form=replace(good.form, **changes)))  # type: ignore[type-var]


@given(seeds)
def test_damage(seed: int) -> None:
    inner = codes(KINDS[seed % len(KINDS)], (3, 5, 2), seed)
    byte = torch.randn(3, 5, 2).to(torch.float8_e4m3fn)
    exponents = torch.randint(-9, 9, (3,), dtype=torch.int8)
    side = Encoded(Exponent(), {"exponents": exponents}, torch.Size([3]), torch.float32)
    for tree in (
        scaled(inner, 0, 4, seed),
        scaled(byte),
        Encoded(Float(), {"values": byte}, byte.shape, torch.float32),
        Encoded(Scaled(0), {"values": inner, "scale": side}, inner.shape, torch.float32),
    ):
        for broken in damaged(tree, seed, 4):
            survives(broken)
