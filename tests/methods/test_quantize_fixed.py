"""quantize.fixed: two's complement, the fraction by hand and by its definition."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import Stats, make
from smelt.core.store import store_of
from smelt.methods.quantize.fixed import Fixed


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(x: Tensor, where: Tensor | None = None, **settings: Any) -> Encoded:
    codec = Fixed(**settings)
    return codec.encode(x, codec.fit(x, Stats(where)))


def fractions(tree: Encoded) -> Tensor:
    side = tree.parts["scale"]
    assert isinstance(side, Encoded)
    return -side.parts["exponents"]  # type: ignore[operator]


def test_by_hand() -> None:
    x = torch.tensor([[0.9, -0.5, 0.3], [-1.0, 0.5, 0.49], [1.0, 0.1, 0.0], [100.0, -3.0, 1.0], [0.0, 0.0, 0.0]])
    tree = encode(x, bits=4)
    assert fractions(tree)[:4].tolist() == [3, 3, 2, -4]  # 0.9 * 8 = 7.2; -1 fits Q0.3, 1 does not; 100 = 6.25 * 2^4
    assert dict(tree.leaves())["codes"].tolist() == [[7, -4, 2], [-8, 4, 4], [4, 0, 0], [6, 0, 0], [0, 0, 0]]
    assert tree.decode()[:2].tolist() == [[0.875, -0.5, 0.25], [-1, 0.5, 0.5]]
    rounded_up = encode(torch.tensor([[0.99, 0.0]]), bits=4)  # 7.92 would be 8, which does not fit
    assert fractions(rounded_up).tolist() == [2]


@pytest.mark.parametrize("bits", [2, 5, 8, 12, 16])
def test_the_fraction_is_the_largest_with_which_all_fits(bits: int) -> None:
    x = randn(50, 7) * torch.logspace(-6, 6, 50)[:, None]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    tree = encode(x, bits=bits)
    for row, n in zip(x.double().numpy(), fractions(tree).tolist(), strict=True):
        fits = [low <= np.round(row * 2.0**k).min() and np.round(row * 2.0**k).max() <= high for k in (n, n + 1)]
        assert fits == [True, False]
    step = 2.0 ** -fractions(tree).double()[:, None]
    assert bool(((tree.decode().double() - x).abs() <= step / 2 * 1.0001).all())


def test_a_given_fraction_saturates() -> None:
    tree = encode(torch.tensor([[100.0, -100.0, 0.3, -0.3]]), bits=8, fraction=4)
    assert tree.decode().tolist() == [[127 / 16, -8, 5 / 16, -5 / 16]]


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_least_error_of_four_steps(bits: int) -> None:
    x = randn(40, 30)
    first, best = encode(x, bits=bits), encode(x, bits=bits, range="mse")
    errors = []
    for less in range(4):
        step = 2.0 ** -(fractions(first) + less).float()[:, None]
        y = (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        errors.append((y - x).square().sum(1))
    found = (best.decode() - x).square().sum(1)
    torch.testing.assert_close(found, torch.stack(errors).amin(0))
    assert bool((found < errors[0]).any())


@pytest.mark.parametrize("settings", [{}, {"range": "mse"}, {"per": "tensor"}, {"per": "group", "group": 16}])
def test_masked_entries_do_not_count(settings: dict[str, Any]) -> None:
    x, where = randn(6, 40), randn(6, 40, seed=1) > 0
    quiet, loud = (encode(torch.where(where, x, f), where, bits=5, **settings).decode() for f in (0.0, 1e6))
    assert torch.equal(quiet[where], loud[where]) and bool((quiet[~where] == 0).all())


def test_stored_pruned_loaded_and_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2), nn.Flatten(), nn.Linear(50, 4))
    x = randn(5, 1, 6, 6)
    recipe = [{"prune.weights": {"ratio": 0.5}}, {"train": {"epochs": 1, "with": [{"quantize.fixed": {"bits": 5}}]}}]
    data = smelt.Data(train=[(x, torch.zeros(5, dtype=torch.int64))])
    result = smelt.compress(model, [*recipe, {"code.entropy": {}}], smelt.Job(data=data, latency=False))
    result.save(tmp_path / "x.smelt")
    loaded = smelt.load(tmp_path / "x.smelt", into=model)
    assert torch.equal(loaded(x), result.model(x))
    assert str(store_of(loaded).entries["0.weight"].encoded) == "sparse(values: affine(scale: exponent))"
    for p in (p for p in loaded.parameters() if p.dim() > 1):
        n = float(p.detach().abs()[p != 0].min().log2().floor())
        assert bool(((p.detach() * 2 ** (8 - n)) % 1 == 0).all())


def test_activations(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), randn(20, 8) * 3
    data = smelt.Data(train=[(x, torch.zeros(20, dtype=torch.int64))])
    for dynamic in (True, False):
        step = {"quantize.fixed": {"at": "input", "dynamic": dynamic}}
        result = smelt.compress(model, [step], smelt.Job(data=data, latency=False))
        result.save(tmp_path / f"{dynamic}.smelt")
        loaded = smelt.load(tmp_path / f"{dynamic}.smelt", into=nn.Sequential(nn.Linear(8, 4)))
        n = 6 - int(np.floor(np.log2(float(x.abs().max()))))
        torch.testing.assert_close(loaded(x), model((x * 2**n).round().clamp(-128, 127) / 2**n))
        quarter = (x * 2**n / 4).round().clamp(-128, 127) / 2**n  # its own range, or that of calibration
        own = 2 if dynamic else 0
        torch.testing.assert_close(loaded(x / 4), model((x / 4 * 2 ** (n + own)).round() / 2 ** (n + own)))
        assert quarter.shape == x.shape


def test_bad_settings() -> None:
    for settings in ({"bits": 1}, {"bits": 17}, {"fraction": 200}):
        with pytest.raises(RecipeError, match="outside"):
            make("quantize.fixed", settings)
