"""Product quantization: parts of a tensor share a codebook of vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.encoded import Encoded, numel
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.store import NODE_BYTES
from smelt.core.target import Target
from smelt.forms.codebook import INDICES
from smelt.forms.product import Product as ProductForm
from smelt.forms.product import cut, lines_of
from smelt.grids import order, vectors
from smelt.statistics.gram import damped

# Share of the mean diagonal of the second moments that is added to their diagonal.
DAMP = 0.01


@dataclass(frozen=True)
class Product(Codec):
    """Sub-vectors of a weight share a codebook, found by k-means; one index stands for `length` weights.

    They lie one after another along the rest of each slice of dimension 0 (`along: rest`: of a convolution through one
    kernel after another, `length: kernel` is one 2-D kernel each), or along the input channels, at one place of the
    kernel (`along: inputs`).  Pruned weights do not count.

    What k-means makes small is the squared error (`error: weights`); with the mean squares of the inputs that the
    weights meet (`diagonal`) or all second moments of those that a sub-vector meets (`moments`), the error at the
    layer's output, summed over sub-vectors.  Of a pruned tensor, `moments` takes the diagonal.

    With `permute` input channels are brought into an order in which the sub-vectors are easier to share: the least
    determinant of their covariance, by random swaps.  The file then holds an index per input channel.

    The codebook is a floating leaf: training tunes it, the gradient of a vector the sum over its places.

    applies to: every floating tensor; diagonal and moments: weights of linear layers and convolutions
    needs a pretrained model: yes
    needs data: no; a few batches for error: diagonal or moments
    needs training: yes, below about 2 bits per weight
    good at: 1/4 to 2 bits per weight: 256 vectors of 8 weights are 1 bit each
    bad at: speed: dense kernels decode first; small tensors, where the codebook weighs
    source: Stock et al. 2020, arXiv:1907.05686; permute: Martinez et al. 2021, arXiv:2010.15703; Gong et al. 2014, \
arXiv:1412.6115
    """

    clusters: int = setting(256, "vectors in the codebook", low=1, high=65536)
    length: int | str = setting(4, "weights per vector, or 'kernel': as many as a kernel of the convolution has", low=1)
    along: str = setting("rest", "what vectors run along", choices=("rest", "inputs"))
    error: str = setting("weights", "the error that is made small", choices=("weights", "diagonal", "moments"))
    permute: bool = setting(False, "store the input channels in an order that makes the error small")
    codebook: str = setting("float32", "how the vectors are stored", choices=("float32", "float16", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.length, str) and self.length != "kernel":
            raise RecipeError(f"{self.name}.length is {self.length!r}; it takes a whole number, or 'kernel'")

    def refuses(self, target: Target) -> str | None:
        x, module = target.tensor, target.module
        if not x.is_floating_point():
            return f"it is {x.dtype}; only floating tensors can share vectors"
        if not x.dim() or not x.numel():
            return "it is empty" if x.dim() else "it has no dimension that vectors could run along"
        if (self.along == "inputs" or self.permute) and x.dim() < 2:
            return "it has no input channels"
        if self.error != "weights":
            layer = isinstance(module, (nn.Linear, _ConvNd)) and target.places[0][1] == "weight"
            if not layer or (self.error == "moments" and isinstance(module, _ConvTransposeNd)):
                return f"error: {self.error} is for weights of linear layers and convolutions, not transposed ones"
        if self.permute and not self._units(x.shape):
            return f"permute: vectors of {self._length(x.shape)} hold no whole channels, or one each"
        lines, n = lines_of(x.shape, self._axis())
        length = self._length(x.shape)
        count = lines * -(-n // length)
        k = min(self.clusters, count)
        places = len(x[0]) * 2 if self.permute else 0
        bits = max(k - 1, 1).bit_length()
        need = k * length * getattr(torch, self.codebook).itemsize + -(-count * bits // 8) + 2 * NODE_BYTES + places
        dense = x.numel() * x.element_size()
        return f"{k} vectors with {count:,} indices need {need:,} bytes, it has {dense:,}" if need >= dense else None

    def _axis(self) -> int | None:
        return 1 if self.along == "inputs" else None

    def _length(self, shape: torch.Size) -> int:
        n = lines_of(shape, self._axis())[1]
        return min(n, max(1, numel(shape[2:])) if isinstance(self.length, str) else self.length)

    def _units(self, shape: torch.Size) -> int:
        """Input channels that a vector holds as a whole, or 0 where an order of them makes no difference."""
        each = numel(shape[2:]) if self.along == "rest" else 1
        whole, rest = divmod(self._length(shape), max(each, 1))
        return whole if whole > 1 and not rest and shape[1] > whole else 0

    def needs_at(self, place: str) -> tuple[str, ...]:
        if place != "weight" or self.error == "weights":
            return ()
        return ("gram",) if self.error == "moments" else ("second_moment",)

    def fit(self, x: Tensor, stats: Stats) -> State:
        """codebook [k, length]; order: int64 [inputs] or None; weight, moments: as in `Vectors`, or None."""
        before: Any = None if stats.inside is None else stats.inside.before
        found = self._order(x, stats) if self.permute else None
        weight, moments = self._counts(x, stats, found)
        seen = self._seen(x, found, weight, moments)
        k = min(self.clusters, seen.x.shape[0] * seen.x.shape[1])
        start = None if before is None else before.codebook
        start = start if start is not None and start.shape == (k, seen.x.shape[2]) else None
        book = vectors.kmeans(seen, k, stats.seed, start).to(getattr(torch, self.codebook))
        return State(codebook=book, order=found, weight=weight, moments=moments)

    def _order(self, x: Tensor, stats: Stats) -> Tensor | None:
        if stats.inside is not None and stats.inside.before is not None:
            kept: Any = stats.inside.before
            return kept.order  # type: ignore[no-any-return]
        units = self._units(x.shape)
        wide = _wide(x) if stats.where is None else _wide(x).where(stats.where, 0)
        samples = wide.reshape(*x.shape[:2], -1).permute(1, 2, 0)  # [inputs, kernel, rows]
        if self.along == "inputs":
            samples = samples.reshape(x.shape[1], 1, -1)
        return order.found(samples, units, stats.seed) if units else None

    def _counts(self, x: Tensor, stats: Stats, found: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(weight, moments) of the vectors, one of them None at least."""
        weight, axis, length = None, self._axis(), self._length(x.shape)
        for name in self.needs_at("weight"):
            if name not in stats.gathered:
                raise RuleError(f"{self.name}: error: {self.error} needs data to gather {name} from; give some")
            known: Tensor = stats.gathered[name].to(x.device)
            if name == "gram" and stats.where is None:
                return None, self._blocks(known, x.shape, found)
            if name == "gram":
                each = known.diagonal(dim1=1, dim2=2)
                known = each.repeat_interleave(len(x) // len(each), 0).reshape(x.shape)
            weight = known.to(_wide(x).dtype).expand_as(x)
        if stats.where is not None:
            weight = stats.where.to(_wide(x).dtype) * (1 if weight is None else weight)
        if weight is None and not lines_of(x.shape, axis)[1] % length:
            return None, None
        ones = torch.ones_like(_wide(x)) if weight is None else weight
        return self._cut(ones, found).contiguous(), None

    def _blocks(self, gram: Tensor, shape: torch.Size, found: Tensor | None) -> Tensor:
        """[s, length, length]: the second moments of what each vector of a row of the weight meets."""
        own = torch.stack([damped(one, DAMP) for one in gram]).float()
        own = own / own.diagonal(dim1=1, dim2=2).mean()
        at = torch.arange(gram.shape[1], device=gram.device).reshape(1, *shape[1:])
        at = at if found is None else at.index_select(1, found)
        at = cut(at + 1, self._axis(), self._length(shape)).flatten(0, 1) - 1  # -1: beyond the end of a line
        blocks = own[:, at[:, :, None], at[:, None, :]]
        blocks = blocks * ((at >= 0)[:, :, None] & (at >= 0)[:, None, :])
        return (blocks + torch.diag_embed((at < 0).to(own.dtype))).flatten(0, 1)

    def _cut(self, x: Tensor, found: Tensor | None) -> Tensor:
        """The vectors, [1, all, length]."""
        turned = x if found is None else x.index_select(1, found)
        return cut(turned, self._axis(), self._length(x.shape)).flatten(0, 1)[None]

    def _seen(self, x: Tensor, found: Tensor | None, weight: Tensor | None, moments: Tensor | None) -> vectors.Vectors:
        """Where there are moments, as [groups * vectors of a row, rows of a group, length]."""
        each = self._cut(_wide(x), found)
        if moments is not None:
            lines = each.reshape(len(x), -1, each.shape[2])  # [rows, vectors, length]
            groups = len(moments) // lines.shape[1]
            each = lines.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return vectors.Vectors(each, weight, moments)

    def encode(self, x: Tensor, state: State) -> Encoded:
        """Every vector by the index of the one that costs least; those of pruned weights alone by index 0."""
        known: Any = state
        seen = self._seen(x, known.order, known.weight, known.moments)
        index = seen.nearest(known.codebook.to(seen.x.dtype))[0]
        lines = lines_of(x.shape, self._axis())[0]
        if known.moments is not None:
            groups = len(known.moments) // (index.numel() // len(x))
            index = index.unflatten(0, (groups, -1)).transpose(1, 2)
        if known.weight is not None:
            index = index.masked_fill(~known.weight.any(-1), 0)
        k = len(known.codebook)
        narrow = INDICES[0 if k <= 256 else 1 if k <= 1 << 15 else 2]
        parts = {"codebook": known.codebook.clone(), "indices": index.reshape(lines, -1).to(narrow)}
        if known.order is not None:
            parts["place"] = known.order.argsort().to(torch.int16 if len(known.order) < 1 << 15 else torch.int32)
        return Encoded(ProductForm(self._axis()), parts, x.shape, x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
