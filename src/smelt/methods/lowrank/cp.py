from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smelt.core.edit import Replace
from smelt.core.errors import RecipeError
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph import factors
from smelt.grids import cp
from smelt.grids.multilinear import refine
from smelt.train.split import Ranks, Split


@dataclass(frozen=True)
class CP(Split):
    """A convolution becomes 1 x 1, depthwise ones, and 1 x 1, by the canonical polyadic decomposition of its weight.

        in channels -> rank by 1 x 1;  depthwise kh x 1, then 1 x kw (or kh x kw);  rank -> out channels by 1 x 1

    The decomposition is by alternating least squares from several starts.  A penalty on the norms of its terms keeps
    them from growing against each other without bound, which would leave a chain that neither trains nor quantizes.
    With weight: inputs the factors are then fitted, one at a time, to what the layer gives on the calibration data.

    applies to: 1-D and 2-D convolution with groups = 1 and a kernel of more than one place
    needs a pretrained model: yes
    needs data: no; a few batches without labels for weight: inputs and keep: faster
    needs training: yes, a little; with low learning rates where the rank is high
    good at: the fewest parameters and multiplications for an error, of all splits of a convolution
    bad at: time: depthwise layers are limited by memory (keep: faster leaves those that are slower)
    source: Lebedev et al. 2015, arXiv:1412.6553; joint kernel: Astrid, Lee 2017, arXiv:1701.07148
    """

    ratio: float | None = setting(
        None, "share of each layer's parameters to keep; 0.5 where nothing else is given", low=0, high=1
    )
    rank: int | None = setting(None, "number of terms", low=1)
    kernel: str = setting("split", "two-dimensional kernels: a column and a row, or joint", choices=("split", "joint"))
    multiple: int = setting(1, "the rank is a multiple of this", low=1)
    penalty: float = setting(0.01, "of the squared norms of the terms, over the squared norm of the weight", low=0)
    starts: int = setting(3, "decompositions that are begun; the best goes on", low=1)
    rounds: int = setting(100, "sweeps over all factors, at most", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.rank is not None:
            raise RecipeError(f"{self.name}: ratio and rank each fix the rank; give one of them")

    def refuses(self, target: Target) -> str | None:
        if reason := factors.refusal(target, (nn.Conv1d, nn.Conv2d)):
            return reason
        if target.tensor[0, 0].numel() == 1:
            return "its kernel has one place, so that the weight is a matrix; take lowrank.svd"
        return None

    def _axes(self, target: Target) -> list[tuple[int, ...]]:
        """Axes of the kernel that each depthwise layer takes."""
        sizes = target.tensor.shape[2:]
        if self.kernel == "joint":
            return [tuple(range(len(sizes)))]
        long = [axis for axis, size in enumerate(sizes) if size > 1]
        flat = tuple(axis for axis, size in enumerate(sizes) if size == 1)  # have a stride and padding, too
        return [*((axis,) for axis in long[:-1]), (long[-1], *flat)]

    def _modes(self, target: Target) -> list[int]:
        shape = target.tensor.shape
        return [shape[0], shape[1], *(_size(shape[2:], axes) for axes in self._axes(target))]

    def ranks(self, target: Target, w: Tensor, metric: Tensor | None) -> Ranks:
        if self.rank is not None:
            return (self.rank,)
        fits = int((0.5 if self.ratio is None else self.ratio) * w.numel() / sum(self._modes(target)))
        return (max(1, self.multiple, fits // self.multiple * self.multiple),)

    def shapes(self, target: Target, ranks: Ranks) -> list[Sequence[int]]:
        return [(size, ranks[0]) for size in self._modes(target)]

    def factors(self, target: Target, w: Tensor, ranks: Ranks, metric: Tensor | None, seed: int) -> Sequence[Tensor]:
        x = w.reshape(self._modes(target))
        found = cp.cp(x, ranks[0], penalty=self.penalty, starts=self.starts, sweeps=self.rounds, seed=seed)
        if metric is None:
            return found
        return cp.balanced(refine(x, found, lambda *parts: cp.build(parts), metric))

    def edit(self, target: Target, found: Sequence[Tensor]) -> Replace:
        module: Any = target.module
        kernel = target.tensor.shape[2:]
        last, first, *middle = found
        rank, places = last.shape[1], [1] * len(kernel)
        parts = [factors.conv(module, first.mT.reshape(rank, -1, *places))]
        for part, axes in zip(middle, self._axes(target), strict=True):
            size = [n if axis in axes else 1 for axis, n in enumerate(kernel)]
            parts.append(factors.conv(module, part.mT.reshape(rank, 1, *size), axes, groups=rank))
        parts.append(factors.conv(module, last.reshape(*last.shape, *places)))
        return factors.chain(target, parts)


def _size(sizes: Sequence[int], axes: Sequence[int]) -> int:
    found = 1
    for axis in axes:
        found *= sizes[axis]
    return found
