"""1 - the share of zeros in what a unit gives to the layers that read it (Hu et al. 2016, arXiv:1607.03250)."""

from collections.abc import Sequence

from torch import Tensor

from smelt.scores._units import Slice

NEEDS: tuple[str, ...] = ("zeros",)
ROLES = ("in",)


def units(slices: Sequence[Slice]) -> Tensor | None:
    shares = [s.seen["zeros"].mean(1) for s in slices if "zeros" in s.seen]
    return 1 - sum(shares) / len(shares) if shares else None  # type: ignore[return-value]
