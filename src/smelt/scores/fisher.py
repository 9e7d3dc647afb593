"""F / 2, where F is the mean over samples of (dL/dz)^2 and z = 1 scales what the unit gives to the layers that read it.

That is what the loss changes by, to second order, when it gives nothing (Theis et al. 2018, arXiv:1801.05787, eq. 5);
units that are coupled share one z (Liu et al. 2021, arXiv:2108.00708, eq. 8).
"""

from collections.abc import Sequence

from torch import Tensor

from smelt.scores._units import Slice

NEEDS: tuple[str, ...] = ("gates",)
ROLES = ("in",)
LOSS = True


def units(slices: Sequence[Slice]) -> Tensor | None:
    """The slopes of all that reads a unit are summed for each sample before they are squared."""
    slopes: dict[int, Tensor] = {}
    for s in slices:
        if "gates" in s.seen:
            own = s.seen["gates"]
            slopes[own.shape[1]] = slopes[own.shape[1]] + own if own.shape[1] in slopes else own
    return sum(own.square().mean(1) / 2 for own in slopes.values()) if slopes else None  # type: ignore[return-value]
