from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.edit import Edit, Note, Replace
from smelt.core.errors import RecipeError
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.reads import outside

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class SVD(Rewrite):
    """A layer becomes two thinner ones, by the truncated singular value decomposition of its weight.

    How thin is said by one of `ratio`, `rank` and `energy`.  A layer that would not get smaller is left dense.  With
    the singular values split evenly between the two (W = U sqrt(S) . sqrt(S) V), r of them:

        linear              in -> r -> out
        conv, channel       k x k to r channels, then 1 x 1        W as [out, in * kh * kw]
        conv, spatial       kh x 1 to r channels, then 1 x kw      W as [in * kh, out * kw]; one-dimensional: as channel

    The squared error of the weight is the sum of the squared singular values left out, the least of that rank.

    applies to: linear; 1-D and 2-D convolution with groups = 1
    needs a pretrained model: yes
    needs data: no
    needs training: a little, to recover, below about half of the parameters
    good at: large linear layers: smaller and faster on everything, and still ordinary layers
    bad at: small kernels and thin layers, where two layers are slower than one
    source: Eckart, Young 1936; channel: Zhang et al. 2015, arXiv:1505.06798; spatial: Tai et al. 2015, arXiv:1511.06067
    """

    ratio: float | None = setting(
        None, "share of each layer's parameters to keep; 0.5 where nothing else is given", low=0, high=1
    )
    rank: int | None = setting(None, "singular values to keep", low=1)
    energy: float | None = setting(None, "share of the sum of squared singular values to keep", low=0, high=1)
    scheme: str = setting("channel", "how a 2-D convolution is split", choices=("channel", "spatial"))

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", "rank", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{self.name}: {' and '.join(given)} each fix the rank; give one of them")

    def refuses(self, target: Target) -> str | None:
        path, name = target.places[0]
        module = target.module
        if type(module) not in _KINDS or name != "weight":
            return f"it is no weight of a linear or 1-D or 2-D convolution layer but of {type(module).__name__}"
        if getattr(module, "groups", 1) != 1:
            return f"the convolution has {module.groups} groups; it must have one"
        if len(target.places) > 1:
            return "its weight is shared with " + ", ".join(".".join(place) for place in target.places[1:])
        if module._forward_hooks or module._forward_pre_hooks:
            return (
                "a hook acts on the layer (a codec at its input or output, say) and would be lost; put this step before"
            )
        return None if path else "it is the whole model; put the layer into a module"

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        edits: list[Edit] = []
        read = outside(model)
        for target in targets:
            reason = self.refuses(target) or read.get(target.places[0][0])
            edits.append(Note(target.name, reason) if reason else self._split(target))
        return edits

    def _split(self, target: Target) -> Edit:
        weight = target.tensor.detach()
        matrix = _matrix(weight, self._spatial(weight)).to(torch.promote_types(weight.dtype, torch.float32))
        each, dense = sum(matrix.shape), weight.numel()
        u, s, v = (None, None, None) if self.energy is None else torch.linalg.svd(matrix, full_matrices=False)
        rank = self._rank(s, each, dense, min(matrix.shape))
        if rank * each >= dense:
            return Note(target.name, f"rank {rank} would need {rank * each:,} weights, it has {dense:,}")
        if u is None or s is None or v is None:
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:rank].sqrt()
        return self._chain(target, u[:, :rank] * root, root[:, None] * v[:rank])

    def _rank(self, s: Tensor | None, each: int, dense: int, full: int) -> int:
        if self.rank is not None:
            return min(self.rank, full)
        if s is None:
            return min(full, max(1, int((0.5 if self.ratio is None else self.ratio) * dense / each)))
        squares = s.double().square().flip(0).cumsum(0)  # what is lost by leaving out the last 1, 2, ...
        lost = (1 - (self.energy or 0)) * squares[-1]
        return max(1, full - int((squares <= lost).sum()))

    def _spatial(self, weight: Tensor) -> bool:
        return weight.dim() == 4 and self.scheme == "spatial"

    def _chain(self, target: Target, left: Tensor, right: Tensor) -> Replace:
        """left [m, r] and right [r, n], with matrix ~ left @ right."""
        module, shape, rank = target.module, target.tensor.shape, right.shape[0]
        bias: Any = module.bias
        if isinstance(module, nn.Linear):
            first: dict[str, Any] = {"in_features": module.in_features, "out_features": rank, "bias": False}
            second: dict[str, Any] = {"in_features": rank, "out_features": module.out_features}
            a, b = right, left
        else:
            assert isinstance(module, (nn.Conv1d, nn.Conv2d))
            first = {"in_channels": shape[1], "out_channels": rank, "bias": False, "padding_mode": module.padding_mode}
            second = {"in_channels": rank, "out_channels": shape[0]}
            window = {"kernel_size": module.kernel_size, "stride": module.stride, "dilation": module.dilation}
            padding = module.padding
            if self._spatial(target.tensor):
                second["padding_mode"] = module.padding_mode
                for i, layer in enumerate((first, second)):
                    layer.update({k: _along(v, i, 1) for k, v in window.items()})
                    layer["padding"] = padding if isinstance(padding, str) else _along(padding, i, 0)
                a = left.reshape(shape[1], shape[2], rank).permute(2, 0, 1)[:, :, :, None]
                b = right.reshape(rank, shape[0], shape[3]).transpose(0, 1)[:, :, None, :]
            else:
                first |= {k: list(v) for k, v in window.items()}
                first["padding"] = padding if isinstance(padding, str) else list(padding)
                second["kernel_size"] = [1] * (len(shape) - 2)
                a = right.reshape(rank, *shape[1:])
                b = left.reshape(*left.shape, *[1] * (len(shape) - 2))
        second["bias"] = bias is not None
        kind = type(module).__name__
        values = {"0.weight": a, "1.weight": b} | ({} if bias is None else {"1.bias": bias.detach()})
        values = {k: v.to(target.tensor.dtype).clone(memory_format=torch.contiguous_format) for k, v in values.items()}
        return Replace(target.places[0][0], "chain", {"layers": [[kind, first], [kind, second]]}, values)


def _matrix(weight: Tensor, spatial: bool) -> Tensor:
    """[out, in, kh, kw] -> [out, in * kh * kw], or [in * kh, out * kw]."""
    if not spatial:
        return weight.flatten(1)
    return weight.permute(1, 2, 0, 3).reshape(weight.shape[1] * weight.shape[2], -1)


def _along(pair: tuple[int, ...], axis: int, other: int) -> list[int]:
    """[pair[0], other] for axis 0, [other, pair[1]] for axis 1."""
    return [v if i == axis else other for i, v in enumerate(pair)]
