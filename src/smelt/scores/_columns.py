"""Column subset selection: which columns of A the others can stand in for, and by what coefficients.

A [n, d] holds activations, U [m, d] the weights that read them; what counts is the error of the products A U^T.  Only
the Gram matrix A^T A is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eliminate(gram: Tensor, outgoing: Tensor, units: int, size: int, count: int) -> Tensor:
    """[units] bool: what stays when `count` units are taken out one after another, the cheapest first.

    Where the others are refitted by least squares, taking out the columns j of a unit raises the squared error of
    A U^T by tr(U_j ((G^-1)_jj)^-1 U_j^T), and U and G^-1 change by the same block (the optimal brain surgeon of Hassibi
    & Stork 1993, eq. 5, with columns in place of weights).  O(d^3) in all.

    Args:
        gram: [d, d], positive definite.
        outgoing: [m, d].
        units, size: the first units * size columns belong to units, `size` to each; others (a constant) always stay.
        count: fewer than there are units.
    """
    inverse, rest = torch.linalg.inv(gram), outgoing.clone()
    stays = torch.ones(units, dtype=torch.bool, device=gram.device)
    among, one = torch.arange(units, device=gram.device), torch.eye(size, dtype=gram.dtype, device=gram.device)
    for _ in range(count):
        blocks = inverse[: units * size, : units * size].unflatten(0, (units, size)).unflatten(2, (units, size))
        corner = torch.linalg.inv(blocks[among, :, among])
        heard = rest[:, : units * size].unflatten(1, (units, size))
        cost = (corner * torch.einsum("mup,muq->upq", heard, heard)).sum((1, 2))
        j = int(cost.masked_fill(~stays, torch.inf).argmin())
        at = slice(j * size, (j + 1) * size)
        change = corner[j] @ inverse[at]
        rest -= rest[:, at] @ change
        inverse -= inverse[:, at] @ change
        inverse[at], inverse[:, at] = 0, 0
        inverse[at, at] = one
        stays[j] = False
    return stays


def refit(gram: Tensor, products: Tensor, kept: Tensor) -> Tensor:
    """[m, kept columns]: the V that makes A_kept V^T nearest to what `products` = target^T A [m, d] stands for."""
    found: Tensor = torch.linalg.solve(gram[kept][:, kept], products[:, kept].T)
    return found.T


def nearest(gram: Tensor, outgoing: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(what stays [d] bool, the outgoing weights [m, d] afterwards) when `count` columns are merged one by one.

    Column j goes to the single i that is nearest up to a scale, c = G_ij / G_ii, and U_i becomes U_i + c U_j; taken is
    the pair of the smallest |a_j - c a_i|^2 |U_j|^2.
    """
    length = gram.diagonal()
    tiny = torch.finfo(gram.dtype).tiny
    apart = length[:, None] - gram.square() / length.clamp_min(tiny)  # [j, i]
    apart = apart.clamp_min_(0).fill_diagonal_(torch.inf)
    outgoing = outgoing.clone()
    heard = outgoing.square().sum(0)
    best, at = apart.min(1)
    stays = torch.ones_like(heard, dtype=torch.bool)
    for _ in range(count):
        j = int((best * heard).where(stays, torch.inf).argmin())
        i = int(at[j])
        outgoing[:, i] += gram[j, i] / length[i].clamp_min(tiny) * outgoing[:, j]
        heard[i] = outgoing[:, i].square().sum()
        stays[j] = False
        apart[:, j] = torch.inf
        orphans = (at == j).nonzero()[:, 0]
        best[orphans], at[orphans] = apart[orphans].min(1)
    return stays, outgoing
