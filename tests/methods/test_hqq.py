from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import smelt
from smelt.core.encoded import Encoded
from smelt.core.method import Stats
from smelt.core.store import store_of
from smelt.methods.quantize.hqq import Hqq

from ..forms.tools import read

X = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)) ** 3


def reference(w: NDArray[np.float64], bits: int, iterations: int) -> NDArray[np.float64]:
    """One row, as published: range, then e and the zero point by turns; the best of what was met."""
    top = 2**bits - 1
    scale = top / (w.max() - w.min())
    zero, beta, best = -w.min() * scale, 10.0, (np.inf, w)
    for _ in range(iterations + 1):
        q = np.clip(np.round(w * scale + zero), 0, top)
        error = w - (q - zero) / scale
        best = min(best, ((error**2).sum(), (q - zero) / scale), key=lambda found: found[0])
        e = np.sign(error) * np.maximum(0, np.abs(error) - np.maximum(np.abs(error), 1e-12) ** (0.7 - 1) / beta)
        zero = np.mean(q - (w - e) * scale)
        beta *= 1.01
    return best[1]


def stored(x: torch.Tensor, where: torch.Tensor | None = None, **settings: object) -> torch.Tensor:
    codec = Hqq(**settings)  # type: ignore[arg-type]
    return read(codec.encode(x, codec.fit(x, Stats(where))))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_published_iteration(bits: int) -> None:
    x = X.double()
    found = stored(x, bits=bits)
    for row, y in zip(x.reshape(-1, 64), found.reshape(-1, 64), strict=True):
        np.testing.assert_allclose(y.numpy(), reference(row.numpy(), bits, 20), atol=1e-9)
    wide = stored(x, bits=bits, per="channel", iterations=3)
    np.testing.assert_allclose(wide[0].numpy(), reference(x[0].numpy(), bits, 3), atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0])
def test_the_search_finds_smaller_errors_of_its_norm(bits: int, norm: float) -> None:
    x = X.double()
    ways = ({"iterations": 0}, {}, {"solve": "search", "norm": norm})
    sums = [(stored(x, bits=bits, **way) - x).abs().pow(norm).reshape(-1, 64).sum(1) for way in ways]
    assert (sums[2] <= sums[0]).all()
    assert sums[2].sum() < 0.98 * sums[1].sum() and sums[1].sum() < 1.05 * sums[0].sum()


@pytest.mark.parametrize("settings", [{"scale": True}, {"scale": True, "solve": "search", "norm": 2.0}])
def test_scales_by_least_squares(settings: dict[str, Any]) -> None:
    x = X.double()
    fixed, fitted = ((stored(x, bits=3, **s) - x).norm() for s in (settings | {"scale": False}, settings))
    assert fitted < fixed
    line = 0.5 * torch.tensor([[0.0, 1, 2, 3] * 16]) - 0.2  # on a grid: found exactly
    torch.testing.assert_close(stored(line, bits=2, **settings), line)


@pytest.mark.parametrize("scales", ["float16", "bfloat16", "int8"])
def test_narrow_scales_cost_little(scales: str, tmp_path: Path) -> None:
    exact, narrow = (float((stored(X, bits=3, scales=s) - X).norm()) for s in ("float32", scales))
    assert narrow < 1.05 * exact
    model = nn.Sequential(nn.Linear(128, 64), nn.Embedding(64, 100))
    recipe = [{"prune.weights": {"ratio": 0.2}}, {"quantize.hqq": {"bits": 3, "scales": scales}}, {"code.bits": {}}]
    result = smelt.compress(model, recipe)
    result.save(tmp_path / "m.smelt")
    loaded = smelt.load(tmp_path / "m.smelt", into=nn.Sequential(nn.Linear(128, 64), nn.Embedding(64, 100)))
    for name, p in result.model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], p)
    tree = store_of(loaded).entries["0.weight"].encoded.parts["values"]
    assert isinstance(tree, Encoded)
    side = sum(leaf.numel() * leaf.element_size() for path, leaf in tree.leaves() if path != "codes")
    assert side == (4 if scales != "int8" else 2) * 64 * 2 + (16 if scales == "int8" else 0)


def test_pruned_weights_do_not_count() -> None:
    where = X.abs() > 0.3
    for settings in ({}, {"scale": True}, {"solve": "search", "scales": "int8"}):
        loud, quiet = (stored(X.where(where, v), where, bits=3, **settings)[where] for v in (1e6, 0.0))
        assert torch.equal(loud, quiet)
    alone = stored(X[:1][where[:1]][None], bits=3, per="channel")
    torch.testing.assert_close(stored(X[:1], where[:1], bits=3, per="channel")[where[:1]], alone[0])


def test_rows_of_one_value_and_short_groups() -> None:
    x = torch.full((3, 70), 0.25)
    torch.testing.assert_close(stored(x), x)
    torch.testing.assert_close(stored(x, per="tensor", scales="int8"), x)
    assert not stored(torch.zeros(3, 70)).any()
    x = X[:, :70].contiguous()
    assert (stored(x, bits=8) - x).norm() < 0.02 * x.norm()
