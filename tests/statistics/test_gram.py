"""The Gram matrix is what it says: the squared change of the output when a row of the weight changes."""

from typing import Any

import pytest
import torch
from torch import nn

from smelt.core.errors import DataError
from smelt.core.statistic import gather
from smelt.statistics.gram import Gram, damped, geometry, rows
from smelt.statistics.second_moment import SecondMoment
from tests.statistics.test_second_moment import LAYERS

FORWARD = [case for case in LAYERS if not isinstance(case[0], nn.modules.conv._ConvTransposeNd)]


@pytest.mark.parametrize(
    ("layer", "shape"), FORWARD, ids=lambda v: str(v) if isinstance(v, tuple) else type(v).__name__
)
@torch.no_grad()
def test_it_is_the_change_of_the_output(layer: Any, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for _ in range(2)]
    statistic, diagonal = Gram(layer), SecondMoment(layer)
    for x in batches:
        statistic.update(x)
        diagonal.update(x)
    gram, groups = statistic.result(), getattr(layer, "groups", 1)
    assert gram.dtype == torch.float64 and len(gram) == groups
    spread = diagonal.result().expand_as(layer.weight)
    torch.testing.assert_close(rows(spread, groups)[:, 0], gram.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-7)
    change = torch.randn(layer.weight.shape, generator=generator)
    before = [layer(x) for x in batches]
    layer.weight += change
    moved = [(layer(x) - y).double().square().sum() for x, y in zip(batches, before, strict=True)]
    layer.weight -= change
    places = sum(y.numel() for y in before) / len(layer.weight)
    d = rows(change, groups).double()
    expected = torch.einsum("goi,gij,goj->", d, gram, d)
    assert float(sum(moved)) / places == pytest.approx(float(expected), rel=1e-3)


def test_gathered_and_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    x = torch.randn(10, 3)
    found = gather(model, {"2": [("input", "gram")]}, [x[:4], x[4:]])["2"]["input", "gram"]
    inner = model[:2](x).detach().double()
    torch.testing.assert_close(found[0], inner.T @ inner / 10, rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match="input of '0': there are NaN or infinite values"):
        gather(model, {"0": [("input", "gram")]}, [torch.full((2, 3), torch.nan)])
    with pytest.raises(DataError, match="transposed"):
        gather(nn.Sequential(nn.ConvTranspose1d(2, 2, 2)), {"0": [("input", "gram")]}, [torch.ones(1, 2, 3)])


def test_kinds_and_damping() -> None:
    a, b = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 5, 3)
    assert geometry(a) == geometry(b) != geometry(nn.Conv2d(2, 3, 3, padding=1))
    assert geometry(nn.ReLU()) is None and geometry(nn.ConvTranspose2d(2, 3, 3)) is None
    found = damped(torch.diag(torch.tensor([3.0, 0.0, 0.0])), 0.1)
    torch.testing.assert_close(found, torch.diag(torch.tensor([3.1, 1.0, 1.0])))
