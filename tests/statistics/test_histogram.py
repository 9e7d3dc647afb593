import numpy as np
import pytest
import torch
from torch import nn

from smelt.core.errors import DataError
from smelt.statistics.channel_histogram import ChannelHistogram
from smelt.statistics.channel_ranges import ChannelRanges
from smelt.statistics.histogram import Histogram
from smelt.statistics.ranges import Ranges

PARTS = [torch.randn(500, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in range(-2, 3)]


def found(parts: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    statistic = Histogram(nn.Identity())
    for part in parts:
        statistic.update(part)
    counts, edges = statistic.result()
    return counts.numpy(), edges.numpy()


def test_it_is_that_of_all_data_whatever_the_order() -> None:
    zeros = torch.zeros(7)
    counts, edges = found([zeros, *PARTS])
    for other in ([*PARTS, zeros], [zeros, *PARTS[::-1]], [torch.cat([*PARTS, zeros])]):
        again = found(other)
        assert (again[0] == counts).all() and (again[1] == edges).all()
    x = torch.cat(PARTS).double().numpy()
    assert edges[0] == x.min() and edges[-1] == x.max()
    theirs, _ = np.histogram(x, np.unique(edges))
    wide = np.diff(edges) > 0
    np.testing.assert_array_equal(counts[wide], theirs)
    assert counts[~wide].sum() == 7 and counts.sum() == len(x) + 7
    width = np.diff(edges).max()
    assert np.log2(width) == round(np.log2(width)) and abs(x).max() / width > Histogram.BINS / 2


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 2.0**-140, 1e38])
def test_one_value(value: float) -> None:
    counts, edges = found([torch.full((4,), value)])
    assert counts.sum() == 4
    assert edges[0] == edges[-1] == torch.tensor(value).double().item()


def test_by_channel() -> None:
    x = torch.randn(3, 4, 5, 6) * torch.tensor([1.0, 2, 3, 0])[:, None, None]
    for layer, seen, shape in (
        (nn.Conv2d(4, 1, 1), x, [1, 4, 1, 1]),
        (nn.Conv2d(4, 1, 1), x[0], [1, 4, 1, 1]),
        (nn.BatchNorm2d(4), x, [1, 4, 1, 1]),
        (nn.Linear(4, 1), x.movedim(1, -1), [1, 4]),
        (nn.Linear(4, 1), x[0, :, 0, 0], [1, 4]),
    ):
        one, ends = ChannelHistogram(layer), ChannelRanges(layer)
        for statistic in (one, ends):
            statistic.update(seen)
            statistic.update(-seen)
        counts, edges = one.result()
        assert list(counts.shape[:-1]) == shape and (counts.sum(-1) == 2 * seen.numel() / 4).all()
        lows, highs = ends.result()
        assert list(lows.shape) == [2, *shape]
        assert torch.equal(edges[..., -1].float(), highs.amax(0)) and torch.equal(edges[..., 0].float(), lows.amin(0))
        assert torch.equal(highs, -lows.flip(0))
    rows = x.transpose(0, 1).flatten(1)
    statistic = ChannelRanges(nn.Conv2d(4, 1, 1))
    statistic.update(x)
    assert torch.equal(statistic.result()[1].flatten(), rows.amax(1))


def test_the_ends_of_each_call() -> None:
    statistic = Ranges(nn.Identity())
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([[-3.0, 5.0]])):
        statistic.update(x)
    assert [t.tolist() for t in statistic.result()] == [[1, -3], [2, 5]]


@pytest.mark.parametrize("kind", [Histogram, ChannelHistogram, Ranges, ChannelRanges])
def test_values_that_are_no_numbers(kind: type) -> None:
    with pytest.raises(DataError, match="NaN"):
        kind(nn.Linear(2, 1)).update(torch.tensor([[1.0, torch.nan]]))
