"""Units (channels, neurons) that go the same ways, and what a factor or a matrix does to the tensors around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED, ANY = -1, -2  # instead of a label: a factor cannot stand there; whatever factor (the value is zero)


@dataclass(frozen=True)
class Place:
    """One side of a tensor.

    tensor: name of the target; for role 'norm' the path of a norm that the units go into.
    role: 'out' (slices along `dim` make the units), 'in' (they read them) or 'norm'.
    groups: of a convolution whose `dim` 1 holds the channels of one group.
    """

    tensor: str
    dim: int
    role: str
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Team:
    """Units that go the same ways.

    places: index [coordinates] -> the unit of each, or -1.
    straight: for a shift as well: what is added where they are made arrives as such where they are read.
    signed: negative factors pass, too.
    """

    name: str
    size: int
    places: Mapping[Place, Tensor]
    straight: bool
    signed: bool

    def of(self, role: str) -> dict[Place, Tensor]:
        return {place: index for place, index in self.places.items() if place.role == role}

    def names(self) -> set[str]:
        return {place.tensor for place in self.places if place.role != "norm"}


def each(place: Place, index: Tensor, units: Tensor, rest: float = 1.0) -> Tensor:
    """What each coordinate of a side gets of a value per unit; `rest` where it belongs to none."""
    index = index.to(units.device)
    return torch.where(index >= 0, units[index.clamp_min(0)], torch.full_like(units[:1], rest))


def scaled(value: Tensor, place: Place, factor: Tensor) -> Tensor:
    """A tensor whose coordinates along a side are multiplied; factor [size of the side]."""
    if place.groups == 1:
        view = [1] * value.dim()
        view[place.dim] = -1
        made: Tensor = value * factor.view(view)
        return made
    apart = value.unflatten(0, (place.groups, -1))
    view = [1] * apart.dim()
    view[0], view[2] = place.groups, -1
    made = (apart * factor.view(view)).flatten(0, 1)
    return made


def largest(value: Tensor, place: Place) -> Tensor:
    """[size of the side]: the largest magnitude along each coordinate."""
    size: Tensor = value.abs()
    if place.groups == 1:
        size = size if size.dim() == 1 else size.movedim(place.dim, 0).flatten(1).amax(1)
        return size
    size = size.unflatten(0, (place.groups, -1)).transpose(1, 2).flatten(2).amax(2).flatten()
    return size


def summed(value: Tensor, place: Place, shift: Tensor) -> Tensor:
    """[out]: what a weight makes of the constant `shift` [size of the side], where nothing is padded."""
    if place.groups == 1:
        rows = value.movedim(place.dim, 0)
        return torch.einsum("i,io->o", shift, rows.flatten(2).sum(2) if rows.dim() > 2 else rows)
    apart = value.unflatten(0, (place.groups, -1)).flatten(3).sum(3) if value.dim() > 2 else value
    return torch.einsum("gi,goi->go", shift.view(place.groups, -1), apart).flatten()


def turned(value: Tensor, place: Place, index: Tensor, matrix: Tensor) -> Tensor:
    """A tensor whose side is multiplied by an orthogonal matrix [units, units]; a side may hold the units several
    times over."""
    index = index.to(value.device)
    at = (index >= 0).nonzero()[:, 0]
    copies = at[index[at].argsort(stable=True)].view(len(matrix), -1)  # [units, copies]
    moved = value.movedim(place.dim, 0).clone()
    for one in copies.T:
        moved[one] = torch.tensordot(matrix, moved[one], 1)
    return moved.movedim(0, place.dim).contiguous()
