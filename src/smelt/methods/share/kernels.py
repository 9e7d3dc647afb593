"""Kernels or rows that share a dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, numel
from smelt.core.errors import RecipeError
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.store import NODE_BYTES
from smelt.core.target import Target
from smelt.forms.codebook import INDICES
from smelt.forms.product import Product, cut
from smelt.forms.scaled import Scaled
from smelt.grids import vectors


@dataclass(frozen=True)
class Kernels(Codec):
    """Each kernel of a convolution, or each whole row of a tensor, is one of a dictionary, times a scale of its own.

    A kernel is what lies between one input and one output channel; a row is a slice of dimension 0: a neuron, a filter,
    the vector of a word.  `what: kernels` takes rows where there is no kernel, as in linear layers and embeddings.

    Entries and scales make the squared error small, by turns: the entry with the least error at its best scale for
    each, then the best entry for its members (the gain-shape form of k-means); scales may be negative unless
    `scale: positive`.  Pruned weights do not count.  The dictionary and the scales are floating leaves, so training
    tunes them: the gradient of an entry is the sum over its places.

    applies to: every floating tensor of two or more dimensions; linear, convolution, embedding
    needs a pretrained model: yes
    needs data: no
    needs training: yes, with a dictionary of less than about a quarter of the kernels
    good at: convolutions with many small kernels; embeddings and layers with rows alike
    bad at: speed: dense kernels decode first; rows as long as they are many
    source: Son et al. 2018, ECCV (kernels up to a factor); gain-shape: Sabin & Gray 1984, IEEE Trans. ASSP 32(3)
    """

    clusters: int | None = setting(None, "entries of the dictionary; nothing: by share", low=1, high=65536)
    share: float | None = setting(
        None, "entries per kernel or row; 0.25 where nothing else is given", low=0.0001, high=1
    )
    what: str = setting("kernels", "what is shared", choices=("kernels", "rows"))
    scale: str = setting("signed", "the scale of each", choices=("none", "positive", "signed"))
    scales: str = setting("float16", "how scales are stored", choices=("float32", "float16", "bfloat16"))
    codebook: str = setting("float32", "how entries are stored", choices=("float32", "float16", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None and self.share is not None:
            raise RecipeError(f"{self.name}: clusters and share each fix the entries; give one of them")

    def refuses(self, target: Target) -> str | None:
        x = target.tensor
        if not x.is_floating_point():
            return f"it is {x.dtype}; only floating tensors can share kernels"
        if x.dim() < 2 or not x.numel():
            return "it is empty" if x.dim() > 1 else "it has fewer than two dimensions: neither kernels nor rows"
        length = self._length(x)
        count = x.numel() // length
        k = self._entries(count)
        scales = 0 if self.scale == "none" else count * getattr(torch, self.scales).itemsize + NODE_BYTES
        packed = -(-count * max(k - 1, 1).bit_length() // 8) + NODE_BYTES
        need = NODE_BYTES + k * length * getattr(torch, self.codebook).itemsize + packed + scales
        dense = x.numel() * x.element_size()
        return f"{k} entries for {count:,} need {need:,} bytes, it has {dense:,}" if need >= dense else None

    def _length(self, x: Tensor) -> int:
        """Weights of a kernel, or of a row."""
        return numel(x.shape[2:] if x.dim() > 2 and self.what == "kernels" else x.shape[1:])

    def _entries(self, count: int) -> int:
        share = 0.25 if self.share is None else self.share
        return min(count, self.clusters or max(1, round(share * count)))

    def fit(self, x: Tensor, stats: Stats) -> State:
        """codebook [k, length], of unit length where there are scales; where: as in `Stats`."""
        before: Any = None if stats.inside is None else stats.inside.before
        seen = self._seen(x, stats.where)
        k = self._entries(seen.x.shape[1])
        start = None if before is None or len(before.codebook) != k else before.codebook
        book = vectors.kmeans(seen, k, stats.seed, start).to(getattr(torch, self.codebook))
        return State(codebook=book, where=stats.where)

    def _seen(self, x: Tensor, where: Tensor | None) -> vectors.Vectors:
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        length = self._length(x)
        weight = None if where is None else cut(where.to(wide.dtype), None, length).flatten(0, 1)[None]
        return vectors.Vectors(cut(wide, None, length).flatten(0, 1)[None], weight, None, self.scale)

    def encode(self, x: Tensor, state: State) -> Encoded:
        """Each kernel by the entry of least error at its best scale; those that are pruned whole by index 0."""
        known: Any = state
        seen = self._seen(x, known.where)
        index, factor, _ = seen.nearest(known.codebook.to(seen.x.dtype))
        if seen.weight is not None:
            index = index.masked_fill(~seen.weight.any(-1), 0)
        k = len(known.codebook)
        narrow = INDICES[0 if k <= 256 else 1 if k <= 1 << 15 else 2]
        parts = {"codebook": known.codebook.clone(), "indices": index.reshape(len(x), -1).to(narrow)}
        inner = Encoded(Product(), parts, x.shape, x.dtype)
        if self.scale == "none":
            return inner
        whole = self._length(x) == numel(x.shape[1:])
        scale = factor.reshape(-1) if whole else factor.reshape(len(x), -1)
        form = Scaled(0, 0 if whole else self._length(x))
        return Encoded(form, {"values": inner, "scale": scale.to(getattr(torch, self.scales))}, x.shape, x.dtype)
