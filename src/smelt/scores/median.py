"""Sum of the distances to the other units of the group: filters near the geometric median can be replaced by others
(He et al. 2019, arXiv:1811.00250, eq. 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smelt.scores._units import Slice

NEEDS: tuple[str, ...] = ()
ROLES = ("out",)


def units(slices: Sequence[Slice]) -> Tensor | None:
    if not slices:
        return None
    filters = torch.cat([s.x for s in slices], 1)
    return torch.cdist(filters, filters).sum(1)
