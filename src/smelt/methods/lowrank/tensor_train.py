from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.edit import Replace
from smelt.core.errors import RecipeError
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph import factors
from smelt.grids import trains, tucker
from smelt.grids.multilinear import refine
from smelt.models.tensor_train import values
from smelt.train.split import Ranks, Split


@dataclass(frozen=True)
class TensorTrain(Split):
    """A weight becomes a tensor train, whose cores act one after another; the dense weight is never made.

        linear, embedding   each dimension is split into `order` factors (padded where it has no even ones); a core for
                            each pair of them
        convolution         1 x 1, kh x 1, 1 x kw, 1 x 1: the cores of the modes in, kh, kw, out; one whose rank is full
                            is part of the next

    Ranks are given by one of `ratio`, `rank` and `tolerance`; those of ratio and tolerance leave out the same at each
    cut.  The squared error of TT-SVD is at most the sum of what the cuts leave out, so that tolerance bounds the
    relative error of the weight.  With weight: inputs the cores of linear and convolution layers are then fitted, one
    at a time, to what the layer gives on the calibration data.

    applies to: linear; embedding; 1-D and 2-D convolution with groups = 1 and a kernel of more than one place
    needs a pretrained model: yes
    needs data: no; a few batches without labels for weight: inputs and keep: faster
    needs training: yes, at the compression that it is for
    good at: very large embeddings and linear layers, trained further: hundreds of times fewer parameters
    bad at: weights whose order of rows and columns means nothing, without training; time on small layers
    source: Oseledets 2011; linear: Novikov et al. 2015, arXiv:1509.06569; embedding: Hrinchuk et al. 2020,
        arXiv:1901.10787; convolution: Garipov et al. 2016, arXiv:1611.03214
    """

    ratio: float | None = setting(
        None, "share of each layer's parameters to keep; 0.5 where nothing else is given", low=0, high=1
    )
    rank: int | None = setting(None, "largest rank of a cut", low=1)
    tolerance: float | None = setting(None, "largest relative error of the weight", low=0, high=1)
    order: int = setting(3, "cores of a linear layer or an embedding", low=2, high=16)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", "rank", "tolerance") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{self.name}: {' and '.join(given)} each fix the ranks; give one of them")

    def refuses(self, target: Target) -> str | None:
        if reason := factors.refusal(target, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)):
            return reason
        if target.tensor.dim() > 2 and target.tensor[0, 0].numel() == 1:
            return "its kernel has one place, so that the weight is a matrix; take lowrank.svd"
        return None

    def _sides(self, target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Factors of the two dimensions of a matrix."""
        rows, columns = (trains.split(n, self.order) for n in target.tensor.shape)
        return rows, columns

    def _tensor(self, target: Target, w: Tensor, metric: Tensor | None = None) -> Tensor:
        """What is decomposed: of a convolution [in, ..., out], as the moments of its input channels see it."""
        if w.dim() == 2:
            return trains.matrix_modes(w, *self._sides(target))
        x = w.movedim(0, -1)
        return x if metric is None else torch.tensordot(_root(w, metric).mT, x, dims=1)

    def ranks(self, target: Target, w: Tensor, metric: Tensor | None) -> Ranks:
        x = self._tensor(target, w, metric)
        if self.rank is not None:
            return tuple(min(self.rank, full) for full in _full(x.shape))
        spectra = trains.spectra(x)
        if self.tolerance is not None:
            return trains.leaving(spectra, self.tolerance**2 * float(spectra[0].sum()) / len(spectra))
        budget = (0.5 if self.ratio is None else self.ratio) * w.numel()
        return trains.within(spectra, lambda ranks: _size(x.shape, ranks, w.dim() > 2), budget)

    def shapes(self, target: Target, ranks: Ranks) -> list[Sequence[int]]:
        sizes = self._tensor(target, target.tensor.detach()).shape
        return [(a, n, b) for (a, b), n in zip(pairwise((1, *ranks, 1)), sizes, strict=True)]

    def factors(self, target: Target, w: Tensor, ranks: Ranks, metric: Tensor | None, seed: int) -> Sequence[Tensor]:
        found = trains.tt_svd(self._tensor(target, w, metric), ranks)
        if metric is not None:
            if w.dim() > 2:
                found[0] = torch.linalg.solve_triangular(_root(w, metric).mT, found[0][0], upper=True)[None]
            found = refine(w, found, self._build(target), metric)
        return trains.even(found)

    def _build(self, target: Target) -> Callable[..., Tensor]:
        """Of cores the weight."""
        if target.tensor.dim() > 2:
            return lambda *cores: trains.build(*cores).movedim(-1, 0)
        sides = self._sides(target)
        return lambda *cores: trains.from_modes(trains.build(*cores), *sides, target.tensor.shape)

    def edit(self, target: Target, found: Sequence[Tensor]) -> Replace:
        return self._convolutions(target, found) if target.tensor.dim() > 2 else self._module(target, found)

    def _module(self, target: Target, cores: Sequence[Tensor]) -> Replace:
        module: Any = target.module
        table = isinstance(module, nn.Embedding)
        rows, columns = self._sides(target)
        arguments: dict[str, Any] = {
            "shape": list(target.tensor.shape),
            "rows": list(rows),
            "columns": list(columns),
            "ranks": [core.shape[0] for core in cores[1:]],
        }
        found = values(cores, rows, columns, table)
        if table:
            blank = module.padding_idx
            arguments["embedding"] = True
            if blank is not None and not bool(target.tensor[blank].any()):
                arguments["padding"] = blank
        elif module.bias is not None:
            arguments["bias"] = True
            found["bias"] = module.bias.detach()
        made = {k: v.to(target.tensor).clone(memory_format=torch.contiguous_format) for k, v in found.items()}
        return Replace(target.places[0][0], "tensor_train", arguments, made)

    def _convolutions(self, target: Target, cores: Sequence[Tensor]) -> Replace:
        """Each core [rank, size of its mode, rank] is a convolution along its axis; those at the ends along none."""
        module: Any = target.module
        kernel = target.tensor.shape[2:]
        first, *middle, last = cores
        whole = first.shape[1] == first.shape[2], last.shape[0] == last.shape[1]
        if whole[0]:
            middle[0] = torch.tensordot(first[0], middle[0], dims=1)
        if whole[1]:
            middle[-1] = torch.tensordot(middle[-1], last[:, :, 0], dims=1)
        ones = [1] * len(kernel)
        parts = [] if whole[0] else [factors.conv(module, first[0].mT.reshape(first.shape[2], -1, *ones))]
        for axis, core in enumerate(middle):
            size = [n if i == axis else 1 for i, n in enumerate(kernel)]
            weight = core.permute(2, 0, 1).reshape(core.shape[2], core.shape[0], *size)
            parts.append(factors.conv(module, weight, (axis,)))
        parts += [] if whole[1] else [factors.conv(module, last[:, :, 0].mT.reshape(-1, len(last), *ones))]
        return factors.chain(target, parts)


def _root(w: Tensor, metric: Tensor) -> Tensor:
    root: Tensor = torch.linalg.cholesky(tucker.channels(metric, w.shape[1]))
    return root


def _full(shape: Sequence[int]) -> list[int]:
    """Ranks that the cuts can have at most."""
    sizes = [1]
    for n in shape:
        sizes.append(sizes[-1] * n)
    return [min(sizes[k], sizes[-1] // sizes[k]) for k in range(1, len(shape))]


def _size(shape: Sequence[int], ranks: Sequence[int], ends: bool) -> int:
    """Parameters of the cores; with `ends` a full one at either end is part of its neighbour."""
    around = (1, *ranks, 1)
    sizes = [around[k] * n * around[k + 1] for k, n in enumerate(shape)]
    if ends:
        sizes[0] *= ranks[0] < shape[0]
        sizes[-1] *= ranks[-1] < shape[-1]
    return sum(sizes)
