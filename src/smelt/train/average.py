"""What is kept of a loop besides its last weights: their moving average, and statistics of batch norms taken anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smelt.core.data import batch, evaluating, forward
from smelt.train.training import training


class Average:
    """a = d a + (1 - d) w of parameters and of the model's floating buffers, after step n with d = min(decay,
    (1 + n) / (10 + n)); masks and all else as they are."""

    def __init__(self, t: training, decay: float):
        self._t, self._decay = t, decay
        self.values = t.state()

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self._decay, (1 + self._t.done) / (10 + self._t.done))
        moving = {name for name, _ in self._t.named_parameters()} | {name for name, _ in self._t.model.named_buffers()}
        values: dict[str, Tensor] = {}
        for name, now in self._t.tensors().items():
            old = self.values.get(name)
            if old is not None and name in moving and now.is_floating_point():
                values[name] = old.lerp_(now, 1 - decay)
            else:
                values[name] = now.clone()
        self.values = values

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Meanwhile the average stands in the place of the weights."""
        now = self._t.state()
        self._t.load(self.values)
        try:
            yield
        finally:
            self._t.load(now)


def renew_norms(model: nn.Module, batches: Iterable[Any], count: int, given: Callable[[Any], Any]) -> None:
    """Let batch norms have the mean over `count` batches of their means and variances under the weights as they are.

    Args:
        given: what the model is run on, of the inputs of a batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms or not count:
        return
    before = [norm.momentum for norm in norms]
    with evaluating(model), torch.random.fork_rng(devices=[]):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean
                norm.train()
            for item in islice(batches, count):
                forward(model, given(batch(item)[0]))
        finally:
            for norm, momentum in zip(norms, before, strict=True):
                norm.momentum = momentum
