"""A product of two factors, the left one of small integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.encoded import Encoded, numel
from smelt.core.errors import RuleError
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.store import NODE_BYTES
from smelt.core.target import Target
from smelt.forms import factors
from smelt.forms.affine import Affine
from smelt.grids import rows, uniform
from smelt.statistics import gram


@dataclass(frozen=True)
class Factored(Codec):
    """W ~ A B: A whole numbers of `bits` bits with a scale per column, B floating.

    W is the tensor as [channels of dimension 0, rest].  Start: its truncated singular value decomposition, the columns
    of A rounded.  Then by turns the entries of A, column by column, each the best whole number given the rest, and B by
    least squares, until the error falls by less than `tolerance` of itself in a round; no turn makes it larger.  Rows
    of B are divided by their largest entry, which goes to the scale of A's column.  Pruned weights do not count: the
    product stands in for them in every round.

    With `weighted`, the error is that at the layer's output, from the second moments of its inputs.

    applies to: floating tensors of two or more dimensions; weighted: linear layers and convolutions of one group
    needs a pretrained model: yes
    needs data: no; a few batches for weighted: true
    needs training: below about half of the parameters
    good at: wide linear layers of low rank; embeddings
    bad at: convolutions and weights of full rank, which quantize.affine stores with less error in as many bytes
    source: integer matrix factorization by alternating least squares; Eckart & Young 1936 for the start
    """

    share: float = setting(
        0.5, "numbers in both factors over those of the tensor; the rank follows", low=1 / factors.MOST, high=1
    )
    rank: int | None = setting(None, "rank, in place of share", low=1)
    bits: int = setting(8, "bits of the entries of A", low=2, high=8)
    right: str = setting("float16", "how B is stored", choices=rows.DTYPES)
    weighted: bool = setting(False, "count errors as they show at the layer's output")
    damp: float = setting(0.01, "weighted: added to the diagonal of the moments, a share of its mean", low=0, high=1)
    rounds: int = setting(30, "turns of A and B at most", low=0, high=10_000)
    tolerance: float = setting(1e-3, "least relative fall of the squared error in a round", low=0, high=1)

    def refuses(self, target: Target) -> str | None:
        x = target.tensor
        if reason := rows.refusal(target, "tensor", None):
            return reason
        if x.dim() < 2:
            return "it has one dimension; factors need two"
        module = target.module
        plain = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)
        if self.weighted and (not plain or isinstance(module, _ConvTransposeNd) or target.places[0][1] != "weight"):
            return "weighted: true is for the weights of linear layers and convolutions of one group"
        m, n, r = len(x), numel(x.shape[1:]), self._rank(x.shape)
        need = 3 * NODE_BYTES + m * r * self.bits // 8 + 4 * r + r * n * getattr(torch, self.right).itemsize
        dense = x.numel() * x.element_size()
        return f"factors of rank {r} need {need:,} bytes, it has {dense:,}" if need >= dense else None

    def _rank(self, shape: torch.Size) -> int:
        m, n = shape[0], numel(shape[1:])
        least = -(-m * n // (factors.MOST * (m + n)))  # fewer numbers may not claim so large a tensor
        wanted = self.rank if self.rank is not None else int(self.share * m * n / (m + n))
        return max(least, min(wanted, m, n))

    def needs_at(self, place: str) -> tuple[str, ...]:
        return ("gram",) if self.weighted else ()

    def fit(self, x: Tensor, stats: Stats) -> State:
        """codes [m, r], scale [r], right [r, n] as stored; root [n, n]: error (W - A B) root is made small."""
        root = None
        if self.weighted:
            if "gram" not in stats.gathered:
                raise RuleError(f"{self.name}: no moments were gathered; calibrate with data, or take weighted: false")
            moments = gram.damped(stats.gathered["gram"][0].to(x.device), max(self.damp, 1e-8))
            root = torch.linalg.cholesky(moments)
        w, where = _matrix(x, stats.where)
        codes, scale, right = self._start(w, root, self._rank(x.shape))
        error = torch.inf
        for _ in range(self.rounds):
            full = w if where is None else w.where(where, (codes * scale) @ right)
            codes = _closer(full, codes, scale, right, root, self.bits)
            right = _solve(codes * scale, full)
            rest = full - (codes * scale) @ right if where is None else (w - (codes * scale) @ right) * where
            now = float((rest if root is None else rest @ root).square().sum())
            if now >= error * (1 - self.tolerance):
                break
            error = now
        size = right.abs().amax(1)
        size = size.where(size > 0, 1)
        stored = rows.stored((right / size[:, None]).to(_work(x)), self.right)
        scale = (scale * size).to(_work(x))
        return State(codes=codes.to(torch.int8), scale=scale, right=stored, root=root, where=stats.where)

    def _start(self, w: Tensor, root: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        seen = w if root is None else w @ root
        wide = len(w) <= seen.shape[1]  # the smaller of the two Gram matrices has the singular vectors
        square, vectors = torch.linalg.eigh(seen @ seen.T if wide else seen.T @ seen)
        size = square.flip(0)[:rank].clamp_min(0).sqrt()
        own = vectors.flip(1)[:, :rank]
        left = own * size.sqrt() if wide else seen @ own / size.sqrt().where(size > 0, 1)
        low, high = uniform.mse(left.T.contiguous(), bits=self.bits, symmetric=True)
        scale, _ = uniform.steps(low, high, bits=self.bits, symmetric=True)
        scale = scale.where(high > 0, 1)
        codes = uniform.quantize(left, scale, None, bits=self.bits, symmetric=True)
        return codes, scale, _solve(codes * scale, w)

    def encode(self, x: Tensor, state: State) -> Encoded:
        """A once more for `x`, with B as it was found."""
        scale, right = state.get_buffer("scale"), state.get_buffer("right")
        w, where = _matrix(x, getattr(state, "where", None))
        codes, wide = state.get_buffer("codes").to(w.dtype), right.to(w.dtype)
        full = w if where is None else w.where(where, (codes * scale.to(w.dtype)) @ wide)
        codes = _closer(full, codes, scale.to(w.dtype), wide, getattr(state, "root", None), self.bits)
        form = Affine(axis=1, bits=self.bits)
        left = Encoded(form, {"codes": codes.to(torch.int8), "scale": scale.clone()}, codes.shape, scale.dtype)
        return Encoded(factors.Factors(), {"left": left, "right": right.clone()}, x.shape, x.dtype)


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _matrix(x: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tensor as a matrix in float64, 0 where it does not count, and the mask."""
    w = x.detach().double()
    if where is not None:
        w, where = w.where(where, 0), where.reshape(len(x), -1)
    return w.reshape(len(x), -1), where


def _solve(left: Tensor, w: Tensor) -> Tensor:
    """The B with the least error of left @ B."""
    found: Tensor = torch.linalg.pinv(left.T @ left, hermitian=True) @ (left.T @ w)
    return found


def _closer(w: Tensor, codes: Tensor, scale: Tensor, right: Tensor, root: Tensor | None, bits: int) -> Tensor:
    """Codes with a smaller error: column by column, each entry the best whole number given the others in its row."""
    if root is not None:
        w, right = w @ root.to(w.dtype), right @ root.to(w.dtype)
    scaled = right * scale[:, None]
    moments, target = scaled @ scaled.T, w @ scaled.T
    low, high = uniform.limits(bits, True)
    codes = codes.clone()
    for k, own in enumerate(moments.diagonal().tolist()):
        if own > 0:
            rest = target[:, k] - codes @ moments[:, k] + codes[:, k] * own
            codes[:, k] = (rest / own).round().clamp(low, high)
    return codes
