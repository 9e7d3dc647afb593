"""Layers of a chain on their way to be smaller: units (neurons, channels) are taken out, and edits come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smelt.core.edit import Edit, Fill, Keep, Set, submodule
from smelt.graph.chains import Link
from smelt.graph.steps import CONVOLUTIONS, NORMS

# Rows of the table of cosines that are in memory at a time.
BLOCK = 1024
TINY = torch.finfo(torch.float64).tiny


class Layer:
    """A linear layer or convolution: values in float64, and which rows and columns of the original are left.

    weight: [out, units, k]: unit i of the layer before it comes in through k columns (places of a kernel, or positions
        that were flattened).
    """

    def __init__(self, model: nn.Module, path: str, units: int | None = None):
        """units: of the layer before, where it is the consumer of a link."""
        module = submodule(model, path)
        assert isinstance(module, (nn.Linear, *CONVOLUTIONS))
        self.path, self.module = path, module
        self.weight = module.weight.detach().to(torch.float64, copy=True)
        self.weight = self.weight.reshape(len(self.weight), units or self.weight.shape[1], -1)
        self.bias = None if module.bias is None else module.bias.detach().to(torch.float64, copy=True)
        self.width, self.units = self.weight.shape[:2]
        self.rows, self.columns = torch.arange(self.width), torch.arange(self.units)
        self.filled = False

    @property
    def original(self) -> Tensor:
        """[rows left, all units, k]"""
        return (
            self.module.weight.detach().double().reshape(self.width, self.units, -1)[self.rows.to(self.weight.device)]
        )

    def augmented(self) -> Tensor:
        """[out, units * k + 1]: the bias as one more column."""
        bias = torch.zeros_like(self.weight[:, 0, 0]) if self.bias is None else self.bias
        return torch.cat([self.weight.flatten(1), bias[:, None]], 1)

    def full(self) -> dict[str, Tensor]:
        """Weight and bias by name in the shape and dtype of the original, 0 where something was taken out; empty
        where nothing has changed."""
        if not (self.filled or len(self.rows) < self.width or len(self.columns) < self.units or self._moved()):
            return {}
        rows, columns = self.rows.to(self.weight.device), self.columns.to(self.weight.device)
        weight = self.weight.new_zeros(self.width, self.units, self.weight.shape[2])
        weight[rows[:, None], columns] = self.weight
        found = {f"{self.path}.weight": weight.reshape(self.module.weight.shape).to(self.module.weight.dtype)}
        if self.bias is not None:
            bias = self.bias.new_zeros(self.width).index_copy_(0, rows, self.bias)
            found[f"{self.path}.bias"] = bias.to(self.module.weight.dtype)
        return found

    def edits(self) -> list[Edit]:
        found: list[Edit] = []
        linear, path, k = isinstance(self.module, nn.Linear), self.path, self.weight.shape[2]
        if len(self.rows) < self.width:
            index = tuple(self.rows.tolist())
            name = "out_features" if linear else "out_channels"
            found += [Keep(f"{path}.weight", 0, index), Set(path, name, len(index))]
            if self.bias is not None:
                found.append(Keep(f"{path}.bias", 0, index))
        if len(self.columns) < self.units:
            index = tuple(self.columns.tolist())
            if linear:
                index = tuple(i * k + j for i in index for j in range(k))
            name = "in_features" if linear else "in_channels"
            found += [Keep(f"{path}.weight", 1, index), Set(path, name, len(index))]
        if self.filled:
            shape = (len(self.rows), -1) if linear else (*self.weight.shape[:2], *self.module.weight.shape[2:])
            found.append(Fill(f"{path}.weight", self.weight.reshape(shape).to(self.module.weight.dtype)))
        if self.bias is not None and self._moved():
            found.append(Fill(f"{path}.bias", self.bias.to(self.module.weight.dtype)))
        return found

    def _moved(self) -> bool:
        bias = self.module.bias
        return bias is not None and not torch.equal(self.bias, bias.detach()[self.rows.to(bias.device)].double())  # type: ignore[arg-type]


def keep(first: Layer, second: Layer, kept: Tensor) -> None:
    """Let only these units stand between two layers; if none is left, one that is not listened to."""
    if not bool(kept.any()):
        kept = kept.clone()
        kept[0] = second.filled = True
        second.weight[:, 0] = 0
    first.weight, second.weight = first.weight[kept], second.weight[:, kept]
    if first.bias is not None:
        first.bias = first.bias[kept]
    first.rows, second.columns = first.rows[kept.cpu()], second.columns[kept.cpu()]


def edits_between(first: Layer, link: Link) -> list[Edit]:
    """What the modules between two layers lose with the units of the first."""
    found: list[Edit] = []
    if len(first.rows) == first.width:
        return found
    index = tuple(first.rows.tolist())
    for step in link.between:
        if (module := step.module) is None:
            continue
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        found += [Keep(f"{step.path}.{name}", 0, index) for name, tensor in tensors if tensor.dim()]
        sizes = ("num_features", "in_channels", "out_channels", "groups")
        found += [Set(step.path, name, len(index)) for name in sizes if hasattr(module, name)]
    return found


@dataclass
class Stage:
    """Units are the same where their rows are; where functions after it are homogeneous, their lengths do not count.

    rows: [units, n]; the last column is what is added.
    """

    rows: Tensor
    homogeneous: bool = True


def stages(first: Layer, link: Link) -> tuple[list[Stage], Tensor]:
    """(what each unit does on its way to the consumer, [units] the length that it comes out with).

    Affine norms are folded into the rows before them.  Lengths pass through homogeneous functions.
    """
    found, fresh = [Stage(first.augmented())], True  # fresh: no function came after the rows
    for step in link.between:
        if isinstance(step.module, NORMS):
            scale, shift = _affine(step.module, first)
            if not fresh:
                one = torch.ones_like(scale)[:, None]
                found.append(Stage(torch.cat([one, torch.zeros_like(one)], 1)))
            rows = found[-1].rows * scale[:, None]
            rows[:, -1] += shift
            found[-1].rows, fresh = rows, True
        elif isinstance(step.module, CONVOLUTIONS):
            found.append(Stage(_kernels(step.module, first)))
            fresh = True
        else:
            found[-1].homogeneous &= step.homogeneous
            fresh = False
    length = torch.ones_like(found[0].rows[:, 0])
    for i, stage in enumerate(found):
        alike = ~stage.rows[:, :-1].any(1)  # whatever comes before
        for earlier in found[:i]:
            earlier.rows[alike] = torch.eye(earlier.rows.shape[1], dtype=length.dtype, device=length.device)[-1]
    for stage in found:
        stage.rows = torch.cat([stage.rows[:, :-1] * length[:, None], stage.rows[:, -1:]], 1)
        length = stage.rows.norm(dim=1) if stage.homogeneous else torch.ones_like(length)
    return found, length


def constants(first: Layer, link: Link) -> tuple[Tensor, Tensor]:
    """([units] which give the same whatever comes in, what they give to the consumer).

    A constant other than 0 does not stay one where zeros come in at the borders.
    """
    flat = ~first.weight.flatten(1).any(1)
    value = (torch.zeros_like(first.weight[:, 0, 0]) if first.bias is None else first.bias).clone()
    for step in link.between:
        module = step.module
        if isinstance(module, NORMS):
            scale, shift = _affine(module, first)
            flat, value = flat | (scale == 0), torch.where(scale == 0, shift, value * scale + shift)
        elif isinstance(module, CONVOLUTIONS):
            rows = _kernels(module, first)
            gone = ~rows[:, :-1].any(1)
            flat = gone | (flat & ((value == 0) | (not step.zeros)))
            value = value * rows[:, :-1].sum(1) + rows[:, -1]
        elif step.kind == "elementwise":
            value = step.apply(value.to(first.module.weight.dtype)).double()
        elif step.zeros:
            flat = flat & (value == 0)
    return flat, value


def leaders(near: Callable[[slice], Tensor], n: int) -> Tensor:
    """[n]: for each unit the first one that it is the same as (itself, if none).

    near: some units -> bool [those, n], which units they are the same as.

    Units follow a leader, never another follower, so what is merged is as near as `near` says to what stays.
    """
    free = torch.arange(n)
    leader = free.clone()
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        table = near(block).cpu() & (free > free[block, None])
        for i in table.any(1).nonzero()[:, 0].tolist():
            if leader[start + i] == start + i:
                leader[table[i] & (leader == free)] = start + i
    return leader


def same_rows(parts: Sequence[Stage], tolerance: float) -> Callable[[slice], Tensor]:
    """For `leaders`: units whose rows are the same in all stages.

    tolerance: largest 1 - cosine; where lengths count, of rows of equal length.
    """
    lengths = [stage.rows.norm(dim=1) for stage in parts]
    units = [stage.rows / length.clamp_min(TINY)[:, None] for stage, length in zip(parts, lengths, strict=True)]

    def near(block: slice) -> Tensor:
        found = []
        for stage, length, unit in zip(parts, lengths, units, strict=True):
            if stage.homogeneous:
                found.append(unit[block] @ unit.T >= 1 - tolerance)
            else:
                square = length[block, None].square() + length.square() - 2 * (stage.rows[block] @ stage.rows.T)
                found.append(square <= 2 * tolerance * length[block, None] * length)
        return torch.stack(found).all(0)

    return near


def _own(values: Tensor, first: Layer) -> Tensor:
    """The entries of a tensor of one entry per unit that are left, in float64."""
    return values.detach().double()[first.rows.to(values.device)]


def _affine(norm: nn.Module, first: Layer) -> tuple[Tensor, Tensor]:
    """Scale and shift of the units in a batch norm, in evaluation mode."""
    assert isinstance(norm, NORMS) and norm.running_mean is not None and norm.running_var is not None
    scale = (_own(norm.running_var, first) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * _own(norm.weight, first)
    shift = -_own(norm.running_mean, first) * scale
    return scale, shift + _own(norm.bias, first) if norm.affine else shift


def _kernels(module: nn.Module, first: Layer) -> Tensor:
    """[units, k + 1] of a depthwise convolution, the bias last."""
    assert isinstance(module, CONVOLUTIONS)
    weight = _own(module.weight, first).flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if module.bias is None else _own(module.bias, first)
    return torch.cat([weight, bias[:, None]], 1)
