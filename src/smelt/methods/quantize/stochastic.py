"""Values rounded at random, without bias, in groups: the codec of saved activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError
from smelt.core.method import Codec, State, Stats
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms.grouped import Grouped
from smelt.grids.stochastic import rounded


@dataclass(frozen=True)
class Stochastic(Codec):
    """Packed levels between the ends of each group of values, rounded up or down at random so that the mean is right.

    With n levels between the ends of its group, a value x at t = (x - low) / step becomes floor(t) or floor(t) + 1, the
    latter with the probability t - floor(t).  A gradient in which stored values stand linearly then has the right
    mean, whatever the bits.

    `at: saved`, inside `train`, it stores what operations save for their backward pass, and nothing of it is in the
    file.  What is exact in a few bits is stored so (the sign that ReLU needs, the place of the maximum in its window,
    the mask of dropout); inputs of convolutions and linear layers and normalised inputs of norms in `bits` bits, once
    however many operations need them, of ReLU's outputs those above 0; the slope of smooth activation functions
    likewise; what remains in `rest` bits.  With `adapt` the bits differ between tensors, and `bits` is their mean over
    all values: they go where they lower the variance of the gradient most, which is measured by disturbing one stored
    tensor after the other and running the backward pass again.  Selected with `on` are modules: those of which all
    weights are.

    applies to: every floating tensor; at saved, every operation of a training step
    needs a pretrained model: no
    needs data: no
    needs training: no; at saved it makes the memory of training smaller
    good at: activations in 2 bits, 12 to 20 times less memory for the same accuracy; convolutions with batch norms
    bad at: weights (quantize.affine rounds to the nearest); steps take about twice as long on a CPU, where glibc \
gives memory back only with MALLOC_MMAP_THRESHOLD_=262144 in the environment
    source: Chen et al. 2021, arXiv:2104.14129 (ActNN); adapt: Liu et al. 2022, arXiv:2206.11357 (GACT)
    """

    places: ClassVar[tuple[str, ...]] = ("weight", "saved")

    bits: int = setting(3, "bits per value; with adapt, their mean", low=1, high=8)
    group: int = setting(256, "values that share their ends, a multiple of 8", low=8, high=1 << 20)
    rest: int = setting(8, "at saved, bits of what operations save that are not known by name", low=1, high=8)
    adapt: int | None = setting(
        None, "at saved, optimizer steps between two measurements of where bits are needed; nothing: none", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.group, int) and self.group % 8:
            raise RecipeError(f"{self.name}.group is {self.group}; it takes a multiple of 8")

    def refuses(self, target: Target) -> str | None:
        if not target.tensor.is_floating_point():
            return f"it is {target.tensor.dtype}; only floating tensors can be stored in fewer bits"
        return None if target.tensor.numel() else "it is empty"

    def period(self) -> int | None:
        return self.adapt

    def fit(self, x: Tensor, stats: Stats) -> State:
        """State(seed); masked entries are none of the values whose ends count."""
        return State(seed=torch.tensor(stats.seed & 0xFFFFFFFF), where=stats.where)

    def encode(self, x: Tensor, state: State) -> Encoded:
        flat, where = x.detach().reshape(-1), getattr(state, "where", None)
        if where is not None:
            flat = flat.masked_fill(~where.reshape(-1), 0)
        parts = rounded(flat, bits=self.bits, group=self.group, seed=int(state.get_buffer("seed")))
        return Encoded(Grouped(self.bits, self.group), parts, x.shape, x.dtype)
