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
        begin: (columns, what these should be, [out, columns], as far as the errors before them tell) -> how to round
            them; called for every `width` columns in turn.
    """
    errors, rounded = torch.zeros_like(w), torch.empty_like(w)
    for start in range(0, w.shape[1], width):
        now = slice(start, min(start + width, w.shape[1]))
        wanted = w[:, now] + errors[:, :start] @ feed[:start, now]
        round_ = begin(now, wanted)
        own = feed[now, now]
        lines, before = (t.T.clone(memory_format=torch.contiguous_format) for t in (wanted, w[:, now]))
        for c, line in enumerate(lines):
            done = round_(start + c, line)
            before[c] -= done
            lines[c + 1 :].addcmul_(own[c, c + 1 :, None], before[c])
            lines[c] = done
        errors[:, now], rounded[:, now] = before.T, lines.T
    return rounded


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
    w: Tensor,
    rows: Tensor | None,
    columns: Tensor,
    steps: Tensor,
    code: Callable[[Tensor], Tensor],
    keep: Tensor | None = None,
    width: int = 2 * WIDTH,
) -> Tensor:
    """Whole codes [out, k], where the errors of rows count together too: tr(G e H e^T) is made small.

    With G = U diag(g) U^T and H = V diag(d) V^T, U and V unit upper triangular (`factor`), that is the sum of g_r d_c
    (U^T e V)_rc^2; each weight is rounded so that its term is small, given those above and to the left of it (as in
    Tseng et al. 2025, arXiv:2505.22988, weight by weight).  All weights of an anti-diagonal are rounded together.

    Args:
        rows, columns: U [out, out] and V [k, k], in the dtype of w; without rows G is diagonal.
        steps: [out, k].
        code: what is wanted, in steps -> whole numbers.
        keep: [out, k], where codes may differ from 0.
        width: rows whose errors reach the rows below them together.
    """
    if rows is None:
        return _alone(w, columns, steps, code, keep)
    codes, errors = torch.zeros_like(w), torch.zeros_like(w)
    backward = columns.T.flip(0).contiguous()
    for start in range(0, len(w), width):
        now = slice(start, min(start + width, len(w)))
        wanted = (rows[:start, now].T @ errors[:start]) @ columns if start else torch.zeros_like(w[now])
        above = rows[now, now].T.contiguous()
        mask = None if keep is None else keep[now].contiguous()
        codes[now], errors[now] = _wave(
            w[now].contiguous(), wanted, above, backward, steps[now].contiguous(), code, mask
        )
    return codes


def _alone(w: Tensor, columns: Tensor, steps: Tensor, code: Callable[[Tensor], Tensor], keep: Tensor | None) -> Tensor:
    """The same for rows that do not count together."""
    lines, codes = steps.T.contiguous(), torch.empty_like(w.T)
    kept = None if keep is None else keep.T.contiguous()

    def round_(c: int, wanted: Tensor) -> Tensor:
        found = code(wanted / lines[c])
        codes[c] = found if kept is None else found.where(kept[c], 0)
        return codes[c] * lines[c]

    carried(w, columns, lambda *_: round_)
    return codes.T.contiguous()


def _wave(
    w: Tensor,
    wanted: Tensor,
    above: Tensor,
    backward: Tensor,
    steps: Tensor,
    code: Callable[[Tensor], Tensor],
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(codes, errors) of some rows.

    wanted: what rows before them ask for in addition.  above: U^T of these rows.  backward: V^T, last row first.
    """
    n, k = w.shape
    codes, errors, heard = torch.zeros_like(w), torch.zeros_like(w), w.new_zeros(k, n)

    def line(of: Tensor) -> Tensor:
        """The entries (r, t - r)."""
        return of.as_strided((last - first,), (k - 1,), of.storage_offset() + t + first * (k - 1))

    for t in range(n + k - 1):
        first, last = max(0, t - k + 1), min(n - 1, t) + 1
        turned = slice(k - 1 - t + first, k - 1 - t + last)  # columns t - r, counted from the last one
        left = torch.linalg.vecdot(errors[first:last], backward[turned])
        up = torch.linalg.vecdot(heard[turned], above[first:last])
        own, step = line(w), line(steps)
        found = code((own + line(wanted) + left + up) / step)
        if keep is not None:
            found = found.where(line(keep), 0)
        error = own - found * step
        line(codes).copy_(found)
        line(errors).copy_(error)
        heard.as_strided((last - first,), (n + 1,), turned.start * n + first).copy_(error + left)
    return codes, errors
