from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from smelt.core.budget import BYTES, Budget
from smelt.core.edit import Edit, Note, Replace, Stored
from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms.sparse import Sparse
from smelt.graph import factors
from smelt.graph.reads import outside
from smelt.grids import ranks
from smelt.train.reduced import MOMENTS, NORMS, Layer, Norm, Split, Views

TIMED = 8  # ranks of a layer that are measured
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class SVD(Rewrite):
    """A layer becomes two thinner ones, by the truncated singular value decomposition of its weight.

    How thin is said by one of `ratio`, `rank` and `energy`, of each layer, or by a `budget` of all together: an integer
    program gives every layer the rank, or leaves it dense, so that least is lost, which layers are compared by in what
    they add to the loss (weight: inputs, loss, fisher), or by shares of their energy (plain).  A layer that would not
    get smaller, or with `keep: faster` is measured not to get faster, is left dense.  With r singular values, split
    evenly between the two (W = U sqrt(S) . sqrt(S) V):

        linear              in -> r -> out
        conv, channel       k x k to r channels, then 1 x 1        W as [out, in * kh * kw]
        conv, spatial       kh x 1 to r channels, then 1 x kw      W as [in * kh, out * kw]; one-dimensional: as channel
        embedding           entries of width r, then linear        W as [width, entries]

    The squared error is the sum of the squared singular values left out, the least of that rank.  It is that of the
    `weight`: plain, or as it shows at the layer's outputs for its inputs, at the loss, or by Fisher's matrix (formulas
    in train/reduced.py; spatial: of the moments of inputs those within a column of the kernel choose the first factor,
    all of them the second).  With `refit` both factors are those that give, on the layer's inputs as they are once all
    layers before it were split, what comes closest to what the original gave there, again in closed form (reduced-rank
    regression), and so is the bias.

    `form: pivoted` gives r of the outputs and combines the others from them: the same product in r (m + n - r) numbers
    in place of r (m + n).  With `sparse`, W = L + S: that share of the weights, the errors of L that count most, stays
    in a layer beside the factors, stored as a mask and values; the two take `rounds` turns.

    applies to: linear; 1-D and 2-D convolution with groups = 1; embedding
    needs a pretrained model: yes
    needs data: no; for weight: inputs, loss or fisher a few batches, whose labels are drawn where there are none
    needs training: a little, to recover, below about half of the parameters
    good at: large linear layers: smaller and faster on everything, and still ordinary layers
    bad at: small kernels and thin layers, where two layers are slower than one; sparse: smaller files, no speed
    source: Eckart & Young 1936; arXiv:1505.06798, 1511.06067 (conv); 2403.07378 (inputs); 2501.19090 (pivoted)
    """

    ratio: float | None = setting(
        None, "share of each layer's parameters to keep; 0.5 where nothing else is given", low=0, high=1
    )
    rank: int | None = setting(None, "singular values to keep", low=1)
    energy: float | None = setting(None, "share of the sum of squared singular values to keep", low=0, high=1)
    budget: str | None = setting(None, "'0.8x' of what `of` names, or '1.2 MB' of parameters, for all layers together")
    of: str = setting("parameters", "what the budget is of", choices=("parameters", "macs", "milliseconds"))
    weight: str = setting("plain", "what errors of the weight count by", choices=NORMS)
    refit: bool = setting(False, "fit layer after layer to inputs as they now are (weight: inputs or loss)")
    scheme: str = setting("channel", "how a 2-D convolution is split", choices=("channel", "spatial"))
    keep: str = setting("smaller", "which are split: what gets smaller, or also faster", choices=("smaller", "faster"))
    form: str = setting("factors", "what a layer becomes", choices=("factors", "pivoted"))
    sparse: float = setting(0.0, "share of the weights that stay beside the factors", low=0, high=0.5)
    rounds: int = setting(10, "turns that factors and weights beside them take", low=1)
    multiple: int = setting(1, "ranks are a multiple of this, where they can be", low=1)
    damp: float = setting(0.01, "share of the mean diagonal of the inputs' moments added to it", low=0, high=1)
    spread: float = setting(0.03, "the same for the moments of slopes (weight: loss)", low=1e-8, high=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", "rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{self.name}: {' and '.join(given)} each fix the rank; give one of them")
        if self.budget is not None:
            unit = Budget.parse(self.budget, f"{self.name}.budget").unit
            if unit != "x" and (self.of != "parameters" or unit not in BYTES):
                raise RecipeError(f"{self.name}.budget {self.budget!r}: of {self.of} it is a share such as '0.8x'")
        elif self.of != "parameters":
            raise RecipeError(f"{self.name}.of {self.of!r} says what a budget is of; give a budget such as '0.5x'")
        if self.form == "pivoted" and self.scheme == "spatial":
            raise RecipeError(f"{self.name}.form 'pivoted' needs factors of whole outputs; take scheme: channel")
        if self.refit and self.weight not in MOMENTS:
            raise RecipeError(f"{self.name}.refit needs the moments of inputs; take weight: inputs or weight: loss")

    def refuses(self, target: Target) -> str | None:
        return factors.refusal(target, KINDS)

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        read = outside(model)
        reasons = {t.name: self.refuses(t) or read.get(t.places[0][0]) for t in targets}
        notes: list[Edit] = [Note(name, reason) for name, reason in reasons.items() if reason]
        spatial = self.scheme == "spatial"
        layers = {t.name: Layer(t, spatial and t.tensor.dim() == 4) for t in targets if not reasons[t.name]}
        if not layers:
            return notes
        norm = Norm(self.weight, self.damp, self.spread)
        curved = self.weight == "inputs" and self.budget is not None
        views = Views(model, layers, norm, known, self.name, curved)
        sizes = self._sizes(model, layers, known)
        picked = self._picked(views, sizes, layers, notes)
        chosen = self._paying(model, layers, sizes, picked, known, notes)
        found: dict[str, list[Edit]] = {}
        for view in views.each(chosen, self.refit):
            name = view.layer.target.name
            split = view.split(chosen[name], self._beside(view.layer), self.rounds)
            view.put(split)
            found[name] = self._edits(view.layer, split)
        return [*(edit for name in layers for edit in found.get(name, ())), *notes]

    def _edits(self, layer: Layer, split: Split) -> list[Edit]:
        target, spatial = layer.target, layer.spatial
        if self.form == "pivoted":
            edit = factors.pivoted(target, split.left, split.right, split.bias)
        else:
            edit = factors.chain(target, factors.pair(target, split.left, split.right, spatial), split.bias)
        if split.rest is None:
            return [edit]
        rest = factors.folded(target.module, split.rest, target.tensor.shape, spatial).to(target.tensor).contiguous()
        parts = {"mask": rest != 0, "values": rest}
        sparse = Encoded(Sparse(), parts, rest.shape, rest.dtype)
        return [factors.beside(target, edit, rest), Stored(f"{edit.path}.1.weight", sparse)]

    def _beside(self, layer: Layer) -> int:
        """How many weights stay."""
        return round(self.sparse * layer.target.tensor.numel())

    def _sizes(self, model: nn.Module, layers: Mapping[str, Layer], known: Known) -> Mapping[str, _Size | _Time]:
        """What ranks of each layer take, and the layer as it is: parameters, multiplications, or nanoseconds."""
        if self.of == "parameters":
            return {name: self._size(layer) for name, layer in layers.items()}
        what = "to count multiplications (of: macs)" if self.of == "macs" else "to measure layers (of: milliseconds)"
        example = known.example(model, what)
        if self.of == "macs":
            at = factors.places(model, [layer.target for layer in layers.values()], example)
            return {name: self._size(layer, *at[name]) for name, layer in layers.items()}
        speed = factors.Speed(model, [layer.target.places[0][0] for layer in layers.values()], example)
        return {name: self._time(layer, speed) for name, layer in layers.items()}

    def _time(self, layer: Layer, speed: factors.Speed) -> _Time:
        """Of a layer with each of a few ranks, up to where it is no smaller than as it is."""
        size = self._size(layer)
        most = ranks.by_size(size.of, size.full, size.dense - 1)
        tried = sorted({ranks.rounded(max(1, most * i // TIMED), self.multiple, size.full, up=True)
                        for i in range(1, TIMED + 1)})  # fmt: skip
        before, after = [], []
        for rank in tried:
            edit = self._edits(layer, self._draft(layer, rank))[0]
            assert isinstance(edit, Replace)
            took = speed.milliseconds(edit) or (0.0, 0.0)
            before.append(took[0])
            after.append(took[1])
        return _Time(tuple(tried), tuple(after), median(before), size.full)

    def _size(self, layer: Layer, first: int = 1, second: int = 1) -> _Size:
        """With as many places for what the first and the second factor of a spatial pair give."""
        m, n = layer.matrix().shape
        each = m * first + n * second if layer.spatial else (m + n) * second
        square = second if self.form == "pivoted" else 0
        dense = layer.target.tensor.numel() * second
        return _Size(each, square, self._beside(layer) * second, dense, min(m, n))

    def _draft(self, layer: Layer, rank: int) -> Split:
        """Factors of a rank that take as long as any."""
        x = layer.matrix().float()
        left, right = x.new_zeros(len(x), rank), x[:rank]
        left[:rank] = torch.eye(rank).to(x)
        return Split(left, right, x.new_ones(x.shape) if self.sparse else None, None)

    def _picked(
        self, views: Views, sizes: Mapping[str, _Size | _Time], layers: Mapping[str, Layer], notes: list[Edit]
    ) -> dict[str, int | None]:
        """The rank of each layer, or None for one that the budget leaves dense."""
        squares = {}
        if self.energy is not None or self.budget is not None:
            squares = {view.layer.target.name: view.squares() for view in views.each(layers)}
        if self.budget is None:
            return {name: self._rank(size, squares.get(name)) for name, size in sizes.items()}
        dense = sum(size.dense for size in sizes.values())
        budget = Budget.parse(self.budget, self.name)
        limit = int(budget.value * dense)
        if budget.unit != "x":
            itemsize = max(layer.target.tensor.element_size() for layer in layers.values())
            limit = int(budget.value * BYTES[budget.unit]) // itemsize
        costs = {name: s * self._worth(views.slopes.get(name), s) for name, s in squares.items()}
        items = [ranks.Item(costs[name], size.of, size.dense) for name, size in sizes.items()]
        try:
            picks = ranks.under(items, limit, self.multiple)
        except ValueError as error:
            raise RecipeError(
                f"{self.name}: the budget {self.budget!r} of {self.of} is {limit:,}; the layers take from "
                f"{error.args[0]:,} to {dense:,}"
            ) from None
        picked = dict(zip(sizes, picks, strict=True))
        used = sum(size.dense if (r := picked[name]) is None else size.of(r) for name, size in sizes.items())
        what = "nanoseconds" if self.of == "milliseconds" else self.of
        notes.append(Note("", f"{used:,} of {dense:,} {what} of the layers are left, of {limit:,} in the budget"))
        return picked

    def _rank(self, size: _Size | _Time, squares: Tensor | None) -> int:
        if self.rank is not None:
            rank = self.rank
        elif self.energy is not None and squares is not None:
            rank = ranks.by_energy(squares, self.energy)
        else:
            rank = ranks.by_size(size.of, size.full, (0.5 if self.ratio is None else self.ratio) * size.dense)
            return ranks.rounded(rank, self.multiple, size.full, up=False)
        return ranks.rounded(rank, self.multiple, size.full, up=True)

    def _worth(self, slopes: Tensor | None, squares: Tensor) -> float:
        """What makes errors of layers comparable: what they add to the loss, where that is known, else shares."""
        if self.weight == "inputs" and slopes is not None:
            return float(slopes.diagonal().mean())
        return 1.0 if self.weight in ("fisher", "loss") else 1 / max(float(squares.sum()), 1e-300)

    def _paying(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        sizes: Mapping[str, _Size | _Time],
        picked: Mapping[str, int | None],
        known: Known,
        notes: list[Edit],
    ) -> dict[str, int]:
        """The ranks of the layers that get smaller, and faster where that is asked for."""
        speed = None
        if self.keep == "faster":
            example = known.example(model, "to measure layers (keep: faster)")
            speed = factors.Speed(model, [layer.target.places[0][0] for layer in layers.values()], example)
        found = {}
        for name, rank in picked.items():
            layer, reason = layers[name], None
            if rank is None:
                reason = "the budget is spent best with it as it is"
            elif not (reason := factors.larger(layer.target, self._size(layer).of(rank), f"rank {rank}")) and speed:
                edit = self._edits(layer, self._draft(layer, rank))[0]
                assert isinstance(edit, Replace)
                slower = speed.slower(edit)
                reason = slower and f"with rank {rank} {slower}"
            if reason:
                notes.append(Note(name, reason))
            elif rank is not None:
                found[name] = rank
        return found


@dataclass(frozen=True)
class _Size:
    """Of rank r a layer takes beside + r each - r^2 square; dense: as it is; full: its largest rank."""

    each: int
    square: int
    beside: int
    dense: int
    full: int

    def of(self, rank: int) -> int:
        return self.beside + rank * (self.each - rank * self.square)


@dataclass(frozen=True)
class _Time:
    """The same in nanoseconds, from the milliseconds of some ranks; what lies between two is drawn as a line."""

    tried: tuple[int, ...]
    took: tuple[float, ...]
    before: float
    full: int

    @property
    def dense(self) -> int:
        return round(1e6 * self.before)

    def of(self, rank: int) -> int:
        rising = np.maximum.accumulate(self.took)  # noise does not make a larger rank the faster one
        return round(1e6 * float(np.interp(rank, self.tried, rising)))
