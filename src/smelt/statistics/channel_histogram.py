"""How often each value occurs in each channel."""

from __future__ import annotations

from torch import Tensor

from smelt.statistics.channel_ranges import by_channel
from smelt.statistics.histogram import Histogram


class ChannelHistogram(Histogram):
    """`result()` is (counts [*shape, bins], edges [*shape, bins + 1]) as of `histogram`, with the `shape` of
    `by_channel`."""

    BINS = 2048

    def rows(self, x: Tensor) -> tuple[Tensor, list[int]]:
        return by_channel(self.module, x)
