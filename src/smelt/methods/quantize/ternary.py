"""-1, 0 or 1, each times a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Codec, State, Stats, straight_through
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms.affine import Affine
from smelt.forms.codebooks import Codebooks
from smelt.grids import rows


@dataclass(frozen=True)
class Ternary(Codec):
    """Three values: x ~ a where x > d, -a where x < -d, else 0.

    `exact` takes the d with the least squared error of all, found by sorting: of the k largest |x|, the k with the
    largest (sum of |x|)^2 / k.  `mean` takes d = ratio * mean |x|.  a is the mean |x| beyond d.  With `scales: two`
    values above and below 0 have each their own d (`exact`) and scale.

    Pruned weights do not count.  With `learn` scales are parameters inside `train`; thresholds then stay as they began.

    applies to: every floating tensor; linear, convolution, embedding
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no
    needs training: yes
    good at: 2 bits that code.entropy makes 1.5 or less; products without multiplications
    bad at: keeping accuracy without training
    source: Li et al. 2016, arXiv:1605.04711; two scales: Zhu et al. 2017, arXiv:1612.01064
    """

    threshold: str = setting("exact", "how the threshold is found", choices=("exact", "mean"))
    ratio: float = setting(0.7, "threshold over mean |x| (threshold: mean)", low=0, high=10)
    scales: str = setting("one", "the same value above and below 0, or two", choices=("one", "two"))
    per: str = setting("channel", "what has its own scale", choices=("channel", "tensor", "group"))
    axis: int | None = setting(
        None, "dimension of the channels (per: channel); nothing: 0; 1 for transposed convolutions", low=0
    )
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    stored: str = setting("float32", "how scales are stored", choices=rows.DTYPES)
    learn: bool = setting(False, "inside train, learn the scales")

    def refuses(self, target: Target) -> str | None:
        return rows.refusal(target, self.per, self.axis)

    def fit(self, x: Tensor, stats: Stats) -> State:
        """scale, threshold: [1, *side]; [2, *side] for two scales, first that of the values above 0."""
        place = self._place(x)
        values, mask = rows.split(x, stats.where, place)
        signs = (values.abs(),) if self.scales == "one" else (values.clamp_min(0), values.neg().clamp_min(0))
        if self.threshold == "mean":
            count = values.shape[1] if mask is None else mask.sum(1).clamp_min(1)
            least = self.ratio * values.abs().sum(1) / count
            pairs = [(_mean_beyond(part, least), least) for part in signs]
        else:
            pairs = [_exact(part) for part in signs]
        side = Affine(*place).side_shape(x.shape)
        scale, border = (torch.stack(found).to(values.dtype).reshape(-1, *side) for found in zip(*pairs, strict=True))
        learn = ("scale",) if self.learn else ()
        return State(scale=scale if self.learn else rows.stored(scale, self.stored), threshold=border, learn=learn)

    def _place(self, x: Tensor) -> rows.Layout:
        return rows.layout(x, self.per, self.axis, self.group)

    def encode(self, x: Tensor, state: State) -> Encoded:
        return self._encoded(x.detach(), rows.stored(_of(state, "scale").detach().clone(), self.stored), state)

    def simulate(self, x: Tensor, state: State) -> Tensor:
        if not self.learn:
            return straight_through(x, self.encode(x, state).decode())
        scale = _of(state, "scale")
        value = self._encoded(x.detach(), rows.stored(scale, self.stored).to(scale.dtype), state).decode()
        return value + (x - x.detach())

    def _encoded(self, x: Tensor, scale: Tensor, state: State) -> Encoded:
        place = self._place(x)
        form = Affine(*place, 2)
        borders = [form.spread(side, x.shape) for side in _of(state, "threshold")]
        above, below = x > borders[0], x < -borders[-1]
        if len(scale) == 1:
            codes = above.to(torch.int8) - below.to(torch.int8)
            return Encoded(form, {"codes": codes, "scale": scale[0]}, x.shape, x.dtype)
        indices = above.to(torch.uint8) + 2 * below.to(torch.uint8)
        books = torch.stack((scale[0], -scale[1]))
        return Encoded(Codebooks(*place, zero=True), {"codebooks": books, "indices": indices}, x.shape, x.dtype)


def _of(state: State, name: str) -> Tensor:
    found = getattr(state, name)
    assert isinstance(found, Tensor)
    return found


def _mean_beyond(x: Tensor, least: Tensor) -> Tensor:
    """Mean of each row's values above `least`; 0 where there is none."""
    kept = x > least[:, None]
    return (x * kept).sum(1) / kept.sum(1).clamp_min(1)


def _exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, threshold) of each row of values >= 0 with the least squared error of x ~ scale where x > threshold."""
    ordered = x.sort(1, descending=True).values.double()
    total = ordered.cumsum(1)
    count = torch.arange(1, x.shape[1] + 1, device=x.device)
    best = (total.square() / count).argmax(1, keepdim=True)
    scale = (total.gather(1, best) / count[best])[:, 0]
    return scale, scale / 2  # the optimum is where every value takes the nearer of scale and 0
