"""quantize.log and quantize.power against the formulas of their papers."""

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

ALL: list[tuple[str, dict[str, Any]]] = [
    ("quantize.log", {}),
    ("quantize.log", {"base": "sqrt2"}),
    ("quantize.log", {"base": "apot"}),
    ("quantize.power", {}),
    ("quantize.power", {"curve": "mu"}),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(name: str, x: Tensor, where: Tensor | None = None, **settings: Any) -> Encoded:
    codec = make(name, settings)
    tree = codec.encode(x, codec.fit(x, Stats(where)))
    assert isinstance(tree, Encoded)
    return tree


def error(tree: Encoded, x: Tensor) -> float:
    return float((tree.decode() - x).square().sum())


@pytest.mark.parametrize(("base", "each"), [("2", 1), ("sqrt2", 2)])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_rounded_logarithms(base: str, each: int, bits: int) -> None:
    """Miyashita et al. 2016, eq. 4-5, with the sign apart and one code for 0."""
    x = randn(8, 50).double() * torch.logspace(-3, 3, 8).double()[:, None]
    x[0, 0] = 0
    tree = encode("quantize.log", x.float(), base=base, bits=bits, rounding="companded")
    side = tree.parts["scale"]
    assert isinstance(side, Encoded)
    top = side.parts["exponents"].double().numpy()[:, None]  # type: ignore[union-attr]
    exact = x.float().double().numpy()
    with np.errstate(divide="ignore"):
        log = np.round(each * np.log2(np.abs(exact))) / each
    levels = 2 ** (bits - 1) - 1
    expected = np.sign(exact) * np.where(log > top - levels / each, 2.0 ** np.minimum(log, top), 0)
    np.testing.assert_allclose(tree.decode().numpy(), expected, rtol=1e-6)
    assert bool((log.max(1, keepdims=True) <= top).all()) and bool((log.max(1, keepdims=True) > top - 1).all())


@pytest.mark.parametrize(("name", "settings"), ALL)
@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_the_nearest_level(name: str, settings: dict[str, Any], range_: str) -> None:
    x = randn(6, 4, 5)
    tree = encode(name, x, range=range_, **settings)
    inner, side = tree.parts["values"], tree.parts["scale"]
    assert isinstance(inner, Encoded)
    scale = (side.decode() if isinstance(side, Encoded) else side)[:, None, None]
    levels = inner.form.table() * scale[..., None]  # type: ignore[attr-defined]
    expected = levels.expand(*x.shape, -1).gather(-1, (levels - x[..., None]).abs().argmin(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(tree.decode(), expected)
    assert error(tree, x) <= error(encode(name, x, range="minmax", **settings), x) * 1.0001


def test_sums_of_powers_of_two_are_sums_of_powers_of_two() -> None:
    x = randn(16, 64)
    tree = encode("quantize.log", x, base="apot", bits=5)
    top = x.abs().amax(1, keepdim=True)
    units = (tree.decode() / top * 48).round()  # 1.5 = 48 / 32
    torch.testing.assert_close(tree.decode(), units * top / 48)
    for unit in units.abs().unique().int().tolist():
        assert unit.bit_count() <= 2
    assert error(tree, x) < error(encode("quantize.log", x, bits=5), x)


@pytest.mark.parametrize("p", [0.4, 0.75, 1.0])
def test_powers(p: float) -> None:
    """Yvinec et al. 2023, eq. 5-6: sign(x) |x|^p in even steps, and back."""
    x = randn(5, 60)
    top = x.abs().amax(1, keepdim=True).double().numpy()
    even = np.round((np.abs(x.double().numpy()) / top) ** p * 7) / 7
    expected = np.sign(x.numpy()) * even ** (1 / p) * top
    tree = encode("quantize.power", x, parameter=p, rounding="companded")
    np.testing.assert_allclose(tree.decode().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_mu_law() -> None:
    """ITU-T G.711's curve: ln(1 + mu |x|) / ln(1 + mu) in even steps."""
    x = randn(5, 60)
    top = x.abs().amax(1, keepdim=True).double().numpy()
    even = np.round(np.log1p(255 * np.abs(x.double().numpy()) / top) / np.log(256) * 127) / 127
    expected = np.sign(x.numpy()) * np.expm1(even * np.log(256)) / 255 * top
    tree = encode("quantize.power", x, curve="mu", parameter=255.0, bits=8, rounding="companded")
    np.testing.assert_allclose(tree.decode().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("curve", ["power", "mu"])
def test_the_parameter_is_the_best_that_was_tried(curve: str) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_t(4, (20, 60))).float()
    tree = encode("quantize.power", x, curve=curve)
    tried = [0.3, 0.5, 0.7, 1.0] if curve == "power" else [0.5, 4.0, 32.0, 256.0]
    assert error(tree, x) <= min(error(encode("quantize.power", x, curve=curve, parameter=p), x) for p in tried)
    assert error(tree, x) < 0.8 * error(encode("quantize.affine", x, bits=4), x)


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_masked_entries_do_not_count(name: str, settings: dict[str, Any]) -> None:
    x, where = randn(6, 40), randn(6, 40, seed=1) > 0
    for more in ({}, {"range": "mse"}, {"per": "group", "group": 16}, {"per": "tensor"}):
        trees = [encode(name, torch.where(where, x, f), where, **{**settings, **more}) for f in (0.0, 1e6)]
        quiet, loud = (tree.decode() for tree in trees)
        assert torch.equal(quiet[where], loud[where]) and bool((quiet[~where] == 0).all())


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_stored_pruned_loaded_and_trained(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2), nn.Flatten(), nn.Linear(50, 4))
    x = randn(5, 1, 6, 6)
    recipe = [{"prune.weights": {"ratio": 0.5}}, {"train": {"epochs": 1, "with": [{name: settings}]}}]
    data = smelt.Data(train=[(x, torch.zeros(5, dtype=torch.int64))])
    result = smelt.compress(model, [*recipe, {"code.entropy": {}}], smelt.Job(data=data, latency=False))
    result.save(tmp_path / "x.smelt")
    loaded = smelt.load(tmp_path / "x.smelt", into=model)
    assert torch.equal(loaded(x), result.model(x))
    assert str(store_of(loaded).entries["4.weight"].encoded).startswith("sparse(values: scaled(values: levels")
    for p in (p for p in loaded.parameters() if p.dim() > 1):
        assert all(len(row.unique()) <= 16 for row in p.detach())


@pytest.mark.parametrize(("name", "settings"), ALL)
def test_activations_of_calibration_data(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), randn(20, 8)
    data = smelt.Data(train=[(x, torch.zeros(20, dtype=torch.int64))])
    fixed = {"parameter": 0.6} if settings.get("curve") != "mu" else {"parameter": 30.0}
    given = {**settings, **(fixed if name == "quantize.power" else {}), "at": "input", "bits": 8, "dynamic": False}
    result = smelt.compress(model, [{name: given}], smelt.Job(data=data, latency=False))
    result.save(tmp_path / "x.smelt")
    loaded = smelt.load(tmp_path / "x.smelt", into=nn.Sequential(nn.Linear(8, 4)))
    assert torch.equal(loaded(x), result.model(x))
    with torch.no_grad():
        assert 0 < float((loaded(x) - model(x)).norm() / model(x).norm()) < 0.3
    if name == "quantize.power":
        with pytest.raises(RecipeError, match="parameter: nothing at input"):
            smelt.compress(model, [{name: {"at": "input", "dynamic": False}}], smelt.Job(data=data, latency=False))


def test_bad_settings() -> None:
    with pytest.raises(RecipeError, match="sums of powers have no curve"):
        make("quantize.log", {"base": "apot", "rounding": "companded"})
    with pytest.raises(RecipeError, match=r"quantize.power.parameter is 20, outside 0.0625..16"):
        make("quantize.power", {"parameter": 20})
