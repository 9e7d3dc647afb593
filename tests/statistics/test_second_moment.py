"""The second moment is what it says: how much the output changes, squared, when one weight changes by 1."""

from typing import Any

import pytest
import torch
from torch import nn

from smelt.core.errors import DataError
from smelt.core.statistic import gather
from smelt.statistics.second_moment import SecondMoment

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 3), (7, 5)),
    (nn.Linear(5, 3), (2, 3, 4, 5)),
    (nn.Linear(5, 3), (5,)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv1d(4, 6, 3), (4, 9)),
    (nn.Conv2d(3, 4, (3, 2), padding=(2, 0), dilation=(2, 1)), (2, 3, 8, 7)),
    (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (3, 4, 8, 8)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4), (2, 4, 5, 6)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 6, 6)),
    (nn.Conv2d(3, 4, 2, padding="valid", stride=3), (2, 3, 7, 7)),
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 3, 3, stride=2), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, tuple) else type(v).__name__)
@torch.no_grad()
def test_it_is_the_change_of_the_output(layer: Any, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for _ in range(2)]
    statistic = SecondMoment(layer)
    for x in batches:
        statistic.update(x)
    result = statistic.result()
    assert result.dtype == torch.float64
    found = result.expand_as(layer.weight)
    before = [layer(x) for x in batches]
    places = sum(y.numel() / len(layer.weight) for y in before)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        places = sum(x.numel() / x.shape[-1 - len(layer.kernel_size)] for x in batches)
    elif not isinstance(layer, nn.Linear):
        places = sum(y.numel() / layer.out_channels for y in before)
    for index in torch.randint(0, layer.weight.numel(), (8,), generator=generator):
        place = tuple(int(i) for i in torch.unravel_index(index, layer.weight.shape))
        layer.weight[place] += 1
        change = sum(float((layer(x) - y).double().square().sum()) for x, y in zip(batches, before, strict=True))
        layer.weight[place] -= 1
        assert change / places == pytest.approx(float(found[place]), rel=1e-3)


def test_by_hand() -> None:
    statistic = SecondMoment(nn.Identity())
    statistic.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    statistic.update(torch.tensor([0.0, -4.0], dtype=torch.bfloat16))
    assert statistic.result().tolist() == pytest.approx([10 / 3, 20 / 3])


def test_gathered_and_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    x = torch.randn(10, 3)
    found = gather(model, {"2": [("input", "second_moment")]}, [x])["2"]["input", "second_moment"]
    torch.testing.assert_close(found, model[:2](x).detach().double().square().mean(0), rtol=1e-5, atol=0)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(DataError, match="input of '0': there are NaN or infinite values"):
            gather(model, {"0": [("input", "second_moment")]}, [torch.full((2, 3), bad)])
