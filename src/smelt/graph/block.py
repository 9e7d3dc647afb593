"""The smallest module around some weights, run again and again with other values for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smelt.core.data import batch, evaluating, forward_or_raise, move, tensors
from smelt.graph.trace import main


class Block:
    """What the innermost module that is called, and that holds all of `names`, gives on some batches.

    path: of that module.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, names: Sequence[str], batches: Iterable[Any], limit: int):
        paths = [name.rpartition(".")[0].split(".") for name in names]
        common = paths[0]
        for path in paths[1:]:
            same = [a == b for a, b in zip(common, path, strict=False)]
            common = common[: same.index(False) if False in same else len(same)]
        device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
        inputs = [move(batch(item)[0], device) for item in islice(batches, limit)]
        while True:
            self.path = ".".join(common)
            self._module = model.get_submodule(self.path)
            self._calls: list[tuple[Any, Any]] = []
            self._run(model, inputs)
            if self._calls or not common:
                break
            common = common[:-1]
        self._before = [self._outputs({}, args, kwargs) for args, kwargs in self._calls]
        self._total = sum(float(t.double().square().sum()) for out in self._before for t in out)

    def _run(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls.append((args, kwargs))

        handle = self._module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with evaluating(model):
                for one in inputs:
                    forward_or_raise(model, one, "while activations are gathered")
        finally:
            handle.remove()

    def _outputs(self, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        with evaluating(self._module):
            out = functional_call(self._module, dict(values), args, kwargs)
        return [t for t in tensors(main(out)) if t.is_floating_point()]

    def error(self, values: Mapping[str, Tensor]) -> float:
        """Squares of what its outputs change with these values (by name in the model), over those of the outputs."""
        own = {name[len(self.path) + 1 if self.path else 0 :]: value for name, value in values.items()}
        total = 0.0
        for before, (args, kwargs) in zip(self._before, self._calls, strict=True):
            pairs = zip(before, self._outputs(own, args, kwargs), strict=True)
            total += sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        return total / max(self._total, torch.finfo(torch.float64).tiny)
