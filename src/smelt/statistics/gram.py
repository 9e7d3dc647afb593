"""Second moments of what the weights of a layer multiply, with one another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.errors import DataError
from smelt.core.statistic import Statistic

# Numbers that an unfolded piece of a batch may hold.
PIECE = 1 << 24


class Gram(Statistic):
    """`result()`: float64 [groups, k, k], on the device of the inputs: the mean of x x^T.

    x is what one output of the layer is a weighted sum of, in the order of the flattened rest of the weight's
    dimension 0: k = in for a linear layer (over all positions), k = in / groups * kernel for a convolution (over the
    places where the kernel is laid, padding included).  Then the expected squared change of output i, when row w_i of
    the weight changes by d, is d^T result[group of i] d; twice the result is the Hessian of the layer's squared error.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.total: Tensor | None = None
        self.number = 0

    @classmethod
    def kind(cls, module: nn.Module) -> Hashable:
        return geometry(module)

    def update(self, x: Tensor) -> None:
        """Raises DataError: NaN or infinite values, or a transposed convolution, whose weights share no places."""
        if isinstance(self.module, _ConvTransposeNd):
            raise DataError("a transposed convolution has no such moments; take it out of the step")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        pieces = unfolded(self.module, x) if isinstance(self.module, _ConvNd) else [x.reshape(1, -1, x.shape[-1])]
        for piece in pieces:
            total = (piece.mT @ piece).double()
            if not bool(torch.isfinite(total).all()):
                raise DataError("there are NaN or infinite values in a calibration batch")
            self.total = total if self.total is None else self.total.add_(total)
            self.number += piece.shape[1]

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / self.number


def geometry(module: nn.Module) -> Hashable:
    """Equal for layers whose weights see an input in the same way; None for other modules."""
    if isinstance(module, nn.Linear):
        return "linear"
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
        return None
    return (
        *(module.kernel_size, module.stride, module.padding, module.dilation),
        *(module.groups, module.padding_mode, module.in_channels),
    )


def unfolded(module: _ConvNd, x: Tensor) -> Iterator[Tensor]:
    """[groups, places, k] of [n, in, ...] or [in, ...], a few samples at a time."""
    dims = len(module.kernel_size)
    if x.dim() == 1 + dims:
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
    for i, (kernel, stride, step) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, step * (kernel - 1) + 1, stride)[..., ::step]
    x = x.unflatten(1, (module.groups, -1))  # [n, groups, in / groups, *places, *kernel]
    places = list(range(3, 3 + dims))
    for piece in x.split(max(1, PIECE // max(1, x[0].numel()))):
        ordered = piece.permute(1, 0, *places, 2, *range(3 + dims, 3 + 2 * dims))
        yield ordered.flatten(2 + dims).flatten(1, 1 + dims)


def rows(weight: Tensor, groups: int) -> Tensor:
    """[groups, out / groups, k]: a weight as the moments see it; `reshape_as(weight)` undoes it."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def damped(gram: Tensor, share: float) -> Tensor:
    """One [k, k] with `share` of its mean diagonal added to the diagonal, and 1 where an input is always 0."""
    found = gram.clone()
    diagonal = found.diagonal()
    dead = diagonal == 0
    diagonal += share * diagonal.mean()
    diagonal[dead] = 1
    return found


def aimed(w: Tensor, h: Tensor, cross: Tensor, gram: Tensor) -> Tensor:
    """[out, k] rows that give on today's inputs what those of w gave on the inputs before (least squares).

    w (C + D) h^-1, where h [k, k] is `gram` with something D added (see `damped`), and C is of `statistics.cross`: the
    more is added, the nearer to w.  The target of GPTAQ (Li et al. 2025, arXiv:2504.02692), in closed form.
    """
    pulled = w.double() @ (cross + (h - gram)).double()
    solved: Tensor = torch.linalg.solve(h.double(), pulled, left=False)
    return solved.to(w.dtype)
