"""Rounding the rows of a matrix so that (w - q) H (w - q)^T is small: each weight makes up for the errors of others.

H [k, k] is positive definite, V upper triangular with H = V V^T, and e = w - q.  Then

    e H e^T  =  sum over columns c of  cost_c (e_c + sum_{j < c} e_j feed_jc)^2,    feed = V / diag V,  cost = diag(V)^2

so that, column by column, q_c is rounded from w_c + sum_{j < c} e_j feed_jc (`carried`).  These are the values of
optimal brain surgery (Frantar & Alistarh 2022, arXiv:2208.11580) and GPTQ (arXiv:2210.17323), without an inverse of H.
Afterwards each column may be rounded again, given all others (`descended`: cyclic coordinate descent, as in Behdin et
al. 2023, arXiv:2309.01885).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (column, what it should be [out]) -> what it becomes [out]
Round = Callable[[int, Tensor], Tensor]
# (what picks theirs, what they should be [n]) -> what they become [n]
Across = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
# Columns whose errors reach the ones behind them together.
WIDTH = 64


def factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """(feed [k, k], cost [k]) of a positive definite [k, k]."""
    v = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    diagonal = v.diagonal()
    return v / diagonal, diagonal.square()


def carried(w: Tensor, feed: Tensor, begin: Callable[[slice, Tensor], Round], width: int = WIDTH) -> Tensor:
    """The rounded rows q of w [out, k].

    Args:
        feed: of `factor`, in the dtype of w.
        begin: (columns, [out, columns] what these would be if they were not rounded, which makes up best for the errors
            before them) -> how to round them; called for every `width` columns in turn.
    """
    errors, rounded = torch.zeros_like(w), torch.empty_like(w)
    for start in range(0, w.shape[1], width):
        now = slice(start, min(start + width, w.shape[1]))
        own, heard = feed[now, now], errors[:, :start] @ feed[:start, now]
        wanted, round_ = w[:, now] + heard, begin(now, w[:, now] + _alone(heard, own))
        lines, before = (t.T.clone(memory_format=torch.contiguous_format) for t in (wanted, w[:, now]))
        for c, line in enumerate(lines):
            done = round_(start + c, line)
            before[c] -= done
            lines[c + 1 :].addcmul_(own[c, c + 1 :, None], before[c])
            lines[c] = done
        errors[:, now], rounded[:, now] = before.T, lines.T
    return rounded


def _alone(heard: Tensor, own: Tensor) -> Tensor:
    """What to add to columns that hear of errors before them, if they make none of their own: then e feed is 0."""
    added: Tensor = torch.linalg.solve_triangular(own, heard, upper=True, left=False, unitriangular=True)
    return added


def descended(w: Tensor, h: Tensor, rounded: Tensor, round_: Round, width: int = WIDTH) -> Tensor:
    """`rounded` [out, k] after each of its columns was rounded again, in turn, to what is best given all others."""
    rounded, errors = rounded.clone(), w - rounded
    for start in range(0, w.shape[1], width):
        now = slice(start, min(start + width, w.shape[1]))
        own, diagonal = h[now, now], h.diagonal()[now]
        pull = ((errors @ h[:, now]) / diagonal).T.contiguous()
        lines = rounded[:, now].T.contiguous()
        own = own / diagonal
        for c, line in enumerate(lines):
            done = round_(start + c, line + pull[c])
            moved = line - done
            pull[c + 1 :].addcmul_(own[c, c + 1 :, None], moved)
            lines[c] = done
        rounded[:, now] = lines.T
        errors[:, now] = w[:, now] - rounded[:, now]
    return rounded


def error(w: Tensor, rounded: Tensor, h: Tensor) -> Tensor:
    """[out]: (w - q) H (w - q)^T of each row."""
    e = w - rounded
    return ((e @ h) * e).sum(1)


def woven(
    w: Tensor, rows: Tensor, columns: Tensor, begin: Callable[[slice, Tensor], Across], width: int = WIDTH
) -> Tensor:
    """The rounded q [out, k], where errors of different rows count together: tr(G e H e^T) is made small.

    With G = U diag(g) U^T and H = V diag(d) V^T, U and V unit upper triangular (`factor`), that is the sum of g_r d_c
    (U^T e V)_rc^2; each weight is rounded so that its term is small, given those above and to the left of it (as in
    Tseng et al. 2025, arXiv:2505.22988, weight by weight).  Of `width` columns all weights on an anti-diagonal are
    rounded together.

    Args:
        rows, columns: U [out, out] and V [k, k], in the dtype of w.
        begin: as for `carried`; what rounds takes (line, what they should be [n]): line picks from [out, columns] or
            from [out] what belongs to them.
    """
    errors, rounded = torch.zeros_like(w), torch.empty_like(w)
    above, heard = rows.T.contiguous(), torch.zeros_like(w)  # heard: U^T e
    for start in range(0, w.shape[1], width):
        now = slice(start, min(start + width, w.shape[1]))
        told = heard[:, :start] @ columns[:start, now]
        wanted, across = w[:, now] + told, begin(now, w[:, now] + _alone(told, columns[now, now]))
        rounded[:, now] = _wave(w[:, now].contiguous(), wanted.contiguous(), above, columns[now, now], across)
        errors[:, now] = w[:, now] - rounded[:, now]
        heard[:, now] = above @ errors[:, now]
    return rounded


def _wave(w: Tensor, wanted: Tensor, above: Tensor, columns: Tensor, across: Across) -> Tensor:
    """`woven` for some columns; wanted: what they should be, as far as the columns before them tell."""
    n, k = w.shape
    rounded, errors, told = torch.empty_like(w), torch.zeros_like(w), w.new_zeros(k, n)  # told: (e V)^T, last row first
    backward = columns.T.flip(0).contiguous()

    def line(of: Tensor) -> Tensor:
        """The entries (r, t - r)."""
        if of.dim() == 1:
            return of[first:last]
        return of.as_strided((last - first,), (k - 1,), of.storage_offset() + t + first * (k - 1))

    for t in range(n + k - 1):
        first, last = max(0, t - k + 1), min(n - 1, t) + 1
        turned = slice(k - 1 - t + first, k - 1 - t + last)
        left = torch.linalg.vecdot(errors[first:last], backward[turned])
        up = torch.linalg.vecdot(told[turned], above[first:last])
        found = across(line, line(wanted) + left + up)
        error = line(w) - found
        line(rounded).copy_(found)
        line(errors).copy_(error)
        told.as_strided((last - first,), (n + 1,), turned.start * n + first).copy_(error + left)
    return rounded
