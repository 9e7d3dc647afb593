"""What codecs share that scale values before they round them: where scales stand, what counts, at which place."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Codec, State, Stats, straight_through
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.forms import _sides as sides


@dataclass(frozen=True)
class Sided(Codec):
    """A codec with a scale per tensor, channel, group or (activations) token.

    Write `fitted`, which finds them, and `stored`, which rounds by them.

    Weights have a scale per channel unless `per` says otherwise, activations one per tensor.  Those of activations
    come from each batch, or with `dynamic: false` from calibration data.  Rows of activations lie along their last
    dimension: a token is one row, and groups run within rows.
    """

    places: ClassVar[tuple[str, ...]] = ("weight", "input", "output")

    per: str | None = setting(
        None,
        "what has its own scale; nothing: channel for weights, tensor for activations",
        choices=("channel", "tensor", "group", "token"),
    )
    axis: int | None = setting(
        None, "dimension of the channels (per: channel); nothing: 0; 1 for transposed convolutions", low=0
    )
    group: int = setting(64, "values per group (per: group)", low=1, high=1 << 31)
    dynamic: bool = setting(True, "activations: take the scale from each batch, not from calibration data")

    @abstractmethod
    def fitted(self, rows: Tensor, where: Tensor | None) -> dict[str, Tensor]:
        """What `stored` must know: a number for each row [r, n], as [r], or for all of them, as [].

        where: which entries count.  With two values to a row, they are the range that was seen in calibration.
        """

    @abstractmethod
    def stored(self, x: Tensor, axis: int | None, group: int, state: State) -> Encoded:
        """`x` by what `fitted` found; what is [r] there has the side's shape here (see `forms._sides.Sided`)."""

    def refuses(self, target: Target) -> str | None:
        if not target.tensor.is_floating_point():
            return f"it is {target.tensor.dtype}; only floating tensors can be stored in fewer bits"
        if not target.tensor.numel():
            return "it is empty"
        dims = target.tensor.dim()
        if self.layout() in (None, "channel") and dims > 1 and (self.axis or 0) >= dims:
            return f"it has {dims} dimensions, counted from 0, and none is axis {self.axis}"
        return None

    def layout(self) -> str | None:
        """`per`, where no other setting decides it."""
        return self.per

    def searches(self) -> str | None:
        """The setting because of which scales need all values, and not only a calibrated range."""
        return None

    def needs_at(self, place: str) -> tuple[str, ...]:
        if place == "weight":
            return ()
        per = self.layout()
        if per == "channel":
            raise RecipeError(f"{self.name}: per 'channel' is for weights; activations take tensor, token or group")
        if self.dynamic:
            return ()
        wrong = f"per: {per}" if per in ("token", "group") else self.searches()
        if wrong:
            raise RecipeError(f"{self.name}: {wrong} at {place} is known at run time only; take dynamic: true")
        return ("range",)

    def fit(self, x: Tensor, stats: Stats) -> State:
        """Raises RecipeError, RuleError: a scale per token of a weight; activations without a range.

        An empty `x` alone gives an empty state, which means dynamic.
        """
        if "range" in stats.gathered:
            low, high = stats.gathered["range"]
            return self._state(torch.stack((low, high)).reshape(1, 2), None, torch.Size())
        if not x.numel():
            if not self.dynamic:
                raise RuleError(f"{self.name}: no range was gathered; calibrate with data, or take dynamic: true")
            return State()
        if self.layout() == "token":
            raise RecipeError(f"{self.name}: per 'token' is for activations; weights take channel, tensor or group")
        return self._fit(x, stats.where, *self._sides(x))

    def encode(self, x: Tensor, state: State) -> Encoded:
        if any(True for _ in state.buffers()):
            return self.stored(x, *self._sides_of(x, state), state)
        axis, group = self._dynamic_sides()
        return self.stored(x, axis, group, self._fit(x, None, axis, group))

    def simulate(self, x: Tensor, state: State) -> Tensor:
        if not x.numel():
            return x
        rowwise = x.dim() != 2 and self.layout() in ("token", "group") and not any(True for _ in state.buffers())
        given = x.detach().reshape(-1, x.shape[-1] if x.dim() else 1) if rowwise else x.detach()
        return straight_through(x, self.encode(given, state).decode().reshape(x.shape))

    def _fit(self, x: Tensor, where: Tensor | None, axis: int | None, group: int) -> State:
        rows = sides.rows(x.detach(), axis, group)
        if where is None and rows.numel() != x.numel():  # what fills the last group does not count
            where = torch.ones_like(x, dtype=torch.bool)
        counts = None if where is None else sides.rows(where, axis, group, False)
        return self._state(rows, counts, sides.side_shape(x.shape, axis, group))

    def _state(self, rows: Tensor, where: Tensor | None, side: torch.Size) -> State:
        found = self.fitted(rows, where)
        state = State()
        for name, tensor in found.items():
            state.register_buffer(name, tensor.reshape(side) if tensor.dim() else tensor)
        return state

    def _sides(self, x: Tensor) -> tuple[int | None, int]:
        """(axis, group) of a weight; a tensor of one dimension (a bias) always has one scale, or groups."""
        per = self.layout() or "channel"
        if per == "tensor" or (x.dim() < 2 and per == "channel"):
            return None, 0
        if per == "channel":
            return self.axis or 0, 0
        return (0 if x.dim() > 1 else None), self.length()

    def _sides_of(self, x: Tensor, state: State) -> tuple[int | None, int]:
        """The same of a weight or of calibrated activations, by what was found."""
        dims = max(t.dim() for t in state.buffers())
        return self._sides(x) if dims else (None, 0)

    def _dynamic_sides(self) -> tuple[int | None, int]:
        """The same of activations."""
        per = self.layout() or "tensor"
        if per == "channel":
            raise RecipeError(f"{self.name}: per 'channel' is for weights; activations take tensor, token or group")
        return {"tensor": (None, 0), "token": (0, 0), "group": (0, self.length())}[per]

    def length(self) -> int:
        """Values per group."""
        return self.group
