from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms.sparse import Sparse
from smelt.scores._choose import kept_of, n_of_m, top
from smelt.statistics.gram import damped, rows

RATIO = 0.5  # where nothing else is given


@dataclass(frozen=True)
class SparseGPT(Codec):
    """Zero weights by second-order scores, and move the others so that each layer's outputs change least.

    Minimised is (w - w0)^T H (w - w0) over every row w of a layer's weight [out, k], with H = E x x^T of its inputs
    (plus `damp` times its mean diagonal); `ratio` of the weights become 0, or M - N of every M in a row (`pattern`).

        solver obs   optimal brain surgeon column by column (SparseGPT): for every `block` columns the mask takes the
                     lowest w_c^2 / [H^-1]_cc, for the not yet decided H; what is zeroed moves the columns after it
        solver admm  masks and values alternate until the mask stands still, then the values by conjugate gradients
                     on the fixed mask, that is least squares (ALPS); a smaller error for some ten times the time

    Statistics are gathered in the order in which the model runs, of a `block` of the model at a time (as published) or
    of a `layer` (`gather`), on outputs of what is already pruned.  Weights that earlier steps zeroed count as zeros and
    stay so.  Inside `train` the mask is found once, at the start.

    applies to: linear; convolution, grouped too
    needs a pretrained model: yes
    needs data: yes, a few thousand positions per layer; no labels
    needs training: no, up to about 50 % zeros or 2:4
    good at: large models, pruned in one pass in minutes
    bad at: layers with fewer calibration positions than inputs; more than about 70 % zeros
    source: Frantar & Alistarh 2023, arXiv:2301.00774; admm: Meng et al. 2024 (ALPS), arXiv:2406.07831
    """

    settles = True

    ratio: float = setting(RATIO, "share of each tensor's weights to zero", low=0, high=1)
    pattern: str | None = setting(None, "N:M, keep N of every M in place of a ratio")
    solver: str = setting("obs", "how masks and values are found", choices=("obs", "admm"))
    gather: str = setting("block", "what is pruned between two runs of the data", choices=("block", "layer"))
    damp: float = setting(0.01, "share of the mean diagonal of H added to its diagonal", low=1e-8, high=1)
    block: int = setting(128, "columns whose mask is chosen together (solver: obs)", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            n_of_m(self.pattern, f"{self.name}.pattern")
            if self.ratio != RATIO:
                raise RecipeError(f"{self.name}.pattern {self.pattern!r} fixes the ratio; take ratio out")

    def refuses(self, target: Target) -> str | None:
        module = target.module
        if not isinstance(module, (nn.Linear, _ConvNd)) or target.places[0][1] != "weight":
            return f"it is no weight of a linear or convolution layer but of {type(module).__name__}"
        if isinstance(module, _ConvTransposeNd):
            return "the weights of a transposed convolution share no inputs; take prune.weights"
        row = target.tensor[0].numel()
        if self.pattern is not None and row % (m := n_of_m(self.pattern, "")[1]):
            return f"its rows of {row} weights do not divide into groups of {m} ({self.pattern})"
        return None

    def needs_at(self, place: str) -> tuple[str, ...]:
        return ("gram",) if place == "weight" else ()

    def order(self) -> str | None:
        return self.gather

    def fit(self, x: Tensor, stats: Stats) -> State:
        if "gram" not in stats.gathered:
            raise RuleError(f"{self.name} needs the second moments of the layer's inputs, which are not known")
        gram: Tensor = stats.gathered["gram"].to(x.device)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        where = torch.ones_like(x, dtype=torch.bool) if stats.where is None else stats.where
        solve = self._surgeon if self.solver == "obs" else self._alternate
        found = [
            solve(w.masked_fill(~keep, 0), damped(h, self.damp), keep)
            for w, h, keep in zip(rows(wide, len(gram)), gram, rows(where, len(gram)), strict=True)
        ]
        values, mask = (torch.stack(part).reshape(x.shape) for part in zip(*found, strict=True))
        return State(mask=mask, values=values.to(x.dtype), learn=("values",))

    def _chosen(self, scores: Tensor, keep: Tensor) -> Tensor:
        """Mask of a matrix of scores; what is not in `keep` goes first."""
        scores = scores.masked_fill(~keep, -math.inf)
        if self.pattern is None:
            return top(scores.flatten(), kept_of(scores.numel(), self.ratio)).reshape(scores.shape) & keep
        n, m = n_of_m(self.pattern, "")
        return top(scores.reshape(-1, m), n).reshape(scores.shape) & keep

    def _surgeon(self, w: Tensor, h: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 1 of Frantar & Alistarh.  w, keep [out, k], h [k, k]."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        factor = torch.linalg.cholesky(inverse, upper=True).to(w.dtype)  # row c: of H^-1 with what lies before c gone
        together = 1 if self.pattern is None else n_of_m(self.pattern, "")[1]
        width = max(together, self.block - self.block % together)
        w, mask = w.clone(), torch.ones_like(keep)
        for start in range(0, w.shape[1], width):
            end = min(start + width, w.shape[1])
            part, own = w[:, start:end].clone(), factor[start:end, start:end]
            scale, errors = own.diagonal(), torch.zeros_like(part)
            if self.pattern is None:
                mask[:, start:end] = self._chosen((part / scale).square(), keep[:, start:end])
            for c in range(end - start):
                if self.pattern is not None and c % together == 0:
                    now = slice(c, c + together)
                    chosen = self._chosen((part[:, now] / scale[now]).square(), keep[:, start:end][:, now])
                    mask[:, start:end][:, now] = chosen
                column = part[:, c]
                kept = column * mask[:, start + c]
                errors[:, c] = (column - kept) / scale[c]
                part[:, c:] -= errors[:, c, None] * own[c, c:]
                part[:, c] = kept
            w[:, start:end] = part
            w[:, end:] -= errors @ factor[start:end, end:]
        return w * mask, mask

    def _alternate(self, w: Tensor, h: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 1 of Meng et al., on weights scaled so that the diagonal of H is 1."""
        scale = h.diagonal().sqrt()
        h = h / scale / scale[:, None]
        spectrum, basis = (part.to(w.dtype) for part in torch.linalg.eigh(h))
        scaled = w.double() * scale
        pull = (scaled @ h).to(w.dtype)
        mask = self._chosen(scaled.abs(), keep)
        sparse, dual = (scaled * mask).to(w.dtype), torch.zeros_like(w)
        strength, before = STRENGTH, mask
        for step in count(1):
            dense = ((pull - dual + strength * sparse) @ basis / (spectrum + strength)) @ basis.T
            wanted = dense + dual / strength
            mask = self._chosen(wanted.abs(), keep)
            sparse = wanted * mask
            dual = dual + strength * (dense - sparse)
            if step % PATIENCE == 0:
                moved = int((mask != before).sum()) / max(1, int(mask.sum()))
                if not moved or step >= STEPS:
                    break
                strength *= next(factor for least, factor in GROWTH if moved >= least)
                before = mask
        return (_least_squares(scaled, sparse.double(), h, mask) / scale).to(w.dtype), mask

    def encode(self, x: Tensor, state: State) -> Encoded:
        mask, values = state.get_buffer("mask"), state.get_parameter("values").detach()
        return Encoded(Sparse(), {"mask": mask.clone(), "values": torch.where(mask, values, 0)}, x.shape, x.dtype)

    def simulate(self, x: Tensor, state: State) -> Tensor:
        """The values found learn from then on; x, which they replace, has their gradient."""
        mask, values = state.get_buffer("mask"), state.get_parameter("values")
        return torch.where(mask, values + (x - x.detach()), 0)


# Meng et al., section 3.2 and appendix: the first penalty, steps between two looks at the mask, at most so many steps,
# and what the penalty grows by when at least such a share of the mask has moved.
STRENGTH = 0.1
PATIENCE = 3
STEPS = 300
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# Conjugate gradients end where the residual is this share of what it was, or after so many steps.
CLOSE = 1e-6
MOST = 100


def _least_squares(target: Tensor, start: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """[out, k] rows that minimise (w - target)^T h (w - target) among those that are 0 outside the mask."""
    w = start * mask
    residual = (target - w) @ h * mask
    first = size = residual.square().sum(1, keepdim=True)
    direction = residual
    for _ in range(MOST):
        if bool((size <= CLOSE**2 * first).all()):
            break
        image = direction @ h * mask
        length = size / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
        w = w + length * direction
        residual = residual - length * image
        now = residual.square().sum(1, keepdim=True)
        direction = residual + now / size.clamp_min(torch.finfo(size.dtype).tiny) * direction
        size = now
    return w
