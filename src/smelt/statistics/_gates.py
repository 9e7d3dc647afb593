"""Slopes of gates: how the task's loss changes, per sample, when what a layer takes in from one input is scaled.

With a gate z = 1 in front of input u of a layer, dL/dz is the sum over the layer's uses of x_u dL/dx_u, and the same as
the sum over i of w_iu dL/dw_iu.  The mean of its square over samples is the Fisher information of the gate (Theis et
al. 2018, arXiv:1801.05787; Liu et al. 2021, arXiv:2108.00708, eq. 6 to 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.data import batch, evaluating, move, samples
from smelt.core.errors import DataError
from smelt.core.gradient import Gradients, Loss
from smelt.core.target import Target


def gates(
    model: nn.Module,
    wanted: Sequence[tuple[Target, int]],
    batches: Iterable[Any],
    loss: Loss,
    limit: int | None = None,
    seed: int = 0,
) -> dict[tuple[str, int], Tensor]:
    """(name of the weight, dimension of its inputs) -> [draws, inputs], float32, on the model's device.

    A draw is one sample where the weight is that of a linear or convolution layer which is called; elsewhere (a weight
    that others read) it is one batch, scaled so that the mean of the squares is the same for slopes that are
    independent and of mean 0.

    Args:
        loss: of the task, a mean over the samples of a batch.

    Raises:
        ModelError: the forward pass fails.
        DataError: the loss fails; NaN or infinite slopes; no batch.
    """
    probe = _Probe(wanted)
    generator = torch.Generator().manual_seed(seed)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    with evaluating(model):
        for item in islice(batches, limit):
            inputs, labels = move(batch(item), device)
            probe.begin(samples(inputs))
            with probe, Gradients(model, probe.watched, loss, generator) as gradients:
                gradients.backward(inputs, labels)
            probe.end()
    return probe.result()


class _Probe(ExitStack):
    def __init__(self, wanted: Sequence[tuple[Target, int]]):
        super().__init__()
        self.wanted = list(wanted)
        self.draws: dict[tuple[str, int], list[Tensor]] = {(t.name, dim): [] for t, dim in wanted}
        self.now: dict[tuple[str, int], Tensor] = {}
        self.called: set[str] = set()
        self.n = 0
        self.watched = [
            (t.tensor, lambda g, t=t, dim=dim: self._weight(t, dim, g))
            for t, dim in wanted  # type: ignore[misc]
        ]

    def begin(self, n: int) -> None:
        self.n = n
        self.now = {}

    def __enter__(self) -> _Probe:
        super().__enter__()
        for target, dim in self.wanted:
            module, name = target.module, target.places[0][1]
            if isinstance(module, (nn.Linear, _ConvNd)) and name == "weight" and len(target.places) == 1:
                inputs = 0 if isinstance(module, _ConvTransposeNd) else 1
                if dim == inputs:
                    seen = module.register_forward_pre_hook(
                        lambda m, args, kwargs, key=(target.name, dim): self._input(m, args, kwargs, key),
                        with_kwargs=True,
                    )
                    self.callback(seen.remove)
        return self

    def _input(self, module: nn.Module, args: Any, kwargs: Any, key: tuple[str, int]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return None
        x = args[0]
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        self.called.add(key[0])
        value = x.detach()  # a hook that held x itself would never be freed
        x.register_hook(lambda g: self._slope(module, key, value * g))
        return (x, *args[1:]), kwargs

    def _slope(self, module: nn.Module, key: tuple[str, int], product: Tensor) -> None:
        dims = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
        at = product.dim() - 1 - dims
        along = product.movedim(at, -1)
        if at == 0 or len(along) % self.n:
            along = along[None]
        each = along.reshape(self.n if len(along) % self.n == 0 else 1, -1, along.shape[-1]).sum(1).float()
        if isinstance(module, _ConvNd) and module.groups > 1 and not isinstance(module, _ConvTransposeNd):
            each = each.unflatten(1, (module.groups, -1)).sum(1)
        self._add(key, each * self.n)

    def _weight(self, target: Target, dim: int, gradient: Tensor) -> None:
        if target.name not in self.called:
            slope = (target.tensor.detach() * gradient).movedim(dim, 0).flatten(1).sum(1)
            self._add((target.name, dim), slope[None].float() * self.n**0.5)

    def _add(self, key: tuple[str, int], value: Tensor) -> None:
        self.now[key] = self.now[key] + value if key in self.now else value

    def end(self) -> None:
        for key, value in self.now.items():
            if not bool(torch.isfinite(value).all()):
                raise DataError(f"there are NaN or infinite values in the gradient of {key[0]}")
            self.draws[key].append(value)

    def result(self) -> dict[tuple[str, int], Tensor]:
        return {key: torch.cat(found) for key, found in self.draws.items() if found}
