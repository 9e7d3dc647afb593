"""A chain of ordinary layers between two fixed orders of channels, where a layer was divided into groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.errors import ModelError
from smelt.models import chain


def build(layers: Sequence[Any] = ("Identity",), before: Sequence[int] = (), after: Sequence[int] = ()) -> nn.Module:
    """A Sequential: a shuffle, the layers of `models.chain`, a shuffle.

    Args:
        before, after: channel i of what goes on is channel order[i] of what comes; empty for as they are.

    Raises:
        ModelError: as `chain`; an order that does not name every channel once.
    """
    inner = list(chain.build(layers).children())
    return nn.Sequential(*_shuffle("before", before), *inner, *_shuffle("after", after))


def _shuffle(name: str, order: Sequence[int]) -> list[nn.Module]:
    if isinstance(order, (str, bytes)) or not isinstance(order, Sequence) or any(type(i) is not int for i in order):
        raise ModelError(f"shuffled: {name} is no list of channels")
    if sorted(order) != list(range(len(order))):
        raise ModelError(f"shuffled: {name} must name each of {len(order)} channels once")
    return [Shuffle(order)] if order else []


class Shuffle(nn.Module):
    """Channels (dimension 1) in another order; without tensors of the model's own."""

    def __init__(self, order: Sequence[int]):
        super().__init__()
        self._order = torch.tensor(list(order), device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self._order.to(x.device))

    def extra_repr(self) -> str:
        return f"{len(self._order)} channels"
