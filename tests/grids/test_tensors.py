"""Decompositions of tensors, against NumPy, against what theorems say, and on tensors of known rank."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from smelt.grids import cp, multilinear, trains, tucker, variational

SHAPE = (9, 7, 3, 3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(size: int, seed: int = 1) -> Tensor:
    """Of inputs that are far from white."""
    x = random(3 * size, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    x = x @ torch.linalg.qr(random(size, size, seed=seed + 1))[0]
    return x.T @ x / len(x)


def unfold(x: np.ndarray, mode: int) -> np.ndarray:
    return np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)


def reference_tucker(x: np.ndarray, ranks: tuple[int, int], rounds: int) -> float:
    """Squared error of HOOI in the first two modes, by full singular value decompositions."""
    u = [np.linalg.svd(unfold(x, mode))[0][:, :rank] for mode, rank in enumerate(ranks)]
    for _ in range(rounds):
        u[0] = np.linalg.svd(unfold(np.einsum("oikl,is->oskl", x, u[1]), 0))[0][:, : ranks[0]]
        u[1] = np.linalg.svd(unfold(np.einsum("oikl,or->rikl", x, u[0]), 1))[0][:, : ranks[1]]
    u[0] = np.linalg.svd(unfold(np.einsum("oikl,is->oskl", x, u[1]), 0))[0][:, : ranks[0]]
    core = np.einsum("oikl,or,is->rskl", x, *u)
    return float(((x - np.einsum("rskl,or,is->oikl", core, *u)) ** 2).sum())


def test_tucker_is_higher_order_orthogonal_iteration() -> None:
    x = random(*SHAPE)
    steps = tucker.iterate(x, (4, 3))
    errors = [next(steps)[1] for _ in range(8)]
    for rounds, error in enumerate(errors):
        assert error == pytest.approx(reference_tucker(x.numpy(), (4, 3), rounds), rel=1e-8)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors)) and errors[-1] < errors[0]
    out, into = tucker.spectra(x)
    assert errors[0] <= float(out[4:].sum() + into[3:].sum())  # the bound of the truncated HOSVD
    last, core, first = tucker.tucker2(x, (4, 3), rounds=7)
    assert [*last.shape, *core.shape, *first.shape] == [9, 4, 4, 3, 3, 3, 3, 7]
    torch.testing.assert_close(last.T @ last, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("metric", [None, moments(63)])
def test_tucker_finds_exact_ranks(metric: Tensor | None) -> None:
    x = torch.einsum("rskl,or,si->oikl", random(4, 3, 3, 3), random(9, 4, seed=1), random(3, 7, seed=2))
    parts = tucker.tucker2(x, (4, 3), metric)
    assert float((x - tucker.build(*parts)).norm() / x.norm()) < 1e-6
    for squares, rank in zip(tucker.spectra(x, metric), (4, 3), strict=True):
        assert float(squares[rank:].sum() / squares.sum()) < 1e-12


def test_tucker_in_the_metric_of_the_inputs() -> None:
    x, metric = random(*SHAPE), moments(63)
    steps = tucker.iterate(x, (4, 3), metric)
    errors = [next(steps)[1] for _ in range(10)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    plain = multilinear.loss(x, tucker.build(*tucker.tucker2(x, (4, 3))), metric)
    assert errors[0] < plain and errors[-1] < 0.98 * errors[0]
    # with all channels of the input it is a regression of rank 4, whose least error is known (Eckart, Young)
    parts, error = next(tucker.iterate(x, (4, 7), metric))
    least = np.linalg.svd(x.flatten(1).numpy() @ np.linalg.cholesky(metric.numpy()))[1][4:]
    assert error == pytest.approx(float((least**2).sum()), rel=1e-8)
    assert error == pytest.approx(multilinear.loss(x, tucker.build(*parts), metric), rel=1e-8)


def test_one_factor_by_least_squares() -> None:
    """Enough steps give what the normal equations give; no step makes the error larger."""
    w, metric = random(6, 5), moments(5)
    factors = [random(6, 2, seed=3), random(2, 5, seed=4)]
    root = torch.linalg.cholesky(metric)
    exact = torch.linalg.lstsq(factors[0], w).solution  # for a full left factor the metric drops out
    solved = multilinear.solve(w, factors, 1, torch.matmul, metric, steps=60)
    torch.testing.assert_close(solved, exact, rtol=1e-6, atol=1e-8)
    left = torch.linalg.lstsq((factors[1] @ root).T, (w @ root).T).solution.T
    torch.testing.assert_close(multilinear.solve(w, factors, 0, torch.matmul, metric, steps=60), left)
    errors = [
        multilinear.loss(w, factors[0] @ multilinear.solve(w, factors, 1, torch.matmul, metric, steps=n), metric)
        for n in range(8)
    ]
    assert errors[0] == multilinear.loss(w, factors[0] @ factors[1], metric)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    found = multilinear.refine(w, factors, torch.matmul, metric, rounds=200, enough=0)
    least = torch.linalg.svdvals(w @ root)[2:].square().sum()
    assert multilinear.loss(w, found[0] @ found[1], metric) == pytest.approx(float(least), rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 7, 3, 3), (9, 8, 5)])
def test_cp_recovers_a_tensor_of_known_rank(shape: tuple[int, ...]) -> None:
    x = cp.build([random(n, 3, seed=n) for n in shape])
    found = cp.cp(x, 3, penalty=0, starts=4, sweeps=500, enough=1e-7)
    assert float((x - cp.build(found)).norm() / x.norm()) < 1e-3
    norms = torch.stack([f.norm(dim=0) for f in found])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    again = cp.cp(x, 3, penalty=0, starts=4, sweeps=500, enough=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_cp_sweeps_never_make_it_worse() -> None:
    x = random(*SHAPE)
    x /= x.norm()
    start = [random(n, 12, seed=n) for n in SHAPE]
    values = []
    for factors, value in itertools.islice(cp.sweep(x, start, 0.01), 20):
        terms = torch.stack([f.norm(dim=0) for f in factors]).prod(0)
        full = float((x - cp.build(factors)).square().sum()) + 0.01 * float(terms.square().sum())
        assert value == pytest.approx(full, rel=1e-9)
        values.append(value)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))


def test_cp_holds_the_norms_of_terms_that_would_cancel() -> None:
    """a a b + a b a + b a a has rank 3, but is the limit of tensors of rank 2, whose terms grow without bound."""
    a, b = torch.eye(2, dtype=torch.float64)
    x = sum(torch.einsum("i,j,k->ijk", *order) for order in ((a, a, b), (a, b, a), (b, a, a)))
    assert isinstance(x, Tensor)
    sizes = {}
    for penalty in (0.0, 0.01):
        found = cp.cp(x, 2, penalty=penalty, sweeps=2000, enough=0)
        sizes[penalty] = float(torch.stack([f.norm(dim=0) for f in found]).prod(0).norm() / x.norm())
    assert sizes[0.0] > 4 and sizes[0.01] < 1.5


@pytest.mark.parametrize("ranks", [(1, 1, 1), (3, 5, 2), (2, 9, 4), (9, 21, 3)])
def test_tensor_train_keeps_the_bound(ranks: tuple[int, ...]) -> None:
    small = [random(*s, seed=5) for s in ((1, 7, 2), (2, 3, 2), (2, 3, 2), (2, 9, 1))]
    x = random(7, 3, 3, 9) + 3 * trains.build(*small)
    cores = trains.tt_svd(x, ranks)
    error = float((x - trains.build(*cores)).norm())
    left_out = [float(s[r:].sum()) for s, r in zip(trains.spectra(x), ranks, strict=True)]
    assert max(left_out) ** 0.5 * (1 - 1e-9) <= error <= sum(left_out) ** 0.5 * (1 + 1e-9)
    assert [c.shape[2] for c in cores[:-1]] == [min(ranks[0], 7), min(ranks[1], 21, 3 * ranks[0]), ranks[2]]
    same = trains.even(cores)
    torch.testing.assert_close(trains.build(*same), trains.build(*cores))
    assert all(float(c.square().mean()) == pytest.approx(float(same[0].square().mean())) for c in same)


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.5, 0.9])
def test_tensor_train_keeps_a_tolerance(tolerance: float) -> None:
    x = random(4, 5, 6, 3)
    spectra = trains.spectra(x)
    for squares, rows in zip(spectra, (4, 20, 120), strict=True):
        values = np.linalg.svd(x.numpy().reshape(rows, -1))[1] ** 2
        np.testing.assert_allclose(squares[: len(values)].numpy(), values, rtol=1e-9)
    ranks = trains.leaving(spectra, tolerance**2 * float(x.square().sum()) / 3)
    near = trains.build(*trains.tt_svd(x, ranks))
    assert float((x - near).norm() / x.norm()) <= tolerance + 1e-9


def test_tensor_train_of_a_matrix_is_its_truncated_svd() -> None:
    x = random(8, 11)
    u, s, v = np.linalg.svd(x.numpy(), full_matrices=False)
    np.testing.assert_allclose(trains.build(*trains.tt_svd(x, [3])).numpy(), u[:, :3] * s[:3] @ v[:3])


def test_tensor_train_within_a_budget() -> None:
    spectra = trains.spectra(random(6, 5, 4))

    def size(ranks: tuple[int, ...]) -> int:
        return 6 * ranks[0] + ranks[0] * 5 * ranks[1] + ranks[1] * 4

    levels = {float(s.flip(0).cumsum(0).flip(0)[r]) for s in spectra for r in range(len(s))} | {0.0}
    for budget in (10, 60, 80, 200):
        ranks = trains.within(spectra, size, budget)
        allowed = [trains.leaving(spectra, level) for level in sorted(levels)]
        best = next((r for r in allowed if size(r) <= budget), (1, 1))
        assert ranks == best


def test_matrix_of_a_tensor_train_by_the_definition() -> None:
    rows, columns = (2, 3), (4, 2)
    matrix = random(5, 7)
    cores = trains.tt_svd(trains.matrix_modes(matrix, rows, columns), [8])
    for a, b in itertools.product(range(5), range(7)):
        (a1, a2), (b1, b2) = divmod(a, 3), divmod(b, 2)
        value = cores[0][:, a1 * 4 + b1] @ cores[1][:, a2 * 2 + b2]
        assert value.item() == pytest.approx(matrix[a, b].item())
    near = trains.build(*cores)
    torch.testing.assert_close(trains.from_modes(near, rows, columns, (5, 7)), matrix)


@pytest.mark.parametrize("size", [1, 7, 10, 97, 768, 50257])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_factors_of_a_dimension(size: int, parts: int) -> None:
    found = trains.split(size, parts)
    assert len(found) == parts and size <= np.prod(found) <= max(size, int(1.1 * size))
    assert size < 50 or max(found) <= 2 * size ** (1 / parts)


def test_variational_threshold() -> None:
    assert variational._least_tau(1.0) == pytest.approx(2.5129, abs=1e-4)  # Nakajima et al. 2013, after theorem 2
    for alpha in (0.01, 0.1, 0.5):
        assert variational._least_tau(alpha) == pytest.approx(2.5129 * alpha**0.5, rel=0.15)  # their approximation


@pytest.mark.parametrize(("shape", "rank"), [((60, 200), 5), ((200, 60), 5), ((80, 80), 1), ((40, 400), 0)])
def test_variational_ranks(shape: tuple[int, int], rank: int) -> None:
    """Signal well above the edge of the noise counts, noise does not."""
    x = random(*shape) * 0.1
    x += random(shape[0], rank, seed=7) @ random(rank, shape[1], seed=8) if rank else 0
    assert variational.rank(torch.linalg.svdvals(x).square(), shape) == rank


def test_variational_noise() -> None:
    x = random(60, 200) * 0.3 + random(60, 3, seed=7) @ random(3, 200, seed=8)
    squares = torch.linalg.svdvals(x).square().numpy()
    tau = variational._least_tau(0.3)
    found = variational._noise(squares, 200, 0.3, (1 + tau) * (1 + 0.3 / tau))
    assert found == pytest.approx(0.09, rel=0.05)
