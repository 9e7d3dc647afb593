"""|scale| of the batch norms behind a unit, summed: network slimming (Liu et al. 2017, arXiv:1708.06519)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from smelt.scores._units import Slice

NEEDS: tuple[str, ...] = ()
ROLES = ("along",)


def units(slices: Sequence[Slice]) -> Tensor | None:
    scales = [s.x.abs().sum(1) for s in slices if isinstance(s.module, _BatchNorm) and s.name == "weight"]
    return sum(scales) if scales else None  # type: ignore[return-value]
