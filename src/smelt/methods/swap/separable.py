from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.apply import CALIBRATION_BATCHES
from smelt.core.data import batch, evaluating, forward_or_raise, move
from smelt.core.edit import Edit, Replace
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.factors import Part, chain, conv, refusal
from smelt.grids.terms import Fitted, Outer, Supported, columns, fit
from smelt.train.aimed import replaced

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d)
ORDERS = ("depthwise", "pointwise", "both")
EPS = 1e-5  # of new norms
SHIFT = 3.0  # standard deviations below the mean that a new ReLU lets pass


@dataclass(frozen=True)
class Separable(Rewrite):
    """A convolution becomes depthwise ones and pointwise ones that come closest to what it gave.

    For a kernel [O, C, K] of K taps, where m is the multiplier:

        depthwise   K taps on each channel, m C of them; then 1 x 1 from these to O    W = sum P[o, cj] D[cj, k]
        pointwise   1 x 1 to m O; then K taps on each of these, m summed to an output  W = sum D[oj, k] P[oj, c]
        both        1 x 1 to r; K taps on each; 1 x 1 to O                             W = sum A[o, r] D[r, k] B[r, c]
        auto        of those that take no more multiplications than depthwise first, the one with the least error

    Start: the singular vectors of W[:, c] or W[o].  Then depthwise kernels and the columns of the pointwise layer are
    exchanged by turns, each for the best given the others (least squares).  The error is that at the layer's output,
    from the second moments of what enters it now, layer by layer, aimed at what it gave before; with `weighted: false`
    that of the kernel.  `multiplier` or `ratio` says how large the new layers are; those that would need no fewer
    weights or multiplications stay dense, with `keep: faster` also those that run no faster on the first batch (without
    norms, which `swap.fold_norm` takes out in the end).

    `between` puts batch norms, that change nothing at first, behind all new layers but the last, and a ReLU before the
    last pointwise one, moved so that it cuts next to nothing at first.

    applies to: 1-D and 2-D convolutions with groups = 1 and more than one tap
    needs a pretrained model: yes
    needs data: yes, a few batches without labels; weighted: false with nothing between needs none
    needs training: yes, to recover: distillation of the logits
    good at: 3 x 3 kernels: 3 to 8 times fewer multiplications, in ordinary layers
    bad at: accuracy without training; multipliers above 1, which most kernels run slowly (order: both does not)
    source: Guo et al. 2018, arXiv:1808.05517 (decomposition); Haase & Amthor 2020, arXiv:2003.13549 (pointwise first)
    """

    order: str = setting("auto", "what comes first", choices=("auto", *ORDERS))
    multiplier: int | None = setting(
        None, "depthwise kernels of a channel, 1 where nothing else is given; both: as costly as so many", low=1
    )
    ratio: float | None = setting(None, "share of a layer's multiplications to keep at most", low=0, high=1)
    round_to: int = setting(1, "both: channels in the middle are a multiple of this", low=1)
    weighted: bool = setting(True, "count errors as they show at the layer's output")
    damp: float = setting(0.01, "weighted: added to the diagonal of the moments, a share of its mean", low=0, high=1)
    turns: int = setting(10, "times that all terms are fitted anew, at most", low=0, high=10_000)
    between: str = setting("nothing", "what stands between the new layers", choices=("nothing", "norm", "relu"))
    keep: str = setting("smaller", "which new layers are taken", choices=("smaller", "faster"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiplier is not None and self.ratio is not None:
            raise RecipeError(f"{self.name}: multiplier and ratio each say how large the layers are; give one of them")
        if self.between == "relu" and self.order == "pointwise":
            raise RecipeError(
                f"{self.name}: between: relu stands before a pointwise layer; order: pointwise ends otherwise"
            )

    def refuses(self, target: Target) -> str | None:
        return refusal(target, CONVOLUTIONS)

    def _dense(self, target: Target) -> str | None:
        """Why its layer stays as it is."""
        taps, shape = target.tensor[0, 0].numel(), _Shape.of(target)
        if taps == 1:
            return "its kernel has one tap, so there is nothing to separate"
        if not self._sizes(shape):
            return f"{self._what()} would need no fewer weights or multiplications than its {target.tensor.numel():,}"
        return None

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        damp, faster = self.damp if self.weighted else None, self.keep == "faster"
        edits, notes = replaced(model, targets, known, self._dense, self._chain, damp=damp, faster=faster)
        if self.between != "nothing":
            edits = _with_norms(model, edits, known, self.between == "relu")
        return [*edits, *notes]

    def _chain(self, target: Target, w: Tensor, metric: Tensor) -> tuple[Replace, Tensor]:
        """What comes closest to w [out, in * taps], and the kernel that it amounts to."""
        shape = _Shape.of(target)
        found = [
            (_FITS[order](w, metric, shape, size, self.turns), order) for order, size in self._sizes(shape).items()
        ]
        best, order = min(found, key=lambda item: item[0].error)
        return chain(target, _parts(target, best, order, shape)), best.left @ best.right

    def _sizes(self, shape: _Shape) -> dict[str, int]:
        """order -> m or r, for those that may be taken and are smaller than the dense layer."""
        if self.ratio is None:
            m = self.multiplier or 1
            limit = shape.cost("depthwise", m)
            own = shape.cost("pointwise", m) if self.order == "pointwise" else limit
            sizes = {"depthwise": shape.most("depthwise", limit), "pointwise": shape.most("pointwise", own)}
        else:
            limit = int(self.ratio * shape.dense)
            sizes = {order: shape.most(order, limit) for order in ORDERS[:2]}
        sizes["both"] = shape.most("both", limit) // self.round_to * self.round_to
        wanted: tuple[str, ...] = ORDERS if self.order == "auto" else (self.order,)
        if self.between == "relu":
            wanted = tuple(order for order in wanted if order != "pointwise")
        return {o: sizes[o] for o in wanted if sizes[o] > 0 and shape.smaller(o, sizes[o])}

    def _what(self) -> str:
        size = f"ratio {self.ratio:g}" if self.ratio is not None else f"multiplier {self.multiplier or 1}"
        return f"order {self.order} with {size}"


@dataclass(frozen=True)
class _Shape:
    """Of a kernel; `steps`: inputs for each output (product of the strides)."""

    out: int
    inputs: int
    taps: int
    steps: int

    @staticmethod
    def of(target: Target) -> _Shape:
        weight, module = target.tensor, target.module
        return _Shape(weight.shape[0], weight.shape[1], weight[0, 0].numel(), prod(module.stride))  # type: ignore[arg-type]

    @property
    def dense(self) -> int:
        return self.out * self.inputs * self.taps

    def cost(self, order: str, size: int, steps: int | None = None) -> int:
        """Multiplications for one place of the output; with steps = 1 the weights."""
        steps = self.steps if steps is None else steps
        if order == "depthwise":
            return size * self.inputs * (self.taps + self.out)
        if order == "pointwise":
            return size * self.out * (steps * self.inputs + self.taps)
        return size * (steps * self.inputs + self.taps + self.out)

    def most(self, order: str, limit: int) -> int:
        """The largest size that costs no more than `limit`."""
        full = {"depthwise": min(self.out, self.taps), "pointwise": min(self.inputs, self.taps)}
        return min(limit // self.cost(order, 1), full.get(order, limit))

    def smaller(self, order: str, size: int) -> bool:
        return max(self.cost(order, size), self.cost(order, size, 1)) < self.dense


def _depthwise(w: Tensor, metric: Tensor, shape: _Shape, m: int, turns: int) -> Fitted:
    c, taps = shape.inputs, shape.taps
    kernels, _ = _by_channel(w, shape, m)
    right = w.new_zeros(c, m, c, taps)
    at = torch.arange(c, device=w.device)
    right[at, :, at] = kernels
    places = torch.arange(c * taps, device=w.device).reshape(c, taps)
    own = [j // m for j in range(c * m)]
    return fit(w, metric, Supported(metric, right.reshape(c * m, -1), own, places), turns=turns)


def _pointwise(w: Tensor, metric: Tensor, shape: _Shape, m: int, turns: int) -> Fitted:
    mixes, kernels = _by_output(w, shape, m)
    left = torch.eye(shape.out, dtype=w.dtype, device=w.device).repeat_interleave(m, 1)
    return fit(w, metric, Outer(metric, mixes.flatten(0, 1), kernels.flatten(0, 1)), left, turns=turns)


def _both(w: Tensor, metric: Tensor, shape: _Shape, rank: int, turns: int) -> Fitted:
    """Starts from the strongest of the terms of either order, whichever can do with those."""
    c = shape.inputs
    full = min(shape.taps, shape.out), min(shape.taps, c)
    kernels, strengths = _by_channel(w, shape, full[0])
    alone = torch.eye(c, dtype=w.dtype, device=w.device).repeat_interleave(full[0], 0)
    mixes, taps = _by_output(w, shape, full[1])
    starts = []
    for b, k, size in (
        (alone, kernels.flatten(0, 1), strengths.flatten()),
        (mixes.flatten(0, 1), taps.flatten(0, 1), torch.ones(mixes.shape[:2], dtype=w.dtype).flatten().to(w.device)),
    ):
        rows = (b[:, :, None] * k[:, None]).flatten(1)
        energy = size.square() * ((rows @ metric) * rows).sum(1)
        top = energy.argsort(descending=True, stable=True)[:rank].sort().values
        rest = w - columns(w, metric, rows[top]) @ rows[top]
        starts.append((float(((rest @ metric) * rest).sum()), b[top], k[top]))
    _, b, k = min(starts, key=lambda start: start[0])
    return fit(w, metric, Outer(metric, b, k), turns=turns)


_FITS = {"depthwise": _depthwise, "pointwise": _pointwise, "both": _both}


def _by_channel(w: Tensor, shape: _Shape, m: int) -> tuple[Tensor, Tensor]:
    """The m strongest kernels [in, m, taps] of each input channel, and their singular values [in, m]."""
    _, s, v = torch.linalg.svd(w.reshape(shape.out, shape.inputs, shape.taps).transpose(0, 1), full_matrices=False)
    return v[:, :m], s[:, :m]


def _by_output(w: Tensor, shape: _Shape, m: int) -> tuple[Tensor, Tensor]:
    """mixes [out, m, in] and kernels [out, m, taps], the m strongest of each output."""
    u, s, v = torch.linalg.svd(w.reshape(shape.out, shape.inputs, shape.taps), full_matrices=False)
    return (u * s[:, None])[:, :, :m].transpose(1, 2), v[:, :m]


def _parts(target: Target, found: Fitted, order: str, shape: _Shape) -> list[Part]:
    module: Any = target.module
    kernel, axes = target.tensor.shape[2:], range(target.tensor.dim() - 2)
    ones = [1] * len(kernel)
    rows = found.right.reshape(-1, shape.inputs, shape.taps)
    if order == "depthwise":
        own = torch.arange(shape.inputs, device=rows.device).repeat_interleave(len(rows) // shape.inputs)
        taps, after = _balanced(rows[torch.arange(len(rows), device=rows.device), own], found.left.T)
        last = after.T.reshape(shape.out, -1, *ones)
        return [conv(module, taps.reshape(-1, 1, *kernel), axes, shape.inputs), conv(module, last)]
    u, s, v = torch.linalg.svd(rows, full_matrices=False)  # each row is a mix of channels times a kernel
    mix, taps = u[:, :, 0] * s[:, :1], v[:, 0]
    if order == "pointwise":
        mix, taps = _balanced(mix, taps)
        first = conv(module, mix.reshape(*mix.shape, *ones))
        return [first, conv(module, taps.reshape(shape.out, -1, *kernel), axes, shape.out)]
    mix, taps, after = _balanced(mix, taps, found.left.T)
    middle = conv(module, taps.reshape(-1, 1, *kernel), axes, len(taps))
    return [conv(module, mix.reshape(*mix.shape, *ones)), middle, conv(module, after.T.reshape(shape.out, -1, *ones))]


def _balanced(*factors: Tensor) -> list[Tensor]:
    """The same terms with rows of equal length in all factors [r, ...]."""
    lengths = [f.norm(dim=1, keepdim=True) for f in factors]
    mean = torch.stack(lengths).prod(0) ** (1 / len(factors))
    return [f * (mean / length.where(length > 0, 1)) for f, length in zip(factors, lengths, strict=True)]


def _with_norms(model: nn.Module, edits: Sequence[Edit], known: Known, relu: bool) -> list[Edit]:
    """The same chains with norms between their layers, which give what enters them on the calibration batches."""
    known.example(model, "for the statistics of the norms (between)")
    trial = copy.deepcopy(model)
    for edit in edits:
        edit.apply(trial)
    paths = [e.path for e in edits if isinstance(e, Replace)]
    chains = {path: list(trial.get_submodule(path).children()) for path in paths}
    inner = {f"{path}.{i}": layer for path, layers in chains.items() for i, layer in enumerate(layers[:-1])}
    seen = _moments(trial, inner, known)
    return [_normed(e, seen, relu) if isinstance(e, Replace) else e for e in edits]


def _moments(model: nn.Module, layers: Mapping[str, nn.Module], known: Known) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel of what the layers give."""
    sums: dict[str, list[Any]] = {path: [0, 0.0, 0.0] for path in layers}

    def see(path: str, out: Tensor) -> None:
        flat = out.detach().transpose(0, 1).flatten(1).double()
        for i, value in enumerate((flat.shape[1], flat.sum(1), flat.square().sum(1))):
            sums[path][i] = sums[path][i] + value

    hooks = [m.register_forward_hook(lambda _, x, out, path=path: see(path, out)) for path, m in layers.items()]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for item in islice(known.batches or (), CALIBRATION_BATCHES):
                forward_or_raise(model, move(batch(item)[0], device), "while norms are set")
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for path, (number, total, squares) in sums.items():
        if not number:
            raise DataError(f"no calibration batch reaches {path.rpartition('.')[0]!r}; take it out of the step")
        mean = total / number
        found[path] = (mean, (squares / number - mean.square()).clamp_min(0))
    return found


def _normed(edit: Replace, seen: Mapping[str, tuple[Tensor, Tensor]], relu: bool) -> Replace:
    layers, values = edit.arguments["layers"], dict(edit.values)
    made: list[Any] = []
    filled: dict[str, Tensor] = {}
    shift: Tensor | None = None  # what the layer before adds
    for i, (kind, given) in enumerate(layers):
        at, weight = len(made), values[f"{i}.weight"]
        filled[f"{at}.weight"] = weight
        bias = values.get(f"{i}.bias")
        if shift is not None:
            moved = weight.double().flatten(1) @ shift
            bias, given = (-moved if bias is None else bias - moved), {**given, "bias": True}
        made.append([kind, given])
        shift = None
        if bias is not None:
            filled[f"{at}.bias"] = bias.to(weight.dtype)
        if i == len(layers) - 1:
            break
        mean, variance = seen[f"{edit.path}.{i}"]
        made.append([kind.replace("Conv", "BatchNorm"), {"num_features": len(mean), "eps": EPS}])
        deviation = (variance + EPS).sqrt()
        norm = {"weight": deviation, "bias": mean, "running_mean": mean, "running_var": variance}
        if relu and i == len(layers) - 2:
            shift = SHIFT * deviation - mean
            norm["bias"] = mean + shift
            made.append("ReLU")
        filled |= {f"{at + 1}.{k}": v.to(weight.dtype) for k, v in norm.items()}
        filled[f"{at + 1}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return replace(edit, arguments={"layers": made}, values=filled)
