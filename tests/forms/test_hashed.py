from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from smelt.core.encoded import Encoded
from smelt.forms.hashed import Hashed, places, xxhash32

from .tools import damaged, read, seeds, survives

# xxh32 of struct.pack("<II", first, second), from the package xxhash 4.1.0
KNOWN = [
    (0, 0, 0, 3736311059),
    (1, 2, 0, 1762362331),
    (123456, 2147483653, 7, 2567019836),
    (4294967295, 3, 4294967295, 2522960622),
    (7, 11, 2654435761, 2422622901),
]


def word(number: int) -> torch.Tensor:
    return torch.from_numpy(np.array([number], np.uint32).view(np.int32))


@pytest.mark.parametrize(("first", "second", "seed", "expected"), KNOWN)
def test_the_hash_is_xxhash32(first: int, second: int, seed: int, expected: int) -> None:
    assert int(xxhash32(word(first), word(second), seed)) & 0xFFFFFFFF == expected


def tree(shape: tuple[int, ...] = (3, 4), count: int = 5, seed: int = 9, signs: bool = True) -> Encoded:
    values = torch.arange(1.0, count + 1)
    return Encoded(Hashed(seed, signs), {"values": values}, torch.Size(shape), torch.float32)


def scalar(i: int, j: int, seed: int) -> int:
    """The same hash of one place, by Python's integers."""
    return int(xxhash32(word(i), word(j), seed)) & 0xFFFFFFFF


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2), (6,)])
@pytest.mark.parametrize("signs", [True, False])
def test_every_place_has_its_value_and_sign(shape: tuple[int, ...], signs: bool) -> None:
    found = read(tree(shape, 5, 2**32 - 1, signs)).reshape(shape[0], -1)
    for i in range(shape[0]):
        for j in range(found.shape[1]):
            sign = -1 if signs and scalar(i, j, 0) & 1 else 1  # the seed after 2^32 - 1 is 0
            assert found[i, j] == sign * (scalar(i, j, 2**32 - 1) % 5 + 1)


def test_values_and_signs_are_spread_evenly() -> None:
    at = places(torch.Size((500, 400)), 100, 3, True, torch.device("cpu"))
    counts = at.flatten().bincount(minlength=200).double()
    assert counts.sum() == 200_000 and (counts - 1000).abs().max() < 5 * 1000**0.5
    assert abs(float(counts[:100].sum()) - 100_000) < 5 * 200_000**0.5 / 2


def test_the_gradient_of_a_value_is_the_sum_over_its_places() -> None:
    whole = tree((40, 30), 7)
    values = whole.parts["values"]
    assert isinstance(values, torch.Tensor)
    values.requires_grad_()
    slope = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second time by the places that were kept
        values.grad = None
        (whole.decode() * slope).sum().backward()
        at = places(torch.Size((40, 30)), 7, 9, True, values.device)
        signed = torch.where(at < 7, slope, -slope)
        expected = torch.stack([signed[at % 7 == k].sum() for k in range(7)])
        torch.testing.assert_close(values.grad, expected)


def test_false_claims() -> None:
    good = tree()
    assert survives(good)
    for parts in (
        {},
        {"values": torch.ones(0)},
        {"values": torch.ones(2, 2)},
        {"values": torch.ones(3, dtype=torch.int32)},
        {"values": torch.ones(3), "more": torch.ones(1)},
    ):
        assert not survives(replace(good, parts=parts))
    for shape in ([10**6], [], [-1, -2]):
        assert not survives(replace(good, shape=torch.Size(shape)))
    assert not survives(replace(good, dtype=torch.int32))
    for form in (Hashed(-1), Hashed(2**32), Hashed(1.5), Hashed(0, 1)):  # type: ignore[arg-type]
        assert not survives(replace(good, form=form))


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_damage(seed: int) -> None:
    for broken in damaged(tree((9, 8), 11), seed, 8):
        survives(broken)
