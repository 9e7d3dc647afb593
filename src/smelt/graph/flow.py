"""What the consumer of a link reads, before and after the layers above it were changed: measured on data, or assumed.

A source gives pairs (input of the consumer in the original model, input where `changed` tensors took the place of
others), of the same samples.  `moments` sums them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from smelt.core.apply import CALIBRATION_BATCHES
from smelt.core.data import batch, evaluating, forward_or_raise, move
from smelt.core.edit import submodule
from smelt.core.errors import DataError
from smelt.graph.chains import Link
from smelt.graph.layers import Layer
from smelt.graph.steps import CONVOLUTIONS, NORMS

# Rows (samples, or places of a kernel) that count of each batch, and how few images they may come from.
ROWS, IMAGES = 1024, 8
# Samples in a batch of assumed inputs: where a linear layer comes first; before a convolution; before a linear layer.
VECTORS, MAPS, FLATTENED = 512, 32, 128
# Sides of assumed images, in the order in which they are tried: of the smallest ones little is but border.
SIDES = (*range(8, 513), *range(1, 8))
FREE_SIDES = (16, 32, 64, 128, 224)


class Source(Protocol):
    model: nn.Module

    def pairs(self, link: Link, changed: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]: ...


class Measured:
    """The model runs on calibration batches."""

    def __init__(self, model: nn.Module, batches: Iterable[Any]):
        self.model, self.batches = model, batches

    def pairs(self, link: Link, changed: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises DataError: no batch reaches the consumer."""
        device, reached = next(self.model.parameters()).device, False
        for item in islice(self.batches, CALIBRATION_BATCHES):
            inputs = move(batch(item)[0], device)
            before = self._seen(link.consumer, self.model, inputs)
            after = before
            if changed:
                after = self._seen(
                    link.consumer, lambda *args, **kw: functional_call(self.model, dict(changed), args, kw), inputs
                )
            reached |= bool(before)
            yield from zip(before, after, strict=True)
        if not reached:
            raise DataError(f"no calibration batch reaches {link.consumer!r}; take {link.producer!r} out of the step")

    def _seen(self, path: str, model: Callable[..., Any], inputs: Any) -> list[Tensor]:
        found: list[Tensor] = []
        handle = submodule(self.model, path).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
        try:
            forward_or_raise(model, inputs, "while activations are gathered")
        finally:
            handle.remove()
        return found


class Assumed:
    """Independent standard normal inputs where a run of links begins, from which the rest follows.

    A batch norm says what mean and variance its input has on real data: it is taken to normalise the assumed inputs as
    it does the real ones.
    """

    def __init__(self, model: nn.Module, links: Sequence[Link], seed: int):
        self.model, self.seed = model, seed
        self.above = {link.consumer: link for link in links}
        self.below = {link.producer: link for link in links}

    def side(self, link: Link) -> int | None:
        """Of the images to assume where a convolution comes first: such that all that follows fits; None: no side does.
        0 where a linear layer comes first."""
        run = self._run(link)
        while run[-1].consumer in self.below:
            run.append(self.below[run[-1].consumer])
        if isinstance(submodule(self.model, run[0].producer), nn.Linear):
            return 0
        flat = any(step.kind == "flatten" for link in run for step in link.between)
        return next((side for side in (SIDES if flat else FREE_SIDES) if self._fits(run, side)), None)

    def pairs(self, link: Link, changed: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        run, side = self._run(link), self.side(link)
        assert side is not None
        weight = self._weight(run[0].producer)
        shape = [weight.shape[1], *[side] * (weight.dim() - 2)]
        to_map = isinstance(submodule(self.model, link.consumer), CONVOLUTIONS)
        number = (MAPS if to_map else FLATTENED) if side else VECTORS
        generator = torch.Generator().manual_seed(self.seed)
        norms: dict[str, tuple[Tensor, Tensor]] = {}
        for _ in range(CALIBRATION_BATCHES):
            x = torch.randn(number, *shape, generator=generator).to(weight)
            before = self._through(run, x, {}, norms)
            yield before, self._through(run, x, changed, norms) if changed else before

    def _weight(self, path: str) -> Tensor:
        return self.model.get_parameter(f"{path}.weight")

    def _run(self, link: Link) -> list[Link]:
        """The links that lead to a link, and itself."""
        run = [link]
        while run[0].producer in self.above:
            run.insert(0, self.above[run[0].producer])
        return run

    def _through(
        self, run: Sequence[Link], x: Tensor, changed: Mapping[str, Tensor], norms: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """What the last consumer of a run reads; `norms` takes mean and variance of what norms see first."""
        for link in run:
            own = {name: changed.get(f"{link.producer}.{name}") for name in ("weight", "bias")}
            given = {name: value for name, value in own.items() if value is not None}
            x = functional_call(submodule(self.model, link.producer), given, x)
            for step in link.between:
                if not isinstance(norm := step.module, NORMS):
                    x = step.apply(x)
                    continue
                over = [d for d in range(x.dim()) if d != 1]
                mean, variance = norms.setdefault(step.path, (x.mean(over), x.var(over, correction=0)))
                x = functional.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
        return x

    def _fits(self, run: Sequence[Link], side: int) -> bool:
        shape = [side] * (self._weight(run[0].producer).dim() - 2)
        for link in run:
            shape = _after(submodule(self.model, link.producer), shape)
            for step in link.between:
                if isinstance(step.module, CONVOLUTIONS):
                    shape = _after(step.module, shape)
                elif min(shape) > 0 and step.kind in ("pool", "flatten"):
                    try:
                        given = step.apply(torch.empty(1, 1, *shape, device="meta"))
                    except RuntimeError:  # smaller than a window
                        return False
                    if given.dim() == 2:
                        units, columns = len(self._weight(link.producer)), self._weight(link.consumer).shape[1]
                        return given.shape[1] * units == columns
                    shape = list(given.shape[2:])
            if min(shape) < 1:
                return False
        return min(_after(submodule(self.model, run[-1].consumer), shape)) > 0


def _after(module: nn.Module, shape: Sequence[int]) -> list[int]:
    """Sizes of the map that a convolution gives, per dimension."""
    assert isinstance(module, CONVOLUTIONS)
    around = module._reversed_padding_repeated_twice
    padding = [around[2 * i] + around[2 * i + 1] for i in range(len(shape))][::-1]
    each = zip(shape, padding, module.dilation, module.kernel_size, module.stride, strict=True)
    return [(n + p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in each]


@dataclass(frozen=True)
class Moments:
    """Means of products of what a consumer reads: columns of the units, then, if asked for, a constant 1.

    gram: [d, d] of what it reads now, of the units that are left.
    cross: [all, d] of what it read originally, of all units, with what it reads now.
    size: columns of each unit.
    """

    gram: Tensor
    cross: Tensor
    size: int


def moments(
    source: Source, link: Link, second: Layer, changed: Mapping[str, Tensor], *, whole: bool, constant: bool
) -> Moments:
    """Sum up a source in float64.

    Args:
        second: the consumer.
        whole: a column for every column of the consumer; else one for each unit, over all of its positions.

    Raises:
        DataError: no batch reaches the consumer, or there are NaN or infinite values.
    """
    left = second.columns.to(second.weight.device)
    gram = cross = None
    number = 0
    with evaluating(source.model):
        for pair in source.pairs(link, changed):
            original = _read(pair[0], second, whole, constant)
            number += len(original)
            size = second.weight.shape[2] if whole else 1
            columns = (left[:, None] * size + torch.arange(size, device=left.device)).flatten()
            if constant:
                columns = torch.cat([columns, columns.new_tensor([original.shape[1] - 1])])
            if pair[1] is pair[0]:
                products = (original.T @ original)[:, columns]
                own = products[columns]
            else:
                now = _read(pair[1], second, whole, constant)[:, columns]
                products, own = original.T @ now, now.T @ now
            gram, cross = (own, products) if gram is None or cross is None else (gram + own, cross + products)
    if gram is None or cross is None or not bool(torch.isfinite(gram).all()):
        raise DataError(
            f"the calibration batches give NaN or infinite values, or none, at the input of {link.consumer!r}"
        )
    return Moments(gram / number, cross / number, size)


def _read(x: Tensor, second: Layer, whole: bool, constant: bool) -> Tensor:
    """[rows, columns] of an input of the consumer, of at most `ROWS` rows; always the same ones of the same shape."""
    module, units = second.module, second.units
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, units, second.weight.shape[2])
        rows = rows.flatten(1) if whole else rows.transpose(1, 2).reshape(-1, units)
    else:
        if x.dim() != module.weight.dim():
            raise DataError(f"{second.path!r} reads {list(x.shape)}; its channels must come second, after the samples")
        places = math.prod(_after(module, x.shape[2:])) if whole else math.prod(x.shape[2:])
        x = _some(x, max(IMAGES, -(-ROWS // max(1, places))))
        if whole:
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
            one = (1,) if x.dim() == 3 else ()  # unfold takes images only
            kernel, dilation, stride = ((*one, *v) for v in (module.kernel_size, module.dilation, module.stride))
            x = x[:, :, None] if one else x
            rows = functional.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)
        else:
            rows = x.flatten(2).transpose(1, 2).flatten(0, 1)
    rows = _some(rows, ROWS).double()
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if constant else rows


def _some(x: Tensor, most: int) -> Tensor:
    """At most so many of the first dimension, drawn at random, but always the same."""
    if len(x) <= most:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most].sort().values.to(x.device)]
