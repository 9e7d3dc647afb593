"""Shared values by k-means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded
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

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: yes
    needs data: no
    needs training: at 4 or fewer bits per weight, to tune the centers
    good at: small files at 2 to 5 bits per weight, best with code.huffman after it
    bad at: speed: dense kernels decode first; small tensors, where the codebook weighs
    source: Han et al. 2016, arXiv:1510.00149; exact in one dimension: Wang & Song 2011, R Journal 3(2)
    """

    clusters: int = setting(16, "number of shared values", low=1, high=65536)
    start: str = setting(
        "exact",
        "the optimum, or where Lloyd's rounds begin",
        choices=("exact", "quantiles", "line", "density"),
    )
    codebook: str = setting("float32", "how the shared values are stored", choices=("float32", "float16", "bfloat16"))

    def refuses(self, target: Target) -> str | None:
        x = target.tensor
        if not x.is_floating_point():
            return f"it holds {x.dtype}, not floating values"
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

    def fit(self, x: Tensor, stats: Stats) -> State:
        """codebook: [k], ascending and distinct, k <= clusters; where: the mask, as in `Stats`."""
        kept = _numpy(Values(x, stats.where).kept())
        if not kept.size:
            centers = np.zeros(1)
        elif self.start == "exact":
            centers = kmeans.optimal(kept, self.clusters)
        else:
            centers = kmeans.lloyd(kept, self.clusters, self.start)
        book = torch.from_numpy(centers).to(getattr(torch, self.codebook)).unique()
        return State(codebook=book.to(x.device), where=stats.where)

    def encode(self, x: Tensor, state: State) -> Encoded:
        """Every weight by its nearest shared value, masked ones by index 0."""
        book, where = state.get_buffer("codebook").sort().values, state.where
        indices = torch.from_numpy(kmeans.assign(_numpy(x), _numpy(book))).to(x.device)
        if isinstance(where, Tensor):
            indices = indices.masked_fill(~where, 0)
        return Encoded(Codebook(), {"codebook": book, "indices": indices}, x.shape, x.dtype)


def _numpy(x: Tensor) -> kmeans.Array:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).cpu().numpy()
