import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.core.encoded import Encoded
from smelt.forms.rotated import Rotated, rounds, scrambled

from .tools import read, seeds, shapes


@settings(deadline=None)
@given(shapes, st.integers(0, 2**63 - 1), st.integers(1, 3), seeds)
def test_rotations_are_orthogonal_and_undone(shape: tuple[int, ...], seed: int, count: int, values: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(values), dtype=torch.float64)
    form = Rotated(seed, count)
    turned = form.turn(x)
    torch.testing.assert_close(read(Encoded(form, {"values": turned}, x.shape, x.dtype)), x)
    rest = tuple(range(1, x.dim())) or None
    torch.testing.assert_close(turned.square().sum(rest), x.square().sum(rest))


@pytest.mark.parametrize("n", [1, 2, 16, 27, 100, 144])
def test_the_matrix_is_that_of_the_definition(n: int) -> None:
    form = Rotated(7, rounds(torch.Size((1, n))))
    expected = np.eye(n)
    p = 1 << n.bit_length() - 1
    hadamard = np.ones((1, 1))
    while len(hadamard) < p:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    for j in range(form.rounds):
        numbers = [int(i) for i in scrambled(7 + j, 2 * n)]
        order = sorted(range(n), key=lambda i, numbers=numbers: numbers[i])  # type: ignore[misc]
        if j:
            order = [*range(p, n), *(i for i in order if i < p)]
        signs = [-1 if number % 2 else 1 for number in numbers[n:]]
        expected = expected[:, order] * signs
        expected[:, :p] = expected[:, :p] @ hadamard / np.sqrt(p)
    np.testing.assert_allclose(form.turn(torch.eye(n, dtype=torch.float64)).numpy(), expected, atol=1e-12)
    assert n < 2 or (np.abs(expected) > 1e-9).any(0).all()
    if n == 100:  # large values are spread: no input stays where it was
        assert np.abs(expected).max() < 0.75


def test_the_sequence_is_splitmix64() -> None:
    state, found = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        found.append(z ^ z >> 31)
    assert scrambled(1234567, 3).tolist() == found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_gradient_goes_back() -> None:
    x = torch.randn(3, 12, requires_grad=True)
    form, weight = Rotated(5, 2), torch.randn(3, 12)
    (form.back(x) * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, form.turn(weight))
