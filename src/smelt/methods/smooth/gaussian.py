from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from smelt.core.edit import Edit, Fill, Note
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target

TRUNCATE = 4.0  # standard deviations at which the window ends


@dataclass(frozen=True)
class Gaussian(Rewrite):
    """Smooth weights by a Gaussian, a low-pass filter: kernels in space, rows along their last dimension.

    w'[i] = sum over |k| <= r of g(k) w[i + k],   g(k) ~ exp(-k^2 / (2 sigma^2)),  sum g = 1,  r = round(4 sigma),

    along each dimension of a convolution's kernel, else along the last dimension of the tensor.  Beyond the edge stands
    the mirrored tensor (d c b a | a b c d | d c b a), which keeps the sum of the weights, or its last value.

    applies to: kernels of convolutions larger than 1; rows of every other weight
    needs a pretrained model: yes
    needs data: no
    needs training: a little, to recover
    good at: lower entropy at a given step of the levels: a smaller file where it is quantized and coded afterwards
    bad at: shrinking alone, which it never does; linear layers, whose neighbouring weights have nothing in common
    source: R. C. Gonzalez, R. E. Woods, Digital Image Processing, 4th ed. 2018, section 3.5
    """

    sigma: float = setting(0.5, "standard deviation of the Gaussian, in weights", low=0.01, high=1000)
    edge: str = setting("reflect", "what stands beyond the edge", choices=("reflect", "nearest"))

    def refuses(self, target: Target) -> str | None:
        if not target.tensor.is_floating_point() or target.tensor.dim() < 2:
            return "it is no floating tensor of two or more dimensions"
        if all(target.tensor.shape[d] == 1 for d in _dims(target)):
            size = " x ".join(str(target.tensor.shape[d]) for d in _dims(target))
            return f"there is nothing to smooth in {'a kernel of' if _is_kernel(target) else 'rows of'} {size}"
        return None

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        edits: list[Edit] = [Fill(target.name, self._smooth(target)) for target in targets]
        return [*edits, Note("", "smoothing alone makes no file smaller; quantize and code the weights afterwards")]

    def _smooth(self, target: Target) -> Tensor:
        x = target.tensor.detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        radius = int(TRUNCATE * self.sigma + 0.5)
        offset = torch.arange(-radius, radius + 1, dtype=torch.float64, device=x.device)
        window = torch.exp(-0.5 * (offset / self.sigma).square())
        window = (window / window.sum()).to(x.dtype)
        for dim in _dims(target):
            n = x.shape[dim]
            place = torch.arange(-radius, n + radius, device=x.device)
            if self.edge == "reflect":
                place = place.remainder(2 * n)
                place = torch.minimum(place, 2 * n - 1 - place)
            rows = x.movedim(dim, -1)
            wide = rows.reshape(-1, 1, n).index_select(2, place.clamp(0, n - 1))
            x = functional.conv1d(wide, window[None, None]).reshape(rows.shape).movedim(-1, dim)
        return x


def _is_kernel(target: Target) -> bool:
    return isinstance(target.module, _ConvNd) and target.places[0][1] == "weight"


def _dims(target: Target) -> range:
    """The dimensions that are smoothed."""
    dims = target.tensor.dim()
    return range(2, dims) if _is_kernel(target) else range(dims - 1, dims)
