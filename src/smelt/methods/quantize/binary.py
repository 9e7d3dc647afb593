"""Signs, each with a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, numel
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms import binary, rotated
from smelt.grids import rows

# Rounds in which the scales of several bases and the signs follow one another, and in which two rotations do.
ROUNDS, TURNS = 10, 3
# Largest side of a learned rotation.
WIDEST = 4096


@dataclass(frozen=True)
class Binary(Codec):
    """One bit per value: x ~ +-a, + where x >= threshold.

    The scale a = mean |x| of what it covers is the best one for the sign.  Several `bases` give x ~ sum of +-a_k: each
    the sign and the mean |.| of what the ones before it left over; then scales by least squares and the nearest of the
    2^bases values take turns.

    `rotate: hadamard` takes the signs of a random Hadamard rotation of each channel's inputs; decoding rotates them
    back.  The rotation follows from the seed.  `rotate: learned` acts inside `train` only: weights are centered
    and divided by their deviation along each channel, w; signs are those of w + (R1^T w R2 - w) |sin b|, with w as a
    matrix for each channel, R1 and R2 (shared by the channels) refitted every epoch by singular value decompositions so
    that the signs stand at the smallest angle, and b learned for each channel.  What is stored are signs: nothing is
    rotated when the model runs.

    Inside `train`, with u the value over the root mean square of its channel, the gradient of the sign is 1
    (`straight`), 1 where |u| <= width (`clipped`), max(0, 2 - 2 |u| / width) (`polynomial`), or
    k max(0, sqrt(2) t - t^2 |u|) with t = 10^(3 progress - 2), k = max(1 / t, 1) (`annealed`).

    applies to: every floating tensor; linear, convolution, embedding; rotate: learned: two or more dimensions
    needs a pretrained model: yes, or train from scratch with it inside train
    needs data: no
    needs training: yes, except with three or four bases
    good at: the smallest weights that need no codebook; 2 to 4 bases where 1 bit is too little
    bad at: keeping accuracy without training; pruned weights with rotate: hadamard, whose masked signs are stored too
    source: arXiv:1603.05279; bases: arXiv:1711.11294; learned: arXiv:2009.13055; polynomial: arXiv:1808.00278
    """

    renews: ClassVar[bool] = True

    bases: int = setting(1, "signs per value", low=1, high=4)
    threshold: float = setting(0.0, "values from here on are +")
    per: str = setting("channel", "what has its own scale", choices=("channel", "tensor", "group"))
    axis: int | None = setting(
        None, "dimension of the channels (per: channel); nothing: 0; 1 for transposed convolutions", low=0
    )
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    scales: str = setting("float32", "how scales are stored", choices=rows.DTYPES)
    rotate: str = setting("none", "rotation before the sign", choices=("none", "hadamard", "learned"))
    share: float = setting(1.0, "rotate: learned, share of the rotation |sin b| at the start", low=0.001, high=1)
    gradient: str = setting(
        "straight", "of the sign, inside train", choices=("straight", "clipped", "polynomial", "annealed")
    )
    width: float = setting(2.0, "where the gradient is cut, in root mean squares of the channel", low=0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold and (self.bases > 1 or self.rotate != "none"):
            raise RecipeError(f"{self.name}: a threshold goes with one base that is not rotated")
        if self.bases > 1 and self.rotate == "learned":
            raise RecipeError(f"{self.name}: rotate: learned stores one sign per value, not {self.bases}")
        if self.axis and self.rotate != "none":
            raise RecipeError(f"{self.name}: rotate: {self.rotate} goes with channels of axis 0, not {self.axis}")

    def refuses(self, target: Target) -> str | None:
        if reason := rows.refusal(target, self.per, self.axis):
            return reason
        if self.rotate == "learned":
            if target.tensor.dim() < 2:
                return "it has one dimension; rotate: learned rotates the inputs of channels"
            n = numel(target.tensor.shape[1:])
            if _near_square(n)[1] > WIDEST:
                return f"its {n} inputs are no product of two numbers up to {WIDEST}, as rotate: learned needs"
        return None

    def fit(self, x: Tensor, stats: Stats) -> State:
        """scale: [bases, *side].  hadamard: seed, []; learned: r1, r2, angle [channels]; where: the mask."""
        if self.rotate == "learned":
            return self._fit_learned(x, stats)
        seed = stats.seed & (1 << 63) - 1
        state = State(where=stats.where, seed=torch.tensor(seed), progress=_progress(stats))
        turned = self._turned(x.detach(), state)
        mask = stats.where if self.rotate == "none" else None
        found = self._scales(*rows.split(turned, mask, self._place(x)))
        state.register_buffer("scale", self._stored(found, x))
        return state

    def _stored(self, scale: Tensor, x: Tensor) -> Tensor:
        side = binary.Binary(*self._place(x)).side_shape(x.shape)
        return rows.stored(scale.reshape(len(scale), *side), self.scales)

    def _place(self, x: Tensor) -> rows.Layout:
        return rows.layout(x, self.per, self.axis, self.group)

    def _scales(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """[bases, rows]"""
        weight = torch.ones_like(values) if mask is None else mask.to(values.dtype)
        count = weight.sum(1).clamp_min(1)
        rest, found = values, []
        for _ in range(self.bases):
            signs = _sign(rest - self.threshold)
            found.append((rest * signs * weight).sum(1) / count)
            rest = rest - found[-1][:, None] * signs
        scale = torch.stack(found)
        for _ in range(ROUNDS if self.bases > 1 else 0):
            codes = _nearest(values, scale[:, :, None]).int()
            signs = torch.stack([(codes >> k & 1) * 2 - 1 for k in range(self.bases)], 1).to(values.dtype)
            gram = (signs * weight[:, None]) @ signs.mT
            target = (signs * weight[:, None]) @ values[:, :, None]
            before, scale = scale, (torch.linalg.pinv(gram, hermitian=True) @ target)[:, :, 0].T.abs()
            if torch.allclose(before, scale, rtol=1e-6):
                break
        return scale

    def encode(self, x: Tensor, state: State) -> Encoded:
        with torch.no_grad():
            inner = self._inner(self._turned(x.detach(), state), state, x.dtype)
        form = self._rotation(x.shape, state)
        return Encoded(form, {"values": inner}, x.shape, x.dtype) if form else inner

    def simulate(self, x: Tensor, state: State) -> Tensor:
        turned = self._turned(x, state)
        value = self._inner(turned.detach(), state, x.dtype).decode()
        slope = self._slope(turned.detach(), state)
        y = _Sign.apply(turned, value, slope)
        form = self._rotation(x.shape, state)
        return (form.back(y) if form else y).to(x.dtype)  # type: ignore[no-any-return]

    def _rotation(self, shape: torch.Size, state: State) -> rotated.Rotated | None:
        if self.rotate != "hadamard":
            return None
        return rotated.Rotated(int(state.get_buffer("seed")), rotated.rounds(shape))

    def _turned(self, x: Tensor, state: State) -> Tensor:
        """What the signs are taken of; differentiable."""
        where = getattr(state, "where", None)
        if self.rotate == "none":
            return x
        x = x if where is None else x.where(where, 0)
        if form := self._rotation(x.shape, state):
            return form.turn(x)
        even = _standardized(x)
        r1, r2 = (state.get_buffer(k).to(even) for k in ("r1", "r2"))
        matrices = even.reshape(len(x), len(r1), len(r2))
        turned = (r1.T @ matrices @ r2).reshape(even.shape)
        share = state.get_parameter("angle").sin().abs()
        return (even + (turned - even).detach() * share[:, None]).reshape(x.shape)

    def _inner(self, turned: Tensor, state: State, dtype: torch.dtype) -> Encoded:
        scale = state.get_buffer("scale")
        form = binary.Binary(*self._place(turned), self.bases)
        if self.bases == 1:
            codes = (turned >= self.threshold).to(torch.uint8)
        else:
            wide = scale.to(torch.promote_types(scale.dtype, torch.float32))
            codes = _nearest(turned, torch.stack([form.spread(s, turned.shape) for s in wide]))
        if self.rotate == "hadamard":
            dtype = torch.promote_types(dtype, torch.float32)
        return Encoded(form, {"codes": codes, "scale": scale.clone()}, turned.shape, dtype)

    def _slope(self, turned: Tensor, state: State) -> Tensor | None:
        """Gradient of the sign at each value; None: 1."""
        if self.gradient == "straight":
            return None
        place = self._place(turned)
        where = getattr(state, "where", None) if self.rotate == "none" else None
        values, mask = rows.split(turned, where, place)
        count = values.shape[1] if mask is None else mask.sum(1).clamp_min(1)
        size = (values.square().sum(1) / count).sqrt().clamp_min(torch.finfo(values.dtype).tiny)
        form = binary.Binary(*place)
        u = turned.abs() / form.spread(size.reshape(form.side_shape(turned.shape)), turned.shape)
        if self.gradient == "clipped":
            return (u <= self.width).to(u.dtype)
        if self.gradient == "polynomial":
            return (2 - 2 * u / self.width).clamp_min(0)
        t = 10 ** (3 * float(state.get_buffer("progress")) - 2)
        return max(1 / t, 1) * (math.sqrt(2) * t - t * t * u).clamp_min(0)

    def _fit_learned(self, x: Tensor, stats: Stats) -> State:
        """The state before, with the rotations and scales of now."""
        if stats.inside is None:
            raise RuleError(f"{self.name}: rotate: learned is for use inside train; else take hadamard or none")
        state = stats.inside.before
        x = x.detach() if stats.where is None else x.detach().where(stats.where, 0)
        if state is None:
            generator = torch.Generator().manual_seed(stats.seed)
            r1, r2 = (_orthogonal(n, generator).to(x.device) for n in _near_square(numel(x.shape[1:])))
            angle = torch.full((len(x),), math.asin(self.share), device=x.device)
            state = State(r1=r1, r2=r2, angle=angle, where=stats.where, learn=("angle",))
        if stats.inside.before is None or stats.inside.progress < 1:
            r1, r2 = state.get_buffer("r1"), state.get_buffer("r2")
            even = _standardized(x).reshape(len(x), len(r1), len(r2)).to(r1.dtype)
            for _ in range(TURNS):
                r1, r2 = _closer(even, r1, r2)
            state.register_buffer("r1", r1)
            state.register_buffer("r2", r2)
        values, mask = rows.split(x, stats.where, self._place(x))
        count = values.shape[1] if mask is None else mask.sum(1).clamp_min(1)
        state.register_buffer("scale", self._stored((values.abs().sum(1) / count)[None], x))
        state.register_buffer("progress", _progress(stats))
        return state


class _Sign(torch.autograd.Function):
    """`value`, with the gradient of x times `slope`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradients[0] if slope is None else gradients[0] * slope.to(gradients[0].dtype)), None, None


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1, -1).to(x.dtype)


def _nearest(x: Tensor, scale: Tensor) -> Tensor:
    """Codes, uint8, of the nearest sum of +-scale[k]; scale [bases, ...] broadcasts to [bases, *x.shape]."""
    codes = torch.arange(1 << len(scale), device=x.device)
    levels = sum((codes >> k & 1).mul(2).sub(1).reshape(-1, *[1] * x.dim()) * s for k, s in enumerate(scale))
    assert isinstance(levels, Tensor)
    levels, order = levels.sort(0)
    found = order[0].expand(x.shape)
    for i in range(1, len(codes)):
        found = torch.where(x > (levels[i] + levels[i - 1]) / 2, order[i], found)
    return found.to(torch.uint8)


def _progress(stats: Stats) -> Tensor:
    return torch.tensor(stats.inside.progress if stats.inside else 0.0)


def _near_square(n: int) -> tuple[int, int]:
    """The two factors of n that are nearest to each other, the smaller one first."""
    first = next(i for i in range(math.isqrt(n), 0, -1) if n % i == 0)
    return first, n // first


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Uniform among the orthogonal matrices (Stewart 1980)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator))
    found: Tensor = q * _sign(r.diagonal())
    return found


def _standardized(x: Tensor) -> Tensor:
    """[channels, inputs] of mean 0 and deviation 1, in float32 or wider."""
    values = x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))
    values = values - values.mean(1, keepdim=True)
    return values / values.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)


def _closer(x: Tensor, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations with a larger sum of B * (R1^T X R2), B its signs: first R1, then R2, each the best one (eq. 9-11)."""
    signs = _sign(r1.T @ x @ r2)
    u, _, v = torch.linalg.svd(torch.einsum("oij,okj->ik", signs @ r2.T, x))
    r1 = v.T @ u.T
    u, _, v = torch.linalg.svd(torch.einsum("oji,ojk->ik", x, r1 @ signs))
    return r1, u @ v
