"""Shared values by k-means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats, Values
from smelt.core.settings import resolve, setting
from smelt.core.store import NODE_BYTES
from smelt.core.target import Target
from smelt.forms.codebook import Codebook
from smelt.grids import kmeans


@dataclass(frozen=True)
class KMeans(Codec):
    """Lets all weights of a tensor share a few values: their k-means centers.

    Masked weights do not count.  A tensor with fewer distinct weights gets fewer centers, and is then stored
    exactly.  The centers are floating leaves, so later training tunes them.

    With `weighted`, an error of a weight counts as often as the mean square of the inputs that it multiplies: the
    diagonal approximation of the error at the module's output.  With a `rate`, what is made small is the mean error +
    rate * (error of the exact optimum) * (bits per weight after ideal entropy coding): 1 to 3 takes off some bits
    where indices are coded later, most with more clusters than the bits would need; centers that do not pay are
    dropped.  See `grids.kmeans.constrained`.

    applies to: every floating tensor; linear, convolution, embedding; weighted: linear and convolution weights
    needs a pretrained model: yes
    needs data: no; a few batches for weighted: true
    needs training: at 4 or fewer bits per weight, to tune the centers
    good at: small files at 2 to 5 bits per weight, best with code.entropy after it
    bad at: speed: dense kernels decode first; small tensors, where the codebook weighs
    source: Han et al. 2016, arXiv:1510.00149; Wang & Song 2011, R Journal 3(2); Choi et al. 2017, arXiv:1612.01543
    """

    clusters: int = setting(16, "number of shared values", low=1, high=65536)
    start: str = setting(
        "exact",
        "the optimum, or where Lloyd's rounds begin",
        choices=("exact", "quantiles", "line", "density"),
    )
    codebook: str = setting("float32", "how the shared values are stored", choices=("float32", "float16", "bfloat16"))
    weighted: bool = setting(False, "count errors by the mean square of the inputs that they meet")
    rate: float = setting(
        0.0, "price of a bit per weight after entropy coding, as a multiple of the exact optimum's error", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate and self.start != "exact":
            raise RecipeError(f"{self.name}: rate goes with start: exact, not with start: {self.start}")

    def refuses(self, target: Target) -> str | None:
        x = target.tensor
        if not x.is_floating_point():
            return f"it holds {x.dtype}, not floating values"
        if self.weighted and not (isinstance(target.module, (nn.Linear, _ConvNd)) and target.places[0][1] == "weight"):
            return "weighted: true is for the weights of linear layers and convolutions"
        dense, k = x.numel() * x.element_size(), min(resolve(self, 1.0).clusters, x.numel())
        if self._bytes(k, x.numel()) >= dense:
            k = min(k, len(x.detach().unique()))
        if (need := self._bytes(k, x.numel())) >= dense:
            return f"{k} shared values with their indices need {need:,} bytes, it has {dense:,}"
        return None

    def _bytes(self, k: int, n: int) -> int:
        """What k shared values cost for n weights in a file, their indices packed where that makes them smaller."""
        plain = n * (1 if k <= 256 else 2 if k <= 1 << 15 else 4)
        packed = NODE_BYTES + -(-n * max(k - 1, 1).bit_length() // 8)
        each: int = getattr(torch, self.codebook).itemsize
        return NODE_BYTES + k * each + min(plain, packed)

    def needs_at(self, place: str) -> tuple[str, ...]:
        return ("second_moment",) if self.weighted else ()

    def fit(self, x: Tensor, stats: Stats) -> State:
        """codebook: [k], ascending and distinct, k <= clusters; where: the mask, as in `Stats`.

        borders: [k - 1], on the CPU, where there is a rate: between which values each shared value stands.
        """
        kept, weights, borders = _numpy(Values(x, stats.where).kept()), self._weights(x, stats), None
        if not kept.size:
            centers = np.zeros(1)
        elif self.start != "exact":
            centers = kmeans.lloyd(kept, self.clusters, self.start, weights)
        elif self.rate:
            centers, borders = kmeans.constrained(kept, self.clusters, self.rate, weights)
        else:
            centers = kmeans.optimal(kept, self.clusters, weights)
        book = torch.from_numpy(centers).to(getattr(torch, self.codebook))
        ends = None
        if self.rate:  # centers that rounding makes one have no border between them
            ends = torch.from_numpy(kmeans.halves(centers) if borders is None else borders)[book[1:] != book[:-1]]
        return State(codebook=book.unique().to(x.device), where=stats.where, borders=ends)

    def _weights(self, x: Tensor, stats: Stats) -> kmeans.Array | None:
        """What each kept value counts, or None for all the same.  Raises RuleError: nothing was gathered."""
        if not self.weighted:
            return None
        if "second_moment" not in stats.gathered:
            raise RuleError(f"{self.name}: no second moment was gathered; calibrate with data, or take weighted: false")
        where = None if stats.where is None else stats.where.cpu()
        weights = _numpy(Values(stats.gathered["second_moment"].cpu().expand_as(x), where).kept())
        return weights if weights.any() else None

    def encode(self, x: Tensor, state: State) -> Encoded:
        """Every weight by its nearest shared value, or that of the borders it lies between; masked ones by index 0."""
        book, where, borders = state.get_buffer("codebook").sort().values, state.where, getattr(state, "borders", None)
        ends = _numpy(borders) if isinstance(borders, Tensor) else None
        indices = torch.from_numpy(kmeans.assign(_numpy(x), _numpy(book), ends)).to(x.device)
        if isinstance(where, Tensor):
            indices = indices.masked_fill(~where, 0)
        return Encoded(Codebook(), {"codebook": book, "indices": indices}, x.shape, x.dtype)


def _numpy(x: Tensor) -> kmeans.Array:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).cpu().numpy()
