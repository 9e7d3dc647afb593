"""Cut points from the histogram, and a value for each class between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms.codebook import Codebook
from smelt.forms.codebooks import Codebooks
from smelt.grids import rows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram(Codec):
    """Cuts the range of values into classes; each value becomes that of its class.

    cut: `frequency`: classes of equally many values, whose labels have the largest entropy.
         `otsu`: the least variance within classes.
         `entropy`: the largest sum of the entropies of the histogram within each class (Kapur).
         `thresholds`: as given.
    otsu and entropy find the optimum over a histogram of `bins` equal bins, by dynamic programming.  A class begins at
    its cut point.  A class without values gets the middle of its range.  Pruned weights do not count.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: yes
    needs data: no
    needs training: at 4 or fewer bits per weight, to tune the values
    good at: classes that mean something: chosen thresholds, labels used equally often
    bad at: least error (share.kmeans); frequency with value: midpoint, whose outer classes are wide
    source: frequency: Wong & Chiu 1987, IEEE PAMI 9(6); Otsu 1979, IEEE SMC 9(1); Kapur et al. 1985, CVGIP 29(3)
    """

    classes: int = setting(16, "number of classes (not with cut: thresholds)", low=2, high=256)
    cut: str = setting("frequency", "how cut points are found", choices=("frequency", "otsu", "entropy", "thresholds"))
    thresholds: tuple[float, ...] | None = setting(None, "rising cut points (cut: thresholds)")
    value: str = setting("mean", "what a class stands for", choices=("mean", "median", "midpoint"))
    bins: int = setting(256, "bins of the histogram (cut: otsu, entropy)", low=2, high=1024)
    per: str = setting("tensor", "what has its own classes", choices=("tensor", "channel", "group"))
    axis: int | None = setting(
        None, "dimension of the channels (per: channel); nothing: 0; 1 for transposed convolutions", low=0
    )
    group: int = setting(1024, "values per group (per: group)", low=1, high=1 << 31)
    codebook: str = setting("float32", "how class values are stored", choices=rows.DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.thresholds
        if (self.cut == "thresholds") != (given is not None):
            raise RecipeError(f"{self.name}: cut: thresholds goes with thresholds: [...], and they with it")
        if given is not None:
            numbers = all(isinstance(t, (int, float)) and not isinstance(t, bool) and abs(t) < 1e38 for t in given)
            if not (numbers and 1 <= len(given) < 256 and all(a < b for a, b in pairwise(given))):
                raise RecipeError(f"{self.name}.thresholds is {list(given)}; it takes 1 to 255 rising numbers")

    def refuses(self, target: Target) -> str | None:
        return rows.refusal(target, self.per, self.axis)

    def fit(self, x: Tensor, stats: Stats) -> State:
        """borders: [classes - 1, *side]; codebook: [classes, *side]."""
        place = rows.layout(x, self.per, self.axis, self.group)
        values, mask = rows.split(x, stats.where, place)
        each = values.double().cpu().numpy()
        kept = [row if mask is None else row[keep] for row, keep in zip(each, _masks(mask, len(each)), strict=True)]
        borders, books = zip(*(self._classes(np.sort(row)) for row in kept), strict=True)
        side = Codebooks(*place).side_shape(x.shape)
        dtype = values.dtype

        def table(found: tuple[Array, ...]) -> Tensor:
            return torch.from_numpy(np.stack(found, 1)).to(x.device, dtype).reshape(-1, *side)

        return State(borders=table(borders), codebook=rows.stored(table(books), self.codebook))

    def _classes(self, ordered: Array) -> tuple[Array, Array]:
        """(borders [classes - 1], values [classes]) of sorted values."""
        borders = self._borders(ordered)
        if not ordered.size:
            return borders, np.zeros(len(borders) + 1)
        ends = np.concatenate(([0], np.searchsorted(ordered, borders), [ordered.size]))
        low = np.concatenate(([min(ordered[0], borders[0])], borders))
        high = np.concatenate((borders, [max(ordered[-1], borders[-1])]))
        middle = (low + high) / 2
        if self.value == "midpoint":
            return borders, middle
        pick = np.mean if self.value == "mean" else np.median
        found = [pick(ordered[a:b]) if b > a else m for a, b, m in zip(ends, ends[1:], middle, strict=False)]
        return borders, np.array(found)

    def _borders(self, ordered: Array) -> Array:
        if self.thresholds is not None:
            return np.array(self.thresholds, float)
        if not ordered.size:
            return np.zeros(self.classes - 1)
        if self.cut == "frequency":
            first = np.arange(1, self.classes) * ordered.size // self.classes
            return (ordered[np.maximum(first - 1, 0)] + ordered[first]) / 2
        low, high = ordered[0], ordered[-1]
        edges = np.linspace(low, high, self.bins + 1)
        counts = np.histogram(ordered, edges)[0] if high > low else np.zeros(self.bins)
        if high == low:
            return np.full(self.classes - 1, low)
        middles = (edges[1:] + edges[:-1]) / 2
        gain = _variance(counts, middles - middles.mean()) if self.cut == "otsu" else _entropy(counts)
        return edges[_segments(gain, min(self.classes, self.bins))[_spaced(self.classes, self.bins)]]

    def encode(self, x: Tensor, state: State) -> Encoded:
        place = rows.layout(x, self.per, self.axis, self.group)
        form = Codebooks(*place)
        borders = state.get_buffer("borders")
        dense = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if place[0] is None:
            indices = torch.bucketize(dense.contiguous(), borders, right=True).to(torch.uint8)
        else:
            indices = torch.zeros_like(x, dtype=torch.uint8)
            for border in borders:
                indices += dense >= form.spread(border, x.shape)
        book = state.get_buffer("codebook").clone()
        if place[0] is None:
            return Encoded(Codebook(), {"codebook": book, "indices": indices}, x.shape, x.dtype)
        return Encoded(form, {"codebooks": book, "indices": indices}, x.shape, x.dtype)


def _masks(mask: Tensor | None, count: int) -> list[NDArray[np.bool_]] | list[None]:
    return [None] * count if mask is None else list(mask.cpu().numpy())


def _spaced(classes: int, bins: int) -> NDArray[np.int64]:
    """Which of the found cut points each of `classes` - 1 is: with more classes than bins the last is repeated."""
    return np.minimum(np.arange(classes - 1), min(classes, bins) - 2)


def _variance(counts: Array, middles: Array) -> Array:
    """gain[i, j]: n mean^2 of bins i..j-1; its sum over classes is the variance between them but for a constant."""
    number, total = (np.concatenate(([0], np.cumsum(a))) for a in (counts, counts * middles))
    n, s = (a[None, :] - a[:, None] for a in (number, total))
    gain: Array = np.divide(s * s, n, out=np.zeros_like(s, dtype=float), where=n > 0)
    return gain


def _entropy(counts: Array) -> Array:
    """gain[i, j]: entropy of the histogram of bins i..j-1, in nats."""
    counts = counts.astype(float)
    logs = counts * np.log(np.maximum(counts, 1))
    number, total = (np.concatenate(([0], np.cumsum(a))) for a in (counts, logs))
    n, s = (a[None, :] - a[:, None] for a in (number, total))
    gain: Array = np.zeros_like(n)
    some = n > 0
    gain[some] = np.log(n[some]) - s[some] / n[some]
    return gain


def _segments(gain: Array, classes: int) -> NDArray[np.int64]:
    """The `classes` - 1 inner ends of consecutive, non-empty ranges of bins whose summed gain is largest."""
    bins = len(gain) - 1
    upper = np.where(np.triu(np.ones_like(gain, bool), 1), gain, -np.inf)
    best, back = upper[0].copy(), []
    for _ in range(classes - 1):
        total = best[:, None] + upper
        back.append(total.argmax(0))
        best = total.max(0)
    ends = [bins]
    for pointer in reversed(back):
        ends.append(int(pointer[ends[-1]]))
    return np.array(ends[:0:-1])
