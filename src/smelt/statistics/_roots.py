"""Weights as second moments see them: square roots of moments, and truncated decompositions in their norm."""

from __future__ import annotations

import torch
from torch import Tensor

from smelt.statistics.gram import damped

# Singular values below this share of the largest are rounding.
TINY = 1e-7


class Root:
    """R with R R^T = M, for second moments M [k, k], or [k] of a diagonal.

    Args:
        share: of M's mean diagonal, added to its diagonal.  Where M is singular even so, directions that it does not
            know are left out: R is of its eigenvectors, and the inverse is the pseudo-inverse.
    """

    def __init__(self, moments: Tensor, share: float = 0.0):
        found = moments.double()
        self.flat = found.dim() == 1
        self._inverse: Tensor | None = None
        if self.flat:
            self.value = (found + share * found.mean()).sqrt()
            return
        found = damped(found, share)
        self.value, failed = torch.linalg.cholesky_ex(found)
        if bool(failed):
            spectrum, basis = torch.linalg.eigh(found)
            known = spectrum > TINY**2 * spectrum.abs().max()
            size = spectrum.where(known, 0).sqrt()
            self.value = basis * size
            self._inverse = (basis * (1 / size).where(known, 0)).T

    def lengths(self) -> Tensor:
        """[k]: the roots of the diagonal of M."""
        return self.value if self.flat else self.value.norm(dim=1)

    def apply(self, w: Tensor) -> Tensor:
        """w R, for rows [r, k]."""
        return w * self.value if self.flat else w @ self.value

    def undo(self, w: Tensor) -> Tensor:
        """w R^-1."""
        if self.flat:
            return w * (1 / self.value).where(self.value > 0, 0)
        if self._inverse is not None:
            return w @ self._inverse
        found: Tensor = torch.linalg.solve_triangular(self.value, w, upper=False, left=False)
        return found


class Truncated:
    """The best approximations of a matrix w [m, n] by each rank, in the norm |A^T (w - w') R| of two roots.

    By the singular values of A^T w R, whose squares left out are the squared error (Eckart & Young 1936): with R of the
    inputs' moments that of the layer's outputs, with A of the moments of slopes that of the loss, to second order.

    squares: squared singular values, falling.
    """

    def __init__(self, w: Tensor, rows: Root | None = None, columns: Root | None = None):
        self.rows, self.columns = rows, columns
        seen = w.double()
        seen = seen if columns is None else columns.apply(seen)
        seen = seen if rows is None else rows.apply(seen.T).T
        self._seen, self._wide = seen, len(seen) <= seen.shape[1]
        spectrum, basis = torch.linalg.eigh(seen @ seen.T if self._wide else seen.T @ seen)  # of the smaller one
        self.squares, self._basis = spectrum.flip(0).clamp_min(0), basis.flip(1)

    def error(self, w: Tensor) -> float:
        """Squared norm of a matrix of the same shape."""
        seen = w if self.columns is None else self.columns.apply(w)
        return float((seen if self.rows is None else self.rows.apply(seen.T)).square().sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(left [m, r], right [r, n]) whose product is the best; column and row k have equal norms."""
        own = self._basis[:, :rank]
        left, right = (own, own.T @ self._seen) if self._wide else (self._seen @ own, own.T)
        left = left if self.rows is None else self.rows.undo(left.T).T
        right = right if self.columns is None else self.columns.undo(right)
        return even(left, right)


def even(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, with the norms of column and row k equal."""
    sizes = left.norm(dim=0), right.norm(dim=1)
    scale = (sizes[1] / sizes[0]).sqrt()
    scale = scale.where(torch.isfinite(scale) & (scale > 0), 1)
    return left * scale, right / scale[:, None]
